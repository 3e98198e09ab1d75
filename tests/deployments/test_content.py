"""A video's file over HTTP: ranges, resuming, leaving, and how it ends for those who watch.

Finished videos are hand-made, of a few bytes; running ones are made by the Director and the real replicas.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import pytest

from deployments.content import file_bytes, live_bytes, objects_of
from deployments.errors import CutOff
from deployments.making import ReplicaLost, RunningVideo, first_record
from deployments.records import ChunkRecord, News, Status, Timings, VideoRecord
from deployments.store import new_video_id
from helios_core.config import CHUNK_FRAMES
from tests.core.test_provenance import MADE_BY_AI, said_of_picture, said_of_video
from tests.deployments.conftest import LocalService
from tests.deployments.test_director import PROMPT, request

TERM = 1
SIZES = (11, 1, 40, 3)  # of the init segment and the fragments
SIZE = sum(SIZES)
LAST_LIVE_BYTE = 9007199254740990
BODY = {"prompt": PROMPT, "seconds": 3 * CHUNK_FRAMES / 24, "size": "64x64", "steps": [1, 1, 1]}  # three chunks


async def put_video(
    service: LocalService,
    status: Status = "completed",
    sizes: tuple[int, ...] = SIZES,
    at: float = 1.0,
    owner: str = "",
) -> tuple[str, bytes]:
    """A video that has ended, of random bytes, created at the Unix time `at`: its id and its file."""
    asked = request(chunks=3).model_copy(update={"id": new_video_id(at), "created_at": at, "owner": owner})
    if owner:
        await service.store.put_owned(owner, asked.id, asked.spec.seconds)
    await service.store.accept(asked)
    parts = [os.urandom(size) for size in sizes]
    init = await service.store.put_init(asked.id, parts[0])
    timings = Timings(sample_started_at=at, sample_seconds=0, decode_seconds=0, encode_seconds=0, store_seconds=0)
    chunks = []
    for index, part in enumerate(parts[1:]):
        fragment = await service.store.put_fragment(asked.id, index, TERM, part)
        chunks.append(ChunkRecord(index=index, frames=33, steps=3, fragment=fragment, state=fragment, timings=timings))
    record = first_record(asked).model_copy(
        update={"status": status, "init": init, "chunks": tuple(chunks), "completed_at": at}
    )
    await service.store.put_record(record, TERM)
    await service.store.end(asked.id)
    return asked.id, b"".join(parts)


async def get(service: LocalService, video_id: str, query: str = "", **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await service.http.get(f"/v1/videos/{video_id}/content{query}", headers=names)


def about(answer: httpx.Response) -> dict[str, str]:
    """What the headers of an answer say of the file, and not of the request."""
    return {name: value for name, value in answer.headers.items() if name != "x-request-id"}


async def ended(service: LocalService, video_id: str) -> VideoRecord:
    seen = 0
    while not (news := await service.director.news(video_id, seen)).ended:
        seen += len(news.chunks)
    return await stored(service, video_id)


async def stored(service: LocalService, video_id: str) -> VideoRecord:
    record = await service.store.record(video_id)
    assert record is not None
    return record


async def watched_by(video: RunningVideo, watchers: int) -> None:
    """Returns when the Director knows of so many watchers: one for each process that has viewers."""
    while video.watchers != watchers:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def running(service: LocalService, at: str = "sample 1") -> str:
    """A video of three chunks that has come to this point, and waits there for its gate."""
    gate = service.graph.gate(at)
    video_id = (await service.http.post("/v1/videos", json=BODY)).json()["id"]
    await gate.reached.wait()
    return str(video_id)


# A finished file

WHOLE = (200, 0, SIZE)
MISSING = (416, 0, 0)

# Range ▸ status, first byte, byte after the last
RANGES: dict[str, tuple[int, int, int]] = {
    "bytes=0-": (206, 0, SIZE),
    "bytes=0-0": (206, 0, 1),
    f"bytes=0-{SIZE - 1}": (206, 0, SIZE),
    f"bytes=0-{SIZE}": (206, 0, SIZE),
    f"bytes=0-{'9' * 19}": (206, 0, SIZE),
    "bytes=10-11": (206, 10, 12),  # across the first fragment's edge
    "bytes=11-11": (206, 11, 12),  # a whole fragment
    "bytes=12-": (206, 12, SIZE),
    f"bytes={SIZE - 1}-": (206, SIZE - 1, SIZE),
    "bytes=-1": (206, SIZE - 1, SIZE),
    "bytes=-5": (206, SIZE - 5, SIZE),
    f"bytes=-{SIZE}": (206, 0, SIZE),
    f"bytes=-{SIZE + 1}": (206, 0, SIZE),
    f"bytes=-{'9' * 19}": (206, 0, SIZE),
    "BYTES=3-4": (206, 3, 5),
    f"bytes={SIZE}-": MISSING,
    f"bytes={SIZE}-{SIZE + 1}": MISSING,
    f"bytes={'9' * 19}-": MISSING,
    "bytes=-0": MISSING,
    "bytes=5-4": WHOLE,
    "bytes=0-1,3-4": WHOLE,
    "bytes=0-1,": WHOLE,
    f"bytes=0-{'9' * 5000}": WHOLE,
    "bytes=-": WHOLE,
    "bytes=": WHOLE,
    "bytes": WHOLE,
    "bytes=a-b": WHOLE,
    "bytes=1": WHOLE,
    "bytes=--1": WHOLE,
    "bytes=+1-2": WHOLE,
    "bytes=1.0-2": WHOLE,
    "bytes=0x1-2": WHOLE,
    "bytes 0-1": WHOLE,
    "frames=0-1": WHOLE,
    "": WHOLE,
}


@pytest.mark.parametrize("asked", RANGES)
async def test_ranges(service: LocalService, asked: str) -> None:
    status, start, end = RANGES[asked]
    video_id, file = await put_video(service)
    answer = await get(service, video_id, Range=asked)
    assert (answer.status_code, answer.headers.get("content-range")) == (
        status,
        {200: None, 206: f"bytes {start}-{end - 1}/{SIZE}", 416: f"bytes */{SIZE}"}[status],
    )
    if status == 416:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("range_not_satisfiable", "Range")
        assert asked in error["message"] and f"0 to {SIZE - 1}" in error["message"]
        return
    assert answer.content == file[start:end]
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["accept-ranges"] == "bytes"


async def test_ranges_in_other_digits_or_in_several_lines_are_ignored(service: LocalService) -> None:
    video_id, file = await put_video(service)
    several = [("Range", "bytes=0-1"), ("Range", "bytes=3-4")]
    for headers in ([(b"Range", "bytes=²-3".encode("latin-1"))], several):
        answer = await service.http.get(f"/v1/videos/{video_id}/content", headers=headers)  # type: ignore[arg-type]
        assert (answer.status_code, answer.content) == (200, file)


async def test_random_ranges_read_no_more_than_they_send(service: LocalService) -> None:
    rng = random.Random(7)
    sizes = tuple(rng.randint(1, 60) for _ in range(12))
    video_id, file = await put_video(service, sizes=sizes)
    for _ in range(300):
        start = rng.randrange(len(file))
        end = rng.randint(start + 1, len(file))
        service.store.reads.clear()
        answer = await get(service, video_id, Range=f"bytes={start}-{end - 1}")
        assert (answer.status_code, answer.content) == (206, file[start:end])
        read = [stop - first for key, first, stop in service.store.reads if stop is not None]
        assert sum(read) == end - start and 0 not in read


async def test_the_whole_file_and_its_head(service: LocalService) -> None:
    video_id, file = await put_video(service)
    whole = await get(service, video_id)
    service.store.reads.clear()
    # Range is defined for GET alone.
    for headers in ({}, {"Range": "bytes=1-2"}, {"Range": f"bytes={SIZE}-"}):
        head = await service.http.head(f"/v1/videos/{video_id}/content", headers=headers)
        assert (head.status_code, head.content, about(head)) == (200, b"", about(whole))
    assert [key for key, _, _ in service.store.reads if key.endswith(("mp4", "m4s"))] == []
    assert (whole.status_code, whole.content) == (200, file)
    assert whole.headers["content-length"] == str(SIZE)
    assert whole.headers["cache-control"] == "private, max-age=31536000, immutable"


async def test_the_etag_names_the_bytes(service: LocalService) -> None:
    (one, _), (other, _) = await put_video(service), await put_video(service)
    tags = [(await get(service, video_id)).headers["etag"] for video_id in (one, one, other)]
    tags.append((await get(service, one, Range="bytes=1-2")).headers["etag"])
    assert tags[0] == tags[1] == tags[3] != tags[2]
    assert tags[0].startswith('"') and tags[0].endswith('"')  # strong


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        ("{etag}", 304),
        ("W/{etag}", 304),
        ('"a", {etag}', 304),
        ('"a, b",W/{etag} , "c"', 304),
        ("*", 304),
        ('"a"', 200),
        ('"a", "b"', 200),
        ("{bare}", 200),  # not quoted
        ("", 200),
        (",", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_if_none_match(service: LocalService, tags: str, status: int, method: str) -> None:
    video_id, _ = await put_video(service)
    url = f"/v1/videos/{video_id}/content"
    etag = (await service.http.head(url)).headers["etag"]
    asked = tags.format(etag=etag, bare=etag.strip('"'))
    for part in ({}, {"Range": "bytes=0-1"}):
        answer = await service.http.request(method, url, headers={"If-None-Match": asked, **part})
        ranged = status == 200 and part and method == "GET"
        assert answer.status_code == (206 if ranged else status)
        assert answer.headers["etag"] == etag
        if status == 304:
            assert answer.content == b"" and "content-length" not in answer.headers


async def test_if_none_match_in_several_lines(service: LocalService) -> None:
    video_id, _ = await put_video(service)
    url = f"/v1/videos/{video_id}/content"
    etag = (await service.http.head(url)).headers["etag"]
    answer = await service.http.get(url, headers=[("If-None-Match", '"a"'), ("If-None-Match", etag)])
    assert answer.status_code == 304


@pytest.mark.parametrize(
    ("validator", "status"),
    [
        ("{etag}", 206),
        ("W/{etag}", 200),
        ('"a"', 200),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 200),
        ("nonsense", 200),
    ],
)
async def test_if_range(service: LocalService, validator: str, status: int) -> None:
    video_id, file = await put_video(service)
    etag = (await get(service, video_id)).headers["etag"]
    if_range = validator.format(etag=etag)
    answer = await get(service, video_id, Range="bytes=2-5", If_Range=if_range)
    assert (answer.status_code, answer.content) == (status, file[2:6] if status == 206 else file)
    beyond = await get(service, video_id, Range=f"bytes={SIZE}-", If_Range=if_range)
    assert beyond.status_code == (416 if status == 206 else 200)


async def test_a_download_whose_objects_vanish_is_cut_off(service: LocalService) -> None:
    video_id, _ = await put_video(service)
    record = await stored(service, video_id)
    objects = objects_of(record.init, record.chunks)
    body = file_bytes(objects, service.store, 0, SIZE)
    await anext(body)
    await service.store.delete(video_id)
    with pytest.raises(CutOff):
        await anext(body)

    broken, _ = await put_video(service)
    os.unlink(f"{service.store.url}/{(await stored(service, broken)).chunks[1].fragment.key}")
    with pytest.raises(CutOff):
        await get(service, broken)


# Videos that failed or were cancelled


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_the_part_of_an_ended_video_is_a_file(service: LocalService, status: Status) -> None:
    video_id, file = await put_video(service, status)
    for query in ("", "?partial=false"):
        refused = await get(service, video_id, query)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, f"video_{status}")
    part = await get(service, video_id, "?partial=true")
    assert part.headers["cache-control"] == "private, no-cache"
    assert (part.status_code, part.content, part.headers["content-length"]) == (200, file, str(SIZE))
    ranged = await get(service, video_id, "?partial=true", Range="bytes=10-11")
    assert (ranged.status_code, ranged.content) == (206, file[10:12])
    unchanged = await get(service, video_id, "?partial=true", If_None_Match=part.headers["etag"])
    assert unchanged.status_code == 304

    empty, _ = await put_video(service, status, sizes=SIZES[:1])
    assert (await get(service, empty, "?partial=true")).status_code == 409


@pytest.mark.parametrize("query", ["?partial=true", "?partial=false", "?variant=video", "?variant=video&partial=true"])
async def test_these_queries_change_nothing_for_other_videos(service: LocalService, query: str) -> None:
    video_id, file = await put_video(service)
    answer = await get(service, video_id, query)
    assert (answer.status_code, answer.content) == (200, file)
    begun = await running(service)
    asking = asyncio.create_task(get(service, begun, query))
    service.graph.gate("sample 1").open()
    assert (await asking).content == (await get(service, begun)).content


# A running video


async def test_live_bytes_come_while_the_video_is_made_and_are_the_file(service: LocalService) -> None:
    video_id = await running(service)  # one chunk is committed, or about to be
    live = live_bytes(partial(service.director.news, video_id), service.store)
    first = await anext(live) + await anext(live)
    assert (await service.director.get(video_id)).status == "in_progress"
    early = asyncio.create_task(get(service, video_id))
    service.graph.gate("sample 1").open()
    rest = b"".join([data async for data in live])
    answer = await early
    file = (await get(service, video_id)).content
    assert first + rest == answer.content == file
    assert answer.status_code == 200
    assert {"etag", "content-length", "content-range"}.isdisjoint(answer.headers)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["cache-control"] == "no-store"


async def test_a_live_video_resumes_at_any_byte(service: LocalService) -> None:
    """Bytes that exist already, that do not exist yet, and that never will."""
    video_id = await running(service)
    rng = random.Random(11)
    starts = [0, 1, *(int(10 ** rng.uniform(0, 5)) for _ in range(40)), 10**9, LAST_LIVE_BYTE]
    asking = [asyncio.create_task(get(service, video_id, Range=f"bytes={start}-")) for start in starts]
    ignored = ["bytes=0-5", "bytes=-5", "bytes=0-1,2-", f"bytes={LAST_LIVE_BYTE + 1}-", "frames=3-", "bytes=x-"]
    whole = [asyncio.create_task(get(service, video_id, Range=asked)) for asked in ignored]
    whole.append(asyncio.create_task(get(service, video_id, Range="bytes=3-", If_Range='"a"')))
    head = await service.http.head(f"/v1/videos/{video_id}/content")
    assert (head.status_code, "content-length" in head.headers) == (200, False)
    service.graph.gate("sample 1").open()
    await ended(service, video_id)
    file = (await get(service, video_id)).content
    assert any(start < len(file) for start in starts) and any(start > len(file) for start in starts)
    for start, answer in zip(starts, await asyncio.gather(*asking), strict=True):
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {start}-{LAST_LIVE_BYTE}/*"
        assert answer.content == file[start:]
    for answer in await asyncio.gather(*whole):
        assert (answer.status_code, "content-range" in answer.headers) == (200, False)
        assert answer.content == file


async def test_what_lies_before_a_resumed_byte_is_not_read(service: LocalService) -> None:
    video_id, file = await put_video(service)
    service.store.reads.clear()
    live = live_bytes(partial(service.director.news, video_id), service.store, start=14)
    assert b"".join([data async for data in live]) == file[14:]
    fragments = [(key, first) for key, first, _ in service.store.reads if key.endswith(("mp4", "m4s"))]
    assert fragments == [(f"videos/{video_id}/chunks/00001.t1.m4s", 2), (f"videos/{video_id}/chunks/00002.t1.m4s", 0)]


async def test_a_viewer_waits_for_the_next_director(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.content.ASK_AGAIN_S", 0)
    video_id, file = await put_video(service)
    lost = iter([False, True, True, False])

    async def news(seen: int) -> News:
        if next(lost):
            raise ReplicaLost("the Director died")
        whole = await service.director.news(video_id, seen)
        # It dies when it has told of the first chunk.
        return whole if seen else whole.model_copy(update={"status": "in_progress", "chunks": whole.chunks[:1]})

    assert b"".join([data async for data in live_bytes(news, service.store)]) == file


async def fail(service: LocalService, video_id: str) -> None:
    service.graph.errors[PROMPT, "sample 1"] = ValueError("broken")
    service.graph.gate("sample 1").open()
    await ended(service, video_id)


async def cancel(service: LocalService, video_id: str) -> None:
    answer = await service.http.post(f"/v1/videos/{video_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


async def delete(service: LocalService, video_id: str) -> None:
    answer = await service.http.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}


@pytest.mark.parametrize("end", [fail, cancel, delete])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=100-"}, {"Range": "bytes=1000000000-"}])
async def test_a_live_response_of_a_video_without_an_end_is_cut_off(
    service: LocalService, end: Callable[[LocalService, str], Awaitable[None]], headers: dict[str, str]
) -> None:
    video_id = await running(service)
    live = live_bytes(partial(service.director.news, video_id), service.store)
    await anext(live)
    asking = asyncio.create_task(get(service, video_id, **headers))
    await end(service, video_id)
    with pytest.raises(CutOff):
        await asking
    with pytest.raises(CutOff):
        _ = [data async for data in live]


# A video that is made for the one who asked


async def test_what_is_sent_says_that_it_was_made_by_ai(service: LocalService) -> None:
    stream = await service.http.post("/v1/videos/stream", json=BODY)
    video_id = stream.headers["x-video-id"]
    init = await service.http.get(f"/v1/videos/{video_id}/hls/init.mp4")
    segment = await service.http.get(f"/v1/videos/{video_id}/hls/2.m4s")
    for file in (stream.content, (await get(service, video_id)).content, init.content + segment.content):
        assert said_of_video(file) == MADE_BY_AI
    assert said_of_picture((await get(service, video_id, "?variant=thumbnail")).content) == MADE_BY_AI


async def test_a_stream_is_the_video(service: LocalService) -> None:
    stream = await service.http.post("/v1/videos/stream", json=BODY)
    video_id = stream.headers["x-video-id"]
    assert (stream.status_code, stream.headers["content-type"]) == (200, "video/mp4")
    assert stream.content == (await get(service, video_id)).content
    assert (await ended(service, video_id)).status == "completed"


async def only_video(service: LocalService) -> str:
    (video,) = (await service.http.get("/v1/videos")).json()["data"]
    return str(video["id"])


@pytest.mark.parametrize("point", ["sample 0", "sample 2"])
async def test_leaving_a_stream_cancels_its_video(service: LocalService, point: str) -> None:
    service.director._unwatched_s = 3600.0  # it is the leaving that cancels
    gate = service.graph.gate(point)
    streaming = asyncio.create_task(service.http.post("/v1/videos/stream", json=BODY))
    await gate.reached.wait()
    video_id = await only_video(service)
    streaming.cancel()
    await asyncio.wait([streaming])
    assert (await ended(service, video_id)).status == "cancelled"


async def test_a_stream_whose_client_hangs_up_is_cancelled(service: LocalService) -> None:
    """The body waits to be sent, not for news, when the connection breaks."""
    service.director._unwatched_s = 3600.0
    service.graph.gate("sample 2")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def broken(message: Any) -> None:
            if message.get("body"):
                raise OSError("connection reset")
            await send(message)

        await service.app(scope, receive, broken)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://helios") as client:
        with pytest.raises(OSError, match="connection reset"):
            await client.post("/v1/videos/stream", json=BODY)
    assert (await ended(service, await only_video(service))).status == "cancelled"


async def test_a_viewer_who_is_slow_still_watches(service: LocalService) -> None:
    """While it takes its time with what was sent, the Director knows of it, and makes the video that is made for it."""
    service.graph.gate("sample 2")
    held = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def slow(message: Any) -> None:
            if message.get("body") and not held:
                video = service.director._running[await only_video(service)]
                while len(video.record.chunks) < 2:  # it is told of the second one, and does not ask
                    await video.changed.wait()
                await watched_by(video, 1)
                service.director._cancel_unwatched(video)  # as the clock would
                held.append(video.cancelled)
                service.graph.gate("sample 2").open()
            await send(message)

        await service.app(scope, receive, slow)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://helios") as client:
        stream = await client.post("/v1/videos/stream", json=BODY)
    assert held == [False] and stream.content == (await get(service, stream.headers["x-video-id"])).content


async def test_a_viewer_who_leaves_changes_nothing(service: LocalService) -> None:
    video_id = await running(service)
    watching = asyncio.create_task(get(service, video_id))
    live = live_bytes(partial(service.director.news, video_id), service.store)
    await anext(live)
    await live.aclose()
    watching.cancel()
    await asyncio.wait([watching])
    service.graph.gate("sample 1").open()
    assert (await ended(service, video_id)).status == "completed"
