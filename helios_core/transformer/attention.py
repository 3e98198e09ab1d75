"""Attention itself, by the kernel that is known to be the fastest of torch's on this chip.

Which one torch takes of itself depends on the chip, on the version and on what was imported. Here it is said, and torch
raises where it cannot be had, so that no replica is slow in silence. cuDNN's was up to twice as fast as FlashAttention
2 on Hopper (630 to 330 TFLOP/s at 24 heads x 4608 x 128, pytorch#142132), and slower on Ampere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [B, N, L, H] each


def attend(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
    """Every query sees every key: [B, L, N, H]."""
    q, k, v = (heads.transpose(1, 2) for heads in (q_BLNH, k_BSNH, v_BSNH))
    named = _kernel(q.device) if q.dtype == torch.bfloat16 and not torch.is_grad_enabled() else None
    return (named or F.scaled_dot_product_attention)(q, k, v).transpose(1, 2)


@functools.cache
def _kernel(device: torch.device) -> Kernel | None:
    """For inference in bf16; None where torch may choose.

    The operators themselves: `sdpa_kernel` would set flags of the whole process, in which a VAE may be at work.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return {8: _flash, 9: _cudnn, 10: _cudnn}.get(major)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out
