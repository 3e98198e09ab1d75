"""Trains the demo's VAE to read and write the linear code, on films of the world.

Code and pictures are both known, so that decoder and encoder are two regressions. The pictures have twice the rows and
columns of those that are coded: the decoder learns what lies between. Of the posterior only the mean is learnt; its
variance is next to nothing.

Shapes: K latent channels, T pictures, H, W their rows and columns; t, h, w those of the latents.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import CHUNK_FRAMES, VaeConfig
from helios_core.demo import world
from helios_core.demo.codec import CHANNELS, LinearCodec
from helios_core.demo.words import opened, random_scene
from helios_core.vae.model import Cache, WanVae

VAE = VaeConfig(
    base_dim=8,
    decoder_base_dim=16,
    z_dim=CHANNELS,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.0,) * CHANNELS,
    latents_std=(1.0,) * CHANNELS,
    in_channels=48,
    out_channels=48,
    patch_size=4,
    scale_factor_spatial=16,
)
LEARNING_RATE = 3e-3
SHORT, SHORT_BATCH = 13, 2  # the decoder's steps: pictures of a film, and films; the encoder's are one whole chunk
CODE_NOISE = 0.1  # most noise (deviation) on the code, as the transformer's guesses are not exact
STILL_EVERY = 6  # of the encoder's films one stands still
OPEN = 0.2  # share of the films of which some is left open
LOG_VARIANCE = -12.0


@dataclass(frozen=True)
class Progress:
    """One step: "decoder" or "encoder", and its mean squared error."""

    part: str
    step: int
    error: float


def random_film(rng: random.Random, frames: int) -> Tensor:
    """[T, 3, 128, 256] in [0, 1] of any scene, some of it left open, the thing anywhere, from any frame on."""
    scene = random_scene(rng)
    if rng.random() < OPEN:
        scene = opened(scene, rng)
    poses = list(world.poses(scene.motion, (rng.random() * world.WIDTH, rng.random()), CHUNK_FRAMES))
    first = rng.randrange(CHUNK_FRAMES - frames + 1)
    masks = world.masks(scene.shape, scene.ground, poses[first : first + frames], world.SIZE, first)
    return world.paint(masks, world.colours(scene))


def coded(film_T3HW: Tensor, linear: LinearCodec) -> Tensor:
    """A film's code: [1, K, t, 8, 16]."""
    return linear.encode(F.avg_pool2d(film_T3HW, 2))[None]


def train(
    linear: LinearCodec, decoder_steps: int, encoder_steps: int, vae: WanVae, seed: int = 0
) -> Iterator[Progress]:
    """Trains `vae` where it is."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    half = VAE.z_dim
    with torch.no_grad():
        vae.quant_conv.weight[half:] = 0.0
        vae.quant_conv.bias[half:] = LOG_VARIANCE  # type: ignore[index]

    def decoder_error(_: int) -> Tensor:
        films = [random_film(rng, SHORT) for _ in range(SHORT_BATCH)]
        code = torch.cat([coded(film, linear) for film in films])
        code = code + rng.random() * CODE_NOISE * torch.randn(code.shape, generator=generator)
        wrong = written(vae, code) - _signed(films)
        return 0.2 * wrong.abs().mean() + wrong.square().mean()

    def encoder_error(step: int) -> Tensor:
        film = random_film(rng, CHUNK_FRAMES)
        if step % STILL_EVERY == 0:  # as an input picture is encoded
            film = film[:1].expand(CHUNK_FRAMES, -1, -1, -1)
        mean, _ = vae.encode(_signed([film]))
        return (mean - coded(film, linear)).square().mean()

    parts = {
        "decoder": (decoder_steps, decoder_error, [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]),
        "encoder": (encoder_steps, encoder_error, [*vae.encoder.parameters(), *vae.quant_conv.parameters()]),
    }
    for part, (steps, error, parameters) in parts.items():
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
        for step in range(steps):
            loss = error(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            yield Progress(part, step, loss.item())


@torch.no_grad()
def fidelity(vae: WanVae, linear: LinearCodec, films: int, seed: int) -> dict[str, float]:
    """Peak signal-to-noise ratios on new films, in dB: of the decoder on their true code, and after the encoder."""
    rng = random.Random(seed)
    shown = [random_film(rng, CHUNK_FRAMES) for _ in range(films)]
    codes = {
        "decoder, true code": [coded(film, linear) for film in shown],
        "encoder and decoder": [vae.encode(_signed([film]))[0] for film in shown],
    }

    def error(film: Tensor, code: Tensor) -> float:
        return float(((vae.decode(code) - _signed([film])) / 2).square().mean())

    return {name: round(-10 * math.log10(sum(map(error, shown, each)) / films), 2) for name, each in codes.items()}


def written(vae: WanVae, code_BKthw: Tensor) -> Tensor:
    """What the decoder makes of a code, [B, 3, T, H, W], not clamped, so that every pixel can be learnt from."""
    cache: Cache = {}
    p = VAE.patch_size
    frames = [vae.decoder(latent, cache) for latent in vae.post_quant_conv(code_BKthw).split(1, dim=2)]
    return rearrange(torch.cat(frames, dim=2), "b (c pw ph) t h w -> b c t (h ph) (w pw)", ph=p, pw=p)


def _signed(films: list[Tensor]) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1], as the VAE has pictures."""
    return rearrange(2 * torch.stack(films) - 1, "b t c h w -> b c t h w")
