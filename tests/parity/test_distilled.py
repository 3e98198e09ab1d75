"""Helios-Distilled against diffusers 0.42.1: the same checkpoint, prompt and seed give the same video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline

from helios_core.config import SchedulerConfig
from helios_core.helios import Chunk, Helios
from helios_core.sampling.schedule import few_step_points, pyramid
from helios_core.state import StreamState
from helios_core.vae.latents import denormalise
from tests.parity.reference import GEOMETRIES, Geometry, distilled_pipeline, run_reference

PROMPT = "A red  sun &amp;amp; a blue sea, drifting left"
SEED, CHUNKS = 7, 3


@pytest.fixture(scope="module", params=GEOMETRIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One checkpoint, written by diffusers' own `save_pretrained`, in both implementations."""
    geometry, folder = GEOMETRIES[request.param], tmp_path_factory.mktemp(request.param)
    reference = distilled_pipeline(geometry, folder)
    reference.save_pretrained(folder / "saved")
    ours = Helios.load(str(folder / "saved"), device="cpu", dtype="float32")
    return Pair(geometry, folder / "saved", reference, ours)


@dataclass(frozen=True)
class Pair:
    geometry: Geometry
    folder: Path
    reference: HeliosPyramidPipeline
    ours: Helios

    def expected(self, steps: tuple[int, ...], amplify: bool, output: str) -> Any:
        return run_reference(self.reference, self.geometry, PROMPT, CHUNKS, SEED, steps, amplify, output)

    def latents(self, steps: tuple[int, ...], amplify: bool) -> torch.Tensor:
        chunks = self.stream(CHUNKS, steps, amplify)
        return torch.cat([chunk.state.latents for chunk in chunks], dim=2)

    def stream(self, chunks: int, steps: tuple[int, ...], amplify: bool) -> Iterator[Chunk]:
        size = f"{self.geometry.width}x{self.geometry.height}"
        return self.ours.stream(
            PROMPT, size=size, seconds=33 * chunks / 24, seed=SEED, steps=steps, amplify_first_chunk=amplify
        )


@pytest.mark.parametrize("amplify", [False, True])
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 2, 2), (1, 3, 2)])
def test_latents(pair: Pair, steps: tuple[int, ...], amplify: bool) -> None:
    expected = pair.expected(steps, amplify, "latent")
    got = pair.latents(steps, amplify)
    assert got.shape == expected.shape
    assert expected.std() > 0.1, "the reference's latents say nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_frames(pair: Pair) -> None:
    expected = torch.from_numpy(pair.expected((1, 1, 1), True, "np")[0])
    vae = pair.ours.vae
    with torch.inference_mode():
        chunks = pair.latents((1, 1, 1), True).split(9, dim=2)
        got = [vae.decode(denormalise(chunk, vae.config)) for chunk in chunks]
    frames = (torch.cat(got, dim=2)[0] / 2 + 0.5).permute(1, 2, 3, 0)
    # The reference drops up to three frames at the end of the whole video; ours are all there.
    assert len(expected) == 97 and len(frames) == 99
    torch.testing.assert_close(frames[:97], expected, rtol=0, atol=1e-4)


def test_text_embeddings(pair: Pair) -> None:
    """Ours runs only the real tokens through the encoder; the reference pads to 512 and masks."""
    expected, _ = pair.reference.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    text = pair.ours.text_encoder.encode(PROMPT)
    assert 1 < len(text.rows) < 512
    torch.testing.assert_close(text.padded(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("shift_type", ["linear", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_schedule(dynamic: bool, shift_type: str, steps: int) -> None:
    config = SchedulerConfig(use_dynamic_shifting=dynamic, time_shift_type=shift_type)
    reference = HeliosDMDScheduler(use_dynamic_shifting=dynamic, time_shift_type=shift_type)
    for stage, tokens in zip(pyramid(config), (540, 540, 2160), strict=True):
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
        reference.set_timesteps(steps, stage.index, mu=mu)
        points = few_step_points(stage, steps, tokens, config)
        assert [p.timestep for p in points] == [int(t) for t in reference.timesteps]
        nearest = [int((reference.timesteps - int(t)).abs().argmin()) for t in reference.timesteps]
        expected = [float(reference.sigmas[i]) for i in nearest]
        assert [p.sigma for p in points] == pytest.approx(expected, rel=1e-12)
        assert [p.sigma_next for p in points] == pytest.approx([*expected[1:], 0.0], rel=1e-12)


def test_timesteps_of_the_official_size() -> None:
    """At 640x384, where the last two stages are shifted for the 540 and 2160 tokens of the stages before them."""
    config = SchedulerConfig(use_dynamic_shifting=True)
    stages = list(zip(pyramid(config), (540, 540, 2160), strict=True))
    clocks = {
        n: [[p.timestep for p in few_step_points(stage, n, tokens, config)] for stage, tokens in stages]
        for n in (1, 2, 4)
    }
    assert clocks[1] == [[998], [742], [385]]
    assert clocks[2] == [[998, 833], [742, 512], [385, 174]]
    assert clocks[4] == [[998, 902, 833, 783], [742, 607, 512, 441], [385, 274, 174, 84]]


def test_state_round_trip_gives_the_same_next_chunk(pair: Pair) -> None:
    first, second = pair.stream(2, (1, 1, 1), False)
    restored = StreamState.from_bytes(first.state.to_bytes())
    again = pair.ours.sampler.sample(pair.ours.text_encoder.encode(PROMPT), restored, (1, 1, 1))
    assert torch.equal(again.history, second.state.history)
    assert torch.equal(again.generator_state, second.state.generator_state)
