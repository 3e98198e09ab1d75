"""The Director in its Serve replica: what it calls, and how the ingress calls it. No torch here either."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.director import Director, Ref
from deployments.ray_calls import call, call_by_reference, stream
from deployments.records import ChunkRecord, Rendered, SampleReport, VideoRecord, VideoRequestRecord
from deployments.store import Store
from helios_core.spec import VideoSpec


class ServeGraph:
    """The Graph of a Director whose parts are Serve deployments. Values stay where they were made."""

    def __init__(
        self, text_encoder: DeploymentHandle, sampler: DeploymentHandle, vae_decoder: DeploymentHandle
    ) -> None:
        self._text_encoder, self._sampler, self._vae_decoder = text_encoder, sampler, vae_decoder

    async def encode(self, video_id: str, prompt: str) -> Ref:
        text, _ = await call_by_reference(self._text_encoder, "encode", video_id, prompt)
        return text

    async def sample(self, spec: VideoSpec, index: int, text: Ref, state: Ref | None) -> tuple[Ref, SampleReport]:
        return await call_by_reference(self._sampler, "sample_chunk", spec, index, text, state)

    async def render(self, video_id: str, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        rendered: Rendered = await call(self._vae_decoder, "render_chunk", video_id, spec, term, state, sampled)
        return rendered


class DirectorReplica:
    """A Director over a ServeGraph, as a deployment."""

    async def __init__(self, config: AppConfig, *parts: DeploymentHandle) -> None:  # type: ignore[misc]
        self._director = await Director.start(ServeGraph(*parts), Store(config.store))

    async def create(self, request: VideoRequestRecord) -> VideoRecord:
        return await self._director.create(request)

    async def get(self, video_id: str) -> VideoRecord:
        return await self._director.get(video_id)

    async def watch(self, video_id: str, from_chunk: int) -> AsyncIterator[ChunkRecord | VideoRecord]:
        async for event in self._director.watch(video_id, from_chunk):
            yield event

    async def create_and_watch(self, request: VideoRequestRecord) -> AsyncIterator[ChunkRecord | VideoRecord]:
        async for event in self._director.create_and_watch(request):
            yield event

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

    async def create(self, request: VideoRequestRecord) -> VideoRecord:
        record: VideoRecord = await call(self._handle, "create", request)
        return record

    async def get(self, video_id: str) -> VideoRecord:
        record: VideoRecord = await call(self._handle, "get", video_id)
        return record

    def watch(self, video_id: str, from_chunk: int = 0) -> AsyncGenerator[Any, None]:
        return stream(self._handle, "watch", video_id, from_chunk)

    def create_and_watch(self, request: VideoRequestRecord) -> AsyncGenerator[Any, None]:
        return stream(self._handle, "create_and_watch", request)
