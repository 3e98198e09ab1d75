"""Latents between the transformer's scale and the VAE's, and decoded frames as bytes.

Shapes: B batch, C latent channels, T frames, H rows, W columns.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from helios_core.config import VaeConfig
from helios_core.vae.model import WanVae


def normalise(latents_BCTHW: Tensor, config: VaeConfig) -> Tensor:
    """The VAE's latents at the transformer's scale: mean about 0, deviation about 1. Same shape and dtype."""
    mean, inverse_std = _statistics(latents_BCTHW, config)
    return (latents_BCTHW - mean) * inverse_std


def denormalise(latents_BCTHW: Tensor, config: VaeConfig) -> Tensor:
    """The inverse of `normalise` up to rounding. Same shape and dtype."""
    mean, inverse_std = _statistics(latents_BCTHW, config)
    return latents_BCTHW / inverse_std + mean  # the reference divides too, so the last bits agree


def to_uint8(frames_BCTHW: Tensor) -> Tensor:
    """Frames [1, 3, T, H, W] in [-1, 1], any float dtype, as uint8 [T, H, W, 3], rounded and contiguous."""
    unit = (frames_BCTHW.float() / 2 + 0.5).clamp(0.0, 1.0)
    pixels: Tensor = rearrange((unit * 255).round().to(torch.uint8), "1 c t h w -> t h w c")
    return pixels.contiguous()


@torch.inference_mode()
def decode_chunk(vae: WanVae, latents_1C9HW: Tensor) -> Tensor:
    """A chunk's normalised latents [1, C, 9, H/8, W/8], fp32, as frames: uint8 [33, H, W, 3] on the VAE's device.

    Each chunk is decoded on its own, as the reference does: its first latent gives one frame, not four.
    """
    latents = denormalise(latents_1C9HW.to(vae.device), vae.config).to(vae.decoder_dtype)
    return to_uint8(vae.decode(latents))


def _statistics(latents_BCTHW: Tensor, config: VaeConfig) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal of the standard deviation per channel, [C, 1, 1, 1], in the latents' dtype."""
    mean = torch.tensor(config.latents_mean).view(-1, 1, 1, 1).to(latents_BCTHW)
    std = torch.tensor(config.latents_std).view(-1, 1, 1, 1).to(latents_BCTHW)
    return mean, 1.0 / std
