"""Videos that are steered while they are watched: without an end, made no further ahead than a viewer wants, paused.

What depends on a clock is run in virtual time, over chunks that are hashes (test_races); all else over the real
replicas.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.director import UNWATCHED_S, Director
from deployments.playback import TICK_S, Playback
from deployments.records import VideoRecord
from deployments.store import Store
from helios_core.config import CHUNK_FRAMES
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import ended, get, stored
from tests.deployments.test_continuing import BODY, essence, fresh, post, show, told
from tests.deployments.test_director import PROMPT, Gate, Rig, request
from tests.deployments.test_prompts import DESERT, FOREST, changed, one_sampler
from tests.deployments.test_races import NONE, Video, World, undisturbed
from tests.deployments.virtual_time import run_in_virtual_time

CHUNK = CHUNK_FRAMES / 24  # seconds
LEAD = 3.0
OPEN = {**BODY, "seconds": None}


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    return await Rig(tmp_path / "store").start()


# The arithmetic


def test_a_viewer_plays_what_there_is_from_when_it_is_watched() -> None:
    playback = Playback(lead_s=3.0, unseen_s=0.0, now=10.0)
    playback.committed(2.0, now=10.0)
    assert playback.unseen(20.0) == 2.0  # nobody has come
    assert playback.wait(1.0, 20.0) == 0.0 and playback.wait(1.5, 20.0) == math.inf
    assert playback.watched(20.0) and not playback.watched(21.0)  # only one is the first
    assert playback.unseen(21.5) == 0.5
    assert playback.wait(3.0, 21.5) == 0.5 and playback.wait(2.5, 21.5) == 0.0
    assert playback.unseen(30.0) == 0.0  # and waits
    playback.committed(2.0, now=30.0)
    assert playback.unseen(31.0) == 1.0


def test_without_a_lead_nothing_waits() -> None:
    assert Playback(lead_s=None, unseen_s=100.0, now=0.0).wait(100.0, 0.0) == 0.0


# The lead, in virtual time


class LiveWorld(World):
    """A World in which nothing goes wrong; it makes one open-ended video, whose chunks take `speed` seconds to
    sample and as long to render."""

    def __init__(self, folder: Path, speed: float) -> None:
        super().__init__(1, folder)
        self.speed, self.samplers, self.over = speed, 1, True
        asked = request()
        spec = replace(asked.spec, seconds=3600.0, open_ended=True)
        self.request = asked.model_copy(update={"spec": spec, "while_watched": True, "lead_seconds": LEAD})
        self.videos = {self.request.id: Video(self.request, NONE)}

    async def pause(self, most: int) -> None:
        await asyncio.sleep(self.speed if most > 1 else 0)  # once in each part

    def later(self, step: Any) -> None:
        asyncio.get_running_loop().call_soon(step)

    async def started(self) -> Director:
        asyncio.get_running_loop().set_default_executor(self.store._threads)
        self.director = await self.next_director()
        return self.director


class Viewer:
    """Plays at normal speed what has arrived, from when the first of it has. Seconds."""

    def __init__(self) -> None:
        self.arrived = self.played = self.stalled = 0.0
        self._at = math.inf  # when it was last looked at

    def arrive(self, seconds: float, now: float) -> None:
        if self.arrived:
            wanted = self.played + now - self._at
            self.played = min(wanted, self.arrived)
            self.stalled += wanted - self.played
        self.arrived, self._at = self.arrived + seconds, now

    @property
    def lead(self) -> float:
        return self.arrived - self.played


@pytest.mark.parametrize("speed", [0.01, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("comes_after", [0.0, 1.0, 9.0])
def test_a_video_is_made_no_further_ahead_than_its_lead(tmp_path: Path, speed: float, comes_after: float) -> None:
    """And no less far, if it can be made so fast. When nobody watches any more it ends, and is whole."""

    async def test() -> None:
        world, viewer = LiveWorld(tmp_path, speed), Viewer()
        director, clock = await world.started(), asyncio.get_running_loop().time
        await director.create(world.request)
        await asyncio.sleep(comes_after)
        seen, comes, leads = 0, clock(), list[float]()
        while clock() < comes + 60:
            news = await director.news(world.request.id, seen)
            assert not news.ended
            seen += len(news.chunks)
            viewer.arrive(len(news.chunks) * CHUNK, clock())
            leads.append(viewer.lead)
        assert max(leads) <= LEAD + CHUNK + TICK_S
        if speed < CHUNK:
            assert viewer.stalled == 0 and min(leads[5:]) >= LEAD - speed
        left = clock()
        await asyncio.wait([director._running[world.request.id].leading])
        assert left + UNWATCHED_S <= clock() <= left + UNWATCHED_S + 5 * speed
        record = await stored_in(world.store, world.request.id)
        assert (record.status, record.spec.open_ended) == ("completed", False)
        assert len(record.chunks) * CHUNK == record.spec.seconds
        assert [chunk.fragment.sha256 for chunk in record.chunks] == undisturbed(record.spec)

    run_in_virtual_time(test())


def test_nobody_comes(tmp_path: Path) -> None:
    async def test() -> None:
        world = LiveWorld(tmp_path, 0.01)
        director, clock = await world.started(), asyncio.get_running_loop().time
        await director.create(world.request)
        await asyncio.wait([director._running[world.request.id].leading])
        record = await stored_in(world.store, world.request.id)
        assert clock() == pytest.approx(UNWATCHED_S)
        assert (record.status, len(record.chunks)) == ("completed", 1 + LEAD // CHUNK)

    run_in_virtual_time(test())


def test_the_next_director_does_not_run_ahead(tmp_path: Path) -> None:
    """It does not know how much was played, and takes it for as little as it can have been."""

    async def test() -> None:
        world = LiveWorld(tmp_path, 0.01)
        director = await world.started()
        await director.create(world.request)
        seen = 0
        while seen < 20:
            news = await director.news(world.request.id, seen)
            assert not news.ended
            seen += len(news.chunks)
        await director.stop()
        following = await world.started()
        await asyncio.sleep(UNWATCHED_S / 2)
        assert len((await following.news(world.request.id, 0)).chunks) == seen
        await following.cancel(world.request.id)

    run_in_virtual_time(test())


async def stored_in(store: Store, video_id: str) -> VideoRecord:
    record = await store.record(video_id)
    assert record is not None
    return record


# Without an end


async def test_an_open_ended_video_is_whole_when_it_is_ended(service: LocalService) -> None:
    service.graph.gate("sample 3")
    video = await post(service, **OPEN)
    assert (video["seconds"], video["frames"], video["progress"]) == (None, None, 0)
    live = asyncio.create_task(get(service, video["id"]))
    await service.graph.gate("render 2").open().reached.wait()
    while len((await stored(service, video["id"])).chunks) < 3:
        await service.director.news(video["id"], 2)
    over = (await service.http.post(f"/v1/videos/{video['id']}/cancel")).json()
    assert (over["status"], over["seconds"], over["frames"], over["progress"]) == ("completed", "4.125", 99, 100)
    assert (await live).content == (await get(service, video["id"])).content
    assert "etag" in (await get(service, video["id"])).headers
    assert (await service.http.get(f"/v1/videos/{video['id']}/events")).text.count("event: done") == 1
    assert "#EXT-X-ENDLIST" in (await service.http.get(f"/v1/videos/{video['id']}/hls/index.m3u8")).text
    service.graph.gate("sample 3").open()
    longer = await ended(service, (await post(service, f"/{video['id']}/extend", seconds=CHUNK))["id"])
    assert essence(longer) == essence(await fresh(service, seconds=4 * CHUNK))


async def test_an_open_ended_video_of_which_nothing_is_there_is_cancelled(service: LocalService) -> None:
    gate = service.graph.gate("sample 0")
    video = await post(service, **OPEN)
    await gate.reached.wait()
    over = (await service.http.post(f"/v1/videos/{video['id']}/cancel")).json()
    assert (over["status"], over["seconds"]) == ("cancelled", None)


async def test_an_open_ended_video_becomes_no_longer_than_allowed(rig: Rig) -> None:
    asked = request(chunks=2)
    spec = replace(asked.spec, seconds=2 * CHUNK - 0.5, open_ended=True)
    await rig.director.create(asked.model_copy(update={"spec": spec}))
    record = await rig.ended(asked.id)
    assert (record.status, record.spec) == ("completed", replace(spec, open_ended=False))
    assert [chunk.frames for chunk in record.chunks] == [33, 21]


async def test_a_prompt_that_is_sent_steers_the_very_next_chunk(service: LocalService) -> None:
    """Two chunks are made before anybody watches. What a change would have done after the end is not told of."""
    gate = service.graph.gate("sample 2")
    video = await post(service, **OPEN, lead_seconds=CHUNK, prompts=[{"at_seconds": 99, "prompt": DESERT}])
    running = service.director._running[video["id"]]
    while len(running.record.chunks) < 2:
        await running.changed.wait()
    assert (await changed(service, video["id"], FOREST))["chunk"] == 2
    live = asyncio.create_task(get(service, video["id"]))
    await gate.reached.wait()
    await post(service, f"/{video['id']}/cancel")
    assert (await live).status_code == 200
    assert (await stored(service, video["id"])).spec.prompts == ()


# Pauses


async def test_a_paused_video_leaves_its_sampler_to_others_and_goes_on_as_if_nothing_had_been(
    service: LocalService,
) -> None:
    one_sampler(service)
    gate = service.graph.gate("sample 1")
    video_id = (await post(service, **BODY, seconds=3 * CHUNK))["id"]
    await gate.reached.wait()
    paused = await post(service, f"/{video_id}/pause")
    assert (paused["status"], paused["paused"]) == ("in_progress", True)
    gate.open()  # what has begun is finished
    other = await fresh(service, prompt=FOREST, seconds=CHUNK)
    assert other.status == "completed"
    assert (await show(service, video_id))["paused"] and service.director._turns["random"].sampling == 0
    assert len((await service.director.news(video_id, 1)).chunks) == 1 and "sample 2" not in service.graph.log
    assert (await post(service, f"/{video_id}/pause"))["paused"]
    assert not (await post(service, f"/{video_id}/resume"))["paused"]
    assert essence(await ended(service, video_id)) == essence(await fresh(service, seconds=3 * CHUNK))


async def test_a_video_that_is_paused_while_it_waits_for_its_turn_does_not_take_it(service: LocalService) -> None:
    one_sampler(service)
    gate = service.graph.gate("sample 0")
    first = (await post(service, **BODY, seconds=CHUNK))["id"]
    await gate.reached.wait()
    waiting = (await post(service, **{**BODY, "prompt": FOREST}, seconds=CHUNK))["id"]
    while (await show(service, waiting))["queue_position"] != 0:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await post(service, f"/{waiting}/pause")
    gate.open()
    await ended(service, first)
    assert (await fresh(service, prompt=DESERT, seconds=CHUNK)).status == "completed"
    video = await show(service, waiting)
    assert (video["usage"]["chunks"], video["queue_position"]) == (0, None)
    await post(service, f"/{waiting}/resume")
    assert (await ended(service, waiting)).status == "completed"


async def test_a_pause_outlives_its_director(rig: Rig) -> None:
    gate = rig.graph.gate("sample 1")
    video_id = await rig.create()
    await gate.reached.wait()
    await rig.director.pause(video_id)
    await rig.director.stop()
    gate.open()
    following = await Rig(rig.folder).start()
    status = await following.director.get(video_id)
    assert (status.status, status.paused, following.graph.log) == ("in_progress", True, [])
    assert not (await following.director.resume(video_id)).paused
    undisturbed = await following.ended(await following.create())
    assert essence(await following.ended(video_id)) == essence(undisturbed)


async def test_a_paused_video_can_be_cancelled_and_deleted(service: LocalService) -> None:
    for how in ("cancelled", "deleted"):
        gate = service.graph.gates[PROMPT, "sample 1"] = Gate()
        video_id = (await post(service, **BODY))["id"]
        await gate.reached.wait()
        await post(service, f"/{video_id}/pause")
        gate.open()
        while len((await stored(service, video_id)).chunks) < 2:
            await service.director.news(video_id, 1)
        if how == "cancelled":
            over = await post(service, f"/{video_id}/cancel")
            assert (over["status"], over["paused"]) == ("cancelled", False)
        else:
            assert (await service.http.delete(f"/v1/videos/{video_id}")).status_code == 200


@pytest.mark.parametrize("what", ["pause", "resume"])
async def test_what_is_over_cannot_be_paused(service: LocalService, what: str) -> None:
    video_id = (await fresh(service, seconds=CHUNK)).id
    assert told(await service.http.post(f"/v1/videos/{video_id}/{what}"))[:2] == (409, "not_possible")
    missing = f"/v1/videos/video_{'0' * 32}/{what}"
    assert told(await service.http.post(missing))[:2] == (404, "not_found")


# At the door


@pytest.mark.parametrize("lead", [-1, 601, "soon", True, "NaN"])
async def test_a_lead_that_cannot_be(service: LocalService, lead: Any) -> None:
    status, code, message = told(await service.http.post("/v1/videos", json={**BODY, "lead_seconds": lead}))
    assert (status, code) == (422, "invalid_input") and "lead_seconds" in message


async def test_a_form_says_null_in_text(service: LocalService) -> None:
    fields = {"prompt": PROMPT, "size": "64x64", "seconds": "null", "lead_seconds": "2.5"}
    video = (await service.http.post("/v1/videos", files={name: (None, text) for name, text in fields.items()})).json()
    assert video["seconds"] is None
    request = await service.store.request(video["id"])
    assert request is not None and (request.lead_seconds, request.while_watched) == (2.5, True)
