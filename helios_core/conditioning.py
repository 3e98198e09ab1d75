"""What an input image or video does to a video's beginning: it becomes the state before chunk 0.

Nothing after this knows the task: text-to-video starts from `StreamState.start`, the others from here. A video is the
past itself; an image becomes the end of a chunk in which it stood still. Both anchor the video with their first frame,
and all of it is mixed with a little noise, as the reference does.

Shapes: C latent channels, T frames, H rows, W columns; h, w latent rows and columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, HISTORY_LATENTS
from helios_core.state import StreamState
from helios_core.vae.latents import normalise
from helios_core.vae.model import WanVae

NOISE_SHARE = (0.111, 0.135)  # least and most; the reference has four such arguments, with these two values
BLOCKS_IN_HISTORY = math.ceil(HISTORY_LATENTS / CHUNK_LATENTS)  # older blocks of a video are never looked at

Pixels = NDArray[np.uint8] | Tensor  # RGB, uint8


@torch.inference_mode()
def state_from_image(vae: WanVae, image_HWC: Pixels, seed: int) -> StreamState:
    """The state before the first chunk of a video that goes on from this image.

    `image_HWC`: uint8 [H, W, 3], already of the video's size.
    Raises ValueError for another shape or dtype, and for sides that the VAE cannot encode.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    _check("image", image_HWC, "[H, W, 3]", dims=3)
    still = _frames(image_HWC[None], vae).expand(-1, -1, CHUNK_FRAMES, -1, -1)
    mean, logvar = vae.encode(still)
    # The first frame sees no later one, so its posterior is that of the image alone. The reference encodes the image
    # a second time for it; only the draw has to be made.
    image = _draw_latents(vae, mean[:, :, :1], logvar[:, :, :1], generator)
    last = _draw_latents(vae, mean, logvar, generator)[:, :, -1:]
    anchor = _add_noise(image, generator)
    return _start(anchor, [_add_noise(last, generator)], generator)


@torch.inference_mode()
def state_from_video(vae: WanVae, first_HWC: Pixels, tail_THWC: Pixels, frames: int, seed: int) -> StreamState:
    """The state before the first chunk of a video that goes on from a clip of `frames` frames at 24 fps.

    A clip is n = frames // 33 blocks, its last n * 33 frames. `first_HWC`: uint8 [H, W, 3], frame 0 of the whole clip,
    in a block or not; `tail_THWC`: uint8 [33 * min(n, 3), H, W, 3], its last blocks. Both already of the video's size.

    The cost does not depend on the clip's length: history holds 19 latent frames, so of however many blocks only the
    last three are encoded. Random numbers alone are drawn for all n blocks, in the reference's order, so that a seed
    gives the reference's video: some 7 ms per block at 640x384.
    Raises ValueError for another shape or dtype, for less than 33 frames, and for sides that the VAE cannot encode.
    """
    if frames < CHUNK_FRAMES:
        raise ValueError(f"the clip has {frames} frames; allowed: {CHUNK_FRAMES} or more")
    blocks = frames // CHUNK_FRAMES
    seen = min(blocks, BLOCKS_IN_HISTORY)
    _check("first frame", first_HWC, "[H, W, 3]", dims=3)
    _check(f"tail of {frames} frames", tail_THWC, f"[{CHUNK_FRAMES * seen}, H, W, 3]", dims=4)
    expected = (CHUNK_FRAMES * seen, *first_HWC.shape)
    if tuple(tail_THWC.shape) != expected:
        raise ValueError(f"tail of {frames} frames has shape {tuple(tail_THWC.shape)}; allowed: {expected}")

    generator = torch.Generator("cpu").manual_seed(seed)
    first = _draw_latents(vae, *vae.encode(_frames(first_HWC[None], vae)), generator)
    _, c, _, h, w = first.shape
    block_shape = (1, c, CHUNK_LATENTS, h, w)

    for _ in range(blocks - seen):
        _noise(block_shape, generator)
    latents = []
    for k in range(seen):
        block = _frames(tail_THWC[k * CHUNK_FRAMES : (k + 1) * CHUNK_FRAMES], vae)
        latents.append(_draw_latents(vae, *vae.encode(block), generator))

    anchor = _add_noise(first, generator)
    for _ in range(blocks - seen):
        _noise_shares(CHUNK_LATENTS, generator)
        _noise(block_shape, generator)
    return _start(anchor, [_add_noise(block, generator) for block in latents], generator)


def _check(name: str, pixels: Pixels, allowed: str, dims: int) -> None:
    shape, dtype = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != dims or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}; allowed: {allowed}, uint8")


def _frames(pixels_THWC: Pixels, vae: WanVae) -> Tensor:
    """uint8 [T, H, W, 3] as the VAE takes it: [1, 3, T, H, W] in [-1, 1].

    Scaled on the CPU in fp32: a GPU divides by multiplying with 1/255, which is another number.
    """
    if isinstance(pixels_THWC, np.ndarray):
        pixels_THWC = torch.from_numpy(np.array(pixels_THWC, order="C"))  # a copy: arrays from Ray are read-only
    unit = pixels_THWC.cpu().float() / 255
    frames: Tensor = rearrange(2 * unit - 1, "t h w c -> 1 c t h w")
    return frames.contiguous().to(vae.device, vae.encoder_dtype)


def _draw_latents(vae: WanVae, mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from the posterior of `vae.encode`, normalised: [1, C, T, h, w], fp32 on the CPU."""
    noise = _noise(tuple(mean.shape), generator).to(mean)
    return normalise(mean + torch.exp(0.5 * logvar) * noise, vae.config).float().cpu()


def _add_noise(latents_1CThw: Tensor, generator: torch.Generator) -> Tensor:
    """The latents with some noise mixed in, each frame with a share of its own."""
    share = _noise_shares(latents_1CThw.shape[2], generator).view(-1, 1, 1)
    return share * _noise(tuple(latents_1CThw.shape), generator) + (1 - share) * latents_1CThw


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _noise_shares(frames: int, generator: torch.Generator) -> Tensor:
    least, most = NOISE_SHARE
    return torch.rand(frames, generator=generator) * (most - least) + least


def _start(anchor: Tensor, past: list[Tensor], generator: torch.Generator) -> StreamState:
    """The state before chunk 0, with the newest 19 latent frames of `past`, after zeros where it is shorter."""
    nothing = anchor.new_zeros(1, anchor.shape[1], HISTORY_LATENTS, *anchor.shape[3:])
    return StreamState(
        chunk_index=0,
        history=torch.cat([nothing, *past], dim=2)[:, :, -HISTORY_LATENTS:].contiguous(),
        anchor=anchor,
        generator_state=generator.get_state(),
    )
