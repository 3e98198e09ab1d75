"""Tiny random pipelines of diffusers 0.42.1: the numerical oracle, and a writer of official folders."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKLWan,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from helios_core.demo.layout import make_tokenizer


@dataclass(frozen=True)
class Geometry:
    """A shape of model and picture. `layers`, `heads`, `head_dim`, `rope_dim`: of the transformer."""

    width: int
    height: int
    layers: int
    heads: int
    head_dim: int
    rope_dim: tuple[int, int, int]
    vae: dict[str, Any]


GEOMETRIES = {
    # Latents 8x16: history padding in rows, the VAE without patches as in the official checkpoints.
    "official-vae": Geometry(128, 64, 2, 2, 16, (8, 4, 4), {"base_dim": 4, "dim_mult": [1, 2, 4, 4]}),
    # Latents 24x16: upright, another rope split, the VAE that folds 2x2 pixels.
    "patched-vae": Geometry(
        128,
        192,
        3,
        3,
        24,
        (8, 8, 8),
        {
            "base_dim": 4,
            "dim_mult": [1, 2, 4],
            "temperal_downsample": [True, True],
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
        },
    ),
}


def make_scheduler(variant: str) -> Any:
    """The variant's scheduler as the official checkpoint configures it."""
    if variant == "base":
        return HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True, time_shift_type="exponential")
    if variant == "mid":
        return HeliosScheduler()
    return HeliosDMDScheduler(use_dynamic_shifting=True, time_shift_type="linear")


def make_pipeline(variant: str, geometry: Geometry) -> Any:
    """A pipeline of this variant and shape with random weights."""
    torch.manual_seed(geometry.width + geometry.height)
    parts = {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(),
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=384,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ).eval(),
        "vae": AutoencoderKLWan(num_res_blocks=1, **geometry.vae),
        "scheduler": make_scheduler(variant),
        "transformer": HeliosTransformer3DModel(
            num_attention_heads=geometry.heads,
            attention_head_dim=geometry.head_dim,
            rope_dim=geometry.rope_dim,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=geometry.layers,
        ),
    }
    if variant == "base":
        pipeline = HeliosPipeline(**parts)
    else:
        pipeline = HeliosPyramidPipeline(
            **parts, is_cfg_zero_star=variant == "mid", is_distilled=variant == "distilled"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_reference(
    pipeline: Any,
    geometry: Geometry,
    prompt: str,
    chunks: int,
    seed: int,
    steps: tuple[int, ...],
    output: str,
    *,
    amplify: bool = False,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    **inputs: Any,
) -> Any:
    """What diffusers makes: "latent": [1, 16, 9 * chunks, h, w]; "np": frames [1, F, H, W, 3] in [0, 1].

    With "latent" it puts the latents of an image (1) or video (9 per block) first. `inputs`: what else the pipeline
    takes, such as `image` or `video`.
    """
    if isinstance(pipeline, HeliosPyramidPipeline):
        inputs |= {"pyramid_num_inference_steps_list": list(steps), "is_amplify_first_chunk": amplify}
    else:
        inputs["num_inference_steps"] = steps[0]
    with ExitStack() as patches:
        patches.enter_context(mock.patch("torch.linalg.cholesky", _singular_factor))
        if output == "latent":  # it would decode every chunk all the same, and that takes most of the time
            nothing = torch.zeros(1, 3, 1, 1, 1)
            patches.enter_context(mock.patch.object(pipeline.vae, "decode", return_value=(nothing,)))
        return pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            width=geometry.width,
            height=geometry.height,
            num_frames=33 * chunks,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type=output,
            **inputs,
        ).frames


def _singular_factor(covariance: torch.Tensor) -> torch.Tensor:
    """Stands for torch.linalg.cholesky on the block covariance, which LAPACK refuses for the official gamma = 1/3.

    Worked out by hand: the factor of (4 I - J) / 3 + 1e-8 I. Without the jitter the last pivot would be 0.
    """
    third, low, last = -1 / 3, math.sqrt(2 / 9), math.sqrt(2 / 3)
    factor = [
        [1.0, 0.0, 0.0, 0.0],
        [third, 2 * low, 0.0, 0.0],
        [third, -low, last, 0.0],
        [third, -low, -last, 2e-4],
    ]
    return torch.tensor(factor).to(covariance)
