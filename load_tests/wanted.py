"""What users ask for: how often they do what, in which words, and when they have seen enough. It knows no locust, whose
import patches the whole process."""

from __future__ import annotations

import random
from dataclasses import dataclass

from load_tests.watching import CHUNK_S

WEIGHTS = {"watch": 6, "poll": 2, "prompt": 3, "leave": 2, "return": 2, "image": 1}
"""How often users do what: of 16 videos, so many. product.py says what each does."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
THINGS = ("sun", "moon", "ball", "disc", "circle")
GROUNDS = ("sea", "ocean", "hills", "mountains", "field", "desert")
MOTIONS = ("drifting left", "drifting right", "resting")


@dataclass(frozen=True)
class Wanted:
    """What a user asks for, and what they will do with it.

    `seconds`: its length; `later`: another prompt, of somebody who changes it; `patience`: of somebody who leaves, how
    many fragments they see until then.
    """

    kind: str
    seconds: float
    prompt: str
    later: str
    seed: int
    patience: int


def rng_of(seed: int, worker: int, number: int) -> random.Random:
    """Of the user `number`, from 0, of that worker: all that they do comes from it."""
    return random.Random(f"{seed}/{worker}/{number}")


def draw(rng: random.Random, seconds: float, weights: dict[str, int]) -> Wanted:
    """The next thing that a user wants."""
    (kind,) = rng.choices(list(weights), list(weights.values()))
    chunks = max(1, round(seconds / CHUNK_S))
    return Wanted(kind, seconds, say(rng), say(rng), rng.randrange(2**31), rng.randint(1, max(1, chunks - 1)))


def say(rng: random.Random) -> str:
    """A prompt in the words of the demo model; any other takes them too."""
    thing, ground = rng.sample(COLOURS, 2)
    return f"a {thing} {rng.choice(THINGS)} over a {ground} {rng.choice(GROUNDS)}, {rng.choice(MOTIONS)}"
