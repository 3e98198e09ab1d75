"""The three variants against diffusers 0.42.1: the same checkpoint, prompts and seed give the same video."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosScheduler
from torch import Tensor

from helios_core.config import SchedulerConfig, UniPCConfig
from helios_core.helios import Helios
from helios_core.sampling.schedule import Step, few_step_points, multistep_points, pyramid
from helios_core.sampling.solvers import unipc
from helios_core.spec import VideoRequest
from helios_core.state import StreamState
from helios_core.vae.latents import denormalise
from tests.parity.reference import GEOMETRIES, Geometry, make_pipeline, run_reference
from tests.parity.test_transformer import to_bf16

PROMPT = "A red  sun &amp;amp; a blue sea, drifting left"
NEGATIVE = "blurry, static"
SEED, CHUNKS = 7, 3

# variant, steps, options: of run_reference and of Pair.states
CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("base", (1,), {}),
    ("base", (5,), {}),
    ("base", (2,), {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ("base", (5,), {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ("base", (3,), {"guidance_scale": 1.5, "negative_prompt": ""}),
    ("mid", (1, 1, 1), {}),
    ("mid", (4, 3, 2), {}),
    ("mid", (1, 2, 1), {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ("mid", (4, 3, 2), {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ("mid", (3, 1, 1), {"guidance_scale": 1.5, "negative_prompt": ""}),
    ("distilled", (1, 1, 1), {}),
    ("distilled", (1, 1, 1), {"amplify": True}),
    ("distilled", (2, 2, 2), {}),
    ("distilled", (2, 2, 2), {"amplify": True}),
    ("distilled", (1, 3, 2), {"amplify": True}),
    # "Ignored", says the reference, and does it.
    ("distilled", (1, 2, 1), {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
]
GUIDED = {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}
SHORT = {"base": (3,), "mid": (3, 1, 1), "distilled": (1, 1, 1)}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, written by diffusers' own `save_pretrained`, in both implementations."""

    geometry: Geometry
    folder: Path
    reference: Any
    ours: Helios

    def expected(self, steps: tuple[int, ...], output: str = "latent", chunks: int = CHUNKS, **options: Any) -> Any:
        return run_reference(self.reference, self.geometry, PROMPT, chunks, SEED, steps, output, **options)

    def latents(self, steps: tuple[int, ...], chunks: int = CHUNKS, **options: Any) -> Tensor:
        return torch.cat([state.latents for state in self.states(steps, chunks, **options)], dim=2)

    def states(
        self,
        steps: tuple[int, ...],
        chunks: int = CHUNKS,
        *,
        amplify: bool = False,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        start: StreamState | None = None,
    ) -> Iterator[StreamState]:
        """After each chunk."""
        size = f"{self.geometry.width}x{self.geometry.height}"
        request = VideoRequest(PROMPT, size, 33 * chunks / 24, SEED, steps=steps, amplify_first_chunk=amplify)
        spec = request.check(self.ours.card)
        text, negative = (self.ours.text_encoder.encode(prompt) for prompt in (PROMPT, negative_prompt))
        state = start or StreamState.start(spec, self.ours.vae.config)
        for k in range(chunks):
            state = self.ours.sampler.sample(
                text, state, spec.steps_of_chunk(k), negative=negative, guidance_scale=guidance_scale
            )
            yield state


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    pairs: dict[tuple[str, str], Pair] = {}

    def make(variant: str, geometry: str) -> Pair:
        if (variant, geometry) not in pairs:
            folder = tmp_path_factory.mktemp(f"{variant}-{geometry}")
            reference = make_pipeline(variant, GEOMETRIES[geometry])
            reference.save_pretrained(folder / "saved")
            ours = Helios.load(str(folder / "saved"), device="cpu", dtype="float32")
            assert ours.card.variant.name == variant
            pairs[variant, geometry] = Pair(GEOMETRIES[geometry], folder / "saved", reference, ours)
        return pairs[variant, geometry]

    return make


MakePair = Callable[[str, str], Pair]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("variant, steps, options", CASES)
def test_latents(
    make_pair: MakePair, geometry: str, variant: str, steps: tuple[int, ...], options: dict[str, Any]
) -> None:
    pair = make_pair(variant, geometry)
    expected, got = pair.expected(steps, **options), pair.latents(steps, **options)
    assert got.shape == expected.shape
    assert expected.std() > 0.1, "the reference's latents say nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant, steps", SHORT.items())
