# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels for a GPU. Imported only where there is one: Triton does not come with torch for a CPU."""

# P = pixels of a batch entry (frames x rows x columns), C = channels, which lie last in memory

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers per program: 32 for each of its 128 threads


def launch_rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, shortest: float) -> None:
    """`helios_core.vae.norm.rms_norm_silu` for x and out [B, C, T, H, W] whose channels lie last in memory."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    b, c, t, h, w = x.shape
    if not out[0].permute(1, 2, 3, 0).is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} has strides {out.stride()}; needed: channels last")
    pixels, block_c = t * h * w, triton.next_power_of_2(c)
    block_p = max(1, BLOCK // block_c)
    with torch.cuda.device_of(x):
        _rms_norm_silu[triton.cdiv(pixels, block_p), b](
            x, gamma, out, pixels, x.stride(0), out.stride(0), math.sqrt(c), shortest, c, block_p, block_c
        )


@triton.jit
def _rms_norm_silu(
    x_ptr,
    gamma_ptr,
    out_ptr,
    pixels,
    x_entry_stride,
    out_entry_stride,
    scale,
    shortest,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_P pixels of one batch entry, all their channels."""
    entry = tl.program_id(1).to(tl.int64)
    rows_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels_C = tl.arange(0, BLOCK_C)
    offsets_PC = rows_P.to(tl.int64)[:, None] * C + channels_C[None, :]
    inside_PC = (rows_P < pixels)[:, None] & (channels_C < C)[None, :]
    x_PC = tl.load(x_ptr + entry * x_entry_stride + offsets_PC, inside_PC, other=0.0).to(tl.float32)
    gamma_C = tl.load(gamma_ptr + channels_C, channels_C < C, other=0.0).to(tl.float32)
    length_P = tl.maximum(tl.sqrt_rn(tl.sum(x_PC * x_PC, axis=1)), shortest)
    y_PC = x_PC * (scale / length_P)[:, None] * gamma_C[None, :]
    tl.store(out_ptr + entry * out_entry_stride + offsets_PC, y_PC / (1.0 + tl.exp(-y_PC)), inside_PC)
