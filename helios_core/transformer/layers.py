"""The transformer's layers. Attributes carry the names of the official checkpoint, odd ones too: they are its keys.

Precision: c is the dtype of the big weights (bf16 or fp32). Normalisation, modulation, gates and residual sums are
computed in fp32, then rounded to c (kernels.py); matrix products run in c. The time embedder, every scale_shift_table
and norm2 are fp32 parameters, whatever c is.

Shapes: B batch, L tokens, S tokens that they look at, D model dim, N heads, H channels of a head, P = H/2.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import TransformerConfig
from helios_core.transformer.attention import attend
from helios_core.transformer.kernels import Affine, Quantised, add, add_norm, norm, rms_norm, write_heads

MAX_PERIOD = 10000  # ratio of the slowest to the fastest wave of the timestep embedding


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, D]: random, of variance 1/D. Not normal, as for that the meta device imports torch's compiler: a second
    of every sampler's start."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, rows, dim).uniform_(-bound, bound))


class JoinedLinear(nn.Module):
    """Linear layers with the same input as one: their results side by side."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.weight_ED = torch.cat([linear.weight.detach() for linear in linears])
        self.bias_E = torch.cat([linear.bias.detach() for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, weight, bias in zip(linears, self.weight_ED.split(sizes), self.bias_E.split(sizes), strict=True):
            linear.weight.data, linear.bias.data = weight, bias

    def forward(self, x_BLD: Tensor, skip: int = 0) -> Tensor:
        """Without the first `skip` channels of the result."""
        return F.linear(x_BLD, self.weight_ED[skip:], self.bias_E[skip:])


class Attention(nn.Module):
    """The projections of multi-head attention. Queries and keys are RMS-normed over all heads together."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.heads = config.num_attention_heads
        self.eps = config.eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.to_qkv: nn.Module | None = None  # the three at once: what `join` or `to_fp8` makes of them

    def join(self) -> None:
        """Lays the weights of queries, keys and values side by side, so that one product makes all three.

        The three parameters become views of one tensor, so no memory is added. For weights that are in place.
        """
        self.to_qkv = JoinedLinear(self.to_q, self.to_k, self.to_v)

    def write_heads(
        self,
        x_BLD: Tensor | Quantised,
        rope_2L1P: Tensor,
        keys_BLNH: Tensor,
        values_BLNH: Tensor,
        *,
        look: bool = True,
    ) -> Tensor | None:
        """Puts the tokens' keys and values, turned by their places, into the last two; their queries, if they `look`
        at others: [B, L, N, H]."""
        if self.to_qkv is None:
            linears = (self.to_q, self.to_k, self.to_v) if look else (self.to_k, self.to_v)
            projected_BLE = torch.cat([linear(x_BLD) for linear in linears], dim=-1)
        else:
            projected_BLE = self.to_qkv(x_BLD, skip=0 if look else keys_BLNH.shape[2:].numel())
        gain_q, gain_k = self.norm_q.weight, self.norm_k.weight
        return write_heads(projected_BLE, gain_q, gain_k, rope_2L1P, self.eps, keys_BLNH, values_BLNH)

    def queries(self, x_BLD: Tensor | Quantised) -> Tensor:
        """Of cross-attention, which knows no places: [B, L, N, H]."""
        return self._split(rms_norm(self.to_q(x_BLD), self.norm_q.weight, self.eps))

    def keys_values(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Of cross-attention, two of [B, L, N, H]; values are not normed."""
        k_BLD = rms_norm(self.to_k(x_BLD), self.norm_k.weight, self.eps)
        return self._split(k_BLD), self._split(self.to_v(x_BLD))

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        """Every query sees every key. [B, L, D], B that of the keys; queries of batch 1 serve them all."""
        out_BLNH = attend(q_BLNH.expand(len(k_BSNH), -1, -1, -1).contiguous(), k_BSNH, v_BSNH)
        out_BLD: Tensor = self.to_out(out_BLNH.flatten(2))
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

    def forward(self, x_BLD: Tensor | Quantised) -> Tensor:
        out_BLD: Tensor = self.net(x_BLD)
        return out_BLD


class Modulation(NamedTuple):
    """A timestep as one block sees it, for self-attention (1) and feed-forward (2). Gates are [D], fp32."""

    norm1: Affine
    gate1: Tensor
    norm2: Affine
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
        # What makes the inputs of the linear layers; `to_fp8` takes those that make them in FP8.
        self.norm: Callable[..., Tensor | Quantised] = norm
        self.add_norm: Callable[..., tuple[Tensor, Tensor | Quantised]] = add_norm

    def project(
        self,
        x_BLD: Tensor,
        m: Modulation,
        rope_2L1P: Tensor,
        keys_BLNH: Tensor,
        values_BLNH: Tensor,
        *,
        look: bool = True,
    ) -> Tensor | None:
        """Self-attention's `Attention.write_heads`."""
        a_BLD = self.norm(x_BLD, m.norm1, self.eps)
        return self.attn1.write_heads(a_BLD, rope_2L1P, keys_BLNH, values_BLNH, look=look)

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
        update_BLD = self.attn1(*heads)
        gate: Tensor | None = m.gate1
        if text is not None:
            learnt = Affine(self.norm2.weight, self.norm2.bias, learnt=True)
            x_BLD, a_BLD = self.add_norm(x_BLD, update_BLD, gate, learnt, self.eps)
            update_BLD, gate = self.attn2(self.attn2.queries(a_BLD), *text), None
        x_BLD, a_BLD = self.add_norm(x_BLD, update_BLD, gate, m.norm2, self.eps)
        return add(x_BLD, self.ffn(a_BLD), m.gate2)


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
        shift, scale = (self.scale_shift_table + time_11D)[0]
        return norm(x_BLD, Affine(1 + scale, shift), self.eps)
