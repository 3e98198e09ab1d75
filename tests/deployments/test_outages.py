"""A store that is away or full for a while: what was accepted waits and arrives whole, what comes is refused.

An S3 server is stopped, so that it takes every request and answers none; what it is and does not show is said in
tests/deployments/s3.py. A disk is a tmpfs, which takes root to mount, and something else fills it to its last page.
`OUTAGE_S=20` makes outages that are outlasted last so long, `AWS_TIMEOUT=30s` gives requests the time that they have in
the service.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from deployments.drafts import KEY
from deployments.store_check import YOUNG_S, check
from tests.deployments.conftest import LocalService, serving
from tests.deployments.s3 import S3Server
from tests.deployments.test_content import BODY, delete, ended, get, stored
from tests.deployments.test_store import keys

OUTAGE_S = float(os.environ.get("OUTAGE_S", "0"))  # 0: until somebody noticed
VIDEO = {**BODY, "seed": 1}


@dataclass(frozen=True)
class Outage:
    """Of the store at `url`. `status`, `code`: of what is refused meanwhile."""

    url: str
    begin: Callable[[], None]
    end: Callable[[], None]
    status: int
    code: str


def fill(filler: Path) -> None:
    """Takes what room is left on a disk."""
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while True:
            file.write(bytes(4096))


@pytest.fixture
def silent_server(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    # As in the service, one request is waited for longer than those that fail at once are tried again.
    monkeypatch.setenv("AWS_TIMEOUT", os.environ.get("AWS_TIMEOUT", "3s"))
    monkeypatch.setattr("deployments.store.RETRIES", {"max_retries": 3, "retry_timeout": timedelta(seconds=1)})
    yield Outage(bucket, s3_server.stop, s3_server.go_on, 503, "store_unavailable")
    s3_server.go_on()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Outage]:
    if os.geteuid() != 0:
        pytest.skip("mounting a disk takes root, as CI is")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    filler = disk / "filler"
    yield Outage(str(disk / "store"), partial(fill, filler), filler.unlink, 507, "store_full")
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(params=["silent_server", "full_disk"])
def outage(request: pytest.FixtureRequest) -> Outage:
    found: Outage = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def noticed() -> Iterator[asyncio.Event]:
    """Set when a store of this process is found to be away."""
    event = asyncio.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("store away"):
                event.set()

    handler, logger = Handler(), logging.getLogger("deployments.store")
    logger.addHandler(handler)
    yield event
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of VIDEO, made in a folder that nothing happens to."""

    async def run() -> bytes:
        async with serving(tmp_path_factory.mktemp("undisturbed")) as service:
            return await file(service, await create(service))

    return asyncio.run(run())


async def create(service: LocalService, point: str | None = None) -> str:
    """A new VIDEO; with a `point` one that has come there and waits for its gate."""
    gate = service.graph.gate(point) if point else None
    answer = await service.http.post("/v1/videos", json=VIDEO)
    assert answer.status_code == 200, answer.text
    if gate is not None:
        await gate.reached.wait()
    return str(answer.json()["id"])


async def file(service: LocalService, video_id: str) -> bytes:
    """The finished file, for which this waits."""
    record = await ended(service, video_id)
    assert record.status == "completed", record.error
    return (await get(service, video_id)).content


async def findings(service: LocalService) -> list[tuple[str, str]]:
    """What `helios store check` finds, when nothing is young any more."""
    found = check(service.store.patient(60.0), time.time() + 2 * YOUNG_S, deep=True)
    return [(finding.key, finding.problem) async for finding in found]


async def store_up(service: LocalService) -> bool:
    return "helios_store_up 1.0" in (await service.http.get("/metrics")).text.splitlines()


@pytest.mark.parametrize("point", ["encode", "render 1"])
async def test_a_video_outlasts_an_outage(
    tmp_path: Path, outage: Outage, noticed: asyncio.Event, undisturbed: bytes, point: str
) -> None:
    async with serving(tmp_path, store=outage.url, store_patience_s=60.0) as service:
        video_id = await create(service, point)
        outage.begin()
        service.graph.gate(point).open()
        await (asyncio.sleep(OUTAGE_S) if OUTAGE_S else noticed.wait())
        outage.end()
        assert await file(service, video_id) == undisturbed
        assert await findings(service) == []


async def test_an_outage_beyond_patience_ends_its_video_and_the_next_one_is_normal(
    tmp_path: Path, outage: Outage, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.director.STORE_AGAIN_S", 0.1)
    async with serving(tmp_path, store=outage.url, store_patience_s=0.0) as service:
        video_id = await create(service, "render 1")
        outage.begin()
        service.graph.gate("render 1").open()
        seen = 1
        while not (news := await service.director.news(video_id, seen)).ended:
            seen += len(news.chunks)
        assert news.error is not None and (news.status, news.error.code) == ("failed", outage.code)
        refused = await service.http.post("/v1/videos", json=VIDEO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (outage.status, outage.code)
        assert "retry-after" in refused.headers
        assert not await store_up(service)

        outage.end()
        await asyncio.wait([service.director._running[video_id].leading])
        assert (await stored(service, video_id)).error == news.error
        assert len((await get(service, video_id, "?partial=true")).content) < len(undisturbed)
        next_id = await create(service)
        assert await file(service, next_id) == undisturbed
        assert await store_up(service)
        assert await service.store.active() == []
        assert await findings(service) == []  # also no refused request that was put late: a look came first


async def test_a_full_disk_keeps_nothing_of_what_it_refuses(tmp_path: Path, full_disk: Outage) -> None:
    async with serving(tmp_path, store=full_disk.url, store_patience_s=0.0) as service:
        before = keys(service.store)
        full_disk.begin()
        for headers in ({}, {KEY: "a key"}):
            refused = await service.http.post("/v1/videos", json=VIDEO, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "store_full")
        assert keys(service.store) == before


async def test_a_full_disk_is_read_and_has_room_when_videos_are_deleted(
    tmp_path: Path, full_disk: Outage, undisturbed: bytes
) -> None:
    async with serving(tmp_path, store=full_disk.url, store_patience_s=0.0) as service:
        old = [await create(service) for _ in range(2)]  # while one is made, it takes more than when it is done
        assert [await file(service, video_id) for video_id in old] == [undisturbed] * 2
        full_disk.begin()
        assert (await service.http.post("/v1/videos", json=VIDEO)).status_code == 507
        assert (await get(service, old[0])).content == undisturbed
        assert not await store_up(service)  # what can be read is not up: nothing can be stored
        for video_id in old:
            await delete(service, video_id)
        assert await file(service, await create(service)) == undisturbed
        assert await store_up(service)
