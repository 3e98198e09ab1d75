"""The Director in its Serve replica: what it calls, and how the ingress calls it. No torch here either."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig, Pool, Quota
from deployments.director import Director
from deployments.logs import log_with_serve
from deployments.making import Ref, ReplicaLost
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
from deployments.retention import Keep
from deployments.store import Store, Superseded
from deployments.tracing import Tracer
from helios_core.spec import PromptChange, VideoSpec

LEADERLESS = (ReplicaLost, Superseded)  # the Director died, or another one leads
ASK_AGAIN_S = 0.5
NEXT_DIRECTOR_S = 30.0


@dataclass(frozen=True)
class ModelHandles:
    """Who computes for one model. `pool`: its samplers'; `fingerprint`: its checkpoint's."""

    pool: Pool
    fingerprint: str
    text_encoder: DeploymentHandle
    sampler: DeploymentHandle
    vae_decoder: DeploymentHandle


class ServeGraph:
    """The Graph of a Director whose parts are Serve deployments. Values stay where they were made."""

    def __init__(self, models: Mapping[str, ModelHandles]) -> None:
        """`models`: by the id that requests use."""
        self._models = models

    @property
    def models(self) -> Sequence[str]:
        return list(self._models)

    def fingerprint(self, model: str) -> str:
        return self._models[model].fingerprint

    def samplers(self, model: str) -> int:
        pool, live = self._models[model].pool, live_replicas(self._models[model].sampler)
        if live < pool.max_replicas and pool.min_replicas < pool.max_replicas:
            return live + 1  # Serve adds a replica only if it sees a call that none can take
        return max(1, live)  # with none alive, one call waits for the first that is

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Ref, StoredObject]:
        return await call_by_reference(self._models[model].text_encoder, "encode", call, prompt, to_its_end=True)

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> Ref:
        state, _ = await call_by_reference(self._models[spec.model].vae_decoder, "encode_media", call, spec, media)
        return state

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Ref | None, *texts: Ref
    ) -> tuple[Ref, SampleReport]:
        sampler = self._models[spec.model].sampler
        return await call_by_reference(sampler, "sample_chunk", call, spec, index, weights, state, *texts)

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        vae_decoder = self._models[spec.model].vae_decoder
        rendered: Rendered = await call_to_its_end(vae_decoder, "render_chunk", call, spec, term, state, sampled)
        return rendered


class DirectorReplica:
    """A Director over a ServeGraph, as a deployment."""

    async def __init__(self, config: AppConfig, models: dict[str, ModelHandles]) -> None:  # type: ignore[misc]
        log_with_serve()
        tracer = Tracer("director", config.trace_file)
        self._director = await Director.start(
            ServeGraph(models),
            Store(config.store),
            tracer,
            patience_s=config.store_patience_s,
            keep_all_states=config.keep_states == "all",
            log_prompts=config.log_prompts,
            unwatched_s=config.unwatched_s,
            keep=Keep(days=config.keep_videos_days, bytes=config.keep_bytes),
            admission=config.admission,
        )

    def check_health(self) -> None:
        self._director.check_health()

    async def admit(self, owner: str, quota: Quota) -> None:
        await self._director.admit(owner, quota)

    async def create(self, request: VideoRequestRecord, again: bool, quota: Quota) -> VideoStatus:
        return await self._director.create(request, again, quota)

    async def get(self, video_id: str) -> VideoStatus:
        return await self._director.get(video_id)

    async def page(self, limit: int, after: str | None, newest_first: bool, owner: str | None) -> Page:
        return await self._director.page(limit, after, newest_first, owner)

    async def news(self, video_id: str, seen: int) -> News:
        return await self._director.news(video_id, seen)

    async def change_prompt(self, video_id: str, prompt: str, transition_chunks: int) -> PromptChange:
        return await self._director.change_prompt(video_id, prompt, transition_chunks)

    async def pause(self, video_id: str) -> VideoStatus:
        return await self._director.pause(video_id)

    async def resume(self, video_id: str) -> VideoStatus:
        return await self._director.resume(video_id)

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

    async def admit(self, owner: str, quota: Quota) -> None:
        await self._of_any("admit", owner, quota)

    async def create(self, request: VideoRequestRecord, again: bool, quota: Quota) -> VideoStatus:
        try:
            status: VideoStatus = await call(self._handle, "create", request, again, quota)
        except LEADERLESS:
            status = await self._of_next("create", request, True, quota)  # it may have been accepted
        return status

    async def get(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await self._of_any("get", video_id)
        return status

    async def page(self, limit: int, after: str | None, newest_first: bool, owner: str | None) -> Page:
        page: Page = await self._of_any("page", limit, after, newest_first, owner)
        return page

    async def news(self, video_id: str, seen: int) -> News:
        news: News = await call(self._handle, "news", video_id, seen)
        return news

    async def change_prompt(self, video_id: str, prompt: str, transition_chunks: int) -> PromptChange:
        change: PromptChange = await call(self._handle, "change_prompt", video_id, prompt, transition_chunks)
        return change

    async def pause(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await self._of_any("pause", video_id)
        return status

    async def resume(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await self._of_any("resume", video_id)
        return status

    async def cancel(self, video_id: str) -> VideoStatus:
        status: VideoStatus = await self._of_any("cancel", video_id)
        return status

    async def delete(self, video_id: str) -> None:
        await call(self._handle, "delete", video_id)

    async def metrics(self) -> bytes:
        text: bytes = await call(self._handle, "metrics")
        return text

    async def _of_any(self, method: str, *args: Any) -> Any:
        """The answer to what may be asked twice: of the next Director, if this one dies over it."""
        try:
            return await call(self._handle, method, *args)
        except LEADERLESS:
            return await self._of_next(method, *args)

    async def _of_next(self, method: str, *args: Any) -> Any:
        """The answer of the Director that follows one that died. Raises as the last one does after NEXT_DIRECTOR_S."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + NEXT_DIRECTOR_S
        while True:
            await asyncio.sleep(ASK_AGAIN_S)  # the call itself waits in Serve until there is a Director
            try:
                return await call(self._handle, method, *args)
            except LEADERLESS:
                if clock() >= deadline:
                    raise
