"""The whole memory of a video in flight: small, plain, and enough to make the next chunk anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from helios_core.config import CHUNK_LATENTS, HISTORY_LATENTS, VaeConfig
from helios_core.errors import HeliosError, NotFinite
from helios_core.spec import VideoSpec

FORMAT = "helios-stream-state-1"


class BadState(HeliosError):
    """Bytes that are not a StreamState of this version."""

    code = "bad_state"


@dataclass(frozen=True, eq=False)
class StreamState:
    """What the next chunk depends on, besides weights and text. About 5 MB at 640x384. Tensors on the CPU.

    `chunk_index`: chunks made so far, which is the index of the next one.
    `history`: [1, C, 19, h, w] fp32, the newest latent frames, normalised; zeros where there are none yet.
    `anchor`: [1, C, 1, h, w] fp32, the first latent frame of the video; None until it is known.
    `generator_state`: uint8 [5056], the state of the CPU generator that draws the video's noise.
    """

    chunk_index: int
    history: Tensor
    anchor: Tensor | None
    generator_state: Tensor

    @classmethod
    def start(cls, spec: VideoSpec, vae: VaeConfig) -> StreamState:
        """Before the first chunk of a text-to-video, at the latent size that `vae` gives to the video's."""
        scale = vae.scale_factor_spatial
        return cls(
            chunk_index=0,
            history=torch.zeros(1, vae.z_dim, HISTORY_LATENTS, spec.height // scale, spec.width // scale),
            anchor=None,
            generator_state=torch.Generator("cpu").manual_seed(spec.seed).get_state(),
        )

    def generator(self) -> torch.Generator:
        """A new generator at the state's point of the noise."""
        generator = torch.Generator("cpu")
        generator.set_state(self.generator_state)
        return generator

    def after(self, latents: Tensor, generator: torch.Generator) -> StreamState:
        """The state one chunk later. `latents`: the chunk, [1, C, 9, h, w], any float dtype and device.

        Raises NotFinite if they are not numbers: every chunk from here on would be spoilt with this one.
        """
        latents = latents.float().cpu()
        if not latents.isfinite().all():
            raise NotFinite(f"the latents of chunk {self.chunk_index} have values that are not finite")
        return StreamState(
            chunk_index=self.chunk_index + 1,
            history=torch.cat([self.history, latents], dim=2)[:, :, -HISTORY_LATENTS:].contiguous(),
            anchor=latents[:, :, :1].clone() if self.anchor is None else self.anchor,
            generator_state=generator.get_state(),
        )

    def reseeded(self, seed: int) -> StreamState:
        """This state with the noise that is still to come drawn from `seed`."""
        return replace(self, generator_state=torch.Generator("cpu").manual_seed(seed).get_state())

    @property
    def latents(self) -> Tensor:
        """The newest chunk, [1, C, 9, h, w] fp32, normalised: a view of `history`."""
        return self.history[:, :, -CHUNK_LATENTS:]

    def to_bytes(self) -> bytes:
        """As a safetensors file. Equal states give equal bytes."""
        tensors = {
            "chunk_index": torch.tensor(self.chunk_index),  # not metadata, which is written in no fixed order
            "history": self.history,
            "generator_state": self.generator_state,
        }
        if self.anchor is not None:
            tensors["anchor"] = self.anchor
        return safetensors.torch.save(tensors, {"format": FORMAT})

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """The inverse of `to_bytes`, bit for bit.

        Raises BadState if `data` is not a state of this version.
        """
        try:
            header = int.from_bytes(data[:8], "little")
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise BadState(f"{len(data)} bytes are not a stream state: {error}") from None
        metadata = json.loads(data[8 : 8 + header]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise BadState(f"format of the state is {metadata.get('format')!r}; supported: {FORMAT!r}")
        try:
            return cls(
                chunk_index=int(tensors["chunk_index"]),
                history=tensors["history"],
                anchor=tensors.get("anchor"),
                generator_state=tensors["generator_state"],
            )
        except KeyError as error:
            raise BadState(f"the state is incomplete: it has no {error}") from None
