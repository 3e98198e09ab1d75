"""What is measured: a model with its weights, the inputs that it is given, and the work that each part of it is.

Weights and inputs are never zeros or constants: a GPU draws less power on those, and so runs at higher clocks.

Shapes: B batch, C latent channels, T latent frames, h, w latent rows and columns; S text tokens, D text channels.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from helios_core.bench.measure import Work, count
from helios_core.checkpoints import DEFAULT_SIZE, Checkpoint
from helios_core.config import (
    CHUNK_FRAMES,
    CHUNK_LATENTS,
    EXACT,
    HISTORY_LATENTS,
    TEXT_TOKENS,
    VARIANTS,
    Approximations,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
)
from helios_core.errors import InvalidInput
from helios_core.sampling.chunk import ChunkSampler
from helios_core.sampling.guidance import CLASSIFIER_FREE
from helios_core.sampling.schedule import pyramid
from helios_core.sampling.solvers import SOLVERS
from helios_core.spec import Limits, ModelCard, VideoRequest
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings
from helios_core.transformer.fp8 import to_fp8, why_no_fp8
from helios_core.transformer.history import history_length
from helios_core.transformer.layers import JoinedLinear
from helios_core.transformer.model import HeliosTransformer
from helios_core.vae.model import WanVae
from helios_core.weights import load_sampler, load_vae, transformer_dtype, vae_dtype

SEED = 42
PROMPT_TOKENS = 40  # rows of a prompt's embeddings that are not zero
OFFICIAL = TransformerConfig()
# How chunks are made: exactly, and with what can be asked for.
WAYS = {
    "exact": EXACT,
    "fp8": Approximations(fp8=True),
    "history-stage": Approximations(history_refresh="stage"),
    "history-chunk": Approximations(history_refresh="chunk"),
    "fp8-history-chunk": Approximations(fp8=True, history_refresh="chunk"),
}
NO_LIMITS = Limits(max_side=2**16, max_pixels=2**32)  # whoever measures decides how long it may take


@dataclass(frozen=True)
class Model:
    """A transformer as a sampler runs it, and a VAE, on the device where they are measured."""

    card: ModelCard
    transformer: HeliosTransformer
    sampler: ChunkSampler
    vae: WanVae

    @classmethod
    def load(cls, name: str, device: torch.device, dtype: torch.dtype) -> Model:
        """A known name, a folder, or a hub id."""
        checkpoint = Checkpoint.open(name)
        sampler = load_sampler(checkpoint, device, dtype)
        transformer = cast(HeliosTransformer, sampler.model)
        return cls(checkpoint.card, transformer, sampler, load_vae(checkpoint, device))

    @classmethod
    def random(cls, transformer: TransformerConfig, vae: VaeConfig, device: torch.device, dtype: torch.dtype) -> Model:
        """Helios-Distilled of these shapes with random weights."""
        with torch.device("meta"):
            parts = HeliosTransformer(transformer), WanVae(vae)
        generator = torch.Generator(device).manual_seed(SEED)
        _fill(parts[0], generator, partial(transformer_dtype, dtype))
        _fill(parts[1], generator, partial(vae_dtype, device))
        parts[0].join()
        if device.type == "cuda":
            parts[1].lay_channels_last()
        variant = next(each for each in VARIANTS if each.name == "distilled")
        scheduler = SchedulerConfig(use_dynamic_shifting=True)
        card = ModelCard(
            id="random weights",
            variant=variant,
            stages=scheduler.stages,
            size_multiple=vae.scale_factor_spatial * transformer.patch_size[1] * 2 ** (scheduler.stages - 1),
            default_size=DEFAULT_SIZE,
        )
        sampler = ChunkSampler(parts[0], scheduler, SOLVERS[variant.scheduler_class], CLASSIFIER_FREE)
        return cls(card, parts[0], sampler, parts[1])


def shapes(layers: int, heads: int, vae_width: int) -> tuple[TransformerConfig, VaeConfig]:
    """The official shapes but for these; heads keep their 128 channels, the feed-forward its share of the width."""
    ffn_dim = OFFICIAL.ffn_dim * heads // OFFICIAL.num_attention_heads // 16 * 16
    transformer = replace(OFFICIAL, num_layers=layers, num_attention_heads=heads, ffn_dim=ffn_dim)
    return transformer, VaeConfig(base_dim=vae_width)


def shown(steps: tuple[int, ...]) -> str:
    """As it is asked for: 1,1,1"""
    return ",".join(map(str, steps))


def _samplers(model: Model, ways: Sequence[str]) -> dict[str, ChunkSampler]:
    """The model's own, and others of the same weights, which are there twice only in FP8."""
    made: dict[bool, HeliosTransformer] = {False: model.transformer}
    samplers = {}
    for name in ways:
        how = WAYS[name]
        if how.fp8 not in made:
            if (reason := why_no_fp8(model.transformer)) is not None:
                raise InvalidInput("ways", name, f"those without fp8: {reason}")
            tensors = [*model.transformer.parameters(), *_joined(model.transformer)]
            made[True] = copy.deepcopy(model.transformer, {id(tensor): tensor for tensor in tensors})
            to_fp8(made[True])
        own = model.sampler
        samplers[name] = ChunkSampler(made[how.fp8], own.scheduler, own.solver, own.guidance, how.history_refresh)
    return samplers


def _joined(transformer: HeliosTransformer) -> Iterator[Tensor]:
    for module in transformer.modules():
        if isinstance(module, JoinedLinear):
            yield from (module.weight_ED, module.bias_E)