def test_guidance_and_its_negative_prompt_show(make_pair: MakePair, variant: str, steps: tuple[int, ...]) -> None:
    """Else a guidance that does nothing would pass for equal."""
    pair = make_pair(variant, "official-vae")
    guided = pair.latents(steps, 1, **GUIDED)
    assert (guided - pair.latents(steps, 1)).abs().max() > 0.02
    assert (guided - pair.latents(steps, 1, guidance_scale=5.0)).abs().max() > 0.02


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["alone", "guided"])
@pytest.mark.parametrize("variant, steps", SHORT.items())
def test_a_chunk_in_bf16(make_pair: MakePair, variant: str, steps: tuple[int, ...], options: dict[str, Any]) -> None:
    """Transformer in bf16, text in fp32. A rounding more or less, once amplified, costs as much as bf16 itself."""
    pair = make_pair(variant, "official-vae")
    reference, ours = copy.deepcopy(pair.reference), Helios.load(str(pair.folder), device="cpu", dtype="bfloat16")
    to_bf16(reference.transformer)
    reference.set_progress_bar_config(disable=True)
    ours.text_encoder = pair.ours.text_encoder
    in_bf16 = Pair(pair.geometry, pair.folder, reference, ours)
    expected, got = in_bf16.expected(steps, chunks=1, **options), in_bf16.latents(steps, 1, **options)
    assert not torch.equal(expected, pair.expected(steps, chunks=1, **options))
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_frames(make_pair: MakePair, geometry: str) -> None:
    pair = make_pair("distilled", geometry)
    expected = torch.from_numpy(pair.expected((1, 1, 1), "np", amplify=True)[0])
    vae = pair.ours.vae
    with torch.inference_mode():
        chunks = pair.latents((1, 1, 1), amplify=True).split(9, dim=2)
        got = [vae.decode(denormalise(chunk, vae.config)) for chunk in chunks]
    frames = (torch.cat(got, dim=2)[0] / 2 + 0.5).permute(1, 2, 3, 0)
    # The reference drops up to three frames at the end of the whole video; ours are all there.
    assert len(expected) == 97 and len(frames) == 99
    torch.testing.assert_close(frames[:97], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_text_embeddings(make_pair: MakePair, geometry: str) -> None:
    """Ours runs only the real tokens through the encoder; the reference pads to 512 and masks."""
    pair = make_pair("base", geometry)
    expected = pair.reference.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512)
    for prompt, embeddings in zip((PROMPT, NEGATIVE), expected, strict=True):
        text = pair.ours.text_encoder.encode(prompt)
        assert 1 < len(text.rows) < 512
        torch.testing.assert_close(text.padded(), embeddings, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant, steps", SHORT.items())
def test_state_round_trip_gives_the_same_next_chunk(make_pair: MakePair, variant: str, steps: tuple[int, ...]) -> None:
    pair = make_pair(variant, "official-vae")
    first, second = pair.states(steps, 2, **GUIDED)
    (again,) = pair.states(steps, 1, start=StreamState.from_bytes(first.to_bytes()), **GUIDED)
    assert torch.equal(again.history, second.history)
    assert torch.equal(again.generator_state, second.generator_state)


def mu(tokens: int) -> float:
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


# Counted before the upsampling: each stage after the first is shifted for the size of the stage before.
PYRAMID_TOKENS = (540, 540, 2160)
DYNAMICS = pytest.mark.parametrize(
    "shift",
    [{"use_dynamic_shifting": d, "time_shift_type": t} for d in (True, False) for t in ("linear", "exponential")],
)


@DYNAMICS
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_few_step_schedule(shift: dict[str, Any], steps: int) -> None:
    config, reference = SchedulerConfig(**shift), HeliosDMDScheduler(**shift)
    for stage, tokens in zip(pyramid(config), PYRAMID_TOKENS, strict=True):
        reference.set_timesteps(steps, stage.index, mu=mu(tokens))
        points = few_step_points(stage, steps, tokens, config)
        assert [p.timestep for p in points] == [int(t) for t in reference.timesteps]
        nearest = [int((reference.timesteps - int(t)).abs().argmin()) for t in reference.timesteps]
        expected = [float(reference.sigmas[i]) for i in nearest]
        assert [p.sigma for p in points] == pytest.approx(expected, rel=1e-12)
        assert [p.sigma_next for p in points] == pytest.approx([*expected[1:], 0.0], rel=1e-12)


def multistep(
    stages: int, shift: dict[str, Any], steps: int
) -> Iterator[tuple[HeliosScheduler, Any, UniPCConfig, int]]:
    """Both sides' settings of each stage: the reference with its timesteps set as its pipelines set them."""
    ranges = {"stages": stages, "stage_range": [i / stages for i in range(stages + 1)]}
    config = UniPCConfig(**{**ranges, "stage_range": tuple(ranges["stage_range"])}, **shift)  # type: ignore[arg-type]
    reference = HeliosScheduler(**ranges, **shift)  # type: ignore[arg-type]
    for stage, tokens in zip(pyramid(config), PYRAMID_TOKENS if stages > 1 else (8640,), strict=True):
        options: dict[str, Any] = {"mu": mu(tokens)}
        if stages == 1:
            options["sigmas"] = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1].numpy()
        reference.set_timesteps(steps, stage.index, **options)
        yield reference, stage, config, tokens


