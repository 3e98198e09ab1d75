"""The beginning that an input gives to a video: what decides it, and what it costs. tests/parity has the numbers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_core.conditioning import state_from_image, state_from_video
from helios_core.config import VaeConfig
from helios_core.state import StreamState
from helios_core.vae.latents import normalise
from helios_core.vae.model import WanVae

H, W = 16, 24  # latents of 2 x 3


class CountingVae(WanVae):
    """Notes how many frames each encode gets."""

    encoded: list[int]

    def encode(self, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded.append(frames_BCTHW.shape[2])
        return super().encode(frames_BCTHW)


@pytest.fixture(scope="module")
def module() -> CountingVae:
    torch.manual_seed(0)
    return CountingVae(VaeConfig(base_dim=4, num_res_blocks=1)).requires_grad_(False)


@pytest.fixture
def vae(module: CountingVae) -> CountingVae:
    module.encoded = []
    return module


def clip(frames: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, H, W, 3), dtype=np.uint8)


def from_image(vae: WanVae, seed: int = 7, picture: int = 0) -> StreamState:
    return state_from_image(vae, clip(1, picture)[0], seed)


def from_video(vae: WanVae, frames: int, seed: int = 7, picture: int = 0) -> StreamState:
    video = clip(frames, picture)
    return state_from_video(vae, video[0], video[-33 * min(frames // 33, 3) :], frames, seed)


# name ▸ a state from a VAE, a seed and the number of a picture
STARTS: dict[str, Callable[..., StreamState]] = {
    "image": from_image,
    "video-33": lambda vae, **kwargs: from_video(vae, 33, **kwargs),
    "video-80": lambda vae, **kwargs: from_video(vae, 80, **kwargs),
    "video-140": lambda vae, **kwargs: from_video(vae, 140, **kwargs),
}


@pytest.mark.parametrize("name", STARTS)
def test_it_is_a_state_before_chunk_0(vae: WanVae, name: str) -> None:
    state = STARTS[name](vae)
    assert state.chunk_index == 0
    assert (state.history.shape, state.history.dtype) == ((1, 16, 19, 2, 3), torch.float32)
    assert (state.anchor.shape, state.anchor.dtype) == ((1, 16, 1, 2, 3), torch.float32)
    for tensor in (state.history, state.anchor):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, "a view keeps a larger tensor alive"


@pytest.mark.parametrize(("name", "filled"), [("image", 1), ("video-33", 9), ("video-80", 18), ("video-140", 19)])
def test_history_is_filled_from_its_end(vae: WanVae, name: str, filled: int) -> None:
    present = STARTS[name](vae).history.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert present.tolist() == [False] * (19 - filled) + [True] * filled


@pytest.mark.parametrize("name", STARTS)
def test_equal_inputs_give_equal_states(vae: WanVae, name: str) -> None:
    assert STARTS[name](vae, seed=7).to_bytes() == STARTS[name](vae, seed=7).to_bytes()
    assert STARTS[name](vae, seed=7).to_bytes() != STARTS[name](vae, seed=8).to_bytes()


@pytest.mark.parametrize("name", STARTS)
def test_the_state_goes_through_bytes(vae: WanVae, name: str) -> None:
    state = STARTS[name](vae)
    back = StreamState.from_bytes(state.to_bytes())
    for field in ("history", "anchor", "generator_state"):
        assert torch.equal(getattr(back, field), getattr(state, field))
    assert back.chunk_index == 0


@pytest.mark.parametrize("name", STARTS)
def test_the_input_stays_the_anchor(vae: WanVae, name: str) -> None:
    state = STARTS[name](vae)
    assert state.after(torch.ones(1, 16, 9, 2, 3), state.generator()).anchor is state.anchor


class SharpVae(WanVae):
    """Latents are the red of places 8 pixels and 4 frames apart, with next to no variance, as after training."""

    def encode(self, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        mean = frames_BCTHW[:, :1, ::4, ::8, ::8].repeat(1, self.config.z_dim, 1, 1, 1)
        return mean, torch.full_like(mean, -30.0)


@pytest.mark.parametrize("name", STARTS)
def test_the_seed_changes_the_input_but_little(name: str) -> None:
    vae = SharpVae(VaeConfig(base_dim=4, num_res_blocks=1))
    a, b = STARTS[name](vae, seed=7), STARTS[name](vae, seed=8)
    for one, other in ((a.anchor, b.anchor), (a.history, b.history)):
        differences = (one - other)[one != 0]
        assert 0.10 < differences.std() / math.sqrt(2) < 0.15  # noise is 11.1 to 13.5 % of each
    assert (a.anchor - STARTS[name](vae, seed=7, picture=1).anchor).std() > 0.2


def test_the_anchor_is_frame_0_and_the_history_the_end() -> None:
    vae = SharpVae(VaeConfig(base_dim=4, num_res_blocks=1))
    video = clip(80)
    state = state_from_video(vae, video[0], video[-66:], 80, seed=7)
    red = (
        torch.from_numpy(video[..., 0] / np.float32(127.5) - 1)[:, ::8, ::8].view(1, 1, 80, 2, 3).repeat(1, 16, 1, 1, 1)
    )
    expected = normalise(red, vae.config)
    blocks = torch.cat([expected[:, :, 14:47:4], expected[:, :, 47:80:4]], dim=2)
    for got, wanted in ((state.anchor, expected[:, :, :1]), (state.history[:, :, 1:], blocks)):
        noise = (got - wanted * (1 - 0.123)).std()  # 0.123: the mean share
        assert 0.10 < noise < 0.15


# name ▸ the draws by hand, in order: "randn" of so many latent frames, or "rand" of so many numbers
DRAWS = {
    "image": [("randn", 1), ("randn", 9), ("rand", 1), ("randn", 1), ("rand", 1), ("randn", 1)],
    "video-33": [("randn", 1), ("randn", 9), ("rand", 1), ("randn", 1), ("rand", 9), ("randn", 9)],
    "video-140": [("randn", 1), *[("randn", 9)] * 4, ("rand", 1), ("randn", 1), *[("rand", 9), ("randn", 9)] * 4],
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_drawn_in_the_reference_s_order(vae: WanVae, name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    drawn = []
    for kind, frames in DRAWS[name]:
        shape = (1, 16, frames, 2, 3) if kind == "randn" else (frames,)
        drawn.append(getattr(torch, kind)(shape, generator=generator))
    state = STARTS[name](vae, seed=7)
    assert torch.equal(state.generator_state, generator.get_state())

    first = torch.from_numpy(clip(int(name.partition("-")[2] or 1))[:1]).permute(3, 0, 1, 2)[None]
    mean, logvar = vae.encode(2 * (first.float() / 255) - 1)
    latents = normalise(mean + torch.exp(0.5 * logvar) * drawn[0], vae.config)
    share, noise = next((n, m) for n, m in itertools.pairwise(drawn) if n.numel() == 1)
    share = 0.111 + (0.135 - 0.111) * share
    torch.testing.assert_close(state.anchor, share * noise + (1 - share) * latents, rtol=0, atol=1e-6)


def test_the_image_s_own_latents_are_the_first_of_the_still_clip(vae: WanVae) -> None:
    """Why one encode is enough. Equal but for the rounding of the last layer, which may add up in another order."""
    image = torch.rand(1, 3, 1, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone, still = vae.encode(image), vae.encode(image.expand(-1, -1, 33, -1, -1))
    for one, other in zip(alone, still, strict=True):
        torch.testing.assert_close(one, other[:, :, :1], rtol=0, atol=1e-6)


def test_an_image_is_encoded_once(vae: CountingVae) -> None:
    from_image(vae)
    assert vae.encoded == [33]


@pytest.mark.parametrize(("frames", "blocks"), [(33, 1), (65, 1), (66, 2), (98, 2), (99, 3), (132, 3), (33 * 400, 3)])
def test_the_cost_of_a_video_does_not_grow_with_it(vae: CountingVae, frames: int, blocks: int) -> None:
    video = clip(33 * blocks)
    state_from_video(vae, video[0], video, frames, seed=7)
    assert vae.encoded == [1] + [33] * blocks


@pytest.mark.parametrize("layout", ["tensor", "read-only", "mirrored", "strided"])
def test_pixels_in_any_layout_are_taken(vae: WanVae, layout: str) -> None:
    video = clip(66)
    other = {
        "tensor": torch.from_numpy(video),
        "read-only": np.frombuffer(video.tobytes(), np.uint8).reshape(video.shape),
        "mirrored": video[:, :, ::-1].copy()[:, :, ::-1],
        "strided": video.repeat(2, axis=0)[::2],
    }[layout]
    expected = state_from_video(vae, video[0], video, 66, seed=7), state_from_image(vae, video[0], seed=7)
    got = state_from_video(vae, other[0], other, 66, seed=7), state_from_image(vae, other[0], seed=7)
    assert [state.to_bytes() for state in got] == [state.to_bytes() for state in expected]


def test_the_input_s_pixels_are_left_alone(vae: WanVae) -> None:
    video = clip(33)
    pixels = torch.from_numpy(video.copy())
    state_from_video(vae, pixels[0], pixels, 33, seed=7)
    assert torch.equal(pixels, torch.from_numpy(video))


def test_a_vae_in_bf16_gives_a_state_in_fp32(vae: CountingVae) -> None:
    half = copy.deepcopy(vae).to(torch.bfloat16)
    for start in STARTS.values():
        rough, exact = start(half), start(vae)
        assert rough.history.dtype == rough.anchor.dtype == torch.float32
        assert torch.equal(rough.generator_state, exact.generator_state)
        torch.testing.assert_close(rough.history, exact.history, rtol=0, atol=0.1)


IMAGE, VIDEO = clip(1)[0], clip(99)

# what is wrong ▸ image, words that the error must hold
BAD_IMAGES: dict[str, tuple[NDArray[Any], str]] = {
    "floats": (
        IMAGE.astype(np.float32),
        r"image has shape \(16, 24, 3\) and dtype float32; allowed: \[H, W, 3\], uint8",
    ),
    "grey": (IMAGE[..., 0], r"image has shape \(16, 24\)"),
    "transparent": (IMAGE[..., [0, 1, 2, 0]], r"\(16, 24, 4\)"),
    "channels first": (IMAGE.transpose(2, 0, 1), r"\(3, 16, 24\)"),
    "empty": (IMAGE[:0], r"\(0, 24, 3\)"),
    "a video": (VIDEO, r"\(99, 16, 24, 3\)"),
    "of odd sides": (IMAGE[:, :20], "20x16 cannot be encoded; allowed: multiples of 8"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_are_refused(vae: WanVae, name: str) -> None:
    image, words = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=words):
        state_from_image(vae, image, seed=7)


# what is wrong ▸ first frame, tail, frames, words that the error must hold
BAD_VIDEOS: dict[str, tuple[NDArray[Any], NDArray[Any], int, str]] = {
    "too short": (IMAGE, VIDEO[:32], 32, "the clip has 32 frames; allowed: 33 or more"),
    "tail too short": (IMAGE, VIDEO[:33], 66, r"tail of 66 frames has shape \(33, 16, 24, 3\); allowed: \(66, 16"),
    "tail too long": (IMAGE, VIDEO, 66, r"\(99, 16, 24, 3\); allowed: \(66, 16"),
    "tail of all frames": (IMAGE, VIDEO[:80], 80, r"\(80, 16, 24, 3\); allowed: \(66, 16"),
    "two sizes": (IMAGE[:8], VIDEO, 99, r"\(99, 16, 24, 3\); allowed: \(99, 8, 24, 3\)"),
    "first frame of floats": (IMAGE / 255, VIDEO, 99, "first frame .* dtype float64; allowed: .*uint8"),
    "tail of floats": (IMAGE, VIDEO / 255, 99, r"tail of 99 frames .* dtype float64; allowed: \[99, H, W, 3\], uint8"),
    "first frame is a clip": (VIDEO[:1], VIDEO, 99, r"first frame has shape \(1, 16, 24, 3\)"),
    "tail is a frame": (IMAGE, IMAGE, 33, r"tail of 33 frames has shape \(16, 24, 3\)"),
    "of odd sides": (IMAGE[:, :20], VIDEO[:, :, :20], 99, "20x16 cannot be encoded; allowed: multiples of 8"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_videos_that_cannot_be_are_refused(vae: WanVae, name: str) -> None:
    first, tail, frames, words = BAD_VIDEOS[name]
    with pytest.raises(ValueError, match=words):
        state_from_video(vae, first, tail, frames, seed=7)
