"""The stages of a chunk and the points in time at which a stage is solved; plain numbers in double precision.

Helios-Base has one stage. The other variants have a pyramid: a chunk is denoised from coarse to fine (Helios report,
section on pyramid sampling; the idea is that of Pyramidal Flow Matching, Jin et al. 2024, section 3.2). Every stage
covers one part of the noise levels. When a stage ends, its result is upsampled and renoised so that it has the
distribution with which the next stage begins.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_core.config import SchedulerConfig

STAGE_SIGMA_START = 0.999  # inside a stage sigma runs from here to 0, whatever part of the noise the stage covers


@dataclass(frozen=True)
class Stage:
    """One level of the pyramid.

    `timestep_first`, `timestep_last`: the model's clock over this stage, counted down, in training steps.
    `signal`, `noise`: how the upsampled result of the stage before and block noise are mixed at its start:
    latents = signal * upsampled + noise * block_noise. (1, 0) for the first stage, which starts from pure noise.
    """

    index: int
    timestep_first: float
    timestep_last: float
    signal: float
    noise: float


@dataclass(frozen=True)
class Step:
    """One step of a solver: its index in the stage, the model's clock, the noise level before it and after it."""

    index: int
    timestep: float
    sigma: float
    sigma_next: float


@functools.lru_cache
def pyramid(config: SchedulerConfig) -> tuple[Stage, ...]:
    """The stages from coarse to fine.

    A stage that follows another starts noisier than that one ended, because upsampling correlates the noise of each
    2x2 block: signal = 1 / (sqrt(1 + 1/gamma) * sigma + 1 - sigma) brings the marginal back onto the flow (Pyramidal
    Flow Matching, section 3.2, with block correlation -gamma).
    """
    n = config.num_train_timesteps
    if config.stages == 1:  # the model's clock is the noise level
        return (Stage(0, float(n), 0.0, signal=1.0, noise=0.0),)
    sigmas = np.linspace(1.0, 1.0 / n, n + 1)
    sigmas = 1.0 - sigmas
    sigmas = np.flip(config.shift * sigmas / (1.0 + (config.shift - 1.0) * sigmas))[:-1]
    timesteps = sigmas * n

    bounds = [int(r * n) for r in config.stage_range]
    starts = [float(sigmas[b]) for b in bounds[:-1]]
    ends = [float(sigmas[b]) if b < n else 0.0 for b in bounds[1:]]
    mixes = [(1.0, 0.0)]
    for sigma in starts[1:]:
        signal = 1.0 / (math.sqrt(1.0 + 1.0 / config.gamma) * sigma + (1.0 - sigma))
        mixes.append((signal, signal * sigma / math.sqrt(config.gamma)))

    corrected = [starts[0]] + [
        1.0 - signal * (1.0 - sigma) for sigma, (signal, _) in zip(starts[1:], mixes[1:], strict=True)
    ]
    # Each stage gets a share of the model's clock in proportion to the length of its flow.
    lengths = [start - end for start, end in zip(corrected, ends, strict=True)]
    ratios = [sum(lengths[:i]) / sum(lengths) for i in range(config.stages)] + [0.9999999999999999]

    stages = []
    for i in range(config.stages):
        first = min(float(timesteps[int(ratios[i] * n)]), 999.0)
        last = float(timesteps[min(int(ratios[i + 1] * n), n - 1)])
        clock = np.linspace(first, last, n + 1)[:-1]
        stages.append(Stage(i, float(clock[0]), float(clock[-1]), *mixes[i]))
    return tuple(stages)


def few_step_points(stage: Stage, steps: int, tokens: int, config: SchedulerConfig) -> tuple[Step, ...]:
    """The `steps` transformer calls of one stage for a distilled model. `tokens`: what the shift counts.

    `steps + 1` evenly spaced points, of which the last but one noise level is left out, so that the last call jumps
    to zero.
    """
    n = config.num_train_timesteps
    sigmas = np.linspace(STAGE_SIGMA_START, STAGE_SIGMA_START / n, steps + 1)[:-1]
    timesteps = np.linspace(stage.timestep_first, stage.timestep_last, steps + 1)[:-1]
    if config.use_dynamic_shifting:
        sigmas = _shift(sigmas, tokens, config)
        timesteps = stage.timestep_last + sigmas * (stage.timestep_first - stage.timestep_last)
    clock = timesteps.astype(np.int64)
    # The model was distilled with whole timesteps, each standing for the noise level whose own timestep is nearest.
    levels = sigmas[np.abs(timesteps[None, :] - clock[:, None]).argmin(axis=1)]
    return _steps(clock, levels)


def multistep_points(stage: Stage, steps: int, tokens: int, config: SchedulerConfig) -> tuple[Step, ...]:
    """The `steps` evenly spaced points of one stage for a solver that learns from its earlier steps.

    In a pyramid the last step covers the last of the training's noise levels only, and the model's clock shows whole
    timesteps; with one stage all steps are of the same length and the clock shows fractions.
    """
    n = config.num_train_timesteps
    if config.stages == 1:
        sigmas = np.linspace(STAGE_SIGMA_START, 0.0, steps + 1)[:-1]
    else:
        sigmas = np.linspace(STAGE_SIGMA_START, STAGE_SIGMA_START / n, steps)
    if config.use_dynamic_shifting:
        sigmas = _shift(sigmas, tokens, config)
    if config.use_dynamic_shifting or config.stages == 1:
        clock = stage.timestep_last + sigmas * (stage.timestep_first - stage.timestep_last)
    else:
        clock = np.linspace(stage.timestep_first, stage.timestep_last, steps)
    return _steps(clock if config.stages == 1 else clock.astype(np.int64), sigmas)


def _steps(clock: NDArray[Any], sigmas: NDArray[np.float64]) -> tuple[Step, ...]:
    following = [*sigmas[1:], 0.0]
    return tuple(
        Step(i, float(t), float(s), float(f)) for i, (t, s, f) in enumerate(zip(clock, sigmas, following, strict=True))
    )


def _shift(sigmas: NDArray[np.float64], tokens: int, config: SchedulerConfig) -> NDArray[np.float64]:
    """Noise levels moved up for larger pictures (SD3, Esser et al. 2024, section 5.3.2), linear in the token count."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = slope * tokens + config.base_shift - slope * config.base_image_seq_len
    weight = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return weight / (weight + (1.0 / sigmas - 1.0))
