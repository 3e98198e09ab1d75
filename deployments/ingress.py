"""HTTP, and nothing else: no tensors, no torch. Checks what comes in, asks the Director, reads the store."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import prometheus_client
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from opentelemetry.trace import Span, SpanKind
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.bodies import Body, read_body
from deployments.config import AppConfig, Quota
from deployments.content import (
    LIVE_HEADERS,
    VideoResponse,
    file_response,
    header,
    live_bytes,
    live_response,
    next_news,
    objects_of,
)
from deployments.contract import install_contract
from deployments.director import NoSuchVideo
from deployments.door import Door, install_cors, without_link
from deployments.drafts import KEY, Draft, Drafts, Media, Once, known, no_such_model
from deployments.errors import CutOff, RequestError, install_error_handlers, status_of
from deployments.events import Position, events, position_of
from deployments.following import following
from deployments.graph import RemoteDirector
from deployments.hls import init_response, playlist_response, segment_response
from deployments.keys import Key
from deployments.logs import log_with_serve
from deployments.making import NotPossible, ReplicaLost
from deployments.metrics import ingress_text
from deployments.page import install_page
from deployments.records import Check, News, Page, VideoRequestRecord, VideoStatus
from deployments.request_ids import RequestIds, request_id
from deployments.safety import Guard, demand
from deployments.schemas import (
    ChangePrompt,
    GetContent,
    ListVideos,
    list_object,
    model_object,
    prompt_object,
    video_object,
)
from deployments.store import Store
from deployments.tracing import Tracer, traceparent
from deployments.watching import Fragments, Watches
from helios_core.errors import HeliosError, InvalidInput
from helios_core.spec import (
    ModelCard,
    PromptChange,
    check_prompt,
    check_transition,
)

NOBODY = ""  # whose videos they are where there are no keys
PLAYLIST_LOOKS = 3  # at a video without a chunk: hls.js gives up on the third playlist without a segment
POLL = {"openai-poll-after-ms": "500"}  # how soon OpenAI's client asks again


class DirectorCalls(Protocol):
    """The Director's public methods, called in process or through a Serve handle."""

    async def ready(self) -> None: ...
    async def admit(self, owner: str, quota: Quota) -> None: ...
    async def create(self, request: VideoRequestRecord, again: bool, quota: Quota) -> VideoStatus: ...
    async def get(self, video_id: str) -> VideoStatus: ...
    async def page(self, limit: int, after: str | None, newest_first: bool, owner: str | None) -> Page: ...
    async def news(self, video_id: str, seen: int) -> News: ...
    async def change_prompt(self, video_id: str, prompt: str, transition_chunks: int) -> PromptChange: ...
    async def pause(self, video_id: str) -> VideoStatus: ...
    async def resume(self, video_id: str) -> VideoStatus: ...
    async def cancel(self, video_id: str) -> VideoStatus: ...
    async def delete(self, video_id: str) -> None: ...
    async def checked(self, check: Check) -> None: ...
    async def metrics(self) -> bytes: ...


