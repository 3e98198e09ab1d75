"""All randomness of a video: drawn on the CPU, in the reference's order, from one generator whose state travels."""

from __future__ import annotations

import functools

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

BLOCK = 2  # upsampling doubles each side, so a correlated block is 2x2


def chunk_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """White noise, fp32 on the CPU, of `shape` [1, C, T, h, w]."""
    return torch.randn(shape, generator=generator)


def block_noise(shape: tuple[int, ...], gamma: float, generator: torch.Generator) -> Tensor:
    """Noise of unit variance, with covariance -gamma inside each 2x2 block; fp32 on the CPU.

    Added to a nearest-neighbour upsampling, whose blocks are fully correlated, it makes the noise white again
    (Pyramidal Flow Matching, Jin et al. 2024, appendix on renoising). `shape`: [1, C, T, h, w], h and w even.
    """
    b, c, t, h, w = shape
    blocks = torch.randn(b * c * t * (h // BLOCK) * (w // BLOCK), BLOCK * BLOCK, generator=generator)
    blocks = blocks @ block_factor(gamma).T
    return rearrange(
        blocks,
        "(b c t h w) (bh bw) -> b c t (h bh) (w bw)",
        b=b, c=c, t=t, h=h // BLOCK, w=w // BLOCK, bh=BLOCK, bw=BLOCK,
    )  # fmt: skip


@functools.lru_cache
def block_factor(gamma: float) -> Tensor:
    """Lower Cholesky factor [4, 4], fp32, of the block covariance: 1 on the diagonal, -gamma elsewhere.

    For the official gamma = 1/3 the matrix is singular: its jitter of 1e-8 is lost in fp32, where the reference's
    factorisation fails on a CPU. In double precision it holds.
    """
    size = BLOCK * BLOCK
    covariance = (1.0 + gamma + 1e-8) * np.eye(size) - gamma
    return torch.from_numpy(np.linalg.cholesky(covariance)).float()
