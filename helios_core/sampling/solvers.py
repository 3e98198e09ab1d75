"""How the latents of one stage get from noise to data: one function per way of stepping, no state between calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from helios_core.config import SchedulerConfig
from helios_core.sampling.schedule import Stage, Step, few_step_points, multistep_points

# velocity(latents [1, C, T, h, w], step) -> d latents / d sigma, same shape, in the model's dtype
Velocity = Callable[[Tensor, Step], Tensor]


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
        v = velocity(latents, point)
        clean = (latents.double() - point.sigma * v.double()).to(v.dtype)
        if point is points[-1]:
            return clean
        mixed = (1.0 - point.sigma_next) * clean.double() + point.sigma_next * start.double()
        latents = mixed.to(start.dtype)
    raise ValueError(f"a stage needs at least one step, got {steps}")


def unipc(velocity: Velocity, start: Tensor, stage: Stage, steps: int, tokens: int, config: SchedulerConfig) -> Tensor:
    """UniPC of order 2 with data prediction and B_2(h) = exp(h) - 1 (Zhao et al. 2023, section 3).

    For the flow x = (1 - sigma) * clean + sigma * noise the paper's step comes to a straight move towards clean
    latents; the order is in the guess of what they are. The predictor lets the guess go on as it changed in the step
    before; the corrector takes the same step once more when the model was asked at its end. The first and the last
    prediction are of order 1. Coefficients in fp64, latents in the dtype of `start`.
    """
    points = multistep_points(stage, steps, tokens, config)
    latents = last_latents = last_guess = start
    trend: Tensor | None = None
    for i, point in enumerate(points):
        v = velocity(latents, point)
        # In bf16 the noise level is rounded and the product too, as in the reference.
        guess = latents - torch.tensor(point.sigma, dtype=v.dtype) * v
        found = guess - last_guess
        if i > 0:
            if trend is None:
                mean = last_guess + 0.5 * found
            else:
                of_trend, of_found = _corrector(_length(points[i - 2]), _length(points[i - 1]))
                mean = last_guess + of_trend * trend + of_found * found
            latents = _move(last_latents, mean, points[i - 1])
        # How the guess will have changed at the end of this step if it goes on as over the last one.
        trend = found * (_length(point) / _length(points[i - 1])) if 0 < i < len(points) - 1 else None
        last_latents, last_guess = latents, guess
        latents = _move(latents, guess if trend is None else guess + 0.5 * trend, point)
    return latents


def _move(latents: Tensor, clean: Tensor, step: Step) -> Tensor:
    """`step` along the flow if its clean end is `clean`."""
    ratio = step.sigma_next / step.sigma
    return ratio * latents + (1.0 - ratio) * clean


def _length(step: Step) -> float:
    """h of a step, the paper's measure: by how much the logarithm of signal over noise rises."""
    return _log_ratio(step.sigma_next) - _log_ratio(step.sigma)


def _log_ratio(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def _corrector(last_h: float, h: float) -> tuple[float, float]:
    """Weights of the trend and of the change that was found, for a step of length h after one of `last_h`.

    The paper's equation for order 2, [[1, 1], [r, 1]] rho = b with r = -last_h / h, solved by hand.
    """
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1.0
    phi_3 = phi_2 / -h - 0.5
    b1, b2 = phi_2 / phi_1, 2.0 * phi_3 / phi_1
    of_trend = (b1 - b2) / (1.0 + last_h / h)
    return of_trend, b1 - of_trend


SOLVERS: dict[str, Solver] = {"HeliosDMDScheduler": few_step, "HeliosScheduler": unipc}  # by the official class
