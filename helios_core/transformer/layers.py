"""The transformer's layers. Attributes carry the names of the official checkpoint, odd ones too: they are its keys.

Precision: c is the dtype of the big weights (bf16 or fp32). Normalisation, modulation, gates and residual sums are
computed in fp32, then rounded to c; matrix products run in c. The time embedder, every scale_shift_table and norm2
are fp32 parameters, whatever c is.

Shapes: B batch, L tokens, S tokens that they look at, D model dim, N heads, H channels of a head, P = H/2.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import TransformerConfig
from helios_core.transformer.rope import rotate

MAX_PERIOD = 10000  # ratio of the slowest to the fastest wave of the timestep embedding


def modulate(x_BLD: Tensor, shift_11D: Tensor, scale_11D: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then scale and shift: in fp32, rounded once to the dtype of `x_BLD`."""
    normed = F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps)
    return (normed * (1 + scale_11D) + shift_11D).to(x_BLD.dtype)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, D]: random, of variance 1/D. Not normal, as for that the meta device imports torch's compiler: a second
    of every sampler's start."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, rows, dim).uniform_(-bound, bound))


class Attention(nn.Module):
    """The projections of multi-head attention. Queries and keys are RMS-normed over all heads together."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def queries(self, x_BLD: Tensor) -> Tensor:
        """[B, L, N, H]"""
        return self._split(self.norm_q(self.to_q(x_BLD)))

    def keys_values(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Two of [B, L, N, H]; values are not normed."""
        return self._split(self.norm_k(self.to_k(x_BLD))), self._split(self.to_v(x_BLD))

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        """Every query sees every key. [B, L, D], B that of the keys; queries of batch 1 serve them all."""
        q_BLNH = q_BLNH.expand(len(k_BSNH), -1, -1, -1)
        q, k, v = (heads.transpose(1, 2) for heads in (q_BLNH, k_BSNH, v_BSNH))
        out_BNLH = F.scaled_dot_product_attention(q, k, v)
        out_BLD: Tensor = self.to_out(out_BNLH.transpose(1, 2).flatten(2))
        return out_BLD

    def _split(self, x_BLD: Tensor) -> Tensor:
        x_BLNH: Tensor = rearrange(x_BLD, "b l (n h) -> b l n h", n=self.heads)
        return x_BLNH


class FeedForward(nn.Module):
    """A wide hidden layer for each token by itself."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden_dim = config.hidden_dim, config.ffn_dim
        proj = nn.Sequential(OrderedDict(proj=nn.Linear(dim, hidden_dim)))
        self.net = nn.Sequential(proj, nn.GELU("tanh"), nn.Linear(hidden_dim, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = self.net(x_BLD)
        return out_BLD


class Modulation(NamedTuple):
    """A timestep as one block sees it, for self-attention (1) and feed-forward (2); each [1, 1, D], fp32."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Block(nn.Module):
    """One layer, for tokens that share a timestep: `project`, then `update` with the keys and values of all tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.eps = config.eps
        self.attn1 = Attention(config)
        self.attn2 = Attention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps)
        self.ffn = FeedForward(config)
        self.scale_shift_table = modulation_table(6, dim)

    def modulation(self, time_16D: Tensor) -> Modulation:
        """`time_16D`: a timestep's rows from `TimeTextEmbedding`."""
        return Modulation(*(self.scale_shift_table + time_16D.float()).chunk(6, dim=1))

    def project(self, x_BLD: Tensor, m: Modulation, rope_2L1P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, each [B, L, N, H]."""
        a_BLD = modulate(x_BLD, m.shift1, m.scale1, self.eps)
        k_BLNH, v_BLNH = self.attn1.keys_values(a_BLD)
        return rotate(self.attn1.queries(a_BLD), rope_2L1P), rotate(k_BLNH, rope_2L1P), v_BLNH

    def project_keys_values(self, x_BLD: Tensor, m: Modulation, rope_2L1P: Tensor) -> tuple[Tensor, Tensor]:
        """`project` for tokens that are seen but do not look."""
        k_BLNH, v_BLNH = self.attn1.keys_values(modulate(x_BLD, m.shift1, m.scale1, self.eps))
        return rotate(k_BLNH, rope_2L1P), v_BLNH

    def update(
        self,
        x_BLD: Tensor,
        m: Modulation,
        heads: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The tokens after this layer. `heads`: own queries, everybody's keys and values; `text`: its keys, values.

        Tokens of batch 1 take on the batch of what they see.
        """
        c = x_BLD.dtype
        x_BLD = (x_BLD.float() + self.attn1(*heads) * m.gate1).to(c)
        if text is not None:
            x_BLD = x_BLD + self.attn2(self.attn2.queries(self.norm2(x_BLD.float()).to(c)), *text)
        f_BLD: Tensor = self.ffn(modulate(x_BLD, m.shift2, m.scale2, self.eps))
        return (x_BLD.float() + f_BLD * m.gate2).to(c)


class TimeTextEmbedding(nn.Module):
    """What the tokens are told: the timestep (forward) and the prompt (text_embedder)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(config.freq_dim, dim),
                act=nn.SiLU(),
                linear_2=nn.Linear(dim, dim),
            )
        )
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(config.text_dim, dim),
                act=nn.GELU("tanh"),
                linear_2=nn.Linear(dim, dim),
            )
        )

    def forward(self, timestep: Tensor | float | int) -> tuple[Tensor, Tensor]:
        """The embedded timestep [1, 1, D] and its six rows for the blocks' modulation [1, 6, D], both in c."""
        weight = self.time_proj.weight
        half = self.freq_dim // 2
        index_F = torch.arange(half, dtype=torch.float32, device=weight.device)
        frequency_F = torch.exp(-math.log(MAX_PERIOD) * index_F / half)
        # A number on the CPU goes to the device as a kernel's argument: no copy, nothing to wait for.
        angle_F = torch.as_tensor(timestep, dtype=torch.float32).squeeze() * frequency_F
        waves_11F = torch.cat([angle_F.cos(), angle_F.sin()])[None, None]
        time_11D = self.time_embedder(waves_11F).to(weight.dtype)
        time_16D: Tensor = rearrange(self.time_proj(F.silu(time_11D)), "1 1 (rows d) -> 1 rows d", rows=6)
        return time_11D, time_16D


class OutputNorm(nn.Module):
    """The last modulation, by the embedded timestep itself."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.eps = config.eps
        self.scale_shift_table = modulation_table(2, dim)

    def forward(self, x_BLD: Tensor, time_11D: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_11D).chunk(2, dim=1)
        return modulate(x_BLD, shift, scale, self.eps)
