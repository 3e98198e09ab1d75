"""What this process knows of the videos that are watched here: one watch for all viewers of a video, one copy of each
fragment that they read.

Both do for many what each of them could do for itself, and are called in the same way: `Watch.news` as `Director.news`,
`Fragments.read` as `Store.read`.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from deployments.content import AskNews, next_news
from deployments.records import ChunkRecord, News
from deployments.store import Store

KEPT_BYTES = 64 * 2**20


class Watches:
    """The watches of one process: one for each video that somebody watches.

    `news`: `Director.news`, or what leads there.
    """

    def __init__(self, news: Callable[[str, int], Awaitable[News]]) -> None:
        self._news = news
        self._watches: dict[str, _Watch] = {}

    @asynccontextmanager
    async def of(self, video_id: str) -> AsyncIterator[AskNews]:
        """Whoever is in this context watches the video, also while it asks nothing: a viewer may be slow to take what
        is sent, and a video that nobody asks for may be given up."""
        watch = self._watches.get(video_id)
        if watch is None or watch.asking.done():  # what has failed may work now
            watch = self._watches[video_id] = _Watch(partial(self._news, video_id))
        watch.viewers += 1
        try:
            yield watch.news
        finally:
            watch.viewers -= 1
            if not watch.viewers:
                watch.asking.cancel()
                if self._watches.get(video_id) is watch:
                    del self._watches[video_id]


class _Watch:
    """All that is known of one video, by asking for its news until it ends."""

    def __init__(self, news: AskNews) -> None:
        self.viewers = 0
        self._known: News | None = None  # with all chunks
        self._answered = asyncio.Event()
        # In a context of its own: it outlives the request that began it, but Ray cancels a request's calls with it.
        self.asking = asyncio.create_task(self._ask(news), context=contextvars.Context())
        self.asking.add_done_callback(_heard)
        self.asking.add_done_callback(lambda _: self._answered.set())

    async def news(self, seen: int) -> News:
        """The chunks from index `seen` on, as soon as there is one; or none, if the Director had none to tell of. At
        once if the video has ended. Raises CutOff if it was deleted."""
        known = self._known
        if known is None or (len(known.chunks) <= seen and not known.ended):
            await self._answered.wait()
            if self.asking.done():
                self.asking.result()
            known = self._known
            assert known is not None, "an answer was no error"
        return known.model_copy(update={"chunks": known.chunks[seen:]})

    async def _ask(self, news: AskNews) -> None:
        known: tuple[ChunkRecord, ...] = ()
        while self._known is None or not self._known.ended:
            new = await next_news(news, len(known))
            known = (*known, *new.chunks)
            self._known = new.model_copy(update={"chunks": known})
            self._answered.set()
            self._answered = asyncio.Event()
            await asyncio.sleep(0)  # who wanted no more than this leaves now, before the next question


class Fragments:
    """What a store holds, each object read once for all who want it here, and kept while there is room.

    `most_bytes`: of what is kept; what was not used for longest goes first.
    """

    def __init__(self, store: Store, most_bytes: int = KEPT_BYTES) -> None:
        self._store, self._most_bytes = store, most_bytes
        self._kept: dict[str, bytes] = {}  # by key, in the order of their last use
        self._kept_bytes = 0
        self._too_large: set[str] = set()  # keys of what is never kept
        self._reading: dict[str, asyncio.Task[bytes]] = {}

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of an object that never changes, as Store.read gives them and with its errors."""
        if key in self._too_large:
            return await self._store.read(key, start, end)
        data = self._kept.pop(key, None)
        if data is not None:
            self._kept[key] = data
        else:
            if key not in self._reading:
                self._reading[key] = asyncio.create_task(self._read(key))
                self._reading[key].add_done_callback(_heard)
            data = await asyncio.shield(self._reading[key])  # one who leaves stops it for nobody
        return data[start:end]

    async def _read(self, key: str) -> bytes:
        try:
            data = await self._store.read(key)
        finally:
            del self._reading[key]
        if len(data) > self._most_bytes:
            self._too_large.add(key)
            return data
        self._kept[key] = data
        self._kept_bytes += len(data)
        while self._kept_bytes > self._most_bytes:
            self._kept_bytes -= len(self._kept.pop(next(iter(self._kept))))
        return data


def _heard(task: asyncio.Task[Any]) -> None:
    """What a task raised is told to those who wait for it, of whom there may be none left."""
    _ = task.cancelled() or task.exception()
