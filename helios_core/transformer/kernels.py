"""What a block computes between its matrix products: plain torch, and on a GPU one pass over memory for each.

The plain form is the specification. It runs on the CPU and wherever gradients are recorded; elsewhere the operators
`helios::add_norm`, `write_heads`, `rms_norm` and `quantise` take its place (triton_kernels.py). They round where
the plain form rounds, and only there.

Shapes: B batch, L tokens, S tokens that they see, D model dim, N heads, H channels of a head, P = H/2 pairs. c: the
compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_core.transformer.rope import rotate

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Quantised(NamedTuple):
    """Activations in 8 bits, each row with a scale of its own: `values` [B, L, D] in FP8, `scale` [B, L, 1] in fp32."""

    values: Tensor
    scale: Tensor


class Affine(NamedTuple):
    """What follows a layer norm: times `gain_D`, plus `shift_D`, both fp32.

    `learnt`: the reference leaves the two to torch's layer norm, which rounds once; else it computes them one by one.
    """

    gain_D: Tensor
    shift_D: Tensor
    learnt: bool = False


def norm(x_BLD: Tensor, affine: Affine, eps: float) -> Tensor:
    """Layer norm and what follows it: in fp32, rounded once to c."""
    if _plain(x_BLD):
        return _norm(x_BLD, affine, eps).to(x_BLD.dtype)
    normed: Tensor = _add_norm(x_BLD, None, None, affine.gain_D, affine.shift_D, eps, False)[0]
    return normed


def norm_fp8(x_BLD: Tensor, affine: Affine, eps: float) -> Quantised:
    """`norm`, quantised in place of being rounded to c."""
    if _plain(x_BLD):
        return _quantised(_norm(x_BLD, affine, eps))
    return Quantised(*_add_norm(x_BLD, None, None, affine.gain_D, affine.shift_D, eps, True))


def add(x_BLD: Tensor, update_BLD: Tensor, gate_D: Tensor | None) -> Tensor:
    """x + update * gate: in fp32, rounded once to c. `gate_D`: fp32; None for 1.

    `x_BLD` of batch 1 takes on the batch of the update.
    """
    if _plain(x_BLD):
        if gate_D is None:
            return x_BLD + update_BLD
        return (x_BLD.float() + update_BLD * gate_D).to(x_BLD.dtype)
    total: Tensor = _add_norm(x_BLD, update_BLD, gate_D, None, None, 0.0, False)[0]
    return total


def add_norm(
    x_BLD: Tensor, update_BLD: Tensor, gate_D: Tensor | None, affine: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    """What `add` gives, and `norm` of it."""
    if _plain(x_BLD):
        total = add(x_BLD, update_BLD, gate_D)
        return total, norm(total, affine, eps)
    total, normed = _add_norm(x_BLD, update_BLD, gate_D, affine.gain_D, affine.shift_D, eps, False)
    return total, normed


def add_norm_fp8(
    x_BLD: Tensor, update_BLD: Tensor, gate_D: Tensor | None, affine: Affine, eps: float
) -> tuple[Tensor, Quantised]:
    """What `add` gives, and `norm_fp8` of it."""
    if _plain(x_BLD):
        total = add(x_BLD, update_BLD, gate_D)
        return total, norm_fp8(total, affine, eps)
    total, values, scale = _add_norm(x_BLD, update_BLD, gate_D, affine.gain_D, affine.shift_D, eps, True)
    return total, Quantised(values, scale)


def write_heads(
    projected_BLE: Tensor,
    gain_q_D: Tensor,
    gain_k_D: Tensor,
    rope_2L1P: Tensor,
    eps: float,
    keys_BLNH: Tensor,
    values_BLNH: Tensor,
) -> Tensor | None:
    """RMS norm over all heads together, then the rotation of queries and keys, each rounded to c.

    `projected_BLE`: queries, keys and values side by side, E = 3D, or keys and values only, E = 2D. Keys and values
    are written into the last two arguments, which may be a part of a larger tensor and have a larger batch. Returns the
    queries [B, L, N, H], or None.
    """
    n, h = keys_BLNH.shape[2:]
    if _plain(projected_BLE):
        *q_BLD, k_BLD, v_BLD = projected_BLE.split(n * h, dim=-1)
        values_BLNH.copy_(v_BLD.unflatten(-1, (n, h)))
        keys_BLNH.copy_(rotate(rms_norm(k_BLD, gain_k_D, eps).unflatten(-1, (n, h)), rope_2L1P))
        return rotate(rms_norm(q_BLD[0], gain_q_D, eps).unflatten(-1, (n, h)), rope_2L1P) if q_BLD else None
    queries = None
    if projected_BLE.shape[-1] == 3 * n * h:
        queries = projected_BLE.new_empty(*keys_BLNH.shape)
    _write_heads(projected_BLE, gain_q_D, gain_k_D, rope_2L1P, eps, queries, keys_BLNH, values_BLNH)
    return queries


def rms_norm(x_BLD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Of each row, times `gain_D`, rounded once to c."""
    if _plain(x_BLD):
        return F.rms_norm(x_BLD, x_BLD.shape[-1:], gain_D, eps)
    normed: Tensor = _rms_norm(x_BLD, gain_D, eps)
    return normed


