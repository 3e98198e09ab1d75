"""The Director in its Serve replica: what it calls, and how the ingress calls it. No torch here either."""

from __future__ import annotations

import sys

from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig, Pool
from deployments.director import Director
from deployments.logs import log_with_serve
from deployments.making import Ref
from deployments.ray_calls import call, call_by_reference, call_to_its_end, live_replicas
from deployments.records import (
    Call,
    News,
    Page,
    Rendered,
    SampleReport,
    StoredObject,
    VideoRequestRecord,
    VideoStatus,
)
from deployments.store import Store
from deployments.tracing import Tracer
from helios_core.spec import VideoSpec


class ServeGraph:
    """The Graph of a Director whose parts are Serve deployments. Values stay where they were made."""

    def __init__(
        self, pool: Pool, text_encoder: DeploymentHandle, sampler: DeploymentHandle, vae_decoder: DeploymentHandle
    ) -> None:
        """`pool`: the samplers'."""
        self._pool = pool
        self._text_encoder, self._sampler, self._vae_decoder = text_encoder, sampler, vae_decoder

    def samplers(self) -> int:
        live = live_replicas(self._sampler)
        if live < self._pool.max_replicas and self._pool.min_replicas < self._pool.max_replicas:
            return live + 1  # Serve adds a replica only if it sees a call that none can take
        return max(1, live)  # with none alive, one call waits for the first that is

    async def encode(self, call: Call, prompt: str) -> tuple[Ref, StoredObject]:
        return await call_by_reference(self._text_encoder, "encode", call, prompt, to_its_end=True)

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, text: Ref, state: Ref | None
    ) -> tuple[Ref, SampleReport]:
        return await call_by_reference(self._sampler, "sample_chunk", call, spec, index, text, state)

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        rendered: Rendered = await call_to_its_end(self._vae_decoder, "render_chunk", call, spec, term, state, sampled)
        return rendered


class DirectorReplica:
    """A Director over a ServeGraph, as a deployment."""

    async def __init__(self, config: AppConfig, *parts: DeploymentHandle) -> None:  # type: ignore[misc]
        log_with_serve()
        graph, tracer = ServeGraph(config.sampler, *parts), Tracer("director", config.trace_file)
        self._director = await Director.start(graph, Store(config.store), tracer, config.log_prompts)

    async def create(self, request: VideoRequestRecord) -> VideoStatus:
        return await self._director.create(request)

    async def get(self, video_id: str) -> VideoStatus:
        return await self._director.get(video_id)

    async def page(self, limit: int, after: str | None, newest_first: bool) -> Page:
        return await self._director.page(limit, after, newest_first)

    async def news(self, video_id: str, seen: int) -> News:
        return await self._director.news(video_id, seen)

    async def cancel(self, video_id: str) -> VideoStatus:
        return await self._director.cancel(video_id)

    async def delete(self, video_id: str) -> None:
        await self._director.delete(video_id)

    async def metrics(self) -> bytes:
        return await self._director.metrics()

    async def ready(self) -> None:
        await self._director.ready()

    async def stop(self) -> None:
        await self._director.stop()

    def imported_torch(self) -> bool:
        """Whether this process ever loaded torch, which it must to unpickle a single latent."""
        return "torch" in sys.modules


class RemoteDirector:
    """The Director as the ingress sees it: its public methods, through a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def ready(self) -> None:
        await call(self._handle, "ready")

    async def create(self, request: VideoRequestRecord) -> VideoStatus:
        status: VideoStatus = await call(self._handle, "create", request)
        return status

    async def get(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await call(self._handle, "get", video_id)
        return status

    async def page(self, limit: int, after: str | None, newest_first: bool) -> Page:
        page: Page = await call(self._handle, "page", limit, after, newest_first)
        return page

    async def news(self, video_id: str, seen: int) -> News:
        news: News = await call(self._handle, "news", video_id, seen)
        return news

    async def cancel(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await call(self._handle, "cancel", video_id)
        return status

    async def delete(self, video_id: str) -> None:
        await call(self._handle, "delete", video_id)

    async def metrics(self) -> bytes:
        text: bytes = await call(self._handle, "metrics")
        return text
