"""HTTP, and nothing else: no tensors, no torch. Checks what comes in, asks the Director, reads the store."""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from opentelemetry.trace import Span, SpanKind
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.content import LIVE_HEADERS, VideoResponse, file_response, live_bytes, live_response, objects_of
from deployments.director import NoSuchVideo
from deployments.errors import RequestError, install_error_handlers, status_of
from deployments.graph import RemoteDirector
from deployments.logs import log_with_serve
from deployments.making import ReplicaLost
from deployments.records import News, Page, VideoRequestRecord, VideoStatus
from deployments.schemas import CreateVideo, GetContent, ListVideos, model_object, page_object, video_object
from deployments.store import Store, is_video_id, new_video_id
from deployments.tracing import Tracer, traceparent
from helios_core.errors import HeliosError, InvalidInput
from helios_core.spec import ModelCard


class DirectorCalls(Protocol):
    """The Director's public methods, called in process or through a Serve handle."""

    async def ready(self) -> None: ...
    async def create(self, request: VideoRequestRecord) -> VideoStatus: ...
    async def get(self, video_id: str) -> VideoStatus: ...
    async def page(self, limit: int, after: str | None, newest_first: bool) -> Page: ...
    async def news(self, video_id: str, seen: int) -> News: ...
    async def cancel(self, video_id: str) -> VideoStatus: ...
    async def delete(self, video_id: str) -> None: ...
    async def metrics(self) -> bytes: ...


def http_app(config: AppConfig, card: ModelCard, director: DirectorCalls, store: Store, tracer: Tracer) -> FastAPI:
    """The HTTP service over a Director and its store."""
    app = FastAPI(title="Helios Serve", openapi_url=None)
    install_error_handlers(app)
    leaving: set[asyncio.Task[None]] = set()

    async def accepted(request: Request, while_watched: bool) -> tuple[VideoStatus, str]:
        """The new video, and the traceparent of the span that ends here: an ingress that dies later loses no root."""
        with span_of(request, tracer) as span:
            body = CreateVideo.parse(await json_body(request, config.max_body_bytes))
            if body.model is not None and body.model != card.id:
                raise RequestError(404, "model_not_found", f"model is {body.model[:80]!r}; served: {card.id}", "model")
            spec = body.request(config.limits).check(card)
            now, parent = time.time(), traceparent(span)
            video = VideoRequestRecord(
                id=new_video_id(now), created_at=now, spec=spec, traceparent=parent, while_watched=while_watched
            )
            span.set_attribute("video_id", video.id)
            return await director.create(video), parent

    def leave(video_id: str) -> None:
        """Cancels a video whose only viewer is gone. Ray cancels a request's calls with the request: not this one."""

        async def cancel() -> None:
            with suppress(HeliosError, ReplicaLost):  # then the Director finds by itself that nobody watches
                await director.cancel(video_id)

        task = asyncio.create_task(cancel(), context=contextvars.Context())
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    async def watched_bytes(video_id: str) -> AsyncGenerator[bytes, None]:
        try:
            async for data in live_bytes(partial(director.news, video_id), store):
                yield data
        except (asyncio.CancelledError, GeneratorExit):
            leave(video_id)
            raise

    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        status, parent = await accepted(request, while_watched=False)
        return JSONResponse(video_object(status), headers={"traceparent": parent})

    @app.post("/v1/videos/stream")
    async def stream(request: Request) -> Response:
        status, parent = await accepted(request, while_watched=True)
        headers = {**LIVE_HEADERS, "X-Video-Id": status.id, "traceparent": parent}
        return VideoResponse(watched_bytes(status.id), headers=headers)

    @app.get("/v1/videos")
    async def page(request: Request) -> JSONResponse:
        query = ListVideos.parse(request.query_params)
        try:
            after = None if query.after is None else known(query.after)
            return JSONResponse(page_object(await director.page(query.limit, after, query.order == "desc")))
        except NoSuchVideo:
            raise InvalidInput("after", query.after, "the id of a video") from None

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> JSONResponse:
        return JSONResponse(video_object(await director.get(known(video_id))))

    @app.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> JSONResponse:
        await director.delete(known(video_id))
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{video_id}/cancel")
    async def cancel(video_id: str) -> JSONResponse:
        return JSONResponse(video_object(await director.cancel(known(video_id))))

    @app.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"])
    async def content(request: Request, video_id: str) -> Response:
        query = GetContent.parse(request.query_params)
        video = await director.get(known(video_id))
        if not video.ended:
            return live_response(request, partial(director.news, video_id), store)
        if video.status != "completed" and not (query.partial == "true" and video.usage.chunks):
            why = f": {video.error.message}" if video.error else ""
            raise RequestError(409, f"video_{video.status}", f"video {video_id} is {video.status}{why}")
        record = await store.record(video_id)
        if record is None:
            raise NoSuchVideo(video_id)
        return file_response(request, objects_of(record.init, record.chunks), store, whole=video.status == "completed")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_object(card, config.limits)]})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await director.metrics(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        await director.ready()
        return JSONResponse({"status": "ready", "model": card.id})

    return app


@contextmanager
def span_of(request: Request, tracer: Tracer) -> Iterator[Span]:
    """A request's span, a child of the caller's if there is one. What the caller did wrong is no error of the span."""
    refused: HeliosError | None = None
    name = f"{request.method} {request.url.path}"
    with tracer.span(name, request.headers.get("traceparent"), kind=SpanKind.SERVER) as span:
        try:
            yield span
        except HeliosError as error:
            span.set_attribute("http.response.status_code", status_of(error))
            if status_of(error) >= 500:
                raise
            refused = error
    if refused is not None:
        raise refused


async def json_body(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object. Raises RequestError: 413 past `limit` bytes, 415 for another type, 400 if broken."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "unsupported_media_type", f"Content-Type is {kind[:80]!r}; allowed: application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise RequestError(413, "body_too_large", f"the body is too large; allowed: {limit} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "invalid_json", f"the body is a JSON {type(body).__name__}; allowed: an object")
    return body


def known(video_id: str) -> str:
    """The id, if it has the form of one. No other text from a client gets near the store."""
    if not is_video_id(video_id):
        raise NoSuchVideo(video_id)
    return video_id


@serve.ingress()
class Ingress:
    """The HTTP service as a Serve deployment."""

    def __init__(self, config: AppConfig, card: ModelCard, director: DeploymentHandle) -> None:
        log_with_serve()
        tracer = Tracer("ingress", config.trace_file)
        self._app = http_app(config, card, RemoteDirector(director), Store(config.store), tracer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app
