"""Tiny checkpoints with random weights, stand-ins for trained ones: fast, and the whole path runs on them.

    python -m helios_core.demo.stand_in FOLDER [base | mid | distilled]

Their videos follow no prompt: they are coloured noise. The files are a function of the constants below alone, so that
everybody's stand-ins are the same; `checkpoints.py` keeps them in a cache.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_core.config import TransformerConfig, VaeConfig
from helios_core.demo.layout import Weights, make_tokenizer, write_layout
from helios_core.transformer.model import HeliosTransformer
from helios_core.vae.model import WanVae

SHARDS = 2  # the real checkpoints are sharded, so these are too

TRANSFORMER = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=32,
    text_dim=64,
    ffn_dim=256,
    num_layers=2,
    rope_dim=(12, 10, 10),
)
VAE = VaeConfig(
    base_dim=8,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    in_channels=12,
    out_channels=12,
    patch_size=2,
)
TRANSFORMER_SEEDS = {"base": 1, "mid": 2}  # added to the seed; Distilled's transformer is drawn with the other parts
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": TRANSFORMER.text_dim,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def write_checkpoint(
    folder: Path,
    transformer: TransformerConfig = TRANSFORMER,
    vae: VaeConfig = VAE,
    seed: int = 0,
    variant: str = "distilled",
) -> None:
    """Writes a checkpoint of a variant with random weights of the given shapes into `folder`.

    Of the same shapes and seed, variants differ in the transformer's weights only, not in the text encoder's or VAE's.
    """
    from transformers import UMT5Config, UMT5EncoderModel  # here, as in weights.py

    text_encoder = UMT5Config(**{**TEXT_ENCODER, "d_model": transformer.text_dim})
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        parts = (UMT5EncoderModel(text_encoder), HeliosTransformer(transformer), WanVae(vae))
    text_weights, transformer_weights, vae_weights = (_draw(module, generator) for module in parts)
    if variant in TRANSFORMER_SEEDS:
        own = torch.Generator().manual_seed(seed + TRANSFORMER_SEEDS[variant])
        transformer_weights = _draw(parts[1], own)
    write_layout(
        folder,
        variant,
        text_encoder=(text_encoder, text_weights),
        transformer=(transformer, transformer_weights),
        vae=(vae, vae_weights),
        tokenizer=make_tokenizer(),
        shards=SHARDS,
    )


def _draw(module: nn.Module, generator: torch.Generator) -> Weights:
    return {name: _random(name, p, generator) for name, p in module.named_parameters()}


def _random(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    """A value that keeps activations near unit variance: gains near 1, tables and biases small, matrices by fan-in."""
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith(("weight", "gamma")):
        return 1 + 0.1 * noise
    if parameter.ndim < 2 or "table" in name or "relative_attention_bias" in name:
        return 0.1 * noise
    if name == "shared.weight":
        return noise
    return noise / math.sqrt(parameter[0].numel())


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), variant=sys.argv[2] if len(sys.argv) > 2 else "distilled")
