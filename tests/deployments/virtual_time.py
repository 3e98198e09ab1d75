"""An event loop whose clock goes on by itself when nothing else can happen: no test waits, and each runs the same way
every time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_S = 10_000


class _Clock(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if timeout is None and not events:
            raise AssertionError("nothing can happen any more, and somebody still waits")
        self.now += max(0.0, timeout or 0.0)
        if self.now > LONGEST_S:
            raise AssertionError(f"somebody still waits after {LONGEST_S} s of virtual time")
        return events


class VirtualTime(asyncio.SelectorEventLoop):
    """Timers are all that takes time, and they take none. What can never go on raises AssertionError at once."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def timers(self) -> list[asyncio.TimerHandle]:
        """Those that will still go off."""
        return [timer for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in virtual time. Whatever goes wrong unheard raises an ExceptionGroup."""
    loop, unheard = VirtualTime(), list[Exception]()
    loop.set_exception_handler(lambda _, context: unheard.append(context.get("exception") or _Unheard(context)))
    try:
        result = loop.run_until_complete(main)
    finally:
        loop.close()
    if unheard:
        raise ExceptionGroup("nobody heard of", unheard)
    return result


class _Unheard(Exception):
    """Something that asyncio would have logged."""
