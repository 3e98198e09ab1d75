"""What a viewer hears once another service leads the store: what stands in its records.

An upgrade has two clusters on one store. The new one's Director takes over all videos; who watches through the old one
goes on there, on the same connection, until the old cluster is removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from deployments.director import NEWS_S, NoSuchVideo
from deployments.making import first_record
from deployments.records import News
from deployments.store import Retired, Store

LOOK_AGAIN_S = 1.0  # between two looks at the record of a video

AskNews = Callable[[str, int], Awaitable[News]]


def following(news: AskNews, store: Store) -> AskNews:
    """`news`, which is `Director.news` or what leads there; of a Director that is Retired, from the store."""

    async def asked(video_id: str, seen: int) -> News:
        try:
            return await news(video_id, seen)
        except Retired:
            await store.note_watched(video_id)
            return await _by_the_record(store, video_id, seen)

    return asked


async def _by_the_record(store: Store, video_id: str, seen: int) -> News:
    clock = asyncio.get_running_loop().time
    deadline = clock() + NEWS_S
    while True:
        record = await store.record(video_id)
        if record is None:
            request = await store.request(video_id)
            if request is None:
                raise NoSuchVideo(video_id)
            record = first_record(request)
        if len(record.chunks) > seen or record.ended or clock() >= deadline:
            return News.of(record, seen)
        await asyncio.sleep(LOOK_AGAIN_S)
