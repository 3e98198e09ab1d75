"""How many videos come in, what those are told that do not, and when the others may expect to be made."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.admission import TooMany
from deployments.config import Quota
from deployments.director import Director
from deployments.making import InputLost
from deployments.records import VideoStatus
from deployments.scheduling import forecast
from deployments.tracing import Tracer
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import BODY, ended
from tests.deployments.test_director import PROMPT
from tests.deployments.test_door import Tenants, error_of, tenants


@asynccontextmanager
async def narrow(folder: Path, videos_per_sampler: int, queued: int) -> AsyncIterator[LocalService]:
    """A service with one sampler."""
    admission = {"videos_per_sampler": videos_per_sampler, "queued": queued}
    async with serving(folder, admission=admission) as service:
        service.graph.at_once = 1
        yield service


async def create(service: LocalService, **wanted: Any) -> httpx.Response:
    return await service.http.post("/v1/videos", json={**BODY, **wanted})


async def shown(service: LocalService, video_id: str) -> Any:
    return (await service.http.get(f"/v1/videos/{video_id}")).json()


# The queue


async def test_some_take_turns_some_wait_and_the_rest_is_refused(tmp_path: Path) -> None:
    async with narrow(tmp_path, 2, 1) as service:
        gate = service.graph.gate("sample 0")
        ids = [(await create(service)).json()["id"] for _ in range(3)]
        refused = await create(service)
        assert error_of(refused) == (429, "too_many_requests")
        assert "2 that take turns and 1 that wait" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        await next_is(service, *ids[:2])  # of the two inside, one waits for the sampler
        waiting = await shown(service, ids[2])
        assert (waiting["status"], waiting["queue_position"]) == ("queued", 1)
        metrics = (await service.http.get("/metrics")).text
        assert "helios_videos_queued 1.0" in metrics and "helios_videos_running 3.0" in metrics
        gate.open()
        for video_id in ids:
            assert (await ended(service, video_id)).status == "completed"
        assert (await create(service)).status_code == 200
        assert len(await service.store.video_ids()) == 4  # nothing of the refused one is there


async def test_who_waits_comes_in_when_another_is_paused_and_the_paused_one_waits_for_a_place(tmp_path: Path) -> None:
    async with narrow(tmp_path, 1, 9) as service:
        gate = service.graph.gate("sample 1")
        first, second = [(await create(service)).json()["id"] for _ in range(2)]
        await gate.reached.wait()
        await service.http.post(f"/v1/videos/{first}/pause")
        gate.open()
        assert (await ended(service, second)).status == "completed"
        assert (await shown(service, first))["usage"]["chunks"] == 2
        third_gate = service.graph.gate("sample 0")
        third = (await create(service)).json()["id"]
        await third_gate.reached.wait()
        await service.http.post(f"/v1/videos/{first}/resume")
        assert (await shown(service, first))["queue_position"] == 0
        third_gate.open()
        assert (await ended(service, first)).status == (await ended(service, third)).status == "completed"


async def test_a_video_that_loses_its_input_while_it_waits_for_a_place_waits_again(tmp_path: Path) -> None:
    """It goes back to its last commit, but not past the others."""
    async with narrow(tmp_path, 1, 9) as service:
        sampled, rendering = service.graph.gate("sampled 1"), service.graph.gate("render 1")
        first = (await create(service)).json()["id"]
        await sampled.reached.wait()
        await service.http.post(f"/v1/videos/{first}/pause")
        service.graph.losses[PROMPT, "render 1"] = [InputLost("it is gone")]
        sampled.open()  # it leaves, and its second chunk is still being rendered
        gate = service.graph.gate("sample 0", "another")
        second = (await create(service, prompt="another")).json()["id"]
        await gate.reached.wait()
        await service.http.post(f"/v1/videos/{first}/resume")
        await next_is(service, first)
        rendering.open()
        while not service.director._running[first].retries[1]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await next_is(service, first)
        assert "helios_videos_queued 1.0" in (await service.http.get("/metrics")).text
        gate.open()
        assert (await ended(service, first)).status == (await ended(service, second)).status == "completed"


async def next_is(service: LocalService, *video_ids: str) -> None:
    """Returns when one of these videos is the first of those that wait."""
    while 0 not in [(await shown(service, video_id))["queue_position"] for video_id in video_ids]:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_who_leaves_the_queue_leaves_no_trace(tmp_path: Path) -> None:
    async with narrow(tmp_path, 1, 1) as service:
        gate = service.graph.gate("sample 0")
        first, second = [(await create(service)).json()["id"] for _ in range(2)]
        assert (await create(service)).status_code == 429
        assert (await service.http.post(f"/v1/videos/{second}/cancel")).json()["status"] == "cancelled"
        assert (await create(service)).status_code == 200
        gate.open()
        await ended(service, first)


# Of one key


async def key_of_one(service: Tenants, **wanted: Any) -> httpx.Response:
    return await service.send("POST", "/v1/videos", "one", {**BODY, **wanted})


async def test_videos_at_once_are_counted_by_the_owner(tmp_path: Path) -> None:
    async with tenants(tmp_path, Quota(concurrent_videos=2)) as service:
        gate = service.service.graph.gate("sample 0")
        ids = [(await key_of_one(service)).json()["id"] for _ in range(2)]
        refused = await key_of_one(service)
        assert error_of(refused) == (429, "too_many_requests")
        assert "2 videos of this key have not ended; allowed: 2" in refused.json()["error"]["message"]
        assert (await service.send("POST", "/v1/videos", "other", BODY)).status_code == 200
        gate.open()
        for video_id in ids:
            await ended(service.service, video_id)
        assert (await key_of_one(service)).status_code == 200


async def test_seconds_of_a_day_count_what_was_made_also_after_a_restart(tmp_path: Path) -> None:
    """Three chunks are 4.125 s. One that is cancelled counts what it has; one that is deleted counts all the same."""
    async with tenants(tmp_path, Quota(seconds_per_day=10)) as service:
        first = (await key_of_one(service)).json()["id"]
        await ended(service.service, first)
        gate = service.service.graph.gate("sample 1")
        second = (await key_of_one(service)).json()["id"]
        await gate.reached.wait()
        refused = await key_of_one(service)
        assert error_of(refused) == (429, "too_many_requests")
        assert "4.125 s of video, and 1.75 s are left" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "3600"  # the first one's day ends later; nobody is told to wait longer
        gate.open()
        cancelled = (await service.send("POST", f"/v1/videos/{second}/cancel", "one")).json()
        await service.send("DELETE", f"/v1/videos/{first}", "one")
        made = cancelled["usage"]["chunks"] * 1.375

        again = await Director.start(service.service.graph, service.service.store, Tracer("director"))
        await again.admit("one", Quota(seconds_per_day=4.125 + made + 0.001))
        with pytest.raises(TooMany, match="0 s are left"):
            await again.admit("one", Quota(seconds_per_day=4.125 + made))
        await again.stop()


async def test_a_video_longer_than_a_whole_day_is_refused_for_good(tmp_path: Path) -> None:
    async with tenants(tmp_path, Quota(seconds_per_day=3)) as service:
        refused = await key_of_one(service)
        assert error_of(refused) == (422, "invalid_input")
        assert "4.125; allowed: at most 3" in refused.json()["error"]["message"]


async def test_a_new_frame_rate_does_not_make_a_day_longer(tmp_path: Path) -> None:
    """33 frames are 1.375 s at 24 frames a second, at whatever rate they are shown."""
    async with tenants(tmp_path, Quota(seconds_per_day=2)) as service:
        first = await key_of_one(service, seconds=33 / 60, fps=60)
        assert first.status_code == 200
        await ended(service.service, first.json()["id"])
        assert error_of(await key_of_one(service, seconds=33 / 60, fps=60)) == (429, "too_many_requests")


# What is expected


async def test_a_video_says_when_it_may_begin_and_end(tmp_path: Path) -> None:
    async with narrow(tmp_path, 1, 9) as service:
        first = (await create(service)).json()
        assert (first["estimated_start_at"], first["estimated_completion_at"]) == (None, None)  # nothing was made yet
        await ended(service, first["id"])
        gate = service.graph.gate("sample 0")
        running = (await create(service)).json()
        await gate.reached.wait()
        waiting, last = [(await create(service)).json() for _ in range(2)]
        now = int(time.time())
        running = await shown(service, running["id"])
        assert (running["status"], running["estimated_start_at"]) == ("in_progress", None)
        assert now <= running["estimated_completion_at"] <= waiting["estimated_start_at"] + 1
        assert waiting["estimated_start_at"] <= waiting["estimated_completion_at"] <= last["estimated_start_at"] + 1
        gate.open()
        for video in (running, waiting, last):
            status = await ended(service, video["id"])
            assert VideoStatus.of(status).estimated_completion_at is None


def test_the_forecast_shares_samplers_equally() -> None:
    """By hand: a and b share one sampler, so that a's 2 chunks take 4; then c comes in, and shares it with b."""
    told = forecast({"a": 2, "b": 4}, {"c": 1}, samplers=1, places=2)
    assert told == {"a": (0, 4), "c": (4, 6), "b": (0, 7)}
    assert forecast({"a": 2, "b": 4}, {}, samplers=2, places=2) == {"a": (0, 2), "b": (0, 4)}  # no faster than alone
    assert forecast({}, {"a": 1, "b": 2}, samplers=1, places=1) == {"a": (0, 1), "b": (1, 3)}
    assert forecast({"a": math.inf}, {"b": 1}, samplers=1, places=1) == {"a": (0, math.inf), "b": (math.inf, math.inf)}
    assert forecast({}, {}, samplers=1, places=1) == {}


