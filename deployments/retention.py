"""What is deleted by itself, and when: videos that have ended, and claims of Idempotency-Keys."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from deployments.store import Store, StoreUnavailable, Superseded
from helios_core.errors import HeliosError

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 300.0
DAY_S = 86400.0


@dataclass(frozen=True)
class Keep:
    """What is kept of the videos that have ended; None means without limit.

    `days`: so long after its end each is kept; `bytes`: so much they may take together.
    """

    days: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Ended:
    """A video that has ended. `completed_at`: when (Unix time); `bytes`: what all of it takes in the store."""

    id: str
    completed_at: float
    bytes: int


def expired(videos: Iterable[Ended], keep: Keep, now: float) -> list[Ended]:
    """Those that are to be deleted at the Unix time `now`, the oldest first: all that ended too long ago, and of the
    rest as many as it takes to come below the limit of bytes."""
    oldest_first = sorted(videos, key=lambda video: (video.completed_at, video.id))
    size = sum(video.bytes for video in oldest_first)
    gone = []
    for video in oldest_first:
        too_old = keep.days is not None and now - video.completed_at > keep.days * DAY_S
        if not too_old and (keep.bytes is None or size <= keep.bytes):
            break  # and so are all the younger ones
        gone.append(video)
        size -= video.bytes
    return gone


class Retention:
    """Deletes what is kept no longer, for the Director that leads `store` with `term`. `delete`: the Director's, which
    raises a HeliosError for a video that is gone. A video that has not ended is never touched."""

    def __init__(self, store: Store, term: int, keep: Keep, delete: Callable[[str], Awaitable[None]]) -> None:
        self._store, self._term, self._keep, self._delete = store, term, keep, delete
        self._ended: dict[str, Ended] = {}  # they change no more, so each is looked at once

    async def run(self) -> None:
        """Sweeps again and again, until another Director leads. What goes wrong is tried again at the next sweep."""
        while True:
            try:
                await self.sweep(time.time())
            except Superseded:
                return
            except StoreUnavailable as away:
                logger.warning("not swept: %s", away)
            except Exception:
                logger.exception("not swept")
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self, now: float) -> None:
        """Deletes what is kept no longer at the Unix time `now`. Raises Superseded or StoreUnavailable."""
        await self._store.check_leads(self._term)
        await self._store.forget_claims(now)
        await self._store.forget_spent(now - DAY_S)
        await self._store.forget_watched()
        if self._keep == Keep():
            return
        for video in expired(await self._look(), self._keep, now):
            try:
                await self._delete(video.id)
            except (Superseded, StoreUnavailable):
                raise
            except HeliosError as error:  # somebody else deleted it
                logger.info("not expired: %s", error, extra={"video_id": video.id})
                continue
            del self._ended[video.id]
            logger.info("expired", extra={"video_id": video.id, "bytes": video.bytes, "ended_at": video.completed_at})

    async def _look(self) -> Iterable[Ended]:
        """The videos that have ended: neither those that are active, nor those that another version stored."""
        ids = await self._store.video_ids()
        active = set(await self._store.active())  # asked last: until it is tidied up, a video that ended is active
        self._ended = {video_id: self._ended[video_id] for video_id in ids if video_id in self._ended}
        for video_id in ids:
            if video_id not in active and video_id not in self._ended and (video := await self._read(video_id)):
                self._ended[video_id] = video
        return self._ended.values()

    async def _read(self, video_id: str) -> Ended | None:
        try:
            record = await self._store.record(video_id)
        except ValueError:
            return None  # another version's: only its owner can say that it may go
        if record is None or record.completed_at is None:
            return None
        size = sum(item.bytes for item in await self._store.objects(video_id))
        return Ended(video_id, record.completed_at, size)
