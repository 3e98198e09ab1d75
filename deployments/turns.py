"""Videos waiting for a sampler: where the pure rules of scheduling.py meet the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from deployments import scheduling
from deployments.scheduling import Waiting

LOOK_AGAIN_S = 0.5  # how soon a sampler that has just come up is used while others are busy


class Turns:
    """Hands out turns on the samplers: never more at once than `samplers()` says there are."""

    def __init__(self, samplers: Callable[[], int]) -> None:
        self._samplers = samplers
        self._waiting: dict[str, tuple[Waiting, asyncio.Future[None]]] = {}
        self._turns: dict[str, int] = {}  # taken by each video that may ask again
        self._round = 0
        self._asked = itertools.count()
        self._look_again: asyncio.TimerHandle | None = None
        self.sampling = 0  # turns under way

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def place(self, video_id: str) -> int | None:
        """How many videos get a sampler before this one; None if it does not wait for one."""
        return scheduling.place(self._everybody(), video_id)

    @asynccontextmanager
    async def turn(self, video_id: str, again: bool = False) -> AsyncIterator[None]:
        """Waits for the video's turn and holds it until the block ends. `again`: the turn before was lost, and does not
        count."""
        turns = scheduling.turns_on_asking(self._turns.get(video_id), self._round)
        if again:
            turns = max(0, turns - 1)
        place = Waiting(video_id, turns, next(self._asked))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[video_id] = place, turn
        try:
            self._grant()
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self.sampling -= 1
            else:
                del self._waiting[video_id]  # left before its turn came
            self._grant()

    def forget(self, video_id: str) -> None:
        """The video asks no more."""
        self._turns.pop(video_id, None)

    def _everybody(self) -> list[Waiting]:
        return [place for place, turn in self._waiting.values() if not turn.cancelled()]

    def _grant(self) -> None:
        for place in scheduling.granted(self._everybody(), self.sampling, self._samplers()):
            _, turn = self._waiting.pop(place.video_id)
            # A newcomer opens the next round: else a stream of them would keep waiting those who had their first turn.
            new = place.video_id not in self._turns
            self._round = max(self._round, place.turns + new)
            self._turns[place.video_id] = place.turns + 1
            self.sampling += 1
            turn.set_result(None)
        if self._look_again is not None:
            self._look_again.cancel()
        # A turn that ends grants the next one; only a new sampler comes up unseen.
        self._look_again = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._grant) if self._waiting else None
