"""Videos waiting for a sampler: where the pure rules of scheduling.py meet the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from deployments import scheduling
from deployments.scheduling import Priority, Taken, Waiting

LOOK_AGAIN_S = 0.5  # how soon a sampler that has just come up is used while others are busy


class Turns:
    """Hands out turns on the samplers: never more at once than `samplers()` says there are."""

    def __init__(self, samplers: Callable[[], int]) -> None:
        self._samplers = samplers
        self._waiting: dict[str, tuple[Waiting, asyncio.Future[None]]] = {}
        self._turns: dict[str, dict[str, int]] = {}  # owner ▸ video ▸ taken by it, of each that may ask again
        self._taken: dict[str, Taken] = {}  # by the owners of these videos and of those that wait
        self._since_batch = 0  # turns since the last one of an owner with batch videos alone
        self._places = itertools.count()  # in the order of all askings and turns
        self._look_again: asyncio.TimerHandle | None = None
        self.sampling = 0  # turns under way

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def queue(self) -> list[str]:
        """The videos that wait, in the order in which they get a sampler."""
        return [place.video_id for place in self._order()]

    def place(self, video_id: str) -> int | None:
        """How many videos get a sampler before this one; None if it does not wait for one."""
        return scheduling.place(self._order(), video_id) if video_id in self._waiting else None

    @asynccontextmanager
    async def turn(
        self, video_id: str, owner: str, priority: Priority, deadline: float, again: bool = False
    ) -> AsyncIterator[None]:
        """Waits for the video's turn and holds it until the block ends. `deadline`: when its viewer runs out, by the
        loop's clock; `again`: the turn before was lost, and does not count."""
        asked = next(self._places)
        taken = self._taken.setdefault(owner, Taken(last=asked))
        turns = scheduling.turns_on_asking(self._turns.get(owner, {}).get(video_id), taken.round_)
        if again:
            turns = max(0, turns - 1)
        place = Waiting(video_id, owner, priority, deadline, turns, asked)
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
            # Not at once: a video whose next chunk is wanted asks for it before the loop goes on, and is to be there
            # when it is seen who goes next. Else batch would have every other turn beside a single realtime video.
            asyncio.get_running_loop().call_soon(self._grant)

    def forget(self, video_id: str, owner: str) -> None:
        """The video asks no more."""
        videos = self._turns.get(owner, {})
        videos.pop(video_id, None)
        if not videos:
            self._turns.pop(owner, None)
            if all(place.owner != owner for place, _ in self._waiting.values()):
                self._taken.pop(owner, None)

    def _everybody(self) -> list[Waiting]:
        return [place for place, turn in self._waiting.values() if not turn.cancelled()]

    def _order(self) -> list[Waiting]:
        now = asyncio.get_running_loop().time()
        return scheduling.in_order(self._everybody(), self._taken, self._since_batch, now)

    def _grant(self) -> None:
        for place in scheduling.granted(self._order(), self.sampling, self._samplers()):
            own = [other for other in self._everybody() if other.owner == place.owner]
            self._since_batch = scheduling.turns_since_batch(self._since_batch, own)
            videos = self._turns.setdefault(place.owner, {})
            new = place.video_id not in videos
            self._taken[place.owner] = self._taken[place.owner].with_turn(place, new, next(self._places))
            videos[place.video_id] = place.turns + 1
            _, turn = self._waiting.pop(place.video_id)
            self.sampling += 1
            turn.set_result(None)
        if self._look_again is not None:
            self._look_again.cancel()
        # A turn that ends grants the next one; only a new sampler comes up unseen.
        self._look_again = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._grant) if self._waiting else None
