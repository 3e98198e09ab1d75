"""Whose turn it is: which of the videos that want a chunk now get a sampler. Pure functions over plain values.

Videos take turns chunk by chunk, like processes under a fair scheduler: each has a number of turns taken, the fewest go
first, and whoever asked earlier among equals. A newcomer, or a video that could not ask for a while, starts at the
round that the others are in, less one turn of credit: it is not owed the turns that it did not ask for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A video that wants a chunk now. `turns`: how many it has taken; `asked`: its place in the order of asking."""

    video_id: str
    turns: int
    asked: int


def in_order(waiting: Iterable[Waiting]) -> list[Waiting]:
    """The order in which they get a sampler."""
    return sorted(waiting, key=lambda video: (video.turns, video.asked))


def granted(waiting: Iterable[Waiting], sampling: int, samplers: int) -> list[Waiting]:
    """Those that get a sampler now. `sampling`: calls under way; `samplers`: replicas that live."""
    return in_order(waiting)[: max(0, samplers - sampling)]


def place(waiting: Iterable[Waiting], video_id: str) -> int | None:
    """How many get a sampler before this one; None if it does not wait."""
    ids = [video.video_id for video in in_order(waiting)]
    return ids.index(video_id) if video_id in ids else None


def turns_on_asking(turns: int | None, round_: int) -> int:
    """What counts as taken by a video that asks for a sampler. `turns`: what it took, None if it is new;
    `round_`: the round that the others are in. It never falls, and goes on with the turn of whoever has taken the most,
    or of a newcomer."""
    return round_ if turns is None else max(turns, round_ - 1)