def http_app(
    config: AppConfig, cards: Sequence[ModelCard], director: DirectorCalls, store: Store, tracer: Tracer
) -> FastAPI:
    """The HTTP service over a Director and its store. `cards`: of the models, the default one first."""
    door = Door(config, director.get, store)
    # A path is right or it is a 404: a redirect would lead to whatever Host the client named, before the door.
    app = FastAPI(title="Helios Serve", openapi_url=None, dependencies=[Depends(door)], redirect_slashes=False)
    install_error_handlers(app)
    models = {card.id: card for card in cards}
    drafts = Drafts(config, models, director.get, store)
    guard = None if config.safety is None else Guard(config.safety, tracer)
    leaving: set[asyncio.Task[None]] = set()
    patient = store.patient(config.store_patience_s)  # for bodies that have begun: viewers wait
    watches, fragments = Watches(following(director.news, store)), Fragments(patient)

    async def accepted(
        request: Request,
        draft: Callable[..., Awaitable[Draft]],
        *of: str,
        uploads: bool = False,
        while_watched: bool = False,
    ) -> tuple[VideoStatus, dict[str, str]]:
        """The new video, of which `draft` says what it shall be, or the one that this very request asked for before;
        and the headers that go with it. `uploads`: it may come with a file.

        The span ends here: an ingress that dies later loses no root."""
        with span_of(request, tracer) as span:
            now, parent = time.time(), traceparent(span)
            owner, quota = owner_of(request) or NOBODY, door.quota(request.state.key)
            once = Once(request, owner, store, now)
            if not await once.claimed():  # what was accepted before is no more work
                await director.admit(owner, quota)
            async with read(request, config.uploads.max_bytes if uploads else 0) as body:
                if (earlier := await once.earlier(body, director.get)) is not None:
                    span.set_attribute("video_id", earlier.id)
                    return earlier, {"traceparent": parent, **once.headers}

                async def new_id(prompts: Mapping[str, str], media: Media | None = None) -> str:
                    if guard is not None:
                        for prompt, field in prompts.items():
                            await demanded(guard.prompt(prompt, parent), field)
                        if media is not None:
                            await demanded(guard.input(media.path, media.info, parent), media.field)
                    return await once.new_id()

                wanted = await draft(body, new_id, *of)
            span.set_attribute("video_id", wanted.id)
            video = VideoRequestRecord(
                id=wanted.id,
                created_at=time.time(),  # its body may have taken a while
                spec=wanted.spec,
                owner=owner,
                input=wanted.input,
                origin=wanted.origin,
                traceparent=parent,
                while_watched=while_watched or wanted.spec.open_ended or wanted.lead_seconds is not None,
                lead_seconds=wanted.lead_seconds,
                priority=wanted.priority,
                deadline_s=wanted.deadline_s,
            )
            create = partial(director.create, video, quota=quota)
            return await once.create(create), {"traceparent": parent, **once.headers}

    async def demanded(checking: Awaitable[Check], field: str) -> None:
        """Raises ContentBlocked or SafetyUnavailable if what came by `field` may not pass."""
        check = await checking
        with suppress(HeliosError, ReplicaLost):  # without a Director it is not counted, and that is all
            await director.checked(check)
        demand(check, field)

    def shown(request: Request, status: VideoStatus) -> dict[str, Any]:
        return video_object(status, models.get(status.spec.model), door.share_url(request, status.id))

    def answer(request: Request, status: VideoStatus, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(shown(request, status), headers={**POLL, **(headers or {})})

    def read(request: Request, upload_bytes: int = 0) -> AbstractAsyncContextManager[Body]:
        return read_body(request, config.max_body_bytes, upload_bytes, config.max_body_seconds)

    def leave(video_id: str) -> None:
        """Cancels a video whose only viewer is gone. Ray cancels a request's calls with the request: not this one."""

        async def cancel() -> None:
            with suppress(HeliosError, ReplicaLost):  # then the Director finds by itself that nobody watches
                await director.cancel(video_id)

        task = asyncio.create_task(cancel(), context=contextvars.Context())
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    async def watched_bytes(video_id: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        async with watches.of(video_id) as news:
            async for data in live_bytes(news, fragments, start):
                yield data

    async def only_viewers_bytes(video_id: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(watched_bytes(video_id)) as body:
                async for data in body:
                    yield data
        except (asyncio.CancelledError, GeneratorExit):
            leave(video_id)
            raise

    async def watched_events(video_id: str, seen: Position) -> AsyncGenerator[bytes, None]:
        async with watches.of(video_id) as news:
            async for event in events(news, seen):
                yield event

    async def stands(video_id: str, looks: int = 1) -> News:
        """How a video stands and all its chunks, as soon as it has one; after `looks` of a few seconds each even so."""
        try:
            async with watches.of(known(video_id)) as news:
                for _ in range(looks):
                    new = await next_news(news, 0)
                    if new.chunks or new.ended:
                        break
                return new
        except CutOff as error:
            raise NoSuchVideo(video_id) from error

    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        return answer(request, *await accepted(request, drafts.new, uploads=True))

    @app.post("/v1/videos/stream")
    async def stream(request: Request) -> Response:
        """Who sends an Idempotency-Key may leave and come back with it: their video is not cancelled before the
        Director finds that nobody watches it."""
        status, headers = await accepted(request, drafts.new, uploads=True, while_watched=True)
        if status.ended and status.status != "completed":  # the key's: a stream that is cut off would say no more
            message = f"video {status.id} is {status.status}; allowed: a new {KEY}"
            raise RequestError(409, f"video_{status.status}", message, KEY)
        body = watched_bytes(status.id) if KEY in request.headers else only_viewers_bytes(status.id)
        return VideoResponse(body, headers={**LIVE_HEADERS, "X-Video-Id": status.id, **headers})

    @app.post("/v1/videos/edits")
    @app.post("/v1/videos/extensions")
    async def edit(request: Request) -> JSONResponse:
        edited = partial(drafts.edited, check_owner=partial(door.check_owner, request))
        return answer(request, *await accepted(request, edited, uploads=True))

    @app.post("/v1/videos/{video_id}/extend")
    async def extend(request: Request, video_id: str) -> JSONResponse:
        return answer(request, *await accepted(request, drafts.extended, known(video_id)))

    @app.post("/v1/videos/{video_id}/fork")
    async def fork(request: Request, video_id: str) -> JSONResponse:
        return answer(request, *await accepted(request, drafts.forked, known(video_id)))

    @app.post("/v1/videos/{video_id}/remix")
    async def remix(request: Request, video_id: str) -> JSONResponse:
        return answer(request, *await accepted(request, drafts.remixed, known(video_id)))

    @app.post("/v1/videos/{video_id}/prompt")
    async def change_prompt(request: Request, video_id: str) -> JSONResponse:
        async with read(request) as body:
            wanted = body.parse(ChangePrompt)
        check_prompt("prompt", wanted.prompt, config.limits)
        check_transition("transition_chunks", wanted.transition_chunks, config.limits)
        video = await director.get(known(video_id))
        if guard is not None:
            parent = request.headers.get("traceparent")
            await demanded(guard.prompt(wanted.prompt, parent, video_id=video_id), "prompt")
        change = await director.change_prompt(video_id, wanted.prompt, wanted.transition_chunks)
        note = models[video.spec.model].note(change.prompt)
        told = prompt_object(change, video.spec)
        return JSONResponse({"id": video_id, "object": "video.prompt", **told, "note": note})

    @app.get("/v1/videos")
    async def page(request: Request) -> JSONResponse:
        query = ListVideos.parse(request.query_params)
        try:
            after = None if query.after is None else known(query.after)
        except NoSuchVideo:
            raise InvalidInput("after", query.after, "the id of a video") from None
        found = await director.page(query.limit, after, query.order == "desc", owner_of(request))
        return JSONResponse(list_object([shown(request, video) for video in found.videos], found.has_more))

    @app.get("/v1/videos/{video_id}")
    async def retrieve(request: Request, video_id: str) -> JSONResponse:
        return answer(request, await director.get(known(video_id)))

    @app.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> JSONResponse:
        await director.delete(known(video_id))
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{video_id}/pause")
    async def pause(request: Request, video_id: str) -> JSONResponse:
        return answer(request, await director.pause(known(video_id)))

    @app.post("/v1/videos/{video_id}/resume")
    async def resume(request: Request, video_id: str) -> JSONResponse:
        return answer(request, await director.resume(known(video_id)))

    @app.post("/v1/videos/{video_id}/cancel")
    async def cancel(request: Request, video_id: str) -> JSONResponse:
        return answer(request, await director.cancel(known(video_id)))

    @app.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"])
    async def content(request: Request, video_id: str) -> Response:
        query = GetContent.parse(without_link(request.query_params))
        video = await director.get(known(video_id))
        if query.variant == "thumbnail":
            record = await store.record(video_id)
            if record is None or record.thumbnail is None:
                raise NotPossible(f"video {video_id} has no frames yet; allowed: once its first chunk is made")
            return file_response(request, [record.thumbnail], patient, whole=True, media_type="image/jpeg")
        if not video.ended:
            return live_response(request, partial(watched_bytes, video_id))
        if video.status != "completed" and not (query.partial == "true" and video.usage.chunks):
            why = f": {video.error.message}" if video.error else ""
            raise RequestError(409, f"video_{video.status}", f"video {video_id} is {video.status}{why}")
        record = await store.record(video_id)
        if record is None:
            raise NoSuchVideo(video_id)
        return file_response(
            request, objects_of(record.init, record.chunks), patient, whole=video.status == "completed"
        )

    @app.get("/v1/videos/{video_id}/events")
    async def event_stream(request: Request, video_id: str) -> Response:
        video = await director.get(known(video_id))
        seen = position_of(header(request, "last-event-id"), video)
        if seen is None:
            return Response(status_code=204, headers=LIVE_HEADERS)  # which tells an EventSource to stop
        body = watched_events(video_id, seen)
        return VideoResponse(body, headers=LIVE_HEADERS, media_type="text/event-stream")

    @app.api_route("/v1/videos/{video_id}/hls/index.m3u8", methods=["GET", "HEAD"])
    async def hls_playlist(request: Request, video_id: str) -> Response:
        return playlist_response(request, await stands(video_id, PLAYLIST_LOOKS))

    @app.api_route("/v1/videos/{video_id}/hls/init.mp4", methods=["GET", "HEAD"])
    async def hls_init(request: Request, video_id: str) -> Response:
        return init_response(request, await stands(video_id), fragments)

    @app.api_route("/v1/videos/{video_id}/hls/{index}.m4s", methods=["GET", "HEAD"])
    async def hls_segment(request: Request, video_id: str, index: str) -> Response:
        return segment_response(request, await stands(video_id), index, fragments)

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_object(card, config) for card in cards]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        if model_id not in models:
            raise no_such_model(model_id, models)
        return JSONResponse(model_object(models[model_id], config))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await director.metrics() + ingress_text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        await director.ready()
        return JSONResponse({"status": "ready", "models": list(models)})

    install_page(app)
    install_contract(app, config, cards)
    install_cors(app, config.cors_origins)
    app.add_middleware(RequestIds)  # at last, and so around all others
    return app


def owner_of(request: Request) -> str | None:
    """Who asks; None where there are no keys, and everybody may see everything."""
    key: Key | None = request.state.key
    return None if key is None else key.owner


@contextmanager
def span_of(request: Request, tracer: Tracer) -> Iterator[Span]:
    """A request's span, a child of the caller's if there is one. What the caller did wrong is no error of the span."""
    refused: HeliosError | None = None
    name, parent = f"{request.method} {request.url.path}", request.headers.get("traceparent")
    with tracer.span(name, parent, kind=SpanKind.SERVER, request_id=request_id(request)) as span:
        try:
            yield span
        except HeliosError as error:
            span.set_attribute("http.response.status_code", status_of(error))
            if status_of(error) >= 500:
                raise
            refused = error
    if refused is not None:
        raise refused


@serve.ingress()
class Ingress:
    """The HTTP service as a Serve deployment."""

    def __init__(self, config: AppConfig, cards: list[ModelCard], director: DeploymentHandle) -> None:
        log_with_serve()
        tracer = Tracer("ingress", config.trace_file)
        self._app = http_app(config, cards, RemoteDirector(director), Store(config.store), tracer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app
