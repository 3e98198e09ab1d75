"""HTTP, and nothing else: no tensors, no torch. Checks what comes in, follows the Director, reads the store."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.director import NoSuchVideo
from deployments.errors import RequestError, install_error_handlers
from deployments.graph import RemoteDirector
from deployments.records import ChunkRecord, VideoRecord, VideoRequestRecord
from deployments.schemas import CreateVideo, model_object, video_object
from deployments.store import Store, is_video_id, new_video_id
from helios_core.errors import HeliosError
from helios_core.spec import ModelCard

LIVE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: proxies must not hold it back

Events = AsyncGenerator[ChunkRecord | VideoRecord, None]


class DirectorCalls(Protocol):
    """The Director's public methods, called in process or through a Serve handle."""

    async def ready(self) -> None: ...
    async def create(self, request: VideoRequestRecord) -> VideoRecord: ...
    async def get(self, video_id: str) -> VideoRecord: ...
    def watch(self, video_id: str, from_chunk: int = 0) -> Events: ...
    def create_and_watch(self, request: VideoRequestRecord) -> Events: ...


class CutOff(HeliosError):
    """A live video ended early. Raised inside a response body, so that the client sees an incomplete one."""

    code = "cut_off"


def http_app(config: AppConfig, card: ModelCard, director: DirectorCalls, store: Store) -> FastAPI:
    """The HTTP service over a Director and its store."""
    app = FastAPI(title="Helios Serve", openapi_url=None)
    install_error_handlers(app)

    async def accepted(request: Request) -> VideoRequestRecord:
        body = CreateVideo.parse(await json_body(request, config.max_body_bytes))
        if body.model is not None and body.model != card.id:
            raise RequestError(404, "model_not_found", f"model is {body.model[:80]!r}; served: {card.id}", "model")
        now = time.time()
        spec = body.request(config.limits).check(card)
        return VideoRequestRecord(id=new_video_id(now), created_at=now, spec=spec)

    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        return JSONResponse(video_object(await director.create(await accepted(request))))

    @app.post("/v1/videos/stream")
    async def stream(request: Request) -> Response:
        video = await accepted(request)
        events = director.create_and_watch(video)
        await anext(events)  # the accepted video: what goes wrong up to here still has a status of its own
        return StreamingResponse(
            file_bytes(events, director, store, video.id),
            media_type="video/mp4",
            headers={**LIVE_HEADERS, "X-Video-Id": video.id},
        )

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> JSONResponse:
        return JSONResponse(video_object(await director.get(known(video_id))))

    @app.get("/v1/videos/{video_id}/content")
    async def content(video_id: str) -> Response:
        record = await director.get(known(video_id))
        if record.status in ("failed", "cancelled"):
            why = f": {record.error.message}" if record.error else ""
            raise RequestError(409, f"video_{record.status}", f"video {video_id} is {record.status}{why}")
        headers = LIVE_HEADERS
        if record.status == "completed" and record.init is not None:
            size = record.init.bytes + sum(chunk.fragment.bytes for chunk in record.chunks)
            headers = {"Content-Length": str(size)}
        return StreamingResponse(
            file_bytes(director.watch(video_id), director, store, video_id), media_type="video/mp4", headers=headers
        )

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_object(card, config.limits)]})

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        await director.ready()
        return JSONResponse({"status": "ready", "model": card.id})

    return app


async def file_bytes(events: Events, director: DirectorCalls, store: Store, video_id: str) -> AsyncIterator[bytes]:
    """The video's file, fragment by fragment, as its chunks are committed.

    Raises CutOff at the end of a video that failed or was cancelled.
    """
    begun = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, VideoRecord):
                if event.status != "completed":
                    raise CutOff(f"video {video_id} is {event.status} after {len(event.chunks)} chunks")
                return
            if not begun:
                record = await director.get(video_id)
                assert record.init is not None, "a committed chunk has an init segment"
                yield await store.read(record.init.key)
                begun = True
            yield await store.read(event.fragment.key)


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
        self._app = http_app(config, card, RemoteDirector(director), Store(config.store))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app