@pytest.mark.parametrize("seed", range(50))
def test_the_forecast_is_what_turns_make_of_it(seed: int) -> None:
    """Against chunks that are handed out one by one, to the videos inside in turn: no further off than one round."""
    rng = random.Random(seed)
    samplers, places = rng.randint(1, 3), rng.randint(1, 6)
    chunks = {f"v{k}": rng.randint(1, 12) for k in range(rng.randint(1, 12))}
    inside = dict(list(chunks.items())[:places])
    queue = {name: left for name, left in chunks.items() if name not in inside}
    told = forecast(inside, queue, samplers, places)
    left, waiting, now, ends, starts = dict(inside), list(queue), 0, dict[str, int](), dict.fromkeys(inside, 0)
    while left:
        turn = list(left)[:samplers]
        now += 1
        for name in turn:
            left[name] -= 1
            left[name] = left.pop(name)  # to the end of the line
            if not left[name]:
                del left[name]
                ends[name] = now
        while waiting and len(left) < places:
            name = waiting.pop(0)
            starts[name], left[name] = now, queue[name]
    for name in chunks:
        rounds = math.ceil(places / samplers) * (1 + len(queue))
        assert abs(told[name][1] - ends[name]) <= rounds
        assert abs(told[name][0] - starts[name]) <= rounds
    assert sum(chunks.values()) / samplers <= max(end for _, end in told.values()) + 1e-9
