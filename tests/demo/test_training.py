"""What the demo model is trained on and with: the same thing that sampling does, only with gradients."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from helios_core.config import CHUNK_FRAMES
from helios_core.demo import codec, train_transformer, world
from helios_core.demo.codec import LinearCodec
from helios_core.demo.lessons import NO_MOTION, Lessons, Track, latest, seed_of, steered
from helios_core.demo.train_transformer import STAGES, TRANSFORMER, Student, Training, text_config
from helios_core.demo.words import TAUGHT_MOTIONS, random_scene
from helios_core.sampling.chunk import ChunkSampler
from helios_core.sampling.guidance import CLASSIFIER_FREE
from helios_core.sampling.noise import chunk_noise
from helios_core.sampling.schedule import Stage
from helios_core.sampling.solvers import few_step
from helios_core.state import StreamState
from helios_core.text import TextEncoder, blend
from helios_core.transformer.model import HeliosTransformer

CHUNK = (codec.CHANNELS, 9, 8, 16)


@pytest.fixture(scope="module")
def linear() -> LinearCodec:
    rng = random.Random(0)
    films = [world.film(random_scene(rng), (rng.random(), 0.3), CHUNK_FRAMES, codec.SIZE) for _ in range(12)]
    return LinearCodec.fit(films, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(torch.Generator().manual_seed(0)).requires_grad_(False)


def test_the_code_of_a_film_is_the_sum_of_its_parts(linear: LinearCodec) -> None:
    scene = random_scene(random.Random(3))
    masks = world.masks(
        scene.shape, scene.ground, list(world.poses(scene.motion, (1.0, 0.3), CHUNK_FRAMES)), codec.SIZE
    )
    whole = linear.encode(world.paint(masks, world.colours(scene)))
    parts = torch.einsum("pkthw,p->kthw", linear.terms(masks), world.colours(scene).flatten())
    torch.testing.assert_close(parts + linear.offset[:, None, None, None], whole, rtol=0, atol=1e-4)


def test_the_code_keeps_what_it_can_say_of_a_film(linear: LinearCodec) -> None:
    code = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.encode(linear.decode(code))[:, 1:], code[:, 1:], rtol=0, atol=1e-3)


def test_noise_can_be_steered_and_is_read_as_a_seed_gives_it() -> None:
    noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(1))
    track = Track((), (0.0, 0.0), uv=(0.2, 0.9))
    assert seed_of(steered(noise, track)) == pytest.approx(track.uv, abs=1e-4)
    drawn = [seed_of(chunk_noise((1, *CHUNK), torch.Generator().manual_seed(seed))[0]) for seed in range(200)]
    for values in zip(*drawn, strict=True):
        assert abs(sum(values) / 200 - 0.5) < 0.1 and min(values) < 0.1 and max(values) > 0.9


def test_a_past_is_that_of_a_stream_state() -> None:
    state = StreamState(0, torch.zeros(1, codec.CHANNELS, 19, 8, 16), None, torch.Generator().get_state())
    chunks = [torch.randn(1, *CHUNK) for _ in range(4)]
    for chunk in chunks:
        state = state.after(chunk, torch.Generator())
    assert torch.equal(latest(torch.cat([chunk[0] for chunk in chunks[-3:]], dim=1), 19), state.history[0])
    assert latest(chunks[0][0], 19)[:, :10].abs().max() == 0


def test_prompts_are_seen_as_in_sampling(student: Student) -> None:
    """512 rows, most of them zero, are one row with a weight; and a mix of two prompts is `blend`'s."""
    prompts = [[("a red sun over a blue sea", 1.0)], [("a green ball", 1 / 3), ("a pink moon, drifting left", 2 / 3)]]
    plain = HeliosTransformer(TRANSFORMER)
    plain.load_state_dict(student.transformer.state_dict())
    encoder = TextEncoder(student.tokenizer, student.text_encoder)
    latents, past = torch.randn(1, *CHUNK), torch.randn(1, codec.CHANNELS, 19, 8, 16)
    for prompt in prompts:
        rows = blend([(encoder.encode(text), share) for text, share in prompt]).padded()
        expected = plain(latents, 998, plain.begin_chunk(past[:, :, :1], past, plain.text_context(rows)))
        context = student.transformer.begin_chunk(past[:, :, :1], past, student.text_context([prompt]))
        torch.testing.assert_close(student.transformer(latents, 998, context), expected, rtol=0, atol=1e-4)


