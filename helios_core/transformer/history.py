"""What the model remembers: 19 latent frames and the anchor, as tokens that get coarser with age.

         frames of the history   one token covers       frame numbers
long     oldest 16               4 x 8 x 8 latents      1 ... 16
mid      next 2                  2 x 4 x 4 latents      17, 18
short    anchor, newest 1        1 x 2 x 2 latents      0, 19
chunk    (being made)            1 x 2 x 2 latents      20 ... 28

The numbers never move: the chunk being made is always 20 ... 28, and the anchor stays 0 for the whole video.

Shapes: B batch, C latent channels, T frames, H, W latent rows and columns, L tokens, D model dim, P channel pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import (
    CHUNK_LATENTS,
    HISTORY_LATENTS,
    HISTORY_LONG,
    HISTORY_MID,
    HISTORY_SHORT,
    TransformerConfig,
)
from helios_core.transformer.rope import rope_table

ANCHOR_NUMBER = 0
LONG_NUMBERS = range(1, 1 + HISTORY_LONG)
MID_NUMBERS = range(LONG_NUMBERS.stop, LONG_NUMBERS.stop + HISTORY_MID)
SHORT_NUMBERS = (ANCHOR_NUMBER, *range(MID_NUMBERS.stop, MID_NUMBERS.stop + HISTORY_SHORT))
CHUNK_NUMBERS = range(1 + HISTORY_LATENTS, 1 + HISTORY_LATENTS + CHUNK_LATENTS)


def history_tokens(
    anchor_BCTHW: Tensor,
    history_BCTHW: Tensor,
    patch_long: nn.Conv3d,
    patch_mid: nn.Conv3d,
    patch_short: nn.Conv3d,
) -> Tensor:
    """Anchor (1 frame) and history (19 frames, oldest first) as tokens [B, L, D]: long, then mid, then short."""
    long, mid, newest = torch.split(history_BCTHW, [HISTORY_LONG, HISTORY_MID, HISTORY_SHORT], dim=2)
    short = torch.cat([anchor_BCTHW, newest], dim=2)
    return torch.cat([_embed(long, patch_long), _embed(mid, patch_mid), _embed(short, patch_short)], dim=1)


def history_length(height: int, width: int) -> int:
    """How many `history_tokens` there are. `height`, `width`: the grid of the short tokens."""
    kinds = ((HISTORY_LONG, 4), (HISTORY_MID, 2), (HISTORY_SHORT + 1, 1))  # frames, pool; the anchor is short
    return sum(-(-frames // pool) * -(-height // pool) * -(-width // pool) for frames, pool in kinds)


def history_rope(config: TransformerConfig, height: int, width: int, device: torch.device) -> Tensor:
    """The rotations of `history_tokens`, [2, L, 1, P]. `height`, `width`: the grid of the short tokens."""
    long = rope_table(config, LONG_NUMBERS, height, width, device, pool=4)
    mid = rope_table(config, MID_NUMBERS, height, width, device, pool=2)
    short = rope_table(config, SHORT_NUMBERS, height, width, device)
    return torch.cat([long, mid, short], dim=1)


def _embed(latents_BCTHW: Tensor, patch: nn.Conv3d) -> Tensor:
    """One token per patch; the last frame, row and column are repeated until whole patches cover the latents."""
    sizes = zip(latents_BCTHW.shape[2:], patch.kernel_size, strict=True)
    t, h, w = (-size % kernel for size, kernel in sizes)
    padded_BCTHW = F.pad(latents_BCTHW, (0, w, 0, h, 0, t), mode="replicate")
    tokens_BLD: Tensor = rearrange(patch(padded_BCTHW), "b d t h w -> b (t h w) d")
    return tokens_BLD
