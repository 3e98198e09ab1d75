"""The weights that the demo's transformer and text encoder start from: random, with some sense put in.

Each is meant to save minutes of training:
- The transformer starts as v = x, so that its guess of the clean latents is their mean.
- Prompts are 10 tokens in 512 rows, the others zero; cross-attention starts so that these together count as one.
- RoPE tells how far tokens are apart, not where they are. Heads of the first layer start as readers of coordinates:
  the history's mid tokens never move, so the attention that they get says where a noisy token is.
- Another head starts with the means of the noise's first two channels, which say where the thing shall start.
- Heads of the text encoder start with a look at a neighbour each, so that a colour finds its noun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from helios_core.config import TransformerConfig
from helios_core.transformer.model import HeliosTransformer

SMALL = 0.2  # of a layer's own scale: what layers add to the tokens at first, and the modulation by the timestep
TIME = 0.05  # the same of the embedded timestep

# Channels of a token: first the latents of its patch, to which no layer writes at first; then two for each class of
# tokens, one positive and one negative, so that a token's mean stays 0; then results of the heads below. The class of
# noisy tokens is large: so a token's norm depends little on its noise, which passes all layer norms unharmed.
PATCH = 64
CLASS = {"patch_short": 64, "patch_mid": 66, "patch_long": 68, "patch_embedding": 70}
CLASS_SIZE = {"patch_short": 3.0, "patch_mid": 3.0, "patch_long": 3.0, "patch_embedding": 8.0}
FROM_NOISE, FROM_COORDINATES = 72, 74
FROM_LAYERS = 38.0  # what all layers add to the square of a noisy token's norm, as measured

# Heads that read a coordinate: its pair of channels among those that RoPE turns, the phase at which it is read, about
# what is read in the mean, and how much of the difference is written. Pairs 0 to 5 turn with the frame, 6 to 10 with
# the row, 11 to 15 with the column.
READERS = {2: (1, 0.0, 0.2, 4.0), 3: (1, -2.3, 0.4, 4.0), 4: (12, -0.25, 0.55, 10.0), 5: (7, -0.5, 0.55, 10.0)}
SIGNS = torch.tensor([1.0, -1.0]) / math.sqrt(2)
READER_SIZE = 2.0  # of query and key before their norm
NOISE_GAIN = 30.0


@torch.no_grad()
def initialise_transformer(model: HeliosTransformer, generator: torch.Generator) -> None:
    """Draws every parameter of `model` anew, on the CPU in fp32."""

    weights = dict(model.named_parameters())
    config, dim = model.config, model.config.hidden_dim
    for name, weight in weights.items():
        if weight.ndim < 2 or "scale_shift_table" in name:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        small = SMALL if name.endswith(("to_out.0.weight", "net.2.weight", "time_proj.weight")) else 1.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * small / math.sqrt(weight[0].numel()))
    for patch, scale in (("patch_embedding", 1), ("patch_short", 1), ("patch_mid", 2), ("patch_long", 4)):
        weights[f"{patch}.weight"].copy_(_means_of_patches(config, scale))
        weights[f"{patch}.bias"][CLASS[patch] : CLASS[patch] + 2] = CLASS_SIZE[patch] * SIGNS
    # The embedding lists a patch by channel, row, column, the output by row, column, channel.
    order = torch.arange(PATCH).view(config.in_channels, -1).T.flatten()
    norm = math.sqrt((PATCH + CLASS_SIZE["patch_embedding"] ** 2 + FROM_LAYERS) / dim)
    weights["proj_out.weight"].zero_()
    weights["proj_out.weight"][torch.arange(PATCH), order] = norm

    weights["condition_embedder.time_embedder.linear_2.weight"].mul_(TIME)
    weights["condition_embedder.text_embedder.linear_2.weight"].mul_(math.sqrt(3))
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        weights[f"{block}.scale_shift_table"][:, [2, 5]] = 1.0  # gates
        for layer in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
            weights[f"{block}.{layer}.weight"][:PATCH] = 0.0
        weights[f"{block}.attn2.to_q.weight"][:, :PATCH] = 0.0  # which word a token reads shall not hang on its noise
        # Queries are far from the key that all zero rows share, the keys of words near it.
        signs = torch.randn(dim, generator=generator).sign()
        weights[f"{block}.attn2.to_q.bias"].copy_(-0.6 * signs)
        weights[f"{block}.attn2.to_k.bias"].copy_(0.2 * signs)
        weights[f"{block}.attn2.norm_q.weight"].fill_(1.5)
        weights[f"{block}.attn2.norm_k.weight"].fill_(1.5)
    _first_heads(weights, config)


def _means_of_patches(config: TransformerConfig, scale: int) -> Tensor:
    """A kernel [D, C, scale, 2 scale, 2 scale]: a patch, pooled by `scale`, in the token's first channels."""
    c, (t, h, w) = config.in_channels, config.patch_size
    copy = torch.eye(c * t * h * w).view(c * t * h * w, c, t, h, w)
    for axis in (2, 3, 4):
        copy = copy.repeat_interleave(scale, dim=axis) / scale
    kernel = torch.zeros(config.hidden_dim, *copy.shape[1:])
    kernel[: len(copy)] = copy
    return kernel


def _first_heads(weights: Mapping[str, Tensor], config: TransformerConfig) -> None:
    """Turns heads of the first layer's self-attention into readers of the noise and of coordinates."""
    size = config.attention_head_dim
    q, k, v, out = (weights[f"blocks.0.attn1.{layer}.weight"] for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    q_bias, out_bias = weights["blocks.0.attn1.to_q.bias"], weights["blocks.0.attn1.to_out.0.bias"]
    for head in (0, *READERS):
        rows = slice(head * size, (head + 1) * size)
        q[rows], k[rows], v[rows], out[:, rows] = 0.0, 0.0, 0.0, 0.0
    for channel in (0, 1):  # head 0: equal attention to all tokens
        v[channel, 4 * channel : 4 * channel + 4] = 0.5
        out[FROM_NOISE + channel, channel] = NOISE_GAIN
    mid = slice(CLASS["patch_mid"], CLASS["patch_mid"] + 2)
    alone = SIGNS / math.sqrt(config.hidden_dim)  # reads 1 of a token that has nothing but this class, after its norm
    for i, (head, (pair, phase, mean, gain)) in enumerate(READERS.items()):
        first = head * size
        q_bias[first + 2 * pair] = READER_SIZE * math.cos(phase)
        q_bias[first + 2 * pair + 1] = READER_SIZE * math.sin(phase)
        k[first + 2 * pair, mid] = READER_SIZE * alone
        v[first, mid] = alone
        out[FROM_COORDINATES + i, first] = gain
        out_bias[FROM_COORDINATES + i] = -gain * mean


@torch.no_grad()
def initialise_text_encoder(model: UMT5EncoderModel) -> None:
    """Adds to transformers' own random weights a look at the word before, the one after, and the one before that."""
    for block in model.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight
        for head, bucket in enumerate((1, len(bias) // 2 + 1, 2)):
            bias[bucket, head] = 4.0
