"""What happens to a video as server-sent events: their order, what they say, and that none is lost or told twice.

Running videos are made by the Director and the real replicas, held at gates.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from deployments.events import BEGINNING, PING, events
from deployments.store import new_video_id
from deployments.watching import Watches
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import BODY, cancel, delete, ended, fail, get, put_video, watched_by
from tests.deployments.test_director import PROMPT
from tests.deployments.test_watching import client

SECOND = "a green sun over a black sea"
CHUNK_S = 33 / 24
# Three chunks, of which the second one begins to follow another prompt.
CHANGING = {**BODY, "prompts": [{"at_seconds": CHUNK_S, "prompt": SECOND, "transition_chunks": 2}]}
IDS = ["0", "1-prompt", "1", "2", "done"]

Told = list[tuple[str, str, dict[str, Any]]]


def parsed(text: str) -> Told:
    """The events as an EventSource takes them: name, id and data."""
    told: Told = []
    for block in text.removesuffix("\n\n").split("\n\n") if text else []:
        if not block.startswith(":"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            told.append((fields.pop("event"), fields.pop("id"), json.loads(fields.pop("data"))))
            assert fields == {}
    return told


async def ask(service: LocalService, video_id: str, last_event_id: str | None = None) -> httpx.Response:
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    return await service.http.get(f"/v1/videos/{video_id}/events", headers=headers)


async def told(service: LocalService, video_id: str, last_event_id: str | None = None) -> Told:
    answer = await ask(service, video_id, last_event_id)
    assert answer.status_code == 200
    return parsed(answer.text)


async def begun(service: LocalService, body: dict[str, Any], at: str, chunks: int) -> str:
    """A video that waits at a gate, with so many chunks."""
    gate = service.graph.gate(at)
    video_id = str((await service.http.post("/v1/videos", json=body)).json()["id"])
    await gate.reached.wait()
    while chunks and not (await service.director.news(video_id, chunks - 1)).chunks:
        pass
    return video_id


async def test_events_tell_of_every_chunk_and_of_the_end(service: LocalService) -> None:
    video_id = await begun(service, CHANGING, "sample 1", chunks=1)
    live = asyncio.create_task(ask(service, video_id))
    service.graph.gate("sample 1").open()
    answer = await live
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    record = await ended(service, video_id)
    file = (await get(service, video_id)).content

    found = parsed(answer.text)
    assert found == await told(service, video_id), "the same while it is made and afterwards"
    assert [event_id for _, event_id, _ in found] == IDS
    assert [name for name, _, _ in found] == ["chunk", "prompt", "chunk", "chunk", "done"]
    assert found[1][2] == {"chunk": 1, "prompt": SECOND, "transition_chunks": 2}
    chunks = [data for name, _, data in found if name == "chunk"]
    for before, chunk, data in zip((None, *record.chunks), record.chunks, chunks, strict=False):
        times = chunk.timings
        fragment = file[data["offset"] : data["offset"] + data["bytes"]]
        assert fragment == await service.store.read(chunk.fragment.key)
        del data["offset"], data["bytes"]
        assert data == {
            "index": chunk.index,
            "first_frame": 33 * chunk.index,
            "frames": 33,
            "pts_s": CHUNK_S * chunk.index,
            "duration_s": CHUNK_S,
            "made_s": times.sample_seconds + times.decode_seconds + times.encode_seconds + times.store_seconds,
            "cadence_s": before and times.sample_started_at - before.timings.sample_started_at,
            "prompt": SECOND if chunk.index else PROMPT,
        }
    assert found[-1][2] == {"chunks": 3, "frames": 99, "bytes": len(file), "duration_s": 99 / 24}


async def test_last_event_id_loses_no_event_and_tells_none_twice(service: LocalService) -> None:
    video_id = await begun(service, CHANGING, "sample 2", chunks=2)
    early = [(k, asyncio.create_task(told(service, video_id, last))) for k, last in enumerate(IDS[:3])]
    early += [(-1, asyncio.create_task(told(service, video_id, last))) for last in (None, "")]
    await watched_by(service.director._running[video_id], 1)
    service.graph.gate("sample 2").open()
    await ended(service, video_id)
    whole = await told(service, video_id)
    assert [event_id for _, event_id, _ in whole] == IDS
    for k, live in early:
        assert await live == whole[k + 1 :]
    for k, last in enumerate(IDS[:-1]):
        assert await told(service, video_id, last) == whole[k + 1 :]
    over = await ask(service, video_id, "done")
    assert (over.status_code, over.content) == (204, b"")


async def test_two_hundred_cuts_lose_no_event_and_tell_none_twice(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that break after a random number of bytes, while a video is made and afterwards. A part of an event
    is dropped, as an EventSource does."""
    monkeypatch.setattr("deployments.events.PING_S", 0.001)  # so that no connection is too quiet to be cut
    video_id = await begun(service, CHANGING, "sample 1", chunks=1)
    cut = asyncio.Semaphore(0)

    async def part(last: str | None, most: int | None) -> Told:
        """The events that arrive whole after the id `last`, if the connection breaks after so many bytes."""
        got = bytearray()

        async def break_off(data: bytes) -> None:
            got.extend(data)
            if most is not None and len(got) >= most:
                del got[most:]
                raise OSError("cut")

        async with client(service, break_off) as http:
            headers = {} if last is None else {"Last-Event-ID": last}
            asking = http.get(f"/v1/videos/{video_id}/events", headers=headers)
            if most is None:
                await asking
            else:
                with pytest.raises(OSError, match="cut"):
                    await asking
                cut.release()
        whole, _, _ = got.decode().rpartition("\n\n")
        return parsed(whole)

    async def heard(cuts: list[int]) -> Told:
        found: Told = []
        for most in (*cuts, None):
            found += await part(found[-1][1] if found else None, most)
        return found

    rng = random.Random(19)
    live = [asyncio.create_task(heard([rng.randint(1, 800) for _ in range(4)])) for _ in range(25)]
    for gate, cuts in ((service.graph.gate("sample 1"), 40), (service.graph.gate("sample 2"), 60)):
        for _ in range(cuts):
            await cut.acquire()
        gate.open()
    await ended(service, video_id)
    whole = await told(service, video_id)
    assert [event_id for _, event_id, _ in whole] == IDS
    for found in await asyncio.gather(*live):
        assert found == whole
    size = len((await ask(service, video_id)).content.replace(PING, b""))
    for _ in range(100):
        assert await heard([rng.randrange(1, size)]) == whole


