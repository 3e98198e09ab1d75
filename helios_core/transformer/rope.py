"""Rotary positions in three dimensions: frame, row, column.

A pair of channels (2i, 2i+1) is turned by position * theta^(-2i/d). The first channels of a head turn with the frame,
the next with the row, the last with the column (`rope_dim`).

Shapes: B batch, L tokens, N heads, H channels of a head, P = H/2 pairs, 2 = (cos, sin).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from helios_core.config import TransformerConfig


@functools.lru_cache(maxsize=32)  # a video needs six tables, of 4 MB at most at 640x384
@torch.inference_mode(False)  # a cached tensor must also serve a caller that records gradients
def rope_table(
    config: TransformerConfig,
    frames: range | tuple[int, ...],
    height: int,
    width: int,
    device: torch.device,
    pool: int = 1,
) -> Tensor:
    """The rotations of a grid of tokens, [2, L, 1, P], fp32, frame-major; to be read only.

    `frames`: frame numbers; `height`, `width`: rows and columns of the grid. One token covers `pool` positions in each
    direction, the last position being repeated up to a multiple: its cos and sin are their means, so that the tokens
    of the coarse history are turned and also shortened.
    """
    t_2TP, y_2YP, x_2XP = (
        _axis(positions, dim, config.rope_theta, pool, device)
        for positions, dim in zip((frames, range(height), range(width)), config.rope_dim, strict=True)
    )
    t, y, x = t_2TP.shape[1], y_2YP.shape[1], x_2XP.shape[1]
    # The mean over a 3-D box is the mean along the one axis that an angle depends on.
    axes = [
        repeat(t_2TP, "r t p -> r t y x p", y=y, x=x),
        repeat(y_2YP, "r y p -> r t y x p", t=t, x=x),
        repeat(x_2XP, "r x p -> r t y x p", t=t, y=y),
    ]
    table_2L1P: Tensor = rearrange(torch.cat(axes, dim=-1), "r t y x p -> r (t y x) 1 p")
    return table_2L1P


def rotate(x_BLNH: Tensor, rope_2L1P: Tensor) -> Tensor:
    """Turns queries or keys: computed in fp32, rounded once to the dtype of `x_BLNH`."""
    a, b = rearrange(x_BLNH.float(), "b l n (p pair) -> pair b l n p", pair=2)
    cos, sin = rope_2L1P
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BLNH.dtype)


def _axis(positions: Sequence[int], dim: int, theta: float, pool: int, device: torch.device) -> Tensor:
    padded = [*positions, *[positions[-1]] * (-len(positions) % pool)]
    position_L = torch.tensor(padded, dtype=torch.float32, device=device)
    frequency_P = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle_LP = position_L[:, None] * frequency_P
    rotation_2LP = torch.stack([angle_LP.cos(), angle_LP.sin()])
    pooled_2LP: Tensor = reduce(rotation_2LP, "r (l pool) p -> r l p", "mean", pool=pool)
    return pooled_2LP