def quantise(x_BLD: Tensor) -> Quantised:
    """Each row divided by its scale, with which its greatest magnitude becomes 448, and rounded to FP8."""
    if _plain(x_BLD):
        return _quantised(x_BLD.float())
    return Quantised(*_quantise(x_BLD, False))


def gelu_quantise(x_BLD: Tensor) -> Quantised:
    """`quantise` of GELU (tanh form), computed in fp32."""
    if _plain(x_BLD):
        return _quantised(F.gelu(x_BLD.float(), approximate="tanh"))
    return Quantised(*_quantise(x_BLD, True))


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" or torch.is_grad_enabled()


def _norm(x_BLD: Tensor, affine: Affine, eps: float) -> Tensor:
    gain_D, shift_D, learnt = affine
    if learnt:
        return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], gain_D, shift_D, eps)
    return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps) * gain_D + shift_D


def _quantised(x_BLD: Tensor) -> Quantised:
    scale = x_BLD.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return Quantised((x_BLD / scale).to(FP8), scale)


# The operators. Registered, so that profiles name them and that shapes can be followed without a GPU; their kernels,
# and with them Triton, are imported when one first runs.


@torch.library.custom_op("helios::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    fp8: bool,
) -> list[Tensor]:
    from helios_core.transformer.triton_kernels import launch_add_norm

    results: list[Tensor] = _add_norm_results(x, update, gate, gain, shift, eps, fp8)
    launch_add_norm(x, update, gate, gain, shift, eps, results)
    return results


@_add_norm.register_fake
def _add_norm_results(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    fp8: bool,
) -> list[Tensor]:
    """Room for the sum if there is an update, for the normed if there is a gain, and for its scales in FP8."""
    shape = (x if update is None else update).shape
    results = [] if update is None else [x.new_empty(shape)]
    if gain is not None:
        results.append(x.new_empty(shape, dtype=FP8 if fp8 else x.dtype))
        if fp8:
            results.append(x.new_empty((*shape[:-1], 1), dtype=torch.float32))
    return results


@torch.library.custom_op("helios::write_heads", mutates_args={"queries", "keys", "values"})
def _write_heads(
    projected: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    rope: Tensor,
    eps: float,
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> None:
    from helios_core.transformer.triton_kernels import launch_write_heads

    launch_write_heads(projected, gain_q, gain_k, rope, eps, queries, keys, values)


@_write_heads.register_fake
def _(
    projected: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    rope: Tensor,
    eps: float,
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> None: ...


@torch.library.custom_op("helios::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    from helios_core.transformer.triton_kernels import launch_rms_norm

    result = torch.empty_like(x)
    launch_rms_norm(x, gain, eps, result)
    return result


@_rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("helios::quantise", mutates_args=())
def _quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    from helios_core.transformer.triton_kernels import launch_quantise

    results: tuple[Tensor, Tensor] = _quantise_results(x, gelu)
    launch_quantise(x, gelu, *results)
    return results


@_quantise.register_fake
def _quantise_results(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
