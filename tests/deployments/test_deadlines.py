"""Videos with a `deadline_s`: how they end, what is left of them, and what a request may say.

The clocks, the loop's and Unix time, are virtual, over chunks that are hashes; what is played is made by the real
replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from deployments.director import COLLECT_AFTER_S
from deployments.records import VideoError, VideoRecord
from deployments.store import Store
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import ended, get, stored
from tests.deployments.test_continuing import BODY, post, show, told
from tests.deployments.test_director import PROMPT
from tests.deployments.test_fair_turns import CHUNK, ServedWorld, asked
from tests.deployments.test_live import stored_in
from tests.deployments.virtual_time import VirtualTime, run_in_virtual_time

LEFT = VideoError(code="deadline_exceeded", message="the deadline passed: deadline_s is 4.5, counted from created_at")
ACCEPTED = 1000.0  # Unix time at which a test begins

# How they end, in virtual time: sampling takes a second, so that chunk k is committed after k + 1.1


def run(monkeypatch: pytest.MonkeyPatch, main: Coroutine[Any, Any, None]) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(time, "time", lambda: ACCEPTED + loop.time())
        await main
        await asyncio.sleep(2 * COLLECT_AFTER_S)
        assert isinstance(loop, VirtualTime) and loop.timers() == [], "nothing is left of a deadline"

    try:
        run_in_virtual_time(test())
    finally:
        monkeypatch.undo()


async def over(world: ServedWorld, k: int = 0) -> VideoRecord:
    """The record of a video of the world that has ended, of which nothing else is left."""
    video_id = world.requests[k].id
    if (running := world.director._running.get(video_id)) is not None:
        await asyncio.wait([running.leading])
    record = await stored_in(world.store, video_id)
    status = await world.director.get(record.id)
    assert (status.status, status.error, status.usage.chunks) == (record.status, record.error, len(record.chunks))
    assert record.id not in await world.store.active()
    assert files(world.store, record.id) == {
        *(chunk.fragment.key for chunk in record.chunks),
        *(chunk.state.key for chunk in record.chunks[-1:]),
    }
    return record


def files(store: Store, video_id: str) -> set[str]:
    """Fragments and states of a video in the store."""
    assert store.folder is not None
    found = store.folder.joinpath("videos", video_id).rglob("*.*")
    return {str(path.relative_to(store.folder)) for path in found if path.parent.name in ("chunks", "states")}


def clock() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize(("deadline_s", "chunks"), [(0.5, {0}), (1.05, {0, 1}), (2.5, {2}), (4.05, {3, 4}), (4.5, {4})])
def test_a_video_ends_at_its_deadline_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline_s: float, chunks: set[int]
) -> None:
    """What is being rendered then may be committed, or not."""

    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9, created_at=ACCEPTED, deadline_s=deadline_s)])
        await (await world.next_director()).create(world.requests[0])
        record = await over(world)
        error = VideoError(code=LEFT.code, message=LEFT.message.replace("4.5", f"{deadline_s:g}"))
        assert (record.status, record.error) == ("failed", error) and len(record.chunks) in chunks
        assert record.completed_at is not None and deadline_s <= record.completed_at - ACCEPTED <= deadline_s + 1
        assert clock() <= deadline_s + 1, "what is under way is waited for, and nothing else"

    run(monkeypatch, test())


def test_a_paused_video_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9, created_at=ACCEPTED, deadline_s=4.5)])
        director = await world.next_director()
        await director.create(world.requests[0])
        await asyncio.sleep(1.5)
        assert (await director.pause(world.requests[0].id)).paused
        record = await over(world)
        assert (record.status, record.error, len(record.chunks), record.paused) == ("failed", LEFT, 2, False)
        assert clock() == 4.5

    run(monkeypatch, test())


def test_a_video_that_waits_for_its_turn_or_for_viewers_ends_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        late = {"created_at": ACCEPTED, "deadline_s": 4.5}
        world = ServedWorld(
            tmp_path, [asked(30), asked(9, priority="batch", **late), asked(9, lead_seconds=0.0, **late)]
        )
        director = await world.next_director()
        for each in world.requests:
            await director.create(each)
        waits, ahead = await over(world, 1), await over(world, 2)
        assert (waits.status, waits.error, waits.chunks) == ("failed", LEFT, ())
        assert (ahead.status, ahead.error, len(ahead.chunks)) == ("failed", LEFT, 1)
        assert clock() == 4.5
        assert (await over(world)).status == "completed"
        assert world.director._turns["random"]._queue._taken == {}

    run(monkeypatch, test())


@pytest.mark.parametrize("end", ["completed", "cancelled", "deleted"])
def test_a_video_that_ended_before_its_deadline_does_not_hear_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(3, created_at=ACCEPTED, deadline_s=86400.0)])
        director = await world.next_director()
        video_id = (await director.create(world.requests[0])).id
        await asyncio.sleep(1.5)
        if end == "cancelled":
            await director.cancel(video_id)
        if end == "deleted":
            await director.delete(video_id)
        else:
            record = await over(world)
            assert (record.status, record.error) == (end, None)
        assert clock() < 10

    run(monkeypatch, test())


@pytest.mark.parametrize("first", ["cancel", "deadline"])
def test_who_comes_first_says_how_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9, created_at=ACCEPTED, deadline_s=4.5)])
        director = await world.next_director()
        video_id = (await director.create(world.requests[0])).id
        await asyncio.sleep(4.499 if first == "cancel" else 4.501)  # chunk 4 is being sampled, which may take until 5
        status = await director.cancel(video_id)
        assert (status.status, status.error) == (("cancelled", None) if first == "cancel" else ("failed", LEFT))

    run(monkeypatch, test())


@pytest.mark.parametrize("paused", [False, True])
def test_a_deadline_outlives_its_director(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paused: bool) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9, created_at=ACCEPTED, deadline_s=4.5)])
        director = await world.next_director()
        video_id = (await director.create(world.requests[0])).id
        await asyncio.sleep(2.5)
        if paused:
            await director.pause(video_id)
        await stopped(world)
        assert clock() < 4 and (await stored_in(world.store, video_id)).status == "in_progress"
        following = await world.next_director()
        await following.news(video_id, 0)
        record = await over(world)
        assert (record.status, record.error) == ("failed", LEFT)
        assert len(record.chunks) == (2 if paused else 3) and clock() <= 5.5

    run(monkeypatch, test())


def test_a_deadline_that_passed_meanwhile_ends_the_video_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9, created_at=ACCEPTED, deadline_s=4.5)])
        director = await world.next_director()
        video_id = (await director.create(world.requests[0])).id
        await asyncio.sleep(2.5)
        await stopped(world)
        before = await stored_in(world.store, video_id)
        await asyncio.sleep(100)
        world.served.clear()
        await world.next_director()
        begun = clock()
        await asyncio.gather(*world.director._resuming.values())
        record = await over(world)
        assert (record.status, record.error, record.chunks) == ("failed", LEFT, before.chunks)
        assert (clock(), world.served) == (begun, [])

    run(monkeypatch, test())


async def stopped(world: ServedWorld) -> None:
    await world.director.stop()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTime) and loop.timers() == [], "a Director that stops leaves no timer behind"


# What is left, played


async def test_what_was_committed_before_the_deadline_can_be_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as service:
        gate = service.graph.gate("sample 2")
        video = await post(service, **BODY, seconds=4 * CHUNK, deadline_s=60)
        await gate.reached.wait()
        while len((await stored(service, video["id"])).chunks) < 2:
            await service.director.news(video["id"], 1)
    a_day_later = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: a_day_later)
    async with serving(tmp_path) as service:
        record = await ended(service, video["id"])
        told_of = await show(service, video["id"])
        message = "the deadline passed: deadline_s is 60, counted from created_at"
        assert (told_of["status"], told_of["error"]) == ("failed", {"code": "deadline_exceeded", "message": message})
        assert (told_of["deadline_s"], told_of["usage"]["chunks"], len(record.chunks)) == (60, 2, 2)
        status, code, why = told(await get(service, video["id"]))
        assert (status, code) == (409, "video_failed") and message in why
        partial = await get(service, video["id"], "?partial=true")
        assert record.init is not None
        parts = [await service.store.read(item.key) for item in (record.init, *(c.fragment for c in record.chunks))]
        assert (partial.status_code, partial.content) == (200, b"".join(parts))


# At the door

NO_VIDEO = f"video_{'0' * 32}"
PATHS = {
    "": {},
    "/stream": {},
    "/edits": {"video": {"id": NO_VIDEO}},
    f"/{NO_VIDEO}/extend": {"seconds": 1},
    f"/{NO_VIDEO}/fork": {"chunk": 0},
    f"/{NO_VIDEO}/remix": {},
}


REFUSED: list[tuple[str, Any, str]] = [
    ("deadline_s", 0, "0.0; allowed: a number above 0, at most 86400"),
    ("deadline_s", -1, "-1.0; allowed: a number above 0, at most 86400"),
    ("deadline_s", 86400.5, "86400.5; allowed: a number above 0, at most 86400"),
    ("deadline_s", "soon", "'soon'; allowed: a number"),
    ("deadline_s", True, "True; allowed: a number"),
    ("deadline_s", "NaN", "'NaN'; allowed: a number"),
    ("priority", "urgent", "'urgent'; allowed: realtime or batch"),
    ("priority", None, "None; allowed: realtime or batch"),
]


async def test_what_cannot_be_is_refused_wherever_a_video_is_asked_for(service: LocalService) -> None:
    for path, fields in PATHS.items():
        for name, value, message in REFUSED:
            body = {"prompt": PROMPT, **fields, name: value}
            answer = await service.http.post(f"/v1/videos{path}", json=body)
            assert told(answer) == (422, "invalid_input", f"{name} is {message}")
    assert (await service.director.page(9)).videos == ()


async def test_the_longest_deadline_is_a_setting(tmp_path: Path) -> None:
    async with serving(tmp_path, limits={"max_deadline_seconds": 30.0}) as service:
        (model,) = (await service.http.get("/v1/models")).json()["data"]
        assert model["limits"]["deadline_seconds"] == 30
        _, _, message = told(await service.http.post("/v1/videos", json={**BODY, "deadline_s": 31}))
        assert message == "deadline_s is 31.0; allowed: a number above 0, at most 30"


async def test_what_a_request_says_is_kept_and_told(service: LocalService) -> None:
    plain = await post(service, **BODY, seconds=CHUNK)
    assert (plain["priority"], plain["deadline_s"]) == ("realtime", None)
    await ended(service, plain["id"])
    form = {
        "prompt": PROMPT,
        "size": "64x64",
        "steps": "1,1,1",
        "seconds": "1",
        "priority": "batch",
        "deadline_s": "3600.5",
    }
    sent = (await service.http.post("/v1/videos", files={name: (None, text) for name, text in form.items()})).json()
    videos = [sent]
    for how, fields in {"extend": {"seconds": 1}, "fork": {"chunk": 0}, "remix": {"prompt": PROMPT}}.items():
        videos.append(await post(service, f"/{plain['id']}/{how}", **fields, priority="batch", deadline_s=3600.5))
    for video in videos:
        request = await service.store.request(video["id"])
        assert request is not None and (request.owner, request.priority, request.deadline_s) == ("", "batch", 3600.5)
        record = await ended(service, video["id"])
        assert (record.status, record.owner, record.priority, record.deadline_s) == ("completed", "", "batch", 3600.5)
        told_of = await show(service, video["id"])
        assert (told_of["priority"], told_of["deadline_s"]) == ("batch", 3600.5)
