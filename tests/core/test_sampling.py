"""Guidance, and what a chunk asks of the transformer: how often, at which stage, with which texts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helios_core.checkpoints import Checkpoint
from helios_core.config import SchedulerConfig, UniPCConfig
from helios_core.sampling.chunk import TEXT_CONTEXTS, ChunkSampler
from helios_core.sampling.guidance import CFG_ZERO_STAR, CLASSIFIER_FREE, Guidance, classifier_free, zero_star
from helios_core.sampling.schedule import Step, pyramid
from helios_core.sampling.solvers import SOLVERS, unipc
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings
from helios_core.transformer.model import HeliosTransformer

BASE = UniPCConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
MID = UniPCConfig()


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def start() -> StreamState:
    return StreamState(0, torch.zeros(1, 2, 19, 8, 16), None, torch.Generator().manual_seed(7).get_state())


def text(seed: int) -> TextEmbeddings:
    return TextEmbeddings.of(draw(3, 4, seed=seed))


class Recorder:
    """A denoiser whose velocity for a text is the sum of its embeddings; notes what it is asked."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.texts: list[Tensor] = []  # that were embedded
        self.calls: list[tuple[tuple[int, ...], float]] = []  # size of the latents, timestep
        self.pasts: list[list[float] | None] = []  # what was kept of earlier runs: here, their timesteps

    def text_context(self, text: Tensor) -> Tensor:
        self.texts.append(text)
        return text.sum(dim=(1, 2))

    def begin_chunk(self, anchor: Tensor, history: Tensor, text: Tensor) -> Tensor:
        assert len(anchor) == len(history) == 1
        return text

    def __call__(self, latents: Tensor, timestep: float, context: Tensor, past: list[Any] | None = None) -> Tensor:
        assert len(latents) == 1
        self.pasts.append(None if past is None else list(past))
        if past == []:
            past.append(timestep)
        self.calls.append((tuple(latents.shape[-2:]), timestep))
        return context.view(-1, 1, 1, 1, 1).expand(-1, *latents.shape[1:])


def sampler(scheduler: SchedulerConfig = MID, guidance: Guidance = CFG_ZERO_STAR, solver: Any = unipc) -> ChunkSampler:
    return ChunkSampler(Recorder(), scheduler, solver, guidance)


@pytest.mark.parametrize("mix", [classifier_free, zero_star])
def test_scale_1_is_the_prompt_alone(mix: Any) -> None:
    a, b = draw(1, 2, 3, seed=0), draw(1, 2, 3, seed=1)
    torch.testing.assert_close(mix(a, b, 1.0), a)


def test_guidance_goes_beyond_the_prompt() -> None:
    a, b = draw(1, 2, 3, seed=0), draw(1, 2, 3, seed=1)
    torch.testing.assert_close(classifier_free(a, b, 3.0), a + 2 * (a - b))