def _fill(module: nn.Module, generator: torch.Generator, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Weights with which activations stay near unit variance, drawn where the generator is."""
    for name, shape in [(name, parameter.shape) for name, parameter in module.named_parameters()]:
        weight = torch.empty(shape, device=generator.device, dtype=dtype_of(name))
        if "norm" in name and name.endswith(("weight", "gamma")):
            weight.normal_(1.0, 0.02, generator=generator)
        elif len(shape) == 1 or name.endswith("table"):
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.normal_(0.0, math.prod(shape[1:]) ** -0.5, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    module.eval()


@dataclass(frozen=True)
class Subject:
    """A model at one size in pixels, with all that it is given.

    `steps`: the lists of steps per stage that chunks are made with. `samplers`: name ▸ the model's sampler, and others
    that make the same chunks in another way: each section about whole chunks measures them all.
    """

    model: Model
    width: int
    height: int
    steps: tuple[tuple[int, ...], ...]
    samplers: dict[str, ChunkSampler]

    @classmethod
    def of(
        cls, model: Model, size: str | None, steps: tuple[tuple[int, ...], ...], ways: Sequence[str] = ("exact",)
    ) -> Subject:
        """`size`: WIDTHxHEIGHT, None: the model's own; without `steps`: the model's presets; `ways`: of WAYS.

        Raises InvalidInput.
        """
        steps = steps or tuple(model.card.variant.presets.values())
        specs = [VideoRequest("-", size, steps=each, limits=NO_LIMITS).check(model.card) for each in steps]
        return cls(model, specs[0].width, specs[0].height, steps, _samplers(model, ways))

    @property
    def device(self) -> torch.device:
        return self.model.transformer.device

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns."""
        scale = self.model.vae.config.scale_factor_spatial
        return self.height // scale, self.width // scale

    @property
    def stage_sizes(self) -> list[tuple[int, int]]:
        """Latent rows and columns of each stage, coarse to fine."""
        h, w = self.latent_size
        return [(h >> halvings, w >> halvings) for halvings in reversed(range(self.model.card.stages))]

    @property
    def lengths(self) -> list[int]:
        """Tokens that each stage's self-attention is about: the chunk's and the history's."""
        h, w = self.latent_size
        history = history_length(h // 2, w // 2)
        return [CHUNK_LATENTS * (rows // 2) * (columns // 2) + history for rows, columns in self.stage_sizes]

    def ways(self) -> Iterator[tuple[str, ChunkSampler, tuple[int, ...]]]:
        """Every way to make a chunk that is measured: its name, the sampler, the steps."""
        for name, sampler in self.samplers.items():
            for steps in self.steps:
                yield f"{name}, {shown(steps)}", sampler, steps

    # ---- Inputs ------------------------------------------------------------------------------------------------------

    def prompts(self) -> Iterator[TextEmbeddings]:
        """One after the other, as many as are asked for, in the transformer's dtype."""
        generator = torch.Generator().manual_seed(SEED)
        while True:
            rows_SD = torch.randn(PROMPT_TOKENS, self.model.transformer.config.text_dim, generator=generator)
            yield TextEmbeddings.of(rows_SD.to(self.model.transformer.dtype))

    def state(self) -> StreamState:
        """A video that has gone on for some time."""
        generator = torch.Generator().manual_seed(SEED)
        c = self.model.vae.config.z_dim
        history = torch.randn(1, c, HISTORY_LATENTS, *self.latent_size, generator=generator)
        anchor = torch.randn(1, c, 1, *self.latent_size, generator=generator)
        return StreamState(3, history, anchor, torch.Generator().manual_seed(SEED).get_state())

    def frames(self) -> Tensor:
        """A chunk of pixels, [1, 3, 33, H, W] in [-1, 1], for the VAE."""
        vae = self.model.vae
        return (
            torch.rand(1, 3, CHUNK_FRAMES, self.height, self.width, device=vae.device, dtype=vae.encoder_dtype) * 2 - 1
        )

    # ---- Work --------------------------------------------------------------------------------------------------------

    @cached_property
    @torch.inference_mode()
    def work(self) -> dict[str, Work]:
        """Of each part: "text", "begin", "stage 1" and so on, "decode", "encode".

        Kinds of operation: "linear" and "attention" of the transformer, "vae" and "attention" of the VAE.
        """
        with torch.device("meta"):
            transformer, vae = HeliosTransformer(self.model.transformer.config), WanVae(self.model.vae.config)
            c, (h, w) = vae.config.z_dim, self.latent_size
            past = torch.empty(1, c, 1, h, w), torch.empty(1, c, HISTORY_LATENTS, h, w)
            prompt = torch.empty(1, TEXT_TOKENS, transformer.config.text_dim)
            frames = torch.empty(1, 3, CHUNK_FRAMES, self.height, self.width)
            stages = [torch.empty(1, c, CHUNK_LATENTS, *size) for size in self.stage_sizes]
        text = transformer.text_context(prompt)
        chunk = transformer.begin_chunk(*past, text)
        work = {
            "text": count("linear", partial(transformer.text_context, prompt)),
            "begin": count("linear", partial(transformer.begin_chunk, *past, text)),
            "decode": count("vae", partial(vae.decode, stages[-1])),
            "encode": count("vae", partial(vae.encode, frames)),
        }
        for i, latents in enumerate(stages, 1):
            work[f"stage {i}"] = count("linear", partial(transformer, latents, 500.0, chunk))
        return work

    def sampling(self, steps: tuple[int, ...]) -> Work:
        """Of a chunk's sampling, when its text is known."""
        total: Work = Counter(self.work["begin"])
        for i, n in enumerate(steps, 1):
            total.update({kind: n * operations for kind, operations in self.work[f"stage {i}"].items()})
        return total

    @property
    def clocks(self) -> list[float]:
        """The timestep at which each stage begins."""
        return [stage.timestep_first for stage in pyramid(self.model.sampler.scheduler)]
