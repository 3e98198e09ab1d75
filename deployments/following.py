"""What a viewer hears once another service leads the store: what stands in its records.

An upgrade has two clusters on one store. The new one's Director takes over all videos; who watches through the old one
goes on there, on the same connection, until the old cluster is removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from deployments.director import NEWS_S, NoSuchVideo
from deployments.making import first_record
from deployments.records import News, VideoRecord
from deployments.store import Retired, Store, term_of

LOOK_AGAIN_S = 1.0  # between two looks at the record of a video

AskNews = Callable[[str, int], Awaitable[News]]


def following(news: AskNews, store: Store) -> AskNews:
    """`news`, which is `Director.news` or what leads there; of a Director that is Retired, from the store."""

    async def asked(video_id: str, seen: int) -> News:
        try:
            return await news(video_id, seen)
        except Retired:
            return await _by_the_record(store, video_id, seen)

    return asked


async def _by_the_record(store: Store, video_id: str, seen: int) -> News:
    clock = asyncio.get_running_loop().time
    record = await _settled(store, video_id)
    if not record.ended:  # what has ended, or never was, shall leave nothing behind
        await store.note_watched(video_id)
    deadline = clock() + NEWS_S
    while len(record.chunks) <= seen and not record.ended and clock() < deadline:
        await asyncio.sleep(LOOK_AGAIN_S)
        record = await _settled(store, video_id)
    return News.of(record, seen)


async def _settled(store: Store, video_id: str) -> VideoRecord:
    """As much of a video's record as the Director that leads knows of, too.

    The one before it may have put one chunk more, or the end, before it found that it leads no more: such a chunk is
    made again, perhaps to another prompt, and removed. Raises NoSuchVideo.
    """
    active = await store.marker(video_id) is not None  # before the record: to one that is not active comes no other
    record = await store.record(video_id)
    if record is None:
        request = await store.request(video_id)
        if request is None:
            raise NoSuchVideo(video_id)
        return first_record(request)
    if record.ended and not active:
        return record
    # The newest term after the record: who claims one from here on reads this very record.
    if record.chunks and term_of(record.chunks[-1].fragment.key) >= await store.newest_term():
        return record
    return record.model_copy(update={"status": "in_progress", "error": None, "chunks": record.chunks[:-1]})