def test_zero_star_knows_no_length_of_the_negative_velocity() -> None:
    a, b = draw(1, 2, 3, seed=0), draw(1, 2, 3, seed=1)
    expected = zero_star(a, b, 5.0)
    torch.testing.assert_close(zero_star(a, -7 * b, 5.0), expected)
    # Of equal directions nothing is left to go away from.
    torch.testing.assert_close(zero_star(a, 3 * a, 5.0), a)
    # All of the guidance is at right angles to the negative velocity.
    assert float(((expected - a) * b).sum()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(zero_star(a, torch.zeros_like(a), 5.0), 5 * a)


@pytest.mark.parametrize("mix", [classifier_free, zero_star])
def test_guidance_keeps_the_dtype_and_rounds_each_operation(mix: Any) -> None:
    a, b = draw(1, 8, 9, seed=0, dtype=torch.bfloat16), draw(1, 8, 9, seed=1, dtype=torch.bfloat16)
    if mix is zero_star:
        factor = (a.float() * b.float()).sum() / ((b.float() ** 2).sum() + 1e-8)
        scaled = b * factor.bfloat16()
    else:
        scaled = b
    difference = a - scaled
    expected = scaled + (5.0 * difference)
    assert mix(a, b, 5.0).dtype == torch.bfloat16
    assert torch.equal(mix(a, b, 5.0), expected)


# scheduler, guidance, scale, steps ▸ transformer runs per stage
RUNS: list[tuple[SchedulerConfig, Guidance, float, tuple[int, ...], list[int]]] = [
    (MID, CFG_ZERO_STAR, 5.0, (5, 3, 2), [3, 3, 2]),
    (MID, CFG_ZERO_STAR, 5.0, (2, 1, 1), [0, 1, 1]),
    (MID, CFG_ZERO_STAR, 5.0, (1, 1, 1), [0, 1, 1]),
    (MID, CFG_ZERO_STAR, 1.0, (5, 3, 2), [5, 3, 2]),  # the zero-init is a part of the guidance
    (MID, CLASSIFIER_FREE, 5.0, (5, 3, 2), [5, 3, 2]),
    (BASE, CLASSIFIER_FREE, 5.0, (4,), [4]),
]


@pytest.mark.parametrize("scheduler, guidance, scale, steps, runs", RUNS)
def test_steps_whose_velocity_is_zero_do_not_run_the_transformer(
    scheduler: SchedulerConfig, guidance: Guidance, scale: float, steps: tuple[int, ...], runs: list[int]
) -> None:
    stages: list[int] = []
    one = sampler(scheduler, guidance)
    one.sample(text(0), start(), steps, negative=text(1), guidance_scale=scale, on_step=stages.append)
    assert [stages.count(i) for i in range(len(steps))] == runs
    sizes = [(8 >> (len(steps) - 1 - i), 16 >> (len(steps) - 1 - i)) for i in stages]
    assert [size for size, _ in one.model.calls] == sizes  # type: ignore[attr-defined]
    clock = [timestep for _, timestep in one.model.calls]  # type: ignore[attr-defined]
    assert clock == sorted(clock, reverse=True)


def test_zero_steps_leave_the_noise_as_it_is() -> None:
    seen: list[Tensor] = []

    def velocity(latents: Tensor, step: Step) -> Tensor:
        seen.append(latents)
        return torch.zeros_like(latents)

    noise = draw(1, 2, 9, 4, 4, seed=0)
    unipc(velocity, noise, pyramid(MID)[0], 4, 36, MID)
    for latents in seen:
        torch.testing.assert_close(latents, noise)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_the_negative_prompt_is_not_even_embedded(scale: float) -> None:
    one, other = sampler(), sampler()
    after = one.sample(text(0), start(), (1, 1, 1), negative=text(1), guidance_scale=scale)
    assert torch.equal(after.history, other.sample(text(0), start(), (1, 1, 1)).history)
    assert [len(texts) for texts in one.model.texts] == [1]  # type: ignore[attr-defined]


def test_guidance_needs_a_negative_prompt() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale 5\.0 needs"):
        sampler().sample(text(0), start(), (1, 1, 1), guidance_scale=5.0)


def test_the_prompt_comes_first_and_guides_away_from_the_negative_one() -> None:
    """With constant velocities Base's chunk is noise - velocity, but for the last thousandth."""
    noise = torch.randn(1, 2, 9, 8, 16, generator=torch.Generator().manual_seed(7))
    one = sampler(BASE, CLASSIFIER_FREE)
    got = one.sample(text(0), start(), (4,), negative=text(1), guidance_scale=3.0).latents
    a, b = float(text(0).rows.sum()), float(text(1).rows.sum())
    torch.testing.assert_close(got, noise - (b + 3 * (a - b)), rtol=0, atol=0.02)


def test_texts_are_embedded_once_for_each_pair() -> None:
    one = sampler()
    embedded = one.model.texts  # type: ignore[attr-defined]

    def sample(prompt: int, negative: int | None) -> int:
        scale, other = (1.0, None) if negative is None else (5.0, text(negative))
        one.sample(text(prompt), start(), (1, 1, 1), negative=other, guidance_scale=scale)
        return len(embedded)

    assert [sample(0, 1), sample(0, 1), sample(0, None), sample(0, 2), sample(1, 0), sample(0, 1)] == [1, 1, 2, 3, 4, 4]
    assert [len(texts) for texts in embedded] == [2, 1, 2, 2]
    assert sample(9, 9) == TEXT_CONTEXTS + 1  # and drops the pair that was used longest ago
    assert sample(0, 1) == TEXT_CONTEXTS + 1
    assert sample(0, None) == TEXT_CONTEXTS + 2


@pytest.mark.parametrize("scheduler, steps", [(MID, (0, 1, 1)), (MID, (1, 1)), (BASE, (1, 1, 1)), (BASE, ())])
def test_every_stage_needs_its_steps(scheduler: SchedulerConfig, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"for each of {scheduler.stages} stages"):
        sampler(scheduler).sample(text(0), start(), steps)


def test_when_the_history_is_computed_again() -> None:
    steps = (2, 3, 1)
    for refresh, runs in {"step": [], "stage": [0, 2, 5], "chunk": [0]}.items():
        one = ChunkSampler(Recorder(), MID, unipc, CLASSIFIER_FREE, refresh)  # type: ignore[arg-type]
        one.sample(text(0), start(), steps)
        assert isinstance(one.model, Recorder)
        clock = [timestep for _, timestep in one.model.calls]
        computed = [i for i, past in enumerate(one.model.pasts) if past == []]
        assert computed == runs
        for i, past in enumerate(one.model.pasts):
            if past:  # is that of the last computation
                assert past == [clock[max(k for k in runs if k < i)]]
        assert (None in one.model.pasts) == (refresh == "step")


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_a_chunk_waits_for_nothing_but_its_end(variant: str) -> None:
    """On the meta device there are no numbers: whatever wants to see one on the way is refused."""
    checkpoint = Checkpoint.open("random" if variant == "distilled" else f"random-{variant}")
    kind = checkpoint.card.variant
    with torch.device("meta"):
        model = HeliosTransformer(checkpoint.transformer).requires_grad_(False)
    guidance = CFG_ZERO_STAR if kind.is_cfg_zero_star else CLASSIFIER_FREE
    one = ChunkSampler(model, checkpoint.scheduler, SOLVERS[kind.scheduler_class], guidance)
    prompt = TextEmbeddings.of(draw(3, checkpoint.transformer.text_dim, seed=0))
    state = StreamState(0, torch.zeros(1, 16, 19, 8, 16), None, torch.Generator().manual_seed(7).get_state())
    ran: list[int] = []
    with mock.patch.object(StreamState, "after", lambda state, latents, generator: latents):  # the one look
        latents: Any = one.sample(
            prompt, state, (3,) * kind.stages, negative=prompt, guidance_scale=kind.guidance_scale, on_step=ran.append
        )
    assert latents.device.type == "meta" and latents.shape == (1, 16, 9, 8, 16)
    assert len(ran) >= 3 * kind.stages - guidance.zero_steps
    with pytest.raises(NotImplementedError, match="no data"):
        latents.cpu()


@pytest.mark.parametrize("scheduler, guidance, solver", [(MID, CFG_ZERO_STAR, unipc), (BASE, CLASSIFIER_FREE, unipc)])
def test_a_warm_up_sees_every_shape_and_leaves_nothing(
    scheduler: SchedulerConfig, guidance: Guidance, solver: Any
) -> None:
    one = sampler(scheduler, guidance, solver)
    one.rehearse(4, start(), 5.0)
    assert isinstance(one.model, Recorder)
    stages = len(pyramid(scheduler))
    assert {size for size, _ in one.model.calls} == {(8 >> stage, 16 >> stage) for stage in range(stages)}
    asked = len(one.model.texts)
    one.sample(TextEmbeddings.of(torch.zeros(1, 4)), start(), (3,) * stages, negative=text(1), guidance_scale=5.0)
    assert len(one.model.texts) == asked + 1
