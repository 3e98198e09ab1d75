"""Many viewers of one video: they share one watch and one reading of each fragment, and none waits for another.

Running videos are made by the Director and the real replicas. What must not depend on time is held at gates.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.content import PIECE_BYTES, AskNews, objects_of
from deployments.errors import CutOff
from deployments.making import ReplicaLost
from deployments.records import ChunkRecord, News, VideoRecord
from deployments.store import ObjectMissing, new_video_id
from deployments.watching import Fragments, Watches
from tests.deployments.conftest import LocalService, ReadStore
from tests.deployments.test_content import BODY, delete, ended, get, running, watched_by
from tests.deployments.test_director import Gate

VIEWERS, SLOW = 100, 10
CUTS = 4  # of each viewer


def client(service: LocalService, before: Callable[[bytes], Awaitable[None]]) -> httpx.AsyncClient:
    """A client to whom each part of a body is sent when `before`, which is called with it, has returned."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def held(message: Any) -> None:
            if message.get("body"):
                await before(message["body"])
            await send(message)

        await service.app(scope, receive, held)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://helios")


# A hundred viewers


@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 1000])
async def test_a_hundred_viewers_cost_one_reading_and_hold_up_nobody(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    def made(record: VideoRecord) -> list[tuple[int, str, str]]:
        return [(chunk.frames, chunk.fragment.sha256, chunk.state.sha256) for chunk in record.chunks]

    monkeypatch.setattr("deployments.content.PIECE_BYTES", piece_bytes)
    unwatched = await ended(service, (await service.http.post("/v1/videos", json=BODY)).json()["id"])
    holding, released = asyncio.Semaphore(0), asyncio.Event()
    video_id = await running(service)

    async def slow_get() -> httpx.Response:
        sizes: list[int] = []

        async def after_one_piece(piece: bytes) -> None:
            sizes.append(len(piece))
            if len(sizes) == 2:
                holding.release()
                await released.wait()

        async with client(service, after_one_piece) as http:
            answer = await http.get(f"/v1/videos/{video_id}/content")
        assert max(sizes) <= piece_bytes
        return answer

    slow = [asyncio.create_task(slow_get()) for _ in range(SLOW)]
    fast = [asyncio.create_task(get(service, video_id)) for _ in range(VIEWERS - SLOW)]
    for _ in range(SLOW):
        await holding.acquire()
    await watched_by(service.director._running[video_id], 1)
    service.graph.gate("sample 1").open()
    record = await ended(service, video_id)
    assert (record.status, len(record.chunks), made(record)) == ("completed", 3, made(unwatched))
    answers = await asyncio.gather(*fast)
    assert not any(viewer.done() for viewer in slow)
    released.set()
    answers += await asyncio.gather(*slow)

    reads = Counter(key for key, _, _ in service.store.reads if key.endswith((".mp4", ".m4s")))
    assert reads == {item.key: 1 for item in objects_of(record.init, record.chunks)}
    file = (await get(service, video_id)).content
    assert len(answers) == VIEWERS and all(answer.content == file for answer in answers)


async def test_two_hundred_cuts_cost_no_byte(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of viewers of a running video, at random bytes; and half as many of viewers of the finished one."""
    monkeypatch.setattr("deployments.content.PIECE_BYTES", 1000)
    cut = asyncio.Semaphore(0)

    async def part(video_id: str, start: int, end: int | None) -> bytes:
        """What arrives from the byte `start` on, if the connection breaks at the byte `end`."""
        got = bytearray()

        async def break_off(piece: bytes) -> None:
            got.extend(piece)
            if end is not None and start + len(got) >= end:
                del got[end - start :]
                raise OSError("cut")

        async with client(service, break_off) as http:
            asking = http.get(f"/v1/videos/{video_id}/content", headers={"Range": f"bytes={start}-"})
            if end is None:
                await asking
            else:
                with pytest.raises(OSError, match="cut"):
                    await asking
                cut.release()
        return bytes(got)

    async def joined(video_id: str, ends: list[int]) -> bytes:
        got = b""
        for end in (*ends, None):
            got += await part(video_id, len(got), end)
        return got

    finished = (await service.http.post("/v1/videos", json=BODY)).json()["id"]
    record = await ended(service, finished)
    file = (await get(service, finished)).content
    rng = random.Random(17)
    cuts = [sorted(rng.sample(range(1, len(file)), CUTS)) for _ in range(75)]
    gates = [service.graph.gate("sample 1"), service.graph.gate("sample 2")]
    video_id = await running(service)  # the same again, byte for byte
    viewers = [asyncio.create_task(joined(video_id, ends)) for ends in cuts[:50]]
    earlier = 0
    for chunks, gate in enumerate(gates, 1):  # what is there is cut, and asked for again, before there is more
        there = sum(item.bytes for item in objects_of(record.init, record.chunks[:chunks]))
        due = sum(end <= there for ends in cuts[:50] for end in ends)
        assert earlier < due < 50 * CUTS
        for _ in range(due - earlier):
            await cut.acquire()
        earlier = due
        gate.open()
    assert set(await asyncio.gather(*viewers)) == {file}
    assert (await get(service, video_id)).content == file
    for ends in cuts[50:]:
        assert await joined(video_id, ends) == file


# The watch


async def followed(news: AskNews) -> tuple[tuple[ChunkRecord, ...], News]:
    """All chunks as they come, and the last news."""
    chunks: tuple[ChunkRecord, ...] = ()
    while not (new := await news(len(chunks))).ended:
        chunks += new.chunks
    return chunks + new.chunks, new


async def test_viewers_share_one_question(service: LocalService) -> None:
    asked: list[int] = []

    async def ask(video_id: str, seen: int) -> News:
        asked.append(seen)
        return await service.director.news(video_id, seen)

    watches = Watches(ask)
    video_id = await running(service)
    async with AsyncExitStack() as watching:
        viewers = [await watching.enter_async_context(watches.of(video_id)) for _ in range(50)]
        first = await asyncio.gather(*(news(0) for news in viewers))
        assert all(new == first[0] for new in first) and first[0].spec.frames == 99
        following = [asyncio.create_task(followed(news)) for news in viewers]
        service.graph.gate("sample 1").open()
        record = await ended(service, video_id)
        for chunks, last in await asyncio.gather(*following):
            assert (chunks, last.status, last.init) == (record.chunks, "completed", record.init)
        late = await viewers[0](1)  # it has ended: all is known
        assert (late.status, late.chunks) == ("completed", record.chunks[1:])
    assert asked == sorted(asked) and asked[0] == 0
    assert len(asked) < 50


async def test_one_look_is_one_question(service: LocalService) -> None:
    asked: list[int] = []

    async def ask(video_id: str, seen: int) -> News:
        asked.append(seen)
        return await service.director.news(video_id, seen)

    video_id = await running(service)
    watches = Watches(ask)
    for _ in range(2):
        async with watches.of(video_id) as news:
            assert len((await news(0)).chunks) == 1
    assert asked == [0, 0]


async def test_the_watch_ends_with_its_last_viewer(service: LocalService) -> None:
    watches = Watches(service.director.news)
    video_id = await running(service)
    video = service.director._running[video_id]
    async with watches.of(video_id) as one:
        async with watches.of(video_id) as other:
            await asyncio.gather(one(0), other(0))
            await watched_by(video, 1)
        waiting = asyncio.ensure_future(one(1))  # the other one has left
        service.graph.gate("sample 2")
        service.graph.gate("sample 1").open()
        assert len((await waiting).chunks) == 1
        await watched_by(video, 1)
    await watched_by(video, 0)
    assert watches._watches == {}
    async with watches.of(video_id) as again:
        assert len((await again(0)).chunks) == 2


async def test_no_news_are_told_too(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.director.NEWS_S", 0.01)
    service.graph.gate("sample 0")
    video_id = await running(service, at="encode")
    async with Watches(service.director.news).of(video_id) as news:
        nothing = await news(0)
    assert (nothing.status, nothing.chunks, nothing.init) == ("queued", (), None)


async def test_a_watch_knows_nothing_of_the_request_that_began_it(service: LocalService) -> None:
    """Ray finds by it which calls to cancel with the request."""
    request = contextvars.ContextVar("request", default="none")
    seen_in: list[str] = []

    async def ask(video_id: str, seen: int) -> News:
        seen_in.append(request.get())
        return await service.director.news(video_id, seen)

    request.set("the first viewer's")
    async with Watches(ask).of(await running(service)) as news:
        await news(0)
    assert set(seen_in) == {"none"}


async def test_a_dead_director_is_waited_for_also_by_those_who_ask_nothing(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.content.ASK_AGAIN_S", 0.0)
    video_id = await running(service)
    back = asyncio.Event()
    losses = iter([False, True, True])

    async def ask(video_id: str, seen: int) -> News:
        if next(losses, False):
            raise ReplicaLost("the Director died")
        if seen:
            back.set()
        return await service.director.news(video_id, seen)

    async with Watches(ask).of(video_id) as news:
        assert len((await news(0)).chunks) == 1
        await back.wait()  # nobody asks, and yet it was asked for
        service.graph.gate("sample 1").open()
        chunks, _ = await followed(news)
    assert len(chunks) == 3


async def test_every_viewer_of_a_deleted_video_is_cut_off(service: LocalService) -> None:
    watches = Watches(service.director.news)
    video_id = await running(service)
    async with AsyncExitStack() as watching:
        viewers = [await watching.enter_async_context(watches.of(video_id)) for _ in range(5)]
        await viewers[0](0)
        following = [asyncio.create_task(followed(news)) for news in viewers]
        await delete(service, video_id)
        for error in await asyncio.gather(*following, return_exceptions=True):
            assert isinstance(error, CutOff) and str(error) == "the video was deleted"
        with pytest.raises(CutOff):  # the one who was slow to ask
            await viewers[0](3)


async def test_an_error_is_told_to_all_and_forgotten(service: LocalService) -> None:
    video_id = await running(service)
    errors = iter([RuntimeError("a bug")])

    async def ask(video_id: str, seen: int) -> News:
        for error in errors:
            raise error
        return await service.director.news(video_id, seen)

    watches = Watches(ask)
    async with watches.of(video_id) as one, watches.of(video_id) as other:
        for error in await asyncio.gather(one(0), other(0), return_exceptions=True):
            assert isinstance(error, RuntimeError)
        async with watches.of(video_id) as next_one:
            assert len((await next_one(0)).chunks) == 1
    assert watches._watches == {}


# Fragments


class HeldStore(ReadStore):
    """A Store each of whose readings waits for its gate."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = Gate()

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.gate.reached.set()
        await self.gate.opened.wait()
        return await super().read(key, start, end)


@pytest.fixture
def store(tmp_path: Path) -> HeldStore:
    return HeldStore(str(tmp_path / "store"))


async def put(store: HeldStore, *sizes: int) -> dict[str, bytes]:
    """Fragments of one video, of these sizes: key ▸ bytes."""
    video_id = new_video_id(1.0)
    parts = [random.Random(k).randbytes(size) for k, size in enumerate(sizes)]
    return {(await store.put_fragment(video_id, k, 1, part)).key: part for k, part in enumerate(parts)}


async def test_a_reader_who_leaves_stops_nobody(store: HeldStore) -> None:
    ((key, data),) = (await put(store, 1000)).items()
    fragments = Fragments(store)
    readers = [asyncio.create_task(fragments.read(key, k, k + 10)) for k in range(20)]
    await store.gate.reached.wait()
    for reader in readers[:5]:  # among them the one whose reading it is
        reader.cancel()
    store.gate.open()
    await asyncio.wait(readers)
    assert [reader.result() for reader in readers[5:]] == [data[k : k + 10] for k in range(5, 20)]
    assert len(store.reads) == 1


async def test_what_all_readers_left_is_kept_for_the_next(store: HeldStore) -> None:
    ((key, data),) = (await put(store, 1000)).items()
    fragments = Fragments(store)
    leaving = asyncio.create_task(fragments.read(key))
    await store.gate.reached.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    store.gate.open()
    assert (await fragments.read(key, 3), await fragments.read(key, 0, 3)) == (data[3:], data[:3])
    assert len(store.reads) == 1


async def test_what_is_missing_is_told_to_all_and_asked_for_again(
    store: HeldStore, caplog: pytest.LogCaptureFixture
) -> None:
    ((key, data),) = (await put(store, 1000)).items()
    await store._delete([key])
    fragments = Fragments(store)
    readers = [asyncio.create_task(fragments.read(key)) for _ in range(3)]
    await store.gate.reached.wait()
    store.gate.open()
    for error in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(error, ObjectMissing)
    store.gate = Gate()
    left = asyncio.create_task(fragments.read(key))
    await store.gate.reached.wait()
    left.cancel()
    store.gate.open()
    await asyncio.wait([left, *fragments._reading.values()])
    gc.collect()
    assert "never retrieved" not in caplog.text
    await store._put(key, data)
    assert await fragments.read(key) == data


async def test_what_was_used_last_is_kept(store: HeldStore) -> None:
    store.gate.open()
    parts = await put(store, 6, 4, 1, 11, 10)
    a, b, c, large, whole = parts
    fragments = Fragments(store, most_bytes=10)

    async def reads(*keys: str) -> list[str]:
        """The keys of those that come from the store."""
        store.reads.clear()
        for key in keys:
            assert await fragments.read(key) == parts[key]
        return [key for key, _, _ in store.reads]

    assert await reads(a, b, a, b, a) == [a, b]
    assert await reads(c, a, c) == [c]  # b made room, which was not used for longest
    assert await reads(b) == [b]
    assert await reads(c, b) == []
    assert await reads(large, c, b, large) == [large, large]  # and nothing made room for it
    assert await fragments.read(large, 2, 5) == parts[large][2:5]
    assert store.reads[-1] == (large, 2, 5)
    assert await reads(whole, whole) == [whole]
    assert await reads(a) == [a]
    assert await reads(whole) == [whole]


async def test_no_more_is_kept_than_there_is_room_for(store: HeldStore) -> None:
    store.gate.open()
    rng = random.Random(5)
    parts = await put(store, *(rng.randint(1, 400) for _ in range(60)))
    fragments = Fragments(store, most_bytes=1000)

    async def reader(seed: int) -> None:
        rng = random.Random(seed)
        for key in rng.choices(list(parts), k=50):
            start = rng.randrange(len(parts[key]))
            end = rng.choice([None, rng.randint(start + 1, len(parts[key]))])
            assert await fragments.read(key, start, end) == parts[key][start:end]
            assert sum(map(len, fragments._kept.values())) == fragments._kept_bytes <= 1000

    await asyncio.gather(*map(reader, range(10)))
    assert 60 < len(store.reads) < 500
