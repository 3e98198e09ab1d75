"""Latents between the transformer's scale and the VAE's, and decoded frames as bytes.

Shapes: B batch, C latent channels or colours, T frames, H rows, W columns; h, w rows and columns of latents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from helios_core.config import VaeConfig
from helios_core.errors import NotFinite
from helios_core.vae.model import WanVae

Format = Callable[[Tensor], Tensor]  # frames [1, 3, T, H, W] in [-1, 1] ▸ uint8 [T, ...]

LUMA = (0.2126, 0.7152, 0.0722)  # red's, green's and blue's part in it, by BT.709

# More are faster until what a pass works on leaves a CPU's caches: 13 % at 256x128, with the demo model, and nothing
# at 640x384, where 4 are slower. On a GPU not measured.
LATENTS_PER_PASS = 2


def normalise(latents_BCTHW: Tensor, config: VaeConfig) -> Tensor:
    """The VAE's latents at the transformer's scale: mean about 0, deviation about 1. Same shape and dtype."""
    mean, inverse_std = _statistics(latents_BCTHW, config)
    return (latents_BCTHW - mean) * inverse_std


def denormalise(latents_BCTHW: Tensor, config: VaeConfig) -> Tensor:
    """The inverse of `normalise` up to rounding. Same shape and dtype."""
    mean, inverse_std = _statistics(latents_BCTHW, config)
    return latents_BCTHW / inverse_std + mean  # the reference divides too, so the last bits agree


def to_uint8(frames_1CTHW: Tensor) -> Tensor:
    """RGB for people: frames [1, 3, T, H, W] in [-1, 1], any float dtype, as uint8 [T, H, W, 3]."""
    levels = (frames_1CTHW.float() / 2).add_(0.5).clamp_(0.0, 1.0).mul_(255).round_()
    pixels: Tensor = rearrange(levels.to(torch.uint8), "1 c t h w -> t h w c")
    return pixels.contiguous()


def to_i420(frames_1CTHW: Tensor) -> Tensor:
    """What encoders take: frames [1, 3, T, H, W] in [-1, 1], any float dtype, as uint8 [T, H * 3 / 2, W].

    BT.709 in TV range: H rows of Y, then U, then V, of which each has a quarter as many numbers: the means of blocks of
    2 x 2 pixels. H and W are even.
    """
    rgb_CTHW = frames_1CTHW.float()[0]
    _, t, h, w = rgb_CTHW.shape
    rows = rgb_CTHW[..., ::2, :] + rgb_CTHW[..., 1::2, :]
    red, _, blue = blocks_CThw = (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
    luma = _luma(blocks_CThw)
    # From -1 to 1 luma goes from 16 to 235, and what a colour has more than luma, at most 2 - 2 LUMA, from 16 to 240.
    y = _luma(rgb_CTHW).mul_(219 / 2).add_(16 + 219 / 2)
    u = (blue - luma).mul_(112 / (2 - 2 * LUMA[2])).add_(128)
    v = (red - luma).mul_(112 / (2 - 2 * LUMA[0])).add_(128)
    planes = [plane.round_().to(torch.uint8).flatten(1) for plane in (y, u, v)]
    return torch.cat(planes, dim=1).reshape(t, h * 3 // 2, w)


@torch.inference_mode()
def decode_chunk(vae: WanVae, latents_1CThw: Tensor, *formats: Format) -> list[NDArray[np.uint8]]:
    """A chunk's frames, in each of `formats`, from its normalised latents [1, C, T, h, w], fp32: 4 T - 3 of them, which
    is 33 for the 9 that every chunk has.

    Each chunk is decoded on its own, as the reference does: its first latent gives one frame, not four.
    Raises NotFinite if they have values that are not numbers.
    """
    latents = denormalise(latents_1CThw.to(vae.device), vae.config).to(vae.decoder_dtype)
    passes, sums = [], []
    for frames in vae.decode_frames(latents, LATENTS_PER_PASS):
        passes.append([made(frames) for made in formats])
        sums.append(frames.sum())  # what is not finite stays in it, and nothing is written to find it
    videos = [_to_host(torch.cat(videos)) for videos in zip(*passes, strict=True)]
    if not torch.stack(sums).isfinite().all():
        raise NotFinite("the frames of a chunk have values that are not finite")
    return videos


def _luma(rgb_CTHW: Tensor) -> Tensor:
    red, green, blue = rgb_CTHW
    luma: Tensor = (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return luma


def _to_host(pixels: Tensor) -> NDArray[np.uint8]:
    host = pixels.to("cpu", non_blocking=True)  # from a GPU this takes pinned memory, and does not wait
    if pixels.is_cuda:
        torch.cuda.current_stream(pixels.device).synchronize()
    array: NDArray[np.uint8] = host.numpy()
    return array


def _statistics(latents_BCTHW: Tensor, config: VaeConfig) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal of the standard deviation per channel, [C, 1, 1, 1], in the latents' dtype."""
    mean = torch.tensor(config.latents_mean).view(-1, 1, 1, 1).to(latents_BCTHW)
    std = torch.tensor(config.latents_std).view(-1, 1, 1, 1).to(latents_BCTHW)
    return mean, 1.0 / std
