"""The scorer: that it passes true films, soft ones too, and fails wrong ones for what is wrong with them alone."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_core.config import CHUNK_FRAMES
from helios_core.demo.score import fit, judge, score, score_windows
from helios_core.demo.words import COLOURS, MOTIONS, Scene, caption, random_scene
from helios_core.demo.world import SIZE, SPEED, START, VELOCITY, Pose, colours, film, masks, paint, poses, start_of
from helios_core.errors import InvalidInput
from helios_core.media.fragments import encode_fragment
from tests.core.media_files import i420

Frames = npt.NDArray[np.uint8]
HALF = (SIZE[0] // 2, SIZE[1] // 2)
SCENE = Scene("red", "disc", "green", "sea", "yellow", "left")
PROMPT = "a red sun over a green sea under a yellow sky, drifting left"
ALL = set(SCENE.named)
OF_THE_THING = {"object_colour", "shape", "motion"}


def pixels(film_TCHW: Tensor) -> Frames:
    """[T, H, W, 3], as a decoder gives them."""
    return (film_TCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def shot(scene: Scene, frames: int = CHUNK_FRAMES, start: tuple[float, float] = START) -> Frames:
    return pixels(film(scene, start, frames, HALF))


def wrong(frames: Frames, prompt: str = PROMPT) -> set[str]:
    return {name for name, right in score(frames, prompt).right.items() if not right}


def random_film(seed: int, frames: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, str]:
    rng = random.Random(seed)
    scene = random_scene(rng, held_out=seed % 2 == 0)
    return film(scene, start_of(rng.random(), rng.random()), frames, size), caption(scene, rng)


# ---- True films -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(48))
def test_true_films_are_right(seed: int) -> None:
    film_TCHW, prompt = random_film(seed, CHUNK_FRAMES)
    result = score(pixels(film_TCHW), prompt)
    assert result.all_right, (prompt, result.found)
    assert (len(result.right), result.percent) == (5 + ("sky" in prompt), 100)
    assert result.world > 0.98
    assert result.thing > 0.95


@pytest.mark.parametrize("seed", range(100, 116))
def test_true_films_are_right_after_the_encoder(seed: int) -> None:
    film_TCHW, prompt = random_film(seed, 48)
    frames = pixels(film_TCHW)
    fragments = [
        encode_fragment(i420(frames[first : first + CHUNK_FRAMES]), chunk_index=i, first_frame=first, fps=24)
        for i, first in enumerate(range(0, len(frames), CHUNK_FRAMES))
    ]
    file = io.BytesIO(fragments[0].init + b"".join(fragment.data for fragment in fragments))
    with av.open(file) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 48
    result = score(decoded, prompt)
    assert result.all_right, (prompt, result.found)


@pytest.mark.parametrize("seed", range(200, 216))
def test_true_films_are_right_at_another_size_and_blurred(seed: int) -> None:
    film_TCHW, prompt = random_film(seed, CHUNK_FRAMES, HALF)
    assert score(pixels(film_TCHW), prompt).all_right
    soft_TCHW = F.avg_pool2d(F.pad(film_TCHW, (2, 2, 2, 2), mode="circular"), 5, stride=1)
    assert not torch.equal(soft_TCHW, film_TCHW)
    result = score(pixels(soft_TCHW), prompt)
    assert result.all_right, (prompt, result.found)


def test_a_few_bad_frames_do_no_harm() -> None:
    frames = shot(SCENE)
    frames[[8, 20]] = np.random.default_rng(0).integers(0, 256, frames[:2].shape)
    result = score(frames, PROMPT)
    assert result.all_right
    assert result.track.frame_N.tolist() == [0, 4, 12, 16, 24, 28, 32]


def test_what_a_prompt_leaves_open_is_not_judged() -> None:
    result = score(shot(SCENE), "a red sun")
    assert result.right == {"object_colour": True, "shape": True}
    assert result.found == SCENE
    assert score(shot(SCENE), "hello").right == {}


def test_open_colours_are_found_open() -> None:
    scene = Scene(shape="diamond", ground="hills", motion="still")
    result = score(shot(scene), "a kite over the hills, still")
    assert result.all_right
    assert result.found == replace(scene, object_colour="white")


def test_tensors_will_do_as_well_and_frames_that_cannot_be_written_to() -> None:
    frames = shot(SCENE)
    assert score(torch.from_numpy(frames), PROMPT).all_right
    frames.setflags(write=False)
    assert score(frames, PROMPT).all_right


# ---- Wrong films ----------------------------------------------------------------------------------------------------


def test_swapped_colours_are_wrong() -> None:
    frames = shot(replace(SCENE, object_colour="green", ground_colour="red"))
    assert wrong(frames) == {"object_colour", "ground_colour"}


@pytest.mark.parametrize("attribute", ["object_colour", "ground_colour", "sky_colour"])
def test_the_nearest_other_colour_is_wrong(attribute: str) -> None:
    for name in COLOURS:
        paint_M3 = colours(Scene(**{attribute: name}))
        others = [other for other in COLOURS if other != name]
        near = min(others, key=lambda other: float((colours(Scene(**{attribute: other})) - paint_M3).norm()))
        # Around it all is left open, so that it stands against the same colours whatever it is.
        scene = Scene(**{"shape": "disc", "ground": "field", "motion": "still", attribute: name})
        noun = {"object_colour": "sun", "ground_colour": "field", "sky_colour": "sky"}[attribute]
        shown = fit(shot(scene, 16))
        assert judge(shown, f"a {name} {noun}").right[attribute], name
        assert not judge(shown, f"a {near} {noun}").right[attribute], (name, near)


@pytest.mark.parametrize("motion", VELOCITY)
def test_a_reversed_motion_is_wrong(motion: str) -> None:
    frames = shot(replace(SCENE, motion=motion))
    prompt = PROMPT.replace("left", motion)
    assert wrong(frames, prompt) == set()
    assert wrong(frames[::-1], prompt) == {"motion"}


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion != "still"])
def test_a_still_picture_is_wrong_for_what_moves(motion: str) -> None:
    frames = shot(replace(SCENE, motion=motion))
    frames[:] = frames[0]
    assert wrong(frames, PROMPT.replace("left", motion)) == {"motion"}
    assert wrong(frames, PROMPT.replace("left", "still")) == set()


@pytest.mark.parametrize("motion", MOTIONS)
def test_another_motion_is_wrong(motion: str) -> None:
    shown = fit(shot(replace(SCENE, motion=motion)))
    for other in MOTIONS:
        assert judge(shown, PROMPT.replace("left", other)).right == dict.fromkeys(ALL, True) | {
            "motion": other == motion
        }


def test_a_motion_that_turns_is_none() -> None:
    there = shot(SCENE)
    result = score(np.concatenate([there, there[::-1]]), PROMPT)
    assert {name for name, right in result.right.items() if not right} == {"motion"}
    assert result.found.motion is None


def test_a_thing_that_jumps_at_a_chunk_does_not_move_steadily() -> None:
    start = START[0] + 0.5, START[1]
    assert wrong(np.concatenate([shot(SCENE, 24), shot(SCENE, 24, start)])) == {"motion"}


@pytest.mark.parametrize(("attribute", "other"), [("shape", "square"), ("shape", "diamond"), ("ground", "field")])
def test_another_shape_or_ground_is_wrong(attribute: str, other: str) -> None:
    assert wrong(shot(replace(SCENE, **{attribute: other}))) == {attribute}


@pytest.mark.parametrize("grain", [1, 4, 16, 32])
def test_noise_is_never_right(grain: int) -> None:
    generator = torch.Generator().manual_seed(grain)
    rough = torch.randn(CHUNK_FRAMES, 3, SIZE[1] // grain, SIZE[0] // grain, generator=generator) * 0.25 + 0.5
    frames = pixels(F.interpolate(rough, size=SIZE[::-1], mode="bicubic"))
    # Whatever it may look like: no prompt finds anything.
    result = score(frames, PROMPT)
    assert result.found == Scene()
    assert not any(result.right.values())
    assert result.percent == 0


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_an_even_picture_shows_nothing(grey: int) -> None:
    assert score(np.full((CHUNK_FRAMES, 64, 128, 3), grey, np.uint8), PROMPT).found == Scene()


def test_without_a_thing_only_ground_and_sky_are_right() -> None:
    nowhere = [Pose(0.0, 0.0, -2.0)] * CHUNK_FRAMES
    assert wrong(pixels(paint(masks("disc", "sea", nowhere, HALF), colours(SCENE)))) == OF_THE_THING


def test_noise_for_most_of_the_time_is_wrong() -> None:
    frames = shot(SCENE)
    frames[:20] = np.random.default_rng(0).integers(0, 256, frames[:20].shape)
    assert wrong(frames) == ALL


# ---- Windows and the track ------------------------------------------------------------------------------------------


def test_a_change_of_the_prompt_shows_in_the_windows_and_leaves_the_motion_unbroken() -> None:
    later = replace(SCENE, object_colour="blue")
    way = list(poses("left", START, 3 * CHUNK_FRAMES))
    before_TMHW, after_TMHW = masks("disc", "sea", way, HALF).tensor_split([CHUNK_FRAMES])
    frames = pixels(torch.cat([paint(before_TMHW, colours(SCENE)), paint(after_TMHW, colours(later))]))
    changed = PROMPT.replace("red", "blue")
    first, middle, old, new = score_windows(
        frames, [(0, 33, PROMPT), (33, 66, changed), (66, 99, PROMPT), (66, 99, changed)]
    )
    assert [each.percent for each in (first, middle, new)] == [100, 100, 100]
    assert [name for name, right in old.right.items() if not right] == ["object_colour"]
    assert old.percent == pytest.approx(100 * 5 / 6)

    track = score(frames, changed).track
    assert track.frame_N.tolist() == list(range(0, 99, 4))
    assert np.abs(track.velocities - (-SPEED, 0)).max() < SPEED / 10
    assert np.abs(track.x_N - (START[0] - SPEED * track.frame_N)).max() < 0.02  # beyond the left side, too
    assert np.abs(track.y_N - START[1]).max() < 0.02


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_second_is_enough_to_tell_a_motion(motion: str) -> None:
    frames = shot(replace(SCENE, motion=motion), 3 * CHUNK_FRAMES)
    prompt = PROMPT.replace("left", motion)
    results = score_windows(frames, [(first, first + 24, prompt) for first in range(0, 75, 5)])
    assert [result.percent for result in results] == [100] * 15


def test_a_window_beyond_the_video_shows_nothing() -> None:
    (result,) = score_windows(shot(SCENE), [(100, 124, PROMPT)])
    assert (result.percent, result.world, result.thing, len(result.track.frame_N)) == (0, 0, 0, 0)


def test_poses_are_measured() -> None:
    way = [Pose(0.1, 0.9), Pose(1.9, 0.5, 0.2), Pose(1.0, 0.3, 0.3)]
    frames = pixels(paint(masks("diamond", "hills", way, SIZE), colours(SCENE)))
    shown = fit(frame for frame in np.repeat(frames, 4, axis=0))
    assert np.abs(shown.pose_N3 - [[pose.x, pose.y, pose.radius] for pose in way]).max() < 0.01


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 64, 64, 3), np.uint8),
        np.zeros((4, 3, 64, 128), np.uint8),
        np.zeros((4, 64, 128, 3), np.float32),
        np.zeros((64, 128, 3), np.uint8),
    ],
    ids=["square", "channels first", "floats", "one picture"],
)
def test_frames_of_another_kind_are_refused(frames: Frames) -> None:
    with pytest.raises(InvalidInput, match="twice as wide as high"):
        score(frames, PROMPT)


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(InvalidInput, match="without frames"):
        score([], PROMPT)