@pytest.mark.parametrize(
    "last", ["3", "1-prompt", "0-prompt", "done", "-1", "x", "00", "0 ", "0-prompts", "prompt", "1" * 5000, "٣", "²"]
)
async def test_a_last_event_id_that_makes_no_sense_is_refused(service: LocalService, last: str) -> None:
    video_id = await begun(service, BODY, "sample 2", chunks=2)
    headers = [(b"Last-Event-ID", last.encode())]
    answer = await service.http.get(f"/v1/videos/{video_id}/events", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (422, "Last-Event-ID", "invalid_input")
    assert "0 to 1" in error["message"] and len(error["message"]) < 250


async def test_what_is_allowed_is_told(service: LocalService) -> None:
    queued = await begun(service, BODY, "encode", chunks=0)
    message = (await ask(service, queued, "0")).json()["error"]["message"]
    assert message == "Last-Event-ID is '0'; allowed: the id of an event that the video has had: none"
    over, _ = await put_video(service)
    message = (await ask(service, over, "3")).json()["error"]["message"]
    assert message.endswith("had: 0 to 2, 0-prompt to 2-prompt where the prompt changed, done")
    for unknown in (new_video_id(1.0), "x"):
        assert (await ask(service, unknown)).status_code == 404


async def test_a_change_of_the_prompt_on_the_way_is_told(service: LocalService) -> None:
    """With the chunk that begins with it; a change to the same prompt is none."""
    video_id = await begun(service, BODY, "sample 0", chunks=0)
    live = asyncio.create_task(told(service, video_id))
    for prompt in (PROMPT, SECOND):
        gate = "sample 0" if prompt == PROMPT else "sample 1"
        await service.graph.gate(gate).reached.wait()
        changed = await service.http.post(f"/v1/videos/{video_id}/prompt", json={"prompt": prompt})
        assert changed.status_code == 200
        service.graph.gate("sample 1")
        service.graph.gate(gate).open()
    found = await live
    assert [event_id for _, event_id, _ in found] == ["0", "1", "2-prompt", "2", "done"]
    assert found[2][2] == {"chunk": 2, "prompt": SECOND, "transition_chunks": 3}
    assert [data["prompt"] for name, _, data in found if name == "chunk"] == [PROMPT, PROMPT, SECOND]


async def test_a_prompt_that_begins_the_video_in_place_of_its_own_is_told(service: LocalService) -> None:
    body = {**BODY, "prompts": [{"at_seconds": 0, "prompt": SECOND}]}
    video_id = (await service.http.post("/v1/videos", json=body)).json()["id"]
    found = await told(service, video_id)
    assert [event_id for _, event_id, _ in found] == ["0-prompt", "0", "1", "2", "done"]
    assert found == [*found[:1], *await told(service, video_id, "0-prompt")]


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (fail, "internal_error", "the service failed while making this video"),
        (cancel, "cancelled", "the video was cancelled"),
        (delete, "not_found", "the video was deleted"),
    ],
)
async def test_a_video_without_an_end_ends_in_an_error(
    service: LocalService, end: Callable[[LocalService, str], Awaitable[None]], code: str, message: str
) -> None:
    video_id = await begun(service, BODY, "sample 1", chunks=1)
    live = asyncio.create_task(told(service, video_id))
    await watched_by(service.director._running[video_id], 1)
    await end(service, video_id)
    (_, first, _), *_, last = await live
    assert (first, last) == ("0", ("error", "done", {"code": code, "message": message, "last_chunk": 0}))
    again = await ask(service, video_id, "done")
    if end is delete:
        assert again.status_code == 404
    else:
        assert again.status_code == 204
        assert (await told(service, video_id))[-1] == last


async def test_a_video_that_ends_without_a_chunk_says_so(service: LocalService) -> None:
    video_id = await begun(service, BODY, "sample 0", chunks=0)
    await cancel(service, video_id)
    data = {"code": "cancelled", "message": "the video was cancelled", "last_chunk": None}
    assert await told(service, video_id) == [("error", "done", data)]


async def test_the_connection_is_kept_with_pings(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.events.PING_S", 0.01)
    video_id = await begun(service, BODY, "sample 1", chunks=1)
    async with Watches(service.director.news).of(video_id) as news:
        stream = events(news, BEGINNING)
        assert b"id: 0\n" in await anext(stream)
        assert await anext(stream) == PING == await anext(stream)
        service.graph.gate("sample 1").open()
        rest = b"".join([data async for data in stream]).decode()
    assert [event_id for _, event_id, _ in parsed(rest)] == ["1", "2", "done"]


async def test_who_only_hears_of_a_video_watches_it(service: LocalService) -> None:
    video_id = await begun(service, BODY, "sample 1", chunks=1)
    live = asyncio.create_task(ask(service, video_id))
    video = service.director._running[video_id]
    await watched_by(video, 1)
    live.cancel()
    await watched_by(video, 0)
    service.graph.gate("sample 1").open()
    assert (await ended(service, video_id)).status == "completed"
