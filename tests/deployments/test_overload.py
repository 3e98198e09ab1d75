"""Far more requests than there is room for, with real processes and keys: some are served as if the others were not
there, some wait, and the rest hears at once when to come back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deployments.config import AppConfig
from deployments.keys import new_key
from deployments.service import run_service
from tests.faults.service import by_library, wait_until

pytestmark = pytest.mark.ray

SAMPLERS, VIDEOS_PER_SAMPLER, QUEUED = 2, 4, 8
ROOM = SAMPLERS * VIDEOS_PER_SAMPLER
REQUESTS, SECONDS = 200, 5.0
CHUNK_SECONDS = 1.0  # of sampling, paced: in turns, none of three chunks ends before 9 s, when all requests came
WANTED = {"prompt": "a red sun over a blue sea", "seconds": 3 * 33 / 24, "size": "64x64", "steps": [1, 1, 1]}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, shared_ray: int) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """One with a key for videos, and one with a key for metrics."""
    folder = tmp_path_factory.mktemp("overload")
    token, key = new_key("acme", "videos", None)
    metrics_token, metrics = new_key(None, "metrics", None)
    (folder / "keys.json").write_text(json.dumps({"keys": [key.model_dump(), metrics.model_dump()]}))
    sampler = {"min_replicas": SAMPLERS, "max_replicas": SAMPLERS, "min_chunk_seconds": CHUNK_SECONDS}
    config = AppConfig(store=str(folder / "store"), port=shared_ray, testing=True, torch_threads=1).override(
        keys=str(folder / "keys.json"),
        models=[{"model": "random", "sampler": sampler}],
        admission={"videos_per_sampler": VIDEOS_PER_SAMPLER, "queued": QUEUED},
    )
    with run_service(config) as url:
        one, other = (
            httpx.Client(
                base_url=url,
                timeout=120,
                headers={"Authorization": f"Bearer {each}"},
                limits=httpx.Limits(max_connections=None),
            )
            for each in (token, metrics_token)
        )
        with one, other:
            yield one, other


def test_who_is_admitted_does_not_notice_who_is_not(clients: tuple[httpx.Client, httpx.Client]) -> None:
    http, of_metrics = clients
    burst = threading.Barrier(REQUESTS)

    def create(seed: int) -> httpx.Response:
        burst.wait()
        threading.Event().wait(SECONDS * seed / REQUESTS)  # one every 25 ms
        return http.post("/v1/videos", json={**WANTED, "seed": seed})

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(create, range(REQUESTS)))
    accepted = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(accepted) == ROOM + QUEUED
    assert {answer.status_code for answer in refused} == {429}
    for answer in refused:
        assert answer.json()["error"]["code"] == "too_many_requests"
        assert 1 <= int(answer.headers["retry-after"]) <= REQUESTS * CHUNK_SECONDS

    def now(video: dict[str, str]) -> dict[str, str]:
        return http.get(f"/v1/videos/{video['id']}").json()

    metrics = of_metrics.get("/metrics").text
    assert f"helios_videos_running {ROOM + QUEUED}.0" in metrics and f"helios_videos_queued {QUEUED}.0" in metrics
    wait_until(lambda: sum(now(video)["status"] == "in_progress" for video in accepted) >= ROOM)
    waiting = [video for video in map(now, accepted) if video["status"] == "queued"]
    assert len(waiting) <= QUEUED
    assert all(video["estimated_start_at"] for video in waiting)

    alone = {video["seed"]: by_library({**WANTED, "seed": video["seed"]}) for video in accepted}
    assert {video["seed"]: http.get(f"/v1/videos/{video['id']}/content").content for video in accepted} == alone
    assert http.post("/v1/videos", json=WANTED).status_code == 200
