"""The Helios transformer: the velocity of nine noisy latent frames, given a history and a prompt.

- Two kinds of tokens. *History* tokens are clean (timestep 0) and do not see the text; *noisy* tokens are at the
  step's timestep and do. They meet in self-attention only, so each kind is one tensor with one modulation.
- What does not change is computed once: per prompt the text's keys and values (`TextContext`), per chunk everything
  of the history that no noisy token has touched (`ChunkContext`). Neither is ever written to.
- What several prompts have in common is computed once: latents and history of batch 1 stay so until they have seen
  texts of batch B (two for guidance): the noisy tokens up to the first block's cross-attention, the history up to the
  second block's self-attention.
- Position tables are no part of the checkpoint: rope.py computes and caches them.

Shapes: B batch, C latent channels, T latent frames, H, W latent rows and columns; L tokens, S text tokens, D model dim,
P pairs of a head's channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import TransformerConfig
from helios_core.transformer.history import CHUNK_NUMBERS, history_rope, history_tokens
from helios_core.transformer.layers import Block, Modulation, OutputNorm, TimeTextEmbedding
from helios_core.transformer.rope import rope_table

# Parameters with one of these in their name stay fp32 when the model is loaded in bf16.
FP32_PARAMETERS = frozenset({"time_embedder", "scale_shift_table", "norm2"})
# Name in older checkpoints ▸ name here.
KEY_ALIASES = {"scale_shift_table": "norm_out.scale_shift_table"}


@dataclass(frozen=True)
class TextContext:
    """A prompt as every block sees it: its cross-attention's keys (normed) and values, [B, S, heads, head dim] in c."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class ChunkContext:
    """What is the same at all steps and stages of a chunk."""

    text: TextContext
    history_BLD: Tensor  # the history's tokens before the first block
    rope_2L1P: Tensor  # the history's rotations
    modulation: tuple[Modulation, ...]  # of timestep 0, by block
    first_heads: tuple[Tensor, Tensor, Tensor]  # the history's queries, keys and values in the first block


class HeliosTransformer(nn.Module):
    """Parameters bear the names and shapes of the official checkpoint. c, the compute dtype, is `dtype`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = _patch(config, 1)
        self.patch_short = _patch(config, 1)
        self.patch_mid = _patch(config, 2)
        self.patch_long = _patch(config, 4)
        self.condition_embedder = TimeTextEmbedding(config)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(config.hidden_dim, config.out_channels * math.prod(config.patch_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def text_context(self, text_BSD: Tensor) -> TextContext:
        """Embeds a prompt for all chunks that it drives.

        `text_BSD`: [B, 512, text_dim], the unused rows zero; they take part in attention as the others do.
        """
        text_BSD = self.condition_embedder.text_embedder(text_BSD.to(self.dtype))
        return TextContext(tuple(block.attn2.keys_values(text_BSD) for block in self.blocks))

    def begin_chunk(self, anchor_BCTHW: Tensor, history_BCTHW: Tensor, text: TextContext) -> ChunkContext:
        """Embeds the past for all steps of a chunk.

        `anchor_BCTHW`: [B, C, 1, H, W]; `history_BCTHW`: [B, C, 19, H, W], oldest first. H and W are those of the
        last stage. Any floating dtype; rounded to c. Raises ValueError if H or W is odd.
        """
        _, height, width = self._grid(history_BCTHW)
        tokens_BLD = history_tokens(
            anchor_BCTHW.to(self.dtype),
            history_BCTHW.to(self.dtype),
            self.patch_long,
            self.patch_mid,
            self.patch_short,
        )
        rope_2L1P = history_rope(self.config, height, width, self.device)
        _, clean = self._modulation(0)
        first_heads = self.blocks[0].project(tokens_BLD, clean[0], rope_2L1P)
        return ChunkContext(text, tokens_BLD, rope_2L1P, clean, first_heads)

    def forward(self, latents_BCTHW: Tensor, timestep: Tensor | float | int, context: ChunkContext) -> Tensor:
        """The velocity at `latents_BCTHW`, in c.

        `latents_BCTHW`: [B, C, 9, h, w], h and w those of the stage; any floating dtype, rounded to c. `timestep`:
        one number in [0, 1000], whole or fractional, for the whole batch; a tensor lies on the CPU or on `device`.
        Latents and history may have batch 1 where the text has more: the velocity is then that for each text.
        Raises ValueError if h or w is odd.
        """
        frames, height, width = self._grid(latents_BCTHW)
        noisy = rearrange(self.patch_embedding(latents_BCTHW.to(self.dtype)), "b d t h w -> b (t h w) d")
        rope = rope_table(self.config, CHUNK_NUMBERS, height, width, self.device)
        time_11D, modulation = self._modulation(timestep)

        history, past_rope, clean = context.history_BLD, context.rope_2L1P, context.modulation
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(noisy, modulation[i], rope)
            if i == 0:
                past_q, past_k, past_v = context.first_heads
            elif i < last:
                past_q, past_k, past_v = block.project(history, clean[i], past_rope)
            else:  # after the last block nobody reads the history
                past_k, past_v = block.project_keys_values(history, clean[i], past_rope)
            k, v = _join(past_k, k), _join(past_v, v)
            noisy = block.update(noisy, modulation[i], (q, k, v), context.text.keys_values[i])
            if i < last:
                history = block.update(history, clean[i], (past_q, k, v))

        pt, ph, pw = self.config.patch_size
        velocity_BCTHW: Tensor = rearrange(
            self.proj_out(self.norm_out(noisy, time_11D)),
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            t=frames,
            h=height,
            w=width,
            pt=pt,
            ph=ph,
            pw=pw,
        )
        return velocity_BCTHW

    def _modulation(self, timestep: Tensor | float | int) -> tuple[Tensor, tuple[Modulation, ...]]:
        """The embedded timestep [1, 1, D], and what each block makes of it."""
        time_11D, time_16D = self.condition_embedder(timestep)
        return time_11D, tuple(block.modulation(time_16D) for block in self.blocks)

    def _grid(self, latents_BCTHW: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of `latents_BCTHW`."""
        pt, ph, pw = self.config.patch_size
        _, _, t, h, w = latents_BCTHW.shape
        if h % ph or w % pw:
            raise ValueError(f"latents of {h} rows and {w} columns are not whole patches of {ph} x {pw}")
        return t // pt, h // ph, w // pw


def _join(past_BLNH: Tensor, noisy_BLNH: Tensor) -> Tensor:
    """Keys or values of all tokens. The history's may still be of batch 1."""
    return torch.cat([past_BLNH.expand(len(noisy_BLNH), -1, -1, -1), noisy_BLNH], dim=1)


def _patch(config: TransformerConfig, scale: int) -> nn.Conv3d:
    """Makes one token of each patch that is `scale` times as long, high and wide as the smallest."""
    t, h, w = config.patch_size
    kernel = (scale * t, scale * h, scale * w)
    return nn.Conv3d(config.in_channels, config.hidden_dim, kernel, stride=kernel)
