"""What a request may say and what becomes of it: the checks, and the arithmetic of frames, chunks and steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from helios_core.config import VARIANTS
from helios_core.errors import InvalidInput
from helios_core.spec import MAX_SEED, Limits, ModelCard, VideoRequest, VideoSpec

DISTILLED = next(variant for variant in VARIANTS if variant.name == "distilled")
CARD = ModelCard("demo", DISTILLED, stages=3, size_multiple=64, default_size=(128, 64))


def check(**fields: Any) -> VideoSpec:
    return VideoRequest(**{"prompt": "a sea", **fields}).check(CARD)


def refusal(**fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check(**fields)
    return caught.value


def test_what_is_left_out_is_the_models_own_choice() -> None:
    assert check() == VideoSpec(
        prompt="a sea",
        model="demo",
        width=128,
        height=64,
        seconds=5.0,
        seed=42,
        steps=(2, 2, 2),
        amplify_first_chunk=True,
        fps=24,
    )


# fields ▸ what they become
ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"size": "64x128"}, {"width": 64, "height": 128}),
    ({"size": "1920x512"}, {"width": 1920, "height": 512}),  # exactly the largest area
    ({"seconds": 1 / 24}, {"frames": 1, "chunks": 1}),
    ({"seconds": 600}, {"frames": 14400, "chunks": 437}),
    ({"seconds": 1 / 60, "fps": 60}, {"frames": 1}),
    ({"seconds": 1, "fps": 8}, {"frames": 8}),
    ({"seed": 0}, {"seed": 0}),
    ({"seed": MAX_SEED}, {"seed": 2**63 - 1}),
    ({"preset": "realtime"}, {"steps": (1, 1, 1)}),
    ({"preset": "quality"}, {"steps": (2, 2, 2)}),
    ({"steps": (1, 2, 50)}, {"steps": (1, 2, 50)}),
    ({"amplify_first_chunk": False}, {"amplify_first_chunk": False}),
    ({"prompt": "é" * 4096}, {"prompt": "é" * 4096}),
]


@pytest.mark.parametrize(("fields", "expected"), ACCEPTED)
def test_accepted(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = check(**fields)
    assert {name: getattr(spec, name) for name in expected} == expected


# fields, field named in the error, words that it must hold
REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"size": "100x100"}, "size", ["'100x100'", "multiples of 64", "1920", "983040", "nearest: 128x128"]),
    ({"size": "1280x832"}, "size", ["983040", "nearest: 1280x768"]),
    ({"size": "0x0"}, "size", ["nearest: 64x64"]),
    ({"size": "128"}, "size", ["WIDTHxHEIGHT", "128x64"]),
    ({"size": "128x64x1"}, "size", ["WIDTHxHEIGHT"]),
    ({"size": "128X64"}, "size", ["WIDTHxHEIGHT"]),
    ({"size": " 128x64"}, "size", ["WIDTHxHEIGHT"]),
    ({"size": ""}, "size", ["WIDTHxHEIGHT"]),
    ({"prompt": ""}, "prompt", ["not empty"]),
    ({"prompt": "\u3000\n"}, "prompt", ["not empty"]),
    ({"prompt": "é" * 4097}, "prompt", ["8194 bytes", "8192"]),
    ({"prompt": "\ud800"}, "prompt", ["Unicode"]),
    ({"prompt": "a\0"}, "prompt", ["NUL"]),
    ({"seconds": float("nan")}, "seconds", ["nan", "1/24", "600"]),
    ({"seconds": float("inf")}, "seconds", ["inf", "600"]),
    ({"seconds": 0}, "seconds", ["is 0;", "1/24"]),
    ({"seconds": 0.04}, "seconds", ["0.04", "1/24"]),
    ({"seconds": 600.1}, "seconds", ["600.1", "600"]),
    ({"fps": 7}, "fps", ["7", "8 to 60"]),
    ({"fps": 61}, "fps", ["61", "8 to 60"]),
    ({"seed": -1}, "seed", ["-1", "2^63-1"]),
    ({"seed": 2**63}, "seed", [str(2**63), "2^63-1"]),
    ({"steps": (1, 1)}, "steps", ["[1, 1]", "3 whole numbers from 1 to 50"]),
    ({"steps": (1, 0, 1)}, "steps", ["[1, 0, 1]", "1 to 50"]),
    ({"steps": (1, 51, 1)}, "steps", ["[1, 51, 1]", "1 to 50"]),
    ({"preset": "best"}, "preset", ["'best'", "realtime, quality"]),
    ({"preset": "quality", "steps": (1, 1, 1)}, "preset", ["'quality'", "not both"]),
]


@pytest.mark.parametrize(("fields", "name", "words"), REFUSED)
def test_refused(fields: dict[str, Any], name: str, words: list[str]) -> None:
    error = refusal(**fields)
    assert error.field == name
    assert str(error).startswith(f"{name} is ")
    assert all(word in str(error) for word in words), str(error)


def test_a_variant_that_does_not_amplify_refuses_it() -> None:
    plain = replace(CARD, variant=replace(DISTILLED, amplifies_first_chunk=False))
    assert not VideoRequest("a sea").check(plain).amplify_first_chunk
    with pytest.raises(InvalidInput, match="amplify_first_chunk is True; allowed: false"):
        VideoRequest("a sea", amplify_first_chunk=True).check(plain)


def test_the_operators_limits_hold_for_the_default_size_too() -> None:
    error = refusal(limits=Limits(max_side=64))
    assert (error.field, error.value) == ("size", "128x64")
    assert "nearest: 64x64" in error.allowed


@pytest.mark.parametrize("multiple", [32, 64, 192])
def test_suggested_sizes_are_accepted_and_none_is_nearer(multiple: int) -> None:
    rng = random.Random(multiple)
    card = replace(CARD, size_multiple=multiple, default_size=(multiple, multiple))
    every = range(multiple, 1921, multiple)
    for _ in range(200):
        width, height = rng.randrange(3000), rng.randrange(3000)
        try:
            VideoRequest("a sea", f"{width}x{height}").check(card)
        except InvalidInput as error:
            suggested = error.allowed.partition("nearest: ")[2].split(", ")
            assert len(suggested) == 2
            for size in suggested:
                spec = VideoRequest("a sea", size).check(card)
                assert f"{spec.width}x{spec.height}" == size
            w, h = map(int, suggested[0].split("x"))
            fitting = [(a, b) for a in every for b in every if a * b <= Limits().max_pixels]
            assert abs(w - width) + abs(h - height) == min(abs(a - width) + abs(b - height) for a, b in fitting)
        else:
            assert width % multiple == height % multiple == 0


@pytest.mark.parametrize(
    ("seconds", "fps", "frames", "lengths"),
    [
        (1, 24, 24, [24]),
        (1.375, 24, 33, [33]),
        (34 / 24, 24, 34, [33, 1]),
        (2.5, 24, 60, [33, 27]),
        (2.75, 24, 66, [33, 33]),
        (0.06, 24, 1, [1]),
        (5, 24, 120, [33, 33, 33, 21]),
        (1.5, 30, 45, [33, 12]),
    ],
)
def test_a_video_is_whole_chunks_and_a_cut_one(seconds: float, fps: int, frames: int, lengths: list[int]) -> None:
    spec = check(seconds=seconds, fps=fps)
    assert (spec.frames, spec.chunks) == (frames, len(lengths))
    assert [spec.frames_of_chunk(k) for k in range(spec.chunks)] == lengths
    assert [spec.first_frame_of_chunk(k) for k in range(spec.chunks)] == [33 * k for k in range(spec.chunks)]


def test_chunks_together_have_exactly_the_videos_frames() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        fps = rng.randint(8, 60)
        spec = check(seconds=rng.uniform(1 / fps, rng.choice([2, 600])), fps=fps)
        lengths = [spec.frames_of_chunk(k) for k in range(spec.chunks)]
        assert sum(lengths) == spec.frames == round(spec.seconds * fps) >= 1
        assert set(lengths[:-1]) <= {33}
        assert 1 <= lengths[-1] <= 33


@pytest.mark.parametrize(("amplify", "first"), [(True, (2, 4, 6)), (False, (1, 2, 3)), (None, (2, 4, 6))])
def test_only_the_first_chunk_is_amplified(amplify: bool | None, first: tuple[int, ...]) -> None:
    spec = check(steps=(1, 2, 3), amplify_first_chunk=amplify)
    assert [spec.steps_of_chunk(k) for k in range(3)] == [first, (1, 2, 3), (1, 2, 3)]


def test_long_values_are_cut_in_messages() -> None:
    assert len(str(refusal(size="9" * 5000))) < 200
