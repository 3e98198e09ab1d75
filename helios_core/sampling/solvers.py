"""How the latents of one stage get from noise to data: one function per way of stepping, no state between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from helios_core.config import SchedulerConfig
from helios_core.sampling.schedule import Stage, few_step_points

# velocity(latents [1, C, T, h, w], timestep) -> d latents / d sigma, same shape, in the model's dtype
Velocity = Callable[[Tensor, float], Tensor]


class Solver(Protocol):
    """Solves one stage: from `start` [1, C, T, h, w] at the stage's first noise level to its result."""

    def __call__(
        self,
        velocity: Velocity,
        start: Tensor,
        stage: Stage,
        steps: int,
        tokens: int,
        config: SchedulerConfig,
    ) -> Tensor: ...


def few_step(
    velocity: Velocity, start: Tensor, stage: Stage, steps: int, tokens: int, config: SchedulerConfig
) -> Tensor:
    """The distilled model's stage: guess the clean latents, go back to the next noise level along `start`, repeat.

    DMD2 (Yin et al. 2024, section 4.4) with the stage's own starting point in place of fresh noise, so that nothing
    is drawn between steps. Arithmetic in fp64; the result has the dtype of the velocity.
    """
    latents = start
    points = few_step_points(stage, steps, tokens, config)
    for point in points:
        v = velocity(latents, point.timestep)
        clean = (latents.double() - point.sigma * v.double()).to(v.dtype)
        if point is points[-1]:
            return clean
        mixed = (1.0 - point.sigma_next) * clean.double() + point.sigma_next * start.double()
        latents = mixed.to(start.dtype)
    raise ValueError(f"a stage needs at least one step, got {steps}")


SOLVERS: dict[str, Solver] = {"distilled": few_step}  # by variant
