"""The offline face: a loaded model whose `stream` yields chunks. The service runs the same loop over replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_core.checkpoints import Checkpoint, placement, use_threads
from helios_core.config import NATIVE_FPS
from helios_core.sampling.chunk import ChunkSampler, OnStep
from helios_core.spec import ModelCard, VideoRequest, VideoSpec
from helios_core.state import StreamState
from helios_core.text import TextEncoder
from helios_core.vae.latents import decode_chunk
from helios_core.vae.model import WanVae


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk. `frames`: uint8 [T, H, W, 3] RGB, T = 33 or less for a cut last chunk; `state`: after it."""

    index: int
    frames: NDArray[np.uint8]
    state: StreamState


class Helios:
    """A model in memory: text encoder, sampler, VAE.

    helios = Helios.load("demo")
    for chunk in helios.stream("a red sun over a blue sea", seconds=4):
        show(chunk.frames)
    """

    def __init__(self, card: ModelCard, text_encoder: TextEncoder, sampler: ChunkSampler, vae: WanVae) -> None:
        self.card = card
        self.text_encoder, self.sampler, self.vae = text_encoder, sampler, vae

    @classmethod
    def load(cls, model: str = "demo", device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Helios:
        """Loads a known name, a folder in the official layout, or a hub id. Sets the process's torch threads.

        Raises CheckpointError for a model that cannot be loaded, InvalidInput for an unknown device or dtype.
        """
        use_threads(threads)
        place, precision = placement(device, dtype)
        checkpoint = Checkpoint.open(model)
        return cls(
            checkpoint.card,
            checkpoint.load_text_encoder(place, precision),
            checkpoint.load_sampler(place, precision),
            checkpoint.load_vae(place),
        )

    def stream(
        self,
        prompt: str,
        *,
        size: str | None = None,
        seconds: float = 5.0,
        seed: int = 42,
        preset: str | None = None,
        steps: tuple[int, ...] | None = None,
        amplify_first_chunk: bool | None = None,
        fps: int = NATIVE_FPS,
        on_step: OnStep | None = None,
    ) -> Iterator[Chunk]:
        """Yields the chunks of one video as they are made; together exactly round(seconds * fps) frames.

        `size`: "WIDTHxHEIGHT" in pixels; `steps`: transformer steps per stage, or `preset` by name; None everywhere
        means the model's own choice. Raises InvalidInput at the call, before anything is computed.
        """
        request = VideoRequest(prompt, size, seconds, seed, preset, steps, amplify_first_chunk, fps)
        return self._stream(request.check(self.card), on_step)

    def _stream(self, spec: VideoSpec, on_step: OnStep | None) -> Iterator[Chunk]:
        text = self.text_encoder.encode(spec.prompt)
        state = StreamState.start(spec, self.vae.config)
        for k in range(spec.chunks):
            state = self.sampler.sample(text, state, spec.steps_of_chunk(k), on_step)
            frames = decode_chunk(self.vae, state.latents)
            yield Chunk(k, frames[: spec.frames_of_chunk(k)].cpu().numpy(), state)
