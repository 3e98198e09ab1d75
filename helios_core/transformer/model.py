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
from helios_core.transformer.kernels import Affine
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
        keys, values = self._room(len(tokens_BLD), tokens_BLD.shape[1])
        queries = self.blocks[0].project(tokens_BLD, clean[0], rope_2L1P, keys, values)
        assert queries is not None
        return ChunkContext(text, tokens_BLD, rope_2L1P, clean, (queries, keys, values))

    def join(self) -> None:
        """Makes the products of queries, keys and values one, see `Attention.join`: when the weights are in place."""
        for block in self.blocks:
            if block.attn1.to_qkv is None:
                block.attn1.join()

    def forward(
        self,
        latents_BCTHW: Tensor,
        timestep: Tensor | float | int,
        context: ChunkContext,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The velocity at `latents_BCTHW`, in c.

        `latents_BCTHW`: [B, C, 9, h, w], h and w those of the stage; any floating dtype, rounded to c. `timestep`:
        one number in [0, 1000], whole or fractional, for the whole batch; a tensor lies on the CPU or on `device`.
        `past`: an approximation. An empty list is filled with the history's keys and values in each block but the
        first, [B, L, N, H]; a full one is taken in their place, though they would have seen other noisy tokens.
        Latents and history may have batch 1 where the text has more: the velocity is then that for each text.
        Raises ValueError if h or w is odd.
        """
        frames, height, width = self._grid(latents_BCTHW)
        noisy = rearrange(self.patch_embedding(latents_BCTHW.to(self.dtype)), "b d t h w -> b (t h w) d").contiguous()
        rope = rope_table(self.config, CHUNK_NUMBERS, height, width, self.device)
        time_11D, modulation = self._modulation(timestep)

        history = context.history_BLD
        known = list(past or ())
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            batch, seen = max(len(noisy), len(history)), history.shape[1]
            keys, values = self._room(batch, seen + noisy.shape[1])
            past_queries = None
            if i == 0:
                past_queries = context.first_heads[0]
                keys[:, :seen], values[:, :seen] = context.first_heads[1:]
            elif known:
                keys[:, :seen], values[:, :seen] = known[i - 1]
            else:  # after the last block nobody reads the history
                past_queries = block.project(
                    history,
                    context.modulation[i],
                    context.rope_2L1P,
                    keys[:, :seen],
                    values[:, :seen],
                    look=i < last,
                )
                if past is not None:
                    past.append((keys[:, :seen].clone(), values[:, :seen].clone()))
            queries = block.project(noisy, modulation[i], rope, keys[:, seen:], values[:, seen:])
            assert queries is not None
            noisy = block.update(noisy, modulation[i], (queries, keys, values), context.text.keys_values[i])
            if i < last and not known:
                assert past_queries is not None
                history = block.update(history, context.modulation[i], (past_queries, keys, values))

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
        rows_N6D = torch.cat([block.scale_shift_table for block in self.blocks]) + time_16D.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = rows_N6D.unbind(1)
        by_block = zip(1 + scale1, shift1, gate1, 1 + scale2, shift2, gate2, strict=True)
        return time_11D, tuple(
            Modulation(Affine(gain1, shift1), gate1, Affine(gain2, shift2), gate2)
            for gain1, shift1, gate1, gain2, shift2, gate2 in by_block
        )

    def _room(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """For keys and for values, [B, L, N, H] in c, not yet written."""
        config = self.config
        shape = (batch, tokens, config.num_attention_heads, config.attention_head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return keys, values

    def _grid(self, latents_BCTHW: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of `latents_BCTHW`."""
        pt, ph, pw = self.config.patch_size
        _, _, t, h, w = latents_BCTHW.shape
        if h % ph or w % pw:
            raise ValueError(f"latents of {h} rows and {w} columns are not whole patches of {ph} x {pw}")
        return t // pt, h // ph, w // pw


def _patch(config: TransformerConfig, scale: int) -> nn.Conv3d:
    """Makes one token of each patch that is `scale` times as long, high and wide as the smallest."""
    t, h, w = config.patch_size
    kernel = (scale * t, scale * h, scale * w)
    return nn.Conv3d(config.in_channels, config.hidden_dim, kernel, stride=kernel)
