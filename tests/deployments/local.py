"""The service in one process, without Ray: the very replica classes, awaited directly by the very Director."""

from __future__ import annotations

from typing import Any

from deployments.config import AppConfig
from deployments.records import Call, Encoded, Rendered, SampleReport, StoredObject
from deployments.sampler import Sampler
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from helios_core.checkpoints import Checkpoint
from helios_core.spec import VideoSpec


class LocalGraph:
    """The Graph of a Director whose replicas live here. `log` holds what began and ended, in order."""

    def __init__(self, config: AppConfig) -> None:
        first = config.models[0].model
        self.text_encoder, self.vae_decoder = TextEncoder(config, first), VaeDecoder(config, first)
        self._samplers = {
            Checkpoint.open(settings.model).card.id: Sampler(config, settings.sampler, settings.model)
            for settings in config.models
        }
        self._fingerprints = {
            checkpoint.card.id: checkpoint.fingerprint()
            for checkpoint in (Checkpoint.open(settings.model) for settings in config.models)
        }
        self.log: list[str] = []

    @property
    def models(self) -> list[str]:
        return list(self._samplers)

    def fingerprint(self, model: str) -> str:
        return self._fingerprints[model]

    def samplers(self, model: str) -> int:
        return 1

    def replicas(self, part: str) -> int:
        return 1

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Any, Encoded]:
        text, encoded = [item async for item in self.text_encoder.encode(call, prompt)]
        return text, encoded

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> tuple[Any, float]:
        state, seconds = [item async for item in self.vae_decoder.encode_media(call, spec, media)]
        return state, seconds

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Any, *texts: Any
    ) -> tuple[Any, SampleReport]:
        self.log.append(f"sample {index}")
        sampler = self._samplers[spec.model]
        after, report = [item async for item in sampler.sample_chunk(call, spec, index, weights, state, *texts)]
        self.log.append(f"sampled {index}")
        return after, report

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Any, sampled: SampleReport) -> Rendered:
        rendered = await self.vae_decoder.render_chunk(call, spec, term, state, sampled)
        self.log.append(f"rendered {rendered.chunk.index}")
        return rendered
