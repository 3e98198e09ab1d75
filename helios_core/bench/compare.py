"""The same against diffusers: its modules hold our very tensors, its pipeline makes the same chunk, taking turns.

It is driven from a text's embeddings, with the history of a video that has gone on for some time and with the same
seed, so that it draws the noise that we draw. What it makes is compared with what we make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helios_core.bench.report import Row
from helios_core.bench.sections import Bench
from helios_core.bench.subject import SEED, Model, Subject, shown
from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS
from helios_core.errors import InvalidInput
from helios_core.sampling.noise import block_factor
from helios_core.vae.latents import LATENTS_PER_PASS, decode_chunk, denormalise, to_i420

EAGER, COMPILED = MODES = ("eager", "compiled")
# In this order: the VAE's attention has one head of 384 channels, for which cuDNN has no kernel.
FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def check(model: Model) -> None:
    """Raises InvalidInput if there is nothing to compare with."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise InvalidInput("compare", "diffusers", f"a machine where diffusers 0.42.1 is installed ({error})") from None
    if not model.card.variant.is_distilled:
        raise InvalidInput("compare", model.card.variant.name, "the variant distilled")


def compare(bench: Bench, mode: str) -> Iterator[Row]:
    """A chunk decoded, sampled, and both. `mode`: eager, as diffusers runs by itself; compiled: its blocks and its
    VAE's decoder compiled, with cuDNN's attention. Times are ours; `ratio` is how many times as long theirs are."""
    model = bench.subject.model
    theirs = pipeline(model)
    if mode == COMPILED:
        _compile(theirs)
    # Theirs is computed in fp32, where it fails for the official gamma. (No mock: torch's compiler wants a function.)
    factor = block_factor(model.sampler.scheduler.gamma).to(bench.subject.device)
    with mock.patch.object(torch.linalg, "cholesky", lambda _: factor):
        yield _decoded(bench, mode, theirs)
        for steps in bench.subject.steps:
            yield from _sampled(bench, mode, theirs, steps)


@torch.inference_mode()
def _decoded(bench: Bench, mode: str, theirs: Any) -> Row:
    vae = bench.subject.model.vae
    latents = denormalise(bench.subject.state().latents.to(vae.device, vae.decoder_dtype), vae.config)
    their_frames = _driven(mode, lambda: theirs.vae.decode(latents).sample)

    def frames() -> Tensor:
        return torch.cat(list(vae.decode_frames(latents, LATENTS_PER_PASS)), dim=2)

    return _row(bench, "a chunk decoded", frames, frames, their_frames)


def _sampled(bench: Bench, mode: str, theirs: Any, steps: tuple[int, ...]) -> Iterator[Row]:
    subject = bench.subject
    vae, prompt, state = subject.model.vae, next(subject.prompts()), subject.state()
    their_chunk = _driven(mode, _chunk(subject, theirs, prompt.padded().to(subject.device), steps))

    def latents() -> Tensor:
        return subject.model.sampler.sample(prompt, state, steps).latents

    label = f"{shown(steps)}: a chunk sampled"
    with mock.patch.object(theirs.vae, "decode", return_value=(torch.zeros(1, 3, 1, 1, 1),)):
        yield _row(bench, label, latents, latents, their_chunk)
    yield _row(bench, f"{label} and decoded", lambda: decode_chunk(vae, latents(), to_i420), latents, their_chunk)


def pipeline(model: Model) -> Any:
    """diffusers' pipeline over the very tensors of `model`."""
    import diffusers

    library: Any = diffusers  # its decorators hide its types
    library.utils.logging.set_verbosity_error()  # its scheduler warns of settings that its pipeline heeds
    sizes, vae_sizes = (dataclasses.asdict(part.config) for part in (model.transformer, model.vae))
    with model.transformer.device:
        transformer = library.HeliosTransformer3DModel(**{**sizes, "num_layers": 0})  # all that has buffers
    with torch.device("meta"):
        transformer.blocks = library.HeliosTransformer3DModel(**sizes).blocks
        vae = library.AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v for k, v in vae_sizes.items()})
    transformer.load_state_dict(model.transformer.state_dict(), strict=True, assign=True)
    # Contiguous: channels that lie last are ours to profit from. Of one dtype: its pipeline asks the encoder for it.
    decoder = model.vae.decoder_dtype
    vae_weights = {name: weight.to(decoder).contiguous() for name, weight in model.vae.state_dict().items()}
    vae.load_state_dict(vae_weights, strict=True, assign=True)
    for part in (transformer, vae):
        part.eval().requires_grad_(False)
    whole = library.HeliosPyramidPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=library.HeliosDMDScheduler.from_config(dataclasses.asdict(model.sampler.scheduler)),
        transformer=transformer,
        is_distilled=True,
    )
    whole.set_progress_bar_config(disable=True)
    return whole


def _chunk(subject: Subject, theirs: Any, prompt: Tensor, steps: tuple[int, ...]) -> Callable[[], Tensor]:
    """Makes the chunk after `subject.state()`, as its latents. `prompt`: [1, 512, D] where the transformer is."""
    state, device = subject.state(), subject.device
    assert state.anchor is not None
    past = {"image_latents": state.anchor.to(device), "video_latents": state.history.to(device)}

    def run() -> Tensor:
        latents: Tensor = theirs(
            prompt_embeds=prompt,
            guidance_scale=1.0,
            width=subject.width,
            height=subject.height,
            num_frames=CHUNK_FRAMES,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            pyramid_num_inference_steps_list=list(steps),
            add_noise_to_image_latents=False,
            add_noise_to_video_latents=False,
            **past,
        ).frames
        return latents[:, :, -CHUNK_LATENTS:]

    return run


def _row(
    bench: Bench, what: str, ours: Callable[[], object], result: Callable[[], Tensor], theirs: Callable[[], Tensor]
) -> Row:
    """`ours` and `theirs` are timed; `result` makes what is to be equal to what `theirs` makes."""
    expected = theirs()
    difference = (result().to(expected) - expected).abs().max().item()
    own, other = bench.clock.interleave(ours, theirs)
    figures = {
        "ratio": other.median / own.median,
        "diffusers_median_s": other.median,
        "diffusers_p10_s": other.quantile(0.1),
        "diffusers_p90_s": other.quantile(0.9),
        "max_difference": difference,
        "relative": difference / expected.abs().max().item(),
    }
    return Row(what, own, figures=figures)


def _compile(theirs: Any) -> None:
    """Block by block. `theirs.vae.compile()` would compile a forward that the pipeline never calls."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 64  # three stages, and the VAE's first latents; 8 were too few
    for block in theirs.transformer.blocks:
        block.compile(dynamic=False)
    theirs.vae.decoder.compile(dynamic=False)


def _driven(mode: str, theirs: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`theirs` with the attention of the mode: torch's choice, or the first of FASTEST that there is."""

    def run() -> Tensor:
        with sdpa_kernel(FASTEST, set_priority=True):
            return theirs()

    return run if mode == COMPILED else theirs
