"""Whether a replica still computes what it computed at its start. Memory goes bad, a driver falls over: a process to
which that happened goes on taking calls, and spoils every one."""

from __future__ import annotations

import gc
import logging
import os
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from deployments.watchdog import Watchdog
from helios_core.errors import HeliosError, Spoilt
from helios_core.memory import shortage_told

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Of what varies in it. What rounding does stays far below, also where a GPU adds up in another order.
DIFFERS_AT_MOST = 0.05
STATUS = 70  # of a process that ends itself: EX_SOFTWARE


class Golden:
    """A small result of fixed inputs, made at the start and made again when something went wrong."""

    def __init__(self, part: str, make: Callable[[], Tensor], watchdog: Watchdog) -> None:
        """`part`: of which a replica this is; `make`: called in the thread that computes, watched by `watchdog`: what
        failed may hang the next time. Raises NotFinite if a replica is spoilt from the beginning."""
        self._part, self._make, self._watchdog = part, make, watchdog
        self._expected = self._watched()

    def guard(self, work: Callable[[], T]) -> T:
        """The result of `work`. Called in the thread that computes.

        If it fails otherwise than an error of ours that the inputs explain, the golden result is made again: if it is
        another one now, this process ends, so that the call is made elsewhere and the replica replaced. Else the error
        is raised: OutOfMemory for whatever torch says if it has no room.
        """
        try:
            with shortage_told(self._part):
                return work()
        except Exception as error:
            if isinstance(error, HeliosError) and not isinstance(error, Spoilt):
                raise
            _release(error)
            if problem := self._problem():
                _end_process(f"{self._part}: after {error!r}, {problem}")
            raise

    def _watched(self) -> Tensor:
        with self._watchdog.watching("golden"):
            return self._make()

    def _problem(self) -> str | None:
        """What is wrong with the golden result; None: nothing."""
        try:
            with shortage_told(self._part):
                made = self._watched().float()
        except Exception as error:  # noqa: BLE001 - whatever it is, this process cannot do what it could do
            return f"the golden result cannot be made any more: {error!r}"
        expected = self._expected.float()
        difference = float((made - expected).norm() / (expected - expected.mean()).norm())
        return None if difference <= DIFFERS_AT_MOST else f"the golden result differs by {difference:.1%}"


def _release(error: BaseException | None) -> None:
    """Frees what the frames of a failure hold: the golden result needs room, too."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where there is no GPU


def _end_process(why: str) -> NoReturn:
    logger.critical("this replica ends itself. %s", why)
    os._exit(STATUS)
