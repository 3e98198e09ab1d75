# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels behind kernels.py, in Triton: a program per row, which it reads and writes once.

All of them are bound by memory: a row of the 14B model is 5120 numbers, and lies in registers while it is worked on.
Rows are addressed by (batch, token) and strides, so that a batch of 1 can be read as one of B and results can be parts
of larger tensors. Channels of a row lie side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_PER_WARP = 1024
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    update_ptr,
    gate_ptr,
    gain_ptr,
    shift_ptr,
    total_ptr,
    normed_ptr,
    scale_ptr,
    tokens,
    dim,
    eps,
    x_batch,
    x_token,
    update_batch,
    update_token,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + batch * x_batch + token * x_token + channel, inside, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(update_ptr + batch * update_batch + token * update_token + channel, inside, other=0.0)
        update = update.to(tl.float32)
        if GATE:
            update *= tl.load(gate_ptr + channel, inside, other=0.0)
        total = (x + update).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * dim + channel, total, inside)
        x = total.to(tl.float32)
    if NORM:
        centred = tl.where(inside, x - tl.sum(x, 0) / dim, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
        normed = normed * tl.load(gain_ptr + channel, inside, other=0.0)
        normed += tl.load(shift_ptr + channel, inside, other=0.0)
        if FP8:
            scale = tl.maximum(tl.max(tl.abs(normed), 0), 1e-12) / FP8_MAX
            tl.store(scale_ptr + row, scale)
            normed = normed / scale
        tl.store(normed_ptr + row * dim + channel, normed.to(normed_ptr.dtype.element_ty), inside)


@triton.jit
def _write_heads_kernel(
    projected_ptr,
    gain_q_ptr,
    gain_k_ptr,
    rope_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    tokens,
    dim,
    pairs,
    eps,
    projected_batch,
    projected_token,
    out_batch,
    out_token,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) + FIRST  # 0 queries, 1 keys, 2 values
    batch, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    source = projected_ptr + batch * projected_batch + token * projected_token + (part - FIRST) * dim
    x = tl.load(source + channel, inside, other=0.0)
    out = batch * out_batch + token * out_token + channel
    if part == 2:
        tl.store(values_ptr + out, x, inside)
    else:
        gain_ptr = gain_k_ptr if part == 1 else gain_q_ptr
        c = projected_ptr.dtype.element_ty
        wide = x.to(tl.float32)
        gain = tl.load(gain_ptr + channel, inside, other=0.0).to(tl.float32)
        normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps) * gain
        a, b = tl.split(tl.reshape(normed.to(c).to(tl.float32), (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)
        angle = token * pairs + pair % pairs
        cos = tl.load(rope_ptr + angle, pair < dim // 2, other=0.0)
        sin = tl.load(rope_ptr + tokens * pairs + angle, pair < dim // 2, other=0.0)
        turned = tl.interleave(a * cos - b * sin, a * sin + b * cos).to(c)
        if part == 1:
            tl.store(keys_ptr + out, turned, inside)
        else:
            tl.store(queries_ptr + row * dim + channel, turned, inside)


@triton.jit
def _rms_norm_kernel(x_ptr, gain_ptr, out_ptr, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + row * dim + channel, inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps) * tl.load(gain_ptr + channel, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * dim + channel, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _quantise_kernel(
    x_ptr, values_ptr, scale_ptr, tokens, dim, x_batch, x_token, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + row // tokens * x_batch + row % tokens * x_token + channel, inside, other=0.0).to(tl.float32)
    if GELU:  # tanh form, as x * sigmoid(2 u): tanh u = 2 sigmoid(2 u) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / FP8_MAX
    tl.store(scale_ptr + row, scale)
    tl.store(values_ptr + row * dim + channel, (x / scale).to(values_ptr.dtype.element_ty), inside)


def launch_add_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    results: list[Tensor],
) -> None:
    """See kernels.py: `results` are the sum, the normed and its scales, as far as they are asked for."""
    results = list(results)
    total = results.pop(0) if update is not None else None
    normed = results.pop(0) if gain is not None else None
    scale = results.pop(0) if results else None
    b, tokens, dim = (x if update is None else update).shape
    x = _rows(x, b)
    update = None if update is None else _rows(update, b)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(b * tokens,)](
            x,
            update,
            gate,
            gain,
            shift,
            total,
            normed,
            scale,
            tokens,
            dim,
            eps,
            *x.stride()[:2],
            *(x if update is None else update).stride()[:2],
            ADD=update is not None,
            GATE=gate is not None,
            NORM=gain is not None,
            FP8=scale is not None,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=_warps(dim),
        )


def launch_write_heads(
    projected: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    rope: Tensor,
    eps: float,
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> None:
    """See kernels.py. A program for each row of each of queries, keys and values."""
    b, tokens, heads, head_dim = keys.shape
    if keys.stride()[:2] != values.stride()[:2] or keys.stride()[2:] != (head_dim, 1) != values.stride()[2:]:
        raise ValueError(f"keys and values lie with strides {keys.stride()} and {values.stride()}")
    dim = heads * head_dim
    parts = 2 if queries is None else 3
    projected = _rows(projected, b)
    with torch.cuda.device_of(projected):
        _write_heads_kernel[(b * tokens, parts)](
            projected,
            gain_q,
            gain_k,
            rope,
            keys if queries is None else queries,
            keys,
            values,
            tokens,
            dim,
            head_dim // 2,
            eps,
            *projected.stride()[:2],
            *keys.stride()[:2],
            FIRST=3 - parts,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=_warps(dim),
        )


def launch_rms_norm(x: Tensor, gain: Tensor, eps: float, out: Tensor) -> None:
    """See kernels.py."""
    dim = x.shape[-1]
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(x.numel() // dim,)](
            x.contiguous(), gain, out, dim, eps, BLOCK=triton.next_power_of_2(dim), num_warps=_warps(dim)
        )


def launch_quantise(x: Tensor, gelu: bool, values: Tensor, scale: Tensor) -> None:
    """See kernels.py."""
    b, tokens, dim = x.shape
    x = _rows(x, b)
    with torch.cuda.device_of(x):
        _quantise_kernel[(b * tokens,)](
            x,
            values,
            scale,
            tokens,
            dim,
            *x.stride()[:2],
            GELU=gelu,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=_warps(dim),
        )


def _rows(x: Tensor, batch: int) -> Tensor:
    """`x` for so many of a batch. Raises ValueError if channels do not lie side by side."""
    if x.stride(-1) != 1:
        raise ValueError(f"rows {tuple(x.shape)} lie with strides {x.stride()}; needed: 1 from channel to channel")
    return x.expand(batch, -1, -1)


def _warps(dim: int) -> int:
    warps: int = triton.next_power_of_2(dim) // CHANNELS_PER_WARP
    return max(1, min(16, warps))
