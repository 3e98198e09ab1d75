"""What a request may say and what becomes of it: the checks, and the arithmetic of frames, chunks and steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from helios_core.config import VARIANTS
from helios_core.errors import InvalidInput
from helios_core.spec import MAX_SEED, Limits, ModelCard, PromptAt, PromptChange, VideoRequest, VideoSpec

DISTILLED = next(variant for variant in VARIANTS if variant.name == "distilled")
CARD = ModelCard("random", DISTILLED, stages=3, size_multiple=64, default_size=(128, 64))


def check(**fields: Any) -> VideoSpec:
    return VideoRequest(**{"prompt": "a sea", **fields}).check(CARD)


def refusal(**fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check(**fields)
    return caught.value


def test_what_is_left_out_is_the_models_own_choice() -> None:
    assert check() == VideoSpec(
        prompt="a sea",
        model="random",
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


# Prompts on the way


def video(chunks: int = 12, *prompts: PromptChange, **fields: Any) -> VideoSpec:
    return replace(check(seconds=chunks * 33 / 24, **fields), prompts=prompts)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_jth_chunk_of_a_transition_has_j_nths_of_the_new_prompt(n: int) -> None:
    spec = video(12, PromptChange(2, "b", n))
    for chunk in range(12):
        j = min(n, max(0, chunk - 1))
        expected = {"a sea": 1 - j / n, "b": j / n}
        assert dict(spec.mix_of_chunk(chunk)) == pytest.approx({p: w for p, w in expected.items() if w})


def test_a_change_on_the_way_to_another_is_blended_with_what_was_in_force() -> None:
    spec = video(12, PromptChange(2, "b", 4), PromptChange(4, "c", 2))
    assert dict(spec.mix_of_chunk(3)) == pytest.approx({"a sea": 0.5, "b": 0.5})
    assert dict(spec.mix_of_chunk(4)) == pytest.approx({"a sea": 0.25, "b": 0.25, "c": 0.5})
    assert spec.mix_of_chunk(5) == (("c", 1.0),)


def test_a_prompt_that_comes_back_is_named_once() -> None:
    spec = video(12, PromptChange(1, "b", 2), PromptChange(2, "a sea", 2))
    assert dict(spec.mix_of_chunk(2)) == pytest.approx({"a sea": 0.75, "b": 0.25})
    assert spec.mix_of_chunk(3) == (("a sea", 1.0),)


def test_nothing_is_in_force_before_the_first_chunk() -> None:
    spec = video(12, PromptChange(0, "b", 9), PromptChange(1, "c", 2))
    assert spec.mix_of_chunk(0) == (("b", 1.0),)
    assert dict(spec.mix_of_chunk(1)) == pytest.approx({"b": 0.5, "c": 0.5})


def test_mixes_of_any_timeline() -> None:
    """Weights are positive and sum to 1, none jumps by more than the part of its transition that a chunk is, and what
    comes later changes nothing."""
    rng = random.Random(0)
    for _ in range(500):
        chunks = sorted(rng.sample(range(20), rng.randint(0, 8)))
        changes = [PromptChange(chunk, rng.choice("abcdef"), rng.choice((1, 2, 3, 5, 64))) for chunk in chunks]
        spec = video(20, *changes)
        before: dict[str, float] = {}
        for chunk in range(20):
            mix = dict(spec.mix_of_chunk(chunk))
            assert len(mix) == len(spec.mix_of_chunk(chunk))
            assert sum(mix.values()) == pytest.approx(1) and all(weight > 0 for weight in mix.values())
            last = max((change for change in changes if change.chunk <= chunk), key=lambda c: c.chunk, default=None)
            if last is None:
                assert mix == {"a sea": 1.0}
            elif chunk:
                most = 1 / last.transition_chunks + 1e-9
                for prompt in mix | before:
                    assert abs(mix.get(prompt, 0) - before.get(prompt, 0)) <= most
            so_far = replace(spec, prompts=tuple(change for change in changes if change.chunk <= chunk))
            assert so_far.mix_of_chunk(chunk) == spec.mix_of_chunk(chunk)
            before = mix


def test_a_change_at_every_chunk_of_the_longest_video() -> None:
    spec = check(seconds=600, fps=60)
    spec = spec.changed(*(PromptChange(k, f"prompt {k}", 64) for k in range(1, spec.chunks)))
    mix = spec.mix_of_chunk(spec.chunks - 1)
    assert spec.chunks == 1091 and sum(weight for _, weight in mix) == pytest.approx(1)
    assert mix[-1] == (f"prompt {spec.chunks - 1}", 1 / 64)


def test_changes_are_in_order_and_one_at_a_chunk() -> None:
    spec = video(6).changed(PromptChange(4, "b"), PromptChange(1, "c")).changed(PromptChange(4, "d", 1))
    assert spec.prompts == (PromptChange(1, "c"), PromptChange(4, "d", 1))


@pytest.mark.parametrize(
    ("at", "fps", "chunk"),
    [(0, 24, 0), (0.01, 24, 1), (1.375, 24, 1), (1.376, 24, 2), (3.3, 30, 3), (2.2, 30, 2), (4.125, 8, 1)],
)
def test_a_scheduled_change_takes_effect_at_the_first_chunk_that_starts_then_or_later(
    at: float, fps: int, chunk: int
) -> None:
    spec = check(seconds=20, fps=fps, prompts=(PromptAt(at, "b", 2),))
    assert spec.prompts == (PromptChange(chunk, "b", 2),)
    assert spec.first_frame_of_chunk(chunk) / fps >= at - 1e-9


# schedule of a video of 4 chunks ▸ words that the error must hold
BAD_SCHEDULES: list[tuple[tuple[PromptAt, ...], list[str]]] = [
    ((PromptAt(2, "b"), PromptAt(1, "c")), ["is 1;", "rising order"]),
    ((PromptAt(1, "b"), PromptAt(1.3, "c")), ["is 1.3;", "apart"]),
    ((PromptAt(5.5, "b"),), ["5.5", "less than seconds 5.5"]),
    ((PromptAt(4.2, "b"),), ["4.2", "4.125"]),
    ((PromptAt(-0.1, "b"),), ["-0.1"]),
    ((PromptAt(float("nan"), "b"),), ["nan"]),
    ((PromptAt(1, ""),), ["not empty"]),
    ((PromptAt(1, "b", 0),), ["transition_chunks from 1 to 64"]),
    ((PromptAt(1, "b", 65),), ["transition_chunks from 1 to 64"]),
    (tuple(PromptAt(k / 100, "b") for k in range(65)), ["65 of them", "at most 64"]),
]


@pytest.mark.parametrize(("schedule", "words"), BAD_SCHEDULES)
def test_bad_schedules(schedule: tuple[PromptAt, ...], words: list[str]) -> None:
    error = refusal(seconds=5.5, prompts=schedule)
    assert error.field == "prompts"
    assert all(word in str(error) for word in words), str(error)


# Videos that come from others

SEA = video(4, PromptChange(1, "b"), PromptChange(3, "c"), seed=5)


def test_an_open_ended_video_gets_its_length_when_it_ends() -> None:
    spec = check(seconds=None, fps=30, prompts=(PromptAt(5.5, "a hill"), PromptAt(3000, "a lake")))
    assert (spec.open_ended, spec.seconds, spec.chunks) == (True, 3600.0, 3273)
    over = spec.ended_after(6)
    assert (over.open_ended, over.frames, over.chunks) == (False, 6 * 33, 6)
    assert [change.prompt for change in over.prompts] == ["a hill"]
    assert over == replace(check(seconds=6.6, fps=30), prompts=over.prompts)
    assert spec.ended_after(3273).frames == 3600 * 30  # the last chunk is cut
    assert refusal(seconds=None, fps=7).field == "fps"


def test_extend() -> None:
    longer = SEA.extend(1.375, 4, None, 3, Limits())
    assert longer == replace(SEA, seconds=6.875)
    turned = SEA.extend(1.375, 4, "d", 2, Limits())
    assert turned.prompts == (*SEA.prompts, PromptChange(4, "d", 2))
    cut = replace(SEA, seconds=4.0, prompts=())
    assert cut.extend(0.125, 3, None, 3, Limits()).chunks == 3
    with pytest.raises(InvalidInput, match=r"seconds is 0.125; allowed: with a prompt more than 0.125"):
        cut.extend(0.125, 3, "d", 3, Limits())
    assert cut.extend(1 / 6, 3, "d", 3, Limits()).chunks == 4
    with pytest.raises(InvalidInput, match=r"seconds is 595; allowed: at most 594.5 more, which makes 600"):
        SEA.extend(595, 4, None, 3, Limits())


def test_fork() -> None:
    def forked(chunk: int, prompt: str | None = None, seed: int | None = None, **fields: Any) -> VideoSpec:
        return SEA.fork(chunk, prompt, 3, seed, fields.get("seconds"), Limits())

    assert forked(0) == forked(3) == SEA
    assert forked(1, "d").prompts == (PromptChange(1, "d"),)
    assert forked(2, "d").prompts == (PromptChange(1, "b"), PromptChange(2, "d"))
    assert forked(1, seconds=4).prompts == (PromptChange(1, "b"),)
    for chunk in (-1, 4):
        with pytest.raises(InvalidInput, match=f"chunk is {chunk}; allowed: a chunk of the new video: 0 to 3"):
            forked(chunk)
    assert forked(4, seconds=6).seconds == 6


def test_each_chunk_of_a_fork_has_its_seed() -> None:
    def seeded(spec: VideoSpec, chunk: int, seed: int | None) -> VideoSpec:
        return spec.fork(chunk, None, 3, seed, None, Limits())

    assert (seeded(SEA, 0, 6).seed, seeded(SEA, 0, 6).reseeds) == (6, ())
    twice = seeded(seeded(SEA, 1, 6), 3, 7)
    assert (twice.seed, twice.reseeds) == (5, ((1, 6), (3, 7)))
    assert seeded(twice, 2, 8).reseeds == ((1, 6), (2, 8))
    assert seeded(twice, 1, 8).reseeds == ((1, 8),)
    assert seeded(twice, 0, 8) == replace(SEA, seed=8)
    for chunk in range(4):
        assert seeded(twice, chunk, None) == twice, "the same noise again"
    with pytest.raises(InvalidInput, match="seed is -1"):
        seeded(SEA, 1, -1)


def test_remix() -> None:
    assert SEA.remix("d", Limits()) == replace(SEA, prompt="d", prompts=())
    assert SEA.fork(1, None, 3, 6, None, Limits()).remix("d", Limits()).reseeds == ()


# Words that a model knows

KNOWING = replace(CARD, vocabulary={"colour": ("red", "blue"), "thing": ("sun",)})
KNOWN = "colour: red, blue; thing: sun"


@pytest.mark.parametrize("prompt", ["red", "A RED city", "two trees,\nsun-lit", "the sun's", "redder than_blue_"])
def test_one_known_word_is_enough(prompt: str) -> None:
    assert KNOWING.note(prompt) is None


@pytest.mark.parametrize("prompt", ["a green moon", "sunny", "infrared", "42", "太阳"])
def test_a_note_names_the_prompt_and_all_words(prompt: str) -> None:
    note = KNOWING.note(prompt)
    assert note is not None
    assert note.startswith(f"the model random knows no word of {prompt!r} and ") and note.endswith(KNOWN)
    assert CARD.note(prompt) is None, "it may know any word"


def test_one_note_for_all_prompts_of_a_video() -> None:
    assert SEA.texts == ("a sea", "b", "c")
    mixed = replace(SEA, prompt="a red sun").changed(PromptChange(1, "rain"), PromptChange(2, "blue"))
    note = KNOWING.note(*mixed.changed(PromptChange(3, "rain")).texts)
    assert note is not None and "no word of 'rain' and " in note
    note = KNOWING.note(*SEA.texts, "d" * 8192)
    assert note is not None and "no word of 'a sea', 'b', 'c', 'ddd" in note and len(note) < 300
