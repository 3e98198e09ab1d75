"""Image-to-video and video-to-video against diffusers 0.42.1: the same beginning, and the same video after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from helios_core.conditioning import state_from_image, state_from_video
from helios_core.helios import Helios
from helios_core.state import StreamState
from tests.parity.reference import GEOMETRIES, Geometry, make_pipeline, run_reference

PROMPT, NEGATIVE = "A red sun over a blue sea, drifting left", "rain"
SEED, CHUNKS = 7, 3
# variant ▸ steps per stage, guidance scale
RUNS: dict[str, tuple[tuple[int, ...], float]] = {
    "distilled": ((1, 1, 1), 1.0),
    "base": ((3,), 5.0),
    "mid": ((3, 2, 2), 5.0),  # the first two steps are not guided
}
# name ▸ frames
INPUTS = {
    "image": 1,
    "video-33": 33,  # one block, all of it
    "video-80": 80,  # two blocks; the first 14 frames are in neither, but frame 0 is the anchor
    "video-150": 150,  # four blocks, of which ours encodes three
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, written by diffusers' own `save_pretrained`, in both implementations."""

    geometry: Geometry
    reference: Any
    ours: Helios
    steps: tuple[int, ...]
    guidance_scale: float

    def clip(self, name: str) -> NDArray[np.uint8]:
        """Coarse squares of random colours, new ones in every frame, so that no frame may stand for another."""
        frames, rows, columns = INPUTS[name], self.geometry.height // 16, self.geometry.width // 16
        squares = np.random.default_rng(frames).integers(0, 256, (frames, rows, columns, 3), dtype=np.uint8)
        return squares.repeat(16, axis=1).repeat(16, axis=2)

    def run_reference(self, clip: NDArray[np.uint8]) -> Tensor:
        """The latents of the generated chunks."""
        images = [Image.fromarray(frame) for frame in clip]
        inputs: dict[str, Any] = {"image": images[0]} if len(images) == 1 else {"video": images}
        latents: Tensor = run_reference(
            self.reference,
            self.geometry,
            PROMPT,
            CHUNKS,
            SEED,
            self.steps,
            "latent",
            guidance_scale=self.guidance_scale,
            negative_prompt=NEGATIVE,
            **inputs,
        )
        return latents[:, :, -9 * CHUNKS :]  # before them comes what the input became

    def start(self, clip: NDArray[np.uint8]) -> StreamState:
        if len(clip) == 1:
            return state_from_image(self.ours.vae, clip[0], SEED)
        tail = 33 * min(len(clip) // 33, 3)
        return state_from_video(self.ours.vae, clip[0], clip[-tail:], len(clip), SEED)

    def latents(self, state: StreamState) -> Tensor:
        text, negative = (self.ours.text_encoder.encode(prompt) for prompt in (PROMPT, NEGATIVE))
        chunks = []
        for _ in range(CHUNKS):
            state = self.ours.sampler.sample(
                text, state, self.steps, negative=negative, guidance_scale=self.guidance_scale
            )
            chunks.append(state.latents)
        return torch.cat(chunks, dim=2)


def pairs(*variants: str) -> pytest.MarkDecorator:
    """Runs a test with the pair of each of these variants in each geometry."""
    params = [(variant, geometry) for variant in variants for geometry in GEOMETRIES]
    return pytest.mark.parametrize("pair", params, ids="-".join, indirect=True, scope="module")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant, name = request.param
    geometry, folder = GEOMETRIES[name], tmp_path_factory.mktemp(name)
    reference = make_pipeline(variant, geometry)
    reference.save_pretrained(folder / "saved")
    ours = Helios.load(str(folder / "saved"), device="cpu", dtype="float32")
    return Pair(geometry, reference, ours, *RUNS[variant])


@pairs(*RUNS)
@pytest.mark.parametrize("name", ["image", "video-80"])
def test_video(pair: Pair, name: str) -> None:
    clip = pair.clip(name)
    expected, got = pair.run_reference(clip), pair.latents(pair.start(clip))
    assert expected.std() > 0.1, "the reference's latents say nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


class Stop(Exception):
    """Raised where the reference has shown what is asked of it."""


@pairs("base")  # its transformer sees the noise as it was drawn
@pytest.mark.parametrize("name", INPUTS)
def test_start(pair: Pair, name: str) -> None:
    clip = pair.clip(name)
    call: dict[str, Tensor] = {}

    def first_call(_: torch.nn.Module, __: Any, arguments: dict[str, Tensor]) -> None:
        call.update(arguments)
        raise Stop

    handle = pair.reference.transformer.register_forward_pre_hook(first_call, with_kwargs=True)
    with pytest.raises(Stop):
        pair.run_reference(clip)
    handle.remove()
    anchor, newest = call["latents_history_short"].split(1, dim=2)
    history = torch.cat([call["latents_history_long"], call["latents_history_mid"], newest], dim=2)

    start = pair.start(clip)
    assert start.chunk_index == 0
    torch.testing.assert_close(start.anchor, anchor, rtol=0, atol=1e-5)
    torch.testing.assert_close(start.history, history, rtol=0, atol=1e-5)
    noise = call["hidden_states"]
    assert torch.equal(torch.randn(noise.shape, generator=start.generator()), noise)


@pairs("base")
def test_the_vae_sees_the_same_pixels(pair: Pair) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, axis=2)
    with mock.patch.object(pair.ours.vae, "encode", wraps=pair.ours.vae.encode) as encode:
        state_from_image(pair.ours.vae, levels, SEED)
    (frames,) = encode.call_args.args
    expected = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(levels), height=8, width=32)
    assert torch.equal(frames, expected.unsqueeze(2).expand(1, 3, 33, 8, 32))
