"""The Director in its Serve replica: what it calls, and how the ingress calls it. No torch here either."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig, Quota
from deployments.director import Director
from deployments.logs import log_with_serve
from deployments.making import Ref, ReplicaLost
from deployments.ray_calls import (
    call,
    call_by_reference,
    call_to_its_end,
    cluster_id,
    kill_silent,
    live_replicas,
    until_live,
)
from deployments.records import (
    Call,
    Check,
    Encoded,
    News,
    Page,
    Rendered,
    SampleReport,
    StoredObject,
    VideoRequestRecord,
    VideoStatus,
)
from deployments.retention import Keep
from deployments.store import Retired, Store, Superseded, cluster_of
from deployments.tracing import Tracer
from helios_core.spec import PromptChange, VideoSpec

LEADERLESS = (ReplicaLost, Superseded)  # the Director died, or another one leads: of this service, unless it is Retired
ASK_AGAIN_S = 0.5
TEXTS_AT_ONCE = 4  # calls that one text encoder takes
RENDERS_AT_ONCE = 2  # of a VAE decoder: one chunk is stored while the next is decoded
OTHER_CLUSTER_S = 1800.0  # so long a new cluster leaves the lead to the one before, until it has replicas itself
NEXT_DIRECTOR_S = 30.0


@dataclass(frozen=True)
class ModelHandles:
    """Who computes for one model. `fingerprint`: its checkpoint's."""

    fingerprint: str
    text_encoder: DeploymentHandle
    sampler: DeploymentHandle
    vae_decoder: DeploymentHandle


@dataclass
class Load:
    """What one deployment was asked for: calls under way, of which a replica takes `at_once`, and the seconds that all
    of them took so far."""

    at_once: int
    calls: int = 0
    seconds: float = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1


class ServeGraph:
    """The Graph of a Director whose parts are Serve deployments. Values stay where they were made."""

    def __init__(self, models: Mapping[str, ModelHandles]) -> None:
        """`models`: by the id that requests use."""
        self._models = models
        self._loads: dict[str, Load] = {}  # of each deployment that serves the videos of several samplers
        for own in models.values():
            for handle, at_once in ((own.text_encoder, TEXTS_AT_ONCE), (own.vae_decoder, RENDERS_AT_ONCE)):
                self._loads.setdefault(handle.deployment_name, Load(at_once))
            live_replicas(own.sampler)  # from now on it hears of them

    @property
    def models(self) -> Sequence[str]:
        return list(self._models)

    def fingerprint(self, model: str) -> str:
        return self._models[model].fingerprint

    def samplers(self, model: str) -> int:
        # With none alive no call waits for the first: Serve would start one for it, whatever the policy says.
        return live_replicas(self._models[model].sampler)

    def replicas(self, part: str) -> int:
        return sum(map(live_replicas, self._handles(part)))

    async def kill_silent(self) -> None:
        """Kills replicas that are alive and silent, for as long as this runs."""
        await kill_silent(self._handles("text_encoder", "sampler", "vae_decoder"))

    def _handles(self, *parts: str) -> list[DeploymentHandle]:
        """Each deployment of these parts once: models share those that are equal."""
        handles = [getattr(own, part) for own in self._models.values() for part in parts]
        return list({handle.deployment_name: handle for handle in handles}.values())

    def demand(self, wanting: Mapping[str, int]) -> dict[str, float]:
        """What the policy in autoscaling.py is told. `wanting`: by model, the videos that want a chunk."""
        told: dict[str, float] = {}
        for model, own in self._models.items():
            told[f"{own.sampler.deployment_name}/wanting"] = wanting[model]
        for name, load in self._loads.items():
            told |= {f"{name}/calls": load.calls / load.at_once, f"{name}/work": load.seconds}
        return told

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Ref, Encoded]:
        handle = self._models[model].text_encoder
        load = self._loads[handle.deployment_name]
        with load.call():
            text, encoded = await call_by_reference(handle, "encode", call, prompt, to_its_end=True)
        load.seconds += encoded.seconds
        return text, encoded

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> tuple[Ref, float]:
        handle = self._models[spec.model].vae_decoder
        load = self._loads[handle.deployment_name]
        with load.call():
            state, seconds = await call_by_reference(handle, "encode_media", call, spec, media)
        load.seconds += seconds
        return state, seconds

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Ref | None, *texts: Ref
    ) -> tuple[Ref, SampleReport]:
        sampler = self._models[spec.model].sampler
        return await call_by_reference(sampler, "sample_chunk", call, spec, index, weights, state, *texts)

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        handle = self._models[spec.model].vae_decoder
        load = self._loads[handle.deployment_name]
        with load.call():
            rendered: Rendered = await call_to_its_end(handle, "render_chunk", call, spec, term, state, sampled)
        timings = rendered.chunk.timings
        load.seconds += timings.decode_seconds + timings.encode_seconds  # one is stored while the next is decoded
        return rendered


class DirectorReplica:
    """A Director over a ServeGraph, as a deployment."""

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, models: dict[str, ModelHandles], always: list[DeploymentHandle], build: str
    ) -> None:
        """`always`: those of the models' deployments that always have a replica; `build`: of the graph."""
        log_with_serve()
        tracer = Tracer("director", config.trace_file)
        self._graph = ServeGraph(models)
        store = Store(config.store)
        cluster = cluster_id()
        service, leads = f"{cluster}-{build}", await store.leads()
        if leads is not None and cluster_of(leads) != cluster and not await store.has_led(service):
            with suppress(TimeoutError):  # the other cluster can make its videos, and this one cannot yet
                await asyncio.wait_for(until_live(always), OTHER_CLUSTER_S)
        self._director = await Director.start(
            self._graph,
            store,
            tracer,
            service=service,
            patience_s=config.store_patience_s,
            keep_all_states=config.keep_states == "all",
            log_prompts=config.log_prompts,
            unwatched_s=config.unwatched_s,
            keep=Keep(days=config.keep_videos_days, bytes=config.keep_bytes),
            admission=config.admission,
        )
        self._asking = asyncio.create_task(self._graph.kill_silent(), name="asking replicas")

    def check_health(self) -> None:
        if self._asking.done():
            self._asking.result()  # which never ends but by a bug of ours
        self._director.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks once a second, for the policy."""
        return self._graph.demand(self._director.wanting())

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

    async def checked(self, check: Check) -> None:
        await self._director.checked(check)

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
        except Retired:
            raise
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

    async def checked(self, check: Check) -> None:
        await call(self._handle, "checked", check)

    async def metrics(self) -> bytes:
        text: bytes = await call(self._handle, "metrics")
        return text

    async def _of_any(self, method: str, *args: Any) -> Any:
        """The answer to what may be asked twice: of the next Director, if this one dies over it."""
        try:
            return await call(self._handle, method, *args)
        except Retired:
            raise
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
            except Retired:
                raise
            except LEADERLESS:
                if clock() >= deadline:
                    raise
