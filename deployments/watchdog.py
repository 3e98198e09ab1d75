"""Notices work that does not end. A replica's event loop goes on answering while its GPU or its encoder hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Overdue(Exception):
    """A replica has been at one piece of work for too long."""


class Watchdog:
    """For a replica's `check_health`: Serve replaces one that fails it, and its calls are made again elsewhere."""

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit_seconds, clock
        self._begun: dict[object, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one piece of work."""
        work = object()
        self._begun[work] = self._clock()
        try:
            yield
        finally:
            del self._begun[work]

    def check(self) -> None:
        """Raises Overdue if some work has taken longer than the limit."""
        longest = max((self._clock() - begun for begun in self._begun.values()), default=0.0)
        if longest > self._limit:
            raise Overdue(f"a call has taken {longest:.0f} s; allowed: max_call_seconds {self._limit:g}")
