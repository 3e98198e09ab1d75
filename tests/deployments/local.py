"""The service in one process, without Ray: the very replica classes, awaited directly by the very Director."""

from __future__ import annotations

from typing import Any

from deployments.config import AppConfig
from deployments.records import Call, Rendered, SampleReport, StoredObject
from deployments.sampler import Sampler
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from helios_core.spec import VideoSpec


class LocalGraph:
    """The Graph of a Director whose replicas live here. `log` holds what began and ended, in order."""

    def __init__(self, config: AppConfig) -> None:
        self.text_encoder, self.sampler, self.vae_decoder = TextEncoder(config), Sampler(config), VaeDecoder(config)
        self.log: list[str] = []

    def samplers(self) -> int:
        return 1

    async def encode(self, call: Call, prompt: str) -> tuple[Any, StoredObject]:
        text, stored = [item async for item in self.text_encoder.encode(call, prompt)]
        return text, stored

    async def sample(self, call: Call, spec: VideoSpec, index: int, text: Any, state: Any) -> tuple[Any, SampleReport]:
        self.log.append(f"sample {index}")
        after, report = [item async for item in self.sampler.sample_chunk(call, spec, index, text, state)]
        self.log.append(f"sampled {index}")
        return after, report

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Any, sampled: SampleReport) -> Rendered:
        rendered = await self.vae_decoder.render_chunk(call, spec, term, state, sampled)
        self.log.append(f"rendered {rendered.chunk.index}")
        return rendered
