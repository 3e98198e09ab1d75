"""Attention itself, by the kernel that is known to be the fastest of torch's on this chip.

Which one torch takes of itself depends on the chip, on the version and on what was imported. Here it is said, and torch
raises where it cannot be had, so that no replica is slow in silence.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# By major compute capability. cuDNN's was up to twice as fast as FlashAttention 2 on Hopper (630 to 330 TFLOP/s at
# 24 heads x 4608 x 128, pytorch#142132), and slower on Ampere.
BACKENDS = {8: SDPBackend.FLASH_ATTENTION, 9: SDPBackend.CUDNN_ATTENTION, 10: SDPBackend.CUDNN_ATTENTION}


def attend(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
    """Every query sees every key: [B, L, N, H]."""
    q, k, v = (heads.transpose(1, 2) for heads in (q_BLNH, k_BSNH, v_BSNH))
    backend = _backend(q.device) if q.dtype == torch.bfloat16 else None  # the fast ones do not compute in fp32
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@functools.cache
def _backend(device: torch.device) -> SDPBackend | None:
    """None where torch may choose."""
    return BACKENDS.get(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else None
