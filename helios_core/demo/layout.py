"""Writes a checkpoint folder in the official layout from configs and weights; `checkpoints.py` reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from helios_core.config import VARIANTS, SchedulerConfig, TransformerConfig, UniPCConfig, VaeConfig, Variant

if TYPE_CHECKING:  # who imports this need not load them (weights.py)
    from tokenizers import Tokenizer
    from transformers import UMT5Config

Weights = dict[str, Tensor]  # parameter ▸ its value, contiguous

SCHEDULERS = {  # of each variant, as its official checkpoint has it
    "base": UniPCConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True),
    "mid": UniPCConfig(),
    "distilled": SchedulerConfig(use_dynamic_shifting=True),
}


def write_layout(
    folder: Path,
    variant: str,
    *,
    text_encoder: tuple[UMT5Config, Weights],
    transformer: tuple[TransformerConfig, Weights],
    vae: tuple[VaeConfig, Weights],
    tokenizer: Tokenizer,
    shards: int = 1,
) -> None:
    """Writes model_index.json and the five parts' folders, which it makes where they are missing.

    `variant`: base, mid or distilled. Weights are a module's named parameters, of which a tied one stands once, and are
    written in the dtype that they have: fp32, bf16 or fp16. `tokenizer` must know <pad>, </s> and <unk>. `shards`: into
    so many files, with an index, go the text encoder's and the transformer's weights; 1 is one file without an index.
    """
    row = next(row for row in VARIANTS if row.name == variant)
    _write_json(folder / "model_index.json", _model_index(row))
    _write_config(folder / "scheduler/scheduler_config.json", row.scheduler_class, SCHEDULERS[variant])
    _write_tokenizer(folder / "tokenizer", tokenizer)

    text_config, text_weights = text_encoder
    _write_json(
        folder / "text_encoder/config.json",
        {**text_config.to_dict(), "architectures": ["UMT5EncoderModel"], "transformers_version": None},
    )
    _write_weights(folder / "text_encoder/model", text_weights, shards)
    transformer_config, transformer_weights = transformer
    _write_config(folder / "transformer/config.json", "HeliosTransformer3DModel", transformer_config)
    _write_weights(folder / "transformer/diffusion_pytorch_model", transformer_weights, shards)
    vae_config, vae_weights = vae
    _write_config(folder / "vae/config.json", "AutoencoderKLWan", vae_config)
    _write_weights(folder / "vae/diffusion_pytorch_model", vae_weights, shards=1)


def make_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """A Unigram tokenizer: a token for each of `words`, in whatever case, characters and bytes for all others."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    characters = ["▁", *(chr(c) for c in range(0x21, 0x7F))]
    vocabulary = [(piece, 0.0) for piece in special]
    vocabulary += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    vocabulary += [(character, -6.0) for character in characters]
    vocabulary += [(f"▁{word}", -4.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    if words:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


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


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", **special})


def _write_weights(stem: Path, weights: Weights, shards: int) -> None:
    if shards == 1:
        save_file(weights, stem.with_name(f"{stem.name}.safetensors"), {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"{stem.name}-{i + 1:05d}-of-{shards:05d}.safetensors"
        keys = sorted(weights)[i::shards]
        save_file({key: weights[key] for key in keys}, stem.with_name(name), {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    _write_json(
        stem.with_name(f"{stem.name}.safetensors.index.json"),
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_config(path: Path, class_name: str, config: Any) -> None:
    _write_json(path, {"_class_name": class_name, **dataclasses.asdict(config)})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
