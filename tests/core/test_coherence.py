"""The coherence figures, on videos for which they are known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from helios_core.coherence import coherence
from helios_core.errors import InvalidInput

Frames = npt.NDArray[np.uint8]
RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (119, 119, 119)


def plain(*colours: tuple[int, int, int], frames: int = 24) -> Frames:
    """`frames` frames of each colour in turn."""
    return np.concatenate([np.full((frames, 16, 24, 3), colour, np.uint8) for colour in colours])


def noise(frames: int, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)


def stripes(frames: int, colour: tuple[int, int, int], upright: bool) -> Frames:
    """Black and coloured, each 4 pixels wide."""
    on_N = np.arange(32) // 4 % 2
    on_HW = np.broadcast_to(on_N if upright else on_N[:, None], (32, 32))
    picture = (on_HW[..., None] * np.array(colour)).astype(np.uint8)
    return np.broadcast_to(picture, (frames, 32, 32, 3))


def test_a_still_picture_is_perfectly_coherent() -> None:
    picture = noise(1)
    result = coherence(np.repeat(picture, 72, axis=0))
    assert result.similarity == pytest.approx(1, abs=1e-5)
    assert result.drift == pytest.approx([0, 0, 0])
    assert len(set(result.sharpness)) == 1
    assert set(result.changes) == {0}
    assert (result.frames, len(result.changes), len(result.seams), result.seam_strength) == (72, 71, 2, 0)


# ---- Similarity of the first and the last second --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (stripes(24, RED, upright=True), 1),
        (stripes(24, BLUE, upright=True), 0.75),  # the same edges; of the colours black, half of the picture, is left
        (stripes(24, RED, upright=False), 0.5),  # the same colours, but other edges
        (stripes(24, BLUE, upright=False), 0.25),
    ],
    ids=["the same", "other colours", "other edges", "both"],
)
def test_similarity_is_half_of_colours_and_half_of_edges(last: Frames, expected: float) -> None:
    middle = noise(24).repeat(2, axis=1)[:, :32].repeat(2, axis=2)[:, :, :32]
    video = np.concatenate([stripes(24, RED, upright=True), middle, last])
    assert coherence(video).similarity == pytest.approx(expected, abs=1e-3)


def test_similarity_is_of_whole_seconds_and_does_not_mind_what_moves_within_one() -> None:
    rolled = np.stack([np.roll(stripes(1, RED, upright=True)[0], t, axis=1) for t in range(48)])
    assert coherence(rolled).similarity > 0.999
    late = np.concatenate([plain(RED, frames=47), plain(BLUE, frames=1)])
    # 1 of the last 24 frames is of another colour: sqrt(23 / 24) of the colours is left.
    assert coherence(late).similarity == pytest.approx(0.5 + 0.5 * math.sqrt(23 / 24), abs=1e-4)


# ---- Drift and sharpness per second ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "delta_e"),
    [(RED, GREEN, 170.57), (RED, BLUE, 176.31), (WHITE, (0, 0, 0), 100), (WHITE, GREY, 49.97), (RED, RED, 0)],
)
def test_drift_is_the_cie76_difference(
    first: tuple[int, int, int], second: tuple[int, int, int], delta_e: float
) -> None:
    assert coherence(plain(first, second)).drift == pytest.approx([0, delta_e], abs=0.05)


def test_drift_is_from_the_first_second() -> None:
    there, far, back = coherence(plain(RED, GREEN, RED)).drift
    assert (there, back) == (0, 0)
    assert far > 100


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    board_HW = (np.indices((16, 24)).sum(0) % 2 * 100).astype(np.uint8)
    video = np.concatenate([np.broadcast_to(board_HW[..., None], (24, 16, 24, 3)), plain(GREY)])
    # On a chessboard of 0 and 100 the Laplacian is 400 and -400.
    assert coherence(video).sharpness == pytest.approx([160_000, 0], rel=1e-4)


def test_a_video_that_blurs_loses_sharpness() -> None:
    sharp = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    soft = sum(np.roll(sharp.astype(np.float32), (dy, dx), (1, 2)) for dy in (0, 1) for dx in (0, 1)) / 4
    first, second = coherence(np.concatenate([sharp, soft.astype(np.uint8)])).sharpness
    assert second < first / 4


@pytest.mark.parametrize(
    ("fps", "frames", "seconds"), [(24, 71, 2), (24, 72, 3), (29.97, 90, 3), (12.5, 25, 2), (1, 5, 5)]
)
def test_seconds_follow_the_frame_rate_and_a_rest_is_left_out(fps: float, frames: int, seconds: int) -> None:
    result = coherence(noise(frames), fps=fps)
    assert (len(result.sharpness), len(result.drift)) == (seconds, seconds)


# ---- Seams ----------------------------------------------------------------------------------------------------------


def ramp(frames: int, chunk: int, jump: int) -> Frames:
    """Grey that rises by 1 from frame to frame and by `jump` from chunk to chunk."""
    level = np.cumsum([0] + [jump if t % chunk == 0 else 1 for t in range(1, frames)])
    return np.broadcast_to(level.astype(np.uint8)[:, None, None, None], (frames, 8, 8, 3))


@pytest.mark.parametrize("jump", [1, 5])
def test_seam_strength_is_the_jump_at_a_boundary_in_steps_of_inside(jump: int) -> None:
    result = coherence(ramp(99, 33, jump))
    assert result.seams == (jump, jump)
    assert result.seam_strength == pytest.approx(jump)


def test_chunks_may_be_of_another_length() -> None:
    video = ramp(60, 10, 4)
    assert coherence(video, chunk_frames=10).seam_strength == pytest.approx(4)
    assert coherence(video, chunk_frames=33).seam_strength == pytest.approx(1)


def test_one_chunk_has_no_seam() -> None:
    assert coherence(noise(50), chunk_frames=50).seam_strength is None
    assert coherence(noise(51), chunk_frames=50).seam_strength is not None


# ---- Input ----------------------------------------------------------------------------------------------------------


def test_frames_may_come_one_by_one_and_as_tensors() -> None:
    video = noise(50)
    assert coherence(frame for frame in video) == coherence(torch.from_numpy(video)) == coherence(video)


@pytest.mark.parametrize(("frames", "fps"), [(47, 24), (0, 24), (1, 1), (59, 29.97)])
def test_a_video_of_less_than_two_seconds_is_refused(frames: int, fps: float) -> None:
    with pytest.raises(InvalidInput, match=rf"video is 'a video of {frames} frames .*allowed: 2 s or more"):
        coherence(noise(frames), fps=fps)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((48, 16, 16), np.uint8),
        np.zeros((48, 3, 16, 16), np.uint8),
        np.zeros((48, 16, 16, 3)),
        noise(48)[:, :2],
    ],
    ids=["no channels", "channels first", "floats", "too small"],
)
def test_frames_of_another_kind_are_refused(frames: npt.NDArray[np.generic]) -> None:
    with pytest.raises(InvalidInput, match="uint8, 3x3 pixels or more"):
        coherence(frames)


def test_frames_of_changing_size_are_refused() -> None:
    with pytest.raises(InvalidInput, match="one size"):
        coherence([*noise(24), *noise(24)[:, :8]])


@pytest.mark.parametrize(("name", "value"), [("fps", 0), ("fps", math.nan), ("fps", math.inf), ("chunk_frames", 1)])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=name):
        coherence(noise(48), **{name: value})
