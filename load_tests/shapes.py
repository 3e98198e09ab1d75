"""How many users there are in the course of a run: `--shape`, of `--users` in `--run-time`."""

from __future__ import annotations

import math
from collections.abc import Callable

RAMP_STEPS = 8


def steady(users: int, part: float) -> int:
    """All of them from the start."""
    return users


def ramp(users: int, part: float) -> int:
    """Ever more, in steps of equal length, so that each number of users has its own figures: the knee is among them."""
    steps = min(RAMP_STEPS, users)
    return math.ceil(users * (math.floor(part * steps) + 1) / steps)


def spike(users: int, part: float) -> int:
    """A quarter of them; all in the middle third."""
    return users if 1 / 3 <= part < 2 / 3 else math.ceil(users / 4)


def soak(users: int, part: float) -> int:
    """All of them, who come one after the other in the first tenth, so that what grows later is no beginning."""
    return max(1, min(users, math.floor(10 * part * users)))


SHAPES: dict[str, Callable[[int, float], int]] = {"steady": steady, "ramp": ramp, "spike": spike, "soak": soak}
"""Users at `part`, from 0 to below 1, of the run."""
