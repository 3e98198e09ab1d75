"""Tiny checkpoints with random weights, in the official layout: the whole path runs on them, on a laptop.

    python -m helios_core.demo.checkpoint FOLDER [base | mid | distilled]

Its videos follow no prompt: they are coloured noise. The files are a function of the constants below alone, so that
everybody's demo checkpoints are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from helios_core.config import (
    VARIANTS,
    SchedulerConfig,
    TransformerConfig,
    UniPCConfig,
    VaeConfig,
    Variant,
)
from helios_core.transformer.model import HeliosTransformer
from helios_core.vae.model import WanVae

RECIPE = 1  # raise it when the files change: old ones in a cache are then left alone
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
SCHEDULERS = {
    "base": UniPCConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True),
    "mid": UniPCConfig(),
    "distilled": SchedulerConfig(use_dynamic_shifting=True),
}
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


def demo_checkpoint(variant: str = "distilled") -> str:
    """The folder of a variant's demo checkpoint, made on first use (about a second) in the user's cache."""
    name = "demo" if variant == "distilled" else f"demo-{variant}"
    folder = Path.home() / ".cache/helios-serve" / f"{name}-random-{RECIPE}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write_checkpoint(made, variant=variant)
        try:
            made.rename(folder)  # atomic: another process sees the whole folder or none
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(made)  # another process was faster; its files are the same
    return str(folder)


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
    row = next(row for row in VARIANTS if row.name == variant)
    _write_json(folder / "model_index.json", _model_index(row))
    _write_config(folder / "scheduler/scheduler_config.json", row.scheduler_class, SCHEDULERS[variant])
    _write_config(folder / "transformer/config.json", "HeliosTransformer3DModel", transformer)
    _write_config(folder / "vae/config.json", "AutoencoderKLWan", vae)
    text_config = UMT5Config(**{**TEXT_ENCODER, "d_model": transformer.text_dim})
    _write_json(
        folder / "text_encoder/config.json",
        {**text_config.to_dict(), "architectures": ["UMT5EncoderModel"], "transformers_version": None},
    )
    write_tokenizer(folder / "tokenizer")

    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        parts = {
            "text_encoder/model": UMT5EncoderModel(text_config),
            "transformer/diffusion_pytorch_model": HeliosTransformer(transformer),
            "vae/diffusion_pytorch_model": WanVae(vae),
        }
    for stem, module in parts.items():
        weights = _draw(module, generator)
        if stem.startswith("transformer") and variant in TRANSFORMER_SEEDS:
            weights = _draw(module, torch.Generator().manual_seed(seed + TRANSFORMER_SEEDS[variant]))
        if stem.startswith("vae"):
            save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})
        else:
            _write_shards(folder / stem, weights)


def _model_index(variant: Variant) -> dict[str, Any]:
    marks = {"is_cfg_zero_star": variant.is_cfg_zero_star, "is_distilled": variant.is_distilled}
    return {
        "_class_name": variant.pipeline_class,
        **(marks if variant.stages > 1 else {}),  # a HeliosPipeline has no such settings
        "scheduler": ["diffusers", variant.scheduler_class],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _draw(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
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


def _write_shards(stem: Path, weights: dict[str, Tensor]) -> None:
    weight_map: dict[str, str] = {}
    for i in range(SHARDS):
        name = f"{stem.name}-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        keys = sorted(weights)[i::SHARDS]
        save_file({key: weights[key] for key in keys}, stem.parent / name, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    _write_json(
        stem.parent / f"{stem.name}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_tokenizer(folder: Path) -> None:
    """A Unigram tokenizer over single characters with bytes for all others: any prompt has tokens."""
    special = ["<pad>", "</s>", "<unk>"]
    characters = ["▁", *(chr(c) for c in range(0x21, 0x7F))]
    vocabulary = [(piece, 0.0) for piece in special]
    vocabulary += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    vocabulary += [(character, -6.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    )


def _write_config(path: Path, class_name: str, config: Any) -> None:
    _write_json(path, {"_class_name": class_name, **dataclasses.asdict(config)})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), variant=sys.argv[2] if len(sys.argv) > 2 else "distilled")