def test_a_student_begins_with_the_mean(linear: LinearCodec, student: Student) -> None:
    """Its velocity is the noise itself, so that its guess of the clean latents is about zero."""
    state = StreamState(0, torch.zeros(1, codec.CHANNELS, 19, 8, 16), None, torch.Generator().get_state())
    plain = HeliosTransformer(TRANSFORMER)
    plain.load_state_dict(student.transformer.state_dict())
    sampler = ChunkSampler(plain, train_transformer.SCHEDULER, few_step, CLASSIFIER_FREE)
    text = TextEncoder(student.tokenizer, student.text_encoder).encode("a red sun")
    assert sampler.sample(text, state, (1, 1, 1)).latents.square().mean() < 0.05


@pytest.mark.parametrize("later", [False, True])
def test_a_lesson_asks_what_sampling_asks(linear: LinearCodec, monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    """The transformer sees the noise levels and latents that two steps of the few-step solver show it."""
    training = Training(linear, steps=1, tracks=8, firsts=2)
    training.lessons.ripe = True
    lesson, stage = training.lessons.draw(1)._replace(own=torch.zeros(1, dtype=torch.int64)), STAGES[0]
    model = training.student.transformer
    asked: list[tuple[torch.Tensor, float]] = []
    forward = HeliosTransformer.forward

    def recorded(self: HeliosTransformer, x: torch.Tensor, timestep: float, context: object) -> torch.Tensor:
        asked.append((x.detach(), timestep))
        return forward(self, x, timestep, context)  # type: ignore[arg-type]

    monkeypatch.setattr(HeliosTransformer, "forward", recorded)
    monkeypatch.setattr(train_transformer, "LATER_STEPS", float(later))
    monkeypatch.setattr(train_transformer, "STEP_COUNTS", (2,))
    with torch.no_grad():
        training._loss(lesson, stage)
        history = lesson.past[:, :, -19:]
        context = model.begin_chunk(lesson.anchor, history, training.student.text_context(lesson.prompts))
        taught, asked[:] = list(asked), []

        def velocity(latents: torch.Tensor, step: object) -> torch.Tensor:
            return model(latents, step.timestep, context)  # type: ignore[attr-defined]

        start = taught[0][0]
        few_step(velocity, start, Stage(**vars(stage)), 2, 18, train_transformer.SCHEDULER)
    assert [t for _, t in taught] == [t for _, t in asked][: len(taught)] and len(taught) == (2 if later else 1)
    for (ours, _), (theirs, _) in zip(taught, asked, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_student_goes_on_as_sampling_does(linear: LinearCodec) -> None:
    training = Training(linear, steps=1, tracks=8, firsts=2)
    plain = HeliosTransformer(TRANSFORMER)
    plain.load_state_dict(training.student.transformer.state_dict())
    sampler = ChunkSampler(plain, train_transformer.SCHEDULER, few_step, CLASSIFIER_FREE)
    text = TextEncoder(training.student.tokenizer, training.student.text_encoder).encode("a red sun")
    past = torch.randn(1, codec.CHANNELS, 19, 8, 16)
    state = StreamState(2, past, past[:, :, :1], training.generator.get_state())
    made = training._chunk(past[:, :, :1], past, [[("a red sun", 1.0)]])
    torch.testing.assert_close(made, sampler.sample(text, state, (1, 1, 1)).latents, rtol=0, atol=1e-4)


def test_some_of_what_a_student_sees_of_the_past_is_its_own(linear: LinearCodec) -> None:
    training = Training(linear, steps=1, tracks=8, firsts=2)
    training.lessons.ripe = True
    lesson = training.lessons.draw(60)
    history, true = training._history(lesson), lesson.past[:, :, -19:]
    assert set(lesson.own.tolist()) == {0, 1, 2}
    for own in (0, 1, 2):
        same = (history == true).flatten(3).all(3).all(1)[lesson.own == own]  # [B, 19]
        assert same[:, : 19 - 9 * own].all() and not same[:, 19 - 9 * own :].any(), own


def test_a_few_steps_teach_something(linear: LinearCodec) -> None:
    """The same few chunks again and again, which need not be enough for others."""
    training = Training(linear, steps=12, tracks=8, firsts=8)
    training.lessons.draw = functools.cache(training.lessons.draw)  # type: ignore[method-assign]
    told = [progress.losses for progress in training.run()]
    for name in ("stage 0", "motion of the past"):
        losses = [each[name] for each in told]
        assert losses[-1] < losses[0], name
    assert text_config(training.average.tokenizer).vocab_size == training.average.tokenizer.get_vocab_size()


def test_a_lesson_tells_the_motion_of_its_past(linear: LinearCodec) -> None:
    """Of a clip's or a video's, not of a picture's, which shows none."""
    lessons = Lessons(linear, tracks=8, firsts=2, seed=0)
    lesson = lessons.draw(100)
    nothing = lesson.past[:, :, -9:-1].abs().amax((1, 2, 3, 4)) == 0  # a picture is one frame
    assert torch.equal(lesson.motion == NO_MOTION, nothing)
    assert lesson.motion.max() < len(TAUGHT_MOTIONS)
