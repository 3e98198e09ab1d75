"""Videos waiting for a sampler: where the queue of scheduling.py meets the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from deployments.scheduling import Priority, Queue

LOOK_AGAIN_S = 0.5  # how soon a sampler that has just come up is used while others are busy


class Turns:
    """Hands out turns on the samplers: never more at once than `samplers()` says there are."""

    def __init__(self, samplers: Callable[[], int]) -> None:
        self._samplers = samplers
        self._queue = Queue()
        self._turns: dict[str, asyncio.Future[None]] = {}  # of those that wait
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def sampling(self) -> int:
        """Turns under way."""
        return self._queue.under_way

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def queue(self) -> list[str]:
        """The videos that wait, in the order in which they get a sampler."""
        self._drop_cancelled()
        return self._queue.order(asyncio.get_running_loop().time())

    def place(self, video_id: str) -> int | None:
        """How many videos get a sampler before this one; None if it does not wait for one."""
        queue = self.queue()
        return queue.index(video_id) if video_id in queue else None

    @asynccontextmanager
    async def turn(
        self, video_id: str, owner: str, priority: Priority, deadline: float, again: bool = False
    ) -> AsyncIterator[None]:
        """Waits for the video's turn and holds it until the block ends. `deadline`: when its viewer runs out, by the
        loop's clock; `again`: the turn before was lost, and does not count."""
        loop = asyncio.get_running_loop()
        self._queue.ask(video_id, owner, priority, deadline, again)
        turn = self._turns[video_id] = loop.create_future()
        try:
            self._grant()
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._queue.end()
            elif self._turns.get(video_id) is turn:
                self._leave(video_id)  # before its turn came
            # Not at once: a video whose next chunk is wanted asks for it before the loop goes on, and is to be there
            # when it is seen who goes next. Else batch would have every other turn beside a single realtime video.
            loop.call_soon(self._grant)

    def forget(self, video_id: str, owner: str) -> None:
        """The video asks no more."""
        self._queue.forget(video_id, owner)

    def _leave(self, video_id: str) -> None:
        del self._turns[video_id]
        self._queue.leave(video_id)

    def _drop_cancelled(self) -> None:
        """Those whose waiting was cancelled, and who have not heard of it yet."""
        for video_id in [each for each, turn in self._turns.items() if turn.cancelled()]:
            self._leave(video_id)

    def _grant(self) -> None:
        loop = asyncio.get_running_loop()
        self._drop_cancelled()
        for video_id in self._queue.grant(self._samplers(), loop.time()):
            self._turns.pop(video_id).set_result(None)
        if self._look_again is not None:
            self._look_again.cancel()
        # A turn that ends grants the next one; only a new sampler comes up unseen.
        self._look_again = loop.call_later(LOOK_AGAIN_S, self._grant) if self._turns else None
