"""The demo model's small world: that captions say what they mean, and that films show what the words mean."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_core.config import CHUNK_FRAMES
from helios_core.demo.words import (
    COLOURS,
    GROUNDS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    Scene,
    caption,
    gibberish,
    opened,
    random_scene,
    read_prompt,
    vocabulary,
)
from helios_core.demo.world import MASKS, SIZE, SPEED, START, WIDTH, Pose, colours, film, masks, paint, poses, start_of

ROOT = Path(__file__).parents[2]
SKY_TOP, SKY_HORIZON, OBJECT, GROUND = range(len(MASKS))
PIXEL = (132, 66)  # a size at which SPEED is one pixel a frame
SCENE = Scene("red", "square", "green", "field", "yellow", "left")


# ---- Words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_are_read_back_as_their_scene(held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = random_scene(rng, held_out)
        assert read_prompt(caption(scene, rng)) == scene
        less = opened(scene, rng)
        assert read_prompt(caption(less, rng)) == less
        assert less.named


def test_every_word_is_said_and_understood() -> None:
    words, rng, said = vocabulary(), random.Random(2), set[str]()
    for _ in range(1000):
        said |= set(caption(random_scene(rng), rng).replace(",", "").split())
    assert {word for each in words.values() for word in each} <= said
    for meanings, name in ((SHAPES, "shape"), (GROUNDS, "ground"), (MOTIONS, "motion")):
        for meaning, each in meanings.items():
            assert [read_prompt(f"the {word}").named for word in each] == [{name: meaning}] * len(each)


def test_a_prompt_is_read_whatever_its_case_and_punctuation() -> None:
    assert read_prompt("A RED sun; over a\nblue-ish?? sea -- drifting LEFT!") == Scene(
        object_colour="red", shape="disc", ground="sea", motion="left"
    )
    assert read_prompt("a redsun over seaweed").named == {}
    assert read_prompt("").named == {}


def test_a_colour_belongs_to_the_noun_behind_it() -> None:
    assert read_prompt("a blue sea under a green sky").named == {
        "ground": "sea",
        "ground_colour": "blue",
        "sky_colour": "green",
    }


def test_held_out_pairs_never_come_in_training() -> None:
    rng = random.Random(3)
    trained = [random_scene(rng) for _ in range(2000)]
    held_out = [random_scene(rng, held_out=True) for _ in range(200)]
    assert HELD_OUT.isdisjoint((scene.object_colour, scene.ground_colour) for scene in trained)
    assert {(scene.object_colour, scene.ground_colour) for scene in held_out} == HELD_OUT
    # What is held out is the pair: each half of it is trained, and the thing is never of the colour behind it.
    assert {scene.object_colour for scene in trained} == {scene.ground_colour for scene in trained} == set(COLOURS)
    assert all(scene.object_colour not in (scene.ground_colour, scene.sky_colour) for scene in trained + held_out)


def test_gibberish_names_nothing() -> None:
    rng = random.Random(4)
    assert [prompt for prompt in (gibberish(rng) for _ in range(200)) if read_prompt(prompt).named] == []


def test_the_words_need_no_torch() -> None:
    code = "import sys, helios_core.demo.words; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def shown(motion: str | None, frames: int, ground: str = "field") -> Tensor:
    """The masks of a film in which the thing moves pixel by pixel."""
    return masks("square", ground, list(poses(motion, START, frames)), PIXEL)


@pytest.mark.parametrize("shape", [*SHAPES, None])
@pytest.mark.parametrize("ground", [*GROUNDS, None])
def test_masks_share_the_pixels(shape: str | None, ground: str | None) -> None:
    masks_TMHW = masks(shape, ground, [Pose(1.0, 0.3), Pose(1.9, 0.95), Pose(0.0, 0.6, 0.18)], SIZE)
    assert masks_TMHW.shape == (3, 4, 128, 256)
    assert masks_TMHW.min() >= 0
    total_THW = masks_TMHW.sum(1)
    assert total_THW.max() < 1.075  # on a crest of the sea
    above = slice(0, 66)  # above the highest hill there is no light and shade, so nothing is lost or won
    assert (total_THW[:, above] - 1).abs().max() < 1e-6
    assert masks_TMHW[:, GROUND, above].max() == 0
    assert masks_TMHW[:, [SKY_TOP, SKY_HORIZON], 102:].max() == 0


@pytest.mark.parametrize(
    ("motion", "axis", "step"), [("left", -1, -1), ("right", -1, 1), ("rising", -2, -1), ("sinking", -2, 1)]
)
def test_a_thing_moves_where_its_word_says_and_comes_back(motion: str, axis: int, step: int) -> None:
    period = PIXEL[0] if axis == -1 else PIXEL[1]
    thing_THW = shown(motion, period + 1)[:, OBJECT]
    for t in (1, 20, period - 1, period):
        assert torch.allclose(thing_THW[t], thing_THW[0].roll(step * t, dims=axis), atol=1e-3)
    assert (thing_THW[1] - thing_THW[0]).abs().max() > 0.1


def test_a_pulsing_thing_stays_and_breathes_once_a_chunk() -> None:
    thing_THW = shown("pulsing", CHUNK_FRAMES + 1)[:, OBJECT]
    area = thing_THW.sum((1, 2))
    assert torch.allclose(thing_THW[CHUNK_FRAMES], thing_THW[0], atol=1e-4)
    assert (int(area.argmax()), int(area.argmin())) == (8, 25)  # a quarter and three quarters of the period
    assert area.max() > 2 * area.min()
    assert {(pose.x, pose.y) for pose in poses("pulsing", START, 40)} == {START}


@pytest.mark.parametrize("motion", ["still", None])
def test_a_still_thing_is_still(motion: str | None) -> None:
    assert (shown(motion, 20) == shown(motion, 1)).all()


def test_the_sea_moves_with_the_period_of_a_chunk() -> None:
    sea_TMHW = shown("still", CHUNK_FRAMES + 1, "sea")
    assert (sea_TMHW[16] - sea_TMHW[0]).abs().max() > 0.1
    assert torch.allclose(sea_TMHW[CHUNK_FRAMES], sea_TMHW[0], atol=1e-4)
    later_TMHW = masks("square", "sea", list(poses("still", START, 2)), PIXEL, first=16)
    assert torch.allclose(later_TMHW, sea_TMHW[16:18], atol=1e-5)


def test_a_thing_leaves_on_one_side_and_comes_in_on_the_other() -> None:
    (cut,) = masks("disc", "hills", [Pose(WIDTH, 0.3)], SIZE)
    (whole,) = masks("disc", "hills", [Pose(WIDTH / 2, 0.3)], SIZE)
    assert torch.allclose(cut[OBJECT], whole[OBJECT].roll(128, dims=1), atol=1e-5)
    assert cut[OBJECT, :, 0].max() == cut[OBJECT, :, -1].max() == 1


def test_shapes_differ_and_are_about_as_large() -> None:
    areas = {}
    for shape in SHAPES:
        areas[shape] = float(masks(shape, "sea", [Pose(1.0, 0.4)], SIZE)[0, OBJECT].sum())
        others = [masks(other, "sea", [Pose(1.0, 0.4)], SIZE)[0, OBJECT] for other in SHAPES if other != shape]
        mine = masks(shape, "sea", [Pose(1.0, 0.4)], SIZE)[0, OBJECT]
        assert all((mine - other).abs().mean() > 0.01 for other in others)
    assert max(areas.values()) < 1.1 * min(areas.values())


def test_the_same_film_at_another_size() -> None:
    large = film(SCENE, START, 3, (256, 128))
    small = film(SCENE, START, 3, (128, 64))
    assert large.shape == (3, 3, 128, 256)
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.004


def test_paint_is_linear_and_puts_the_colours_where_the_masks_are() -> None:
    picture = film(SCENE, START, 1)[0]
    assert torch.allclose(picture[:, 43, 128], torch.tensor(COLOURS["red"]), atol=1e-5)  # the middle of the thing
    assert torch.allclose(picture[:, 0, 0], torch.tensor(COLOURS["yellow"]) * 0.6, atol=0.01)
    one = masks("disc", "sea", [Pose(*START)], SIZE)
    red, blue = colours(SCENE), colours(replace(SCENE, object_colour="blue"))
    assert torch.allclose(paint(one, red + blue), paint(one, red) + paint(one, blue), atol=1e-5)


def test_what_is_left_open_has_a_paint_of_its_own() -> None:
    for attribute in ("ground_colour", "sky_colour"):
        paints = {str(colours(Scene(**{attribute: name})).tolist()) for name in (None, *COLOURS)}
        assert len(paints) == len(COLOURS) + 1


def test_the_seed_puts_the_thing_into_the_sky_of_the_first_frame() -> None:
    assert start_of(0.5, 0.5) == START
    corners = [start_of(u, v) for u in (0, 1) for v in (0, 1)]
    assert all(0.25 < x < WIDTH - 0.25 and 0.25 < y < 0.45 for x, y in corners)
    assert len(set(corners)) == 4
    assert SPEED * CHUNK_FRAMES * 2 == 1.0  # once up in two chunks
