"""RMS norms: the specification, what a CPU computes, and where a GPU takes its kernel.

Shapes: B batch, C channels, T frames, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORTEST = 1e-12  # a vector shorter than this is divided by it


class RMSNorm(nn.Module):
    """Scales each pixel's channel vector to length sqrt(dim), then each channel by gamma."""

    def __init__(self, dim: int, pixel_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * pixel_dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x [B, C, ...], gamma [C, 1, ...]: computed in fp32, rounded once to the dtype of x."""
    wide = x.float()
    unit = wide / _lengths(wide)
    return unit.mul_(math.sqrt(len(gamma))).mul_(gamma).to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Writes SiLU of `rms_norm`, rounded once, into `out`: like x [B, C, T, H, W], or a part of something longer in T.

    On a GPU one kernel, without a gradient, reads and writes each number once, where torch passes over them ten times.
    """
    if _plain(x):
        out.copy_(F.silu(rms_norm(x.float(), gamma), inplace=True))
    else:
        from helios_core.vae.kernels import launch_rms_norm_silu  # here, as Triton comes with torch for a GPU only

        launch_rms_norm_silu(x, gamma, out, SHORTEST)


def _plain(x: Tensor) -> bool:
    return x.device.type != "cuda" or x.requires_grad


def _lengths(x: Tensor) -> Tensor:
    """Of each pixel's channel vector, [B, 1, ...], at least SHORTEST. On a CPU torch's bits, in a tenth of the time.

    Torch adds up one pixel's channels, far apart in memory, then the next one's. Here planes of pixels are added up, in
    the same order; and roots are taken in fp64, because torch does not round those of fp32 as it does in a norm.
    """
    if x.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return norm.clamp_min(SHORTEST)
    first, *others = x.square().unbind(1)
    total = first.clone()
    for square in others:
        total += square
    return total.clamp_min_(SHORTEST**2).double().sqrt().to(x.dtype).unsqueeze(1)