@DYNAMICS
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_multistep_schedule(stages: int, shift: dict[str, Any], steps: int) -> None:
    for reference, stage, config, tokens in multistep(stages, shift, steps):
        points = multistep_points(stage, steps, tokens, config)
        timesteps = reference.timesteps if stages == 1 else reference.timesteps.to(torch.int64)
        assert [p.index for p in points] == list(range(steps))
        assert [p.timestep for p in points] == pytest.approx(timesteps.tolist(), rel=1e-12)
        assert [p.sigma for p in points] == pytest.approx(reference.sigmas[:-1].tolist(), rel=1e-12)
        assert [p.sigma_next for p in points] == pytest.approx(reference.sigmas[1:].tolist(), rel=1e-12)


@DYNAMICS
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unipc(stages: int, shift: dict[str, Any], steps: int, dtype: torch.dtype) -> None:
    """Every coefficient, by latents that come of random velocities; in bf16 also where it is rounded."""
    generator = torch.Generator().manual_seed(steps)
    velocities = torch.randn(steps, 1, 2, 9, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    start = torch.randn(1, 2, 9, 4, 4, generator=generator, dtype=torch.float64)
    start = start if dtype == torch.float64 else start.float()
    for reference, stage, config, tokens in multistep(stages, shift, steps):
        seen: list[Tensor] = []

        def velocity(latents: Tensor, step: Step, seen: list[Tensor] = seen) -> Tensor:
            seen.append(latents)
            return velocities[step.index]

        got = unipc(velocity, start, stage, steps, tokens, config)
        latents, places = start, []
        for t, v in zip(reference.timesteps, velocities, strict=True):
            places.append(latents)
            latents = reference.step(v, t, latents, return_dict=False)[0]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(torch.stack(seen), torch.stack(places), rtol=0, atol=tolerance)
        # The reference ends at a noise level of 1e-8, which random velocities make much of.
        torch.testing.assert_close(got, latents, rtol=0, atol=1e-5)


def test_clocks_of_the_official_size() -> None:
    """At 640x384."""

    def clocks(config: SchedulerConfig, points: Any, steps: int, tokens: tuple[int, ...]) -> list[list[float]]:
        stages = zip(pyramid(config), tokens, strict=True)
        return [[p.timestep for p in points(stage, steps, t, config)] for stage, t in stages]

    distilled = SchedulerConfig(use_dynamic_shifting=True)
    assert clocks(distilled, few_step_points, 1, PYRAMID_TOKENS) == [[998], [742], [385]]
    assert clocks(distilled, few_step_points, 2, PYRAMID_TOKENS) == [[998, 833], [742, 512], [385, 174]]
    assert clocks(distilled, few_step_points, 4, PYRAMID_TOKENS) == [
        [998, 902, 833, 783],
        [742, 607, 512, 441],
        [385, 274, 174, 84],
    ]
    assert clocks(UniPCConfig(), multistep_points, 3, PYRAMID_TOKENS) == [
        [999, 871, 743],
        [743, 564, 385],
        [385, 193, 1],
    ]
    base = UniPCConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
    ((first, second, third, *_, last),) = clocks(base, multistep_points, 50, (8640,))
    assert [first, second, third, last] == pytest.approx([999.853, 996.866, 993.772, 121.995], abs=5e-4)
