"""Notices work that does not end. A replica's event loop goes on answering while its GPU or its encoder hangs."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

SOONEST_S = 5.0
TIMES_LONGER = 4  # than the longest of its kind
REMEMBERED = 100  # of each kind: its longest is then about its 99th percentile
KINDS = 256  # clients choose sizes and steps


class Overdue(Exception):
    """A replica has been at one piece of work for too long."""


class Watchdog:
    """For a replica's `check_health`: Serve replaces one that fails it, and its calls are made again elsewhere.

    A piece of work may take `limit_seconds`, and once there was one of its kind TIMES_LONGER what the longest of them
    took, if that is less, but SOONEST_S at least. One thread works, another one may check.
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit_seconds, clock
        self._begun: dict[object, tuple[float, float]] = {}  # since when, and how long it may take
        self._took: OrderedDict[Hashable, deque[float]] = OrderedDict()  # the newest kinds

    @contextmanager
    def watching(self, kind: Hashable) -> Iterator[None]:
        """Around one piece of work. `kind`: what takes equally long."""
        work, begun = object(), self._clock()
        self._begun[work] = begun, self._allowed(kind)
        try:
            yield
            self._remember(kind, self._clock() - begun)
        finally:
            del self._begun[work]

    def check(self) -> None:
        """Raises Overdue if some work takes longer than it may."""
        for begun, allowed in list(self._begun.values()):
            taken = self._clock() - begun
            if taken > allowed:
                raise Overdue(f"a call has taken {taken:.0f} s; allowed: {allowed:.0f} s, at most max_call_seconds")

    def _allowed(self, kind: Hashable) -> float:
        took = self._took.get(kind)
        return self._limit if took is None else min(self._limit, max(SOONEST_S, TIMES_LONGER * max(took)))

    def _remember(self, kind: Hashable, seconds: float) -> None:
        self._took.setdefault(kind, deque(maxlen=REMEMBERED)).append(seconds)
        self._took.move_to_end(kind)
        if len(self._took) > KINDS:
            self._took.popitem(last=False)
