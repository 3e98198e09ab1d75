"""The demo checkpoint that is shipped, loaded by diffusers 0.42.1: the same prompt and seed give the same video."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeliosPyramidPipeline

from helios_core.checkpoints import Checkpoint
from helios_core.helios import Helios
from tests.parity.reference import Geometry, run_reference

PROMPT = "a red sun over a blue sea, drifting left"
SEED, CHUNKS = 7, 3


@pytest.fixture(scope="module")
def reference() -> Any:
    folder = Checkpoint.open("demo").folder
    pipeline = HeliosPyramidPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("steps, amplify", [((1, 1, 1), False), ((2, 2, 2), True)])
def test_diffusers_makes_the_same_video(reference: Any, steps: tuple[int, ...], amplify: bool) -> None:
    helios = Helios.load("demo", device="cpu", threads=1)
    width, height = helios.card.default_size
    size = Geometry(width, height, layers=0, heads=0, head_dim=0, rope_dim=(0, 0, 0), vae={})
    seconds = CHUNKS * 33 / 24
    stream = helios.stream(PROMPT, seconds=seconds, seed=SEED, steps=steps, amplify_first_chunk=amplify)
    chunks = list(stream)

    latents = run_reference(reference, size, PROMPT, CHUNKS, SEED, steps, "latent", amplify=amplify)
    torch.testing.assert_close(torch.cat([c.state.latents for c in chunks], dim=2), latents, rtol=0, atol=1e-4)

    frames = run_reference(reference, size, PROMPT, CHUNKS, SEED, steps, "np", amplify=amplify)[0]
    ours = np.concatenate([chunk.frames for chunk in chunks])
    assert np.abs(ours[: len(frames)] - frames * 255).max() <= 1  # it drops the last frames; ours are rounded
