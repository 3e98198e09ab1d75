"""What is deleted by itself: of the videos that have ended the oldest, never one that has not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deployments.config import AppConfig, ConfigError
from deployments.director import Director
from deployments.retention import DAY_S, Ended, Keep, Retention, expired
from deployments.store import Listed, Store, StoreUnavailable, Superseded, new_video_id
from deployments.tracing import Tracer
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import ended, put_video, running
from tests.deployments.test_director import GatedGraph, request

NOW = 100 * DAY_S

# ── which ones ───────────────────────────────────────────────────────────────

# name ▸ (settings, days since the end and bytes of each video, which of them go, in order)
CASES: dict[str, tuple[Keep, list[tuple[float, int]], list[int]]] = {
    "no videos": (Keep(days=1, bytes=0), [], []),
    "no settings": (Keep(), [(99, 10**15)], []),
    "all younger": (Keep(days=3), [(0, 5), (2.9, 5)], []),
    "just as old": (Keep(days=3), [(3, 5)], []),
    "some older": (Keep(days=3), [(1, 5), (9, 5), (3.1, 5)], [1, 2]),
    "half a day": (Keep(days=0.5), [(0.4, 5), (0.6, 5)], [1]),
    "just as many bytes": (Keep(bytes=10), [(1, 5), (2, 5)], []),
    "one byte too many": (Keep(bytes=10), [(2, 5), (1, 5), (3, 1)], [2]),
    "the oldest first, large or small": (Keep(bytes=10), [(1, 9), (2, 9), (3, 1)], [2, 1]),
    "one larger than all": (Keep(bytes=10), [(1, 11), (2, 1)], [1, 0]),
    "no bytes": (Keep(bytes=0), [(1, 1), (2, 1)], [1, 0]),
    "age alone is enough": (Keep(days=3, bytes=10), [(1, 9), (4, 2)], [1]),
    "age is not enough": (Keep(days=3, bytes=10), [(1, 9), (2, 2), (4, 5)], [2, 1]),
    "from the future": (Keep(days=1, bytes=10), [(-5, 10), (0, 1)], [1]),
}


@pytest.mark.parametrize("name", CASES)
def test_which_are_deleted(name: str) -> None:
    keep, videos, gone = CASES[name]
    all_of_them = [Ended(f"{k}", NOW - days * DAY_S, size) for k, (days, size) in enumerate(videos)]
    assert expired(all_of_them, keep, NOW) == [all_of_them[k] for k in gone]


def test_of_those_that_ended_together_the_first_by_id_goes_first() -> None:
    videos = [Ended(name, NOW, 1) for name in "cab"]
    assert [video.id for video in expired(videos, Keep(bytes=1), NOW)] == ["a", "b"]


@pytest.mark.parametrize(
    ("setting", "value"), [("keep_videos_days", 0), ("keep_videos_days", -1.0), ("keep_bytes", -1), ("keep_bytes", 1.5)]
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is {value}"):
        AppConfig().override(**{setting: value})


# ── one sweep ────────────────────────────────────────────────────────────────


def retention(service: LocalService, **keep: float) -> Retention:
    return Retention(service.store, 1, Keep(**keep), service.director.delete)  # type: ignore[arg-type]


async def left(service: LocalService) -> set[str]:
    return set(await service.store.video_ids())


async def test_what_ended_goes_and_what_runs_stays(service: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deployments")
    old, _ = await put_video(service, at=NOW - 3 * DAY_S)
    failed, _ = await put_video(service, "failed", sizes=(1, 2), at=NOW - 2 * DAY_S)
    new, _ = await put_video(service, at=NOW - DAY_S / 2)
    runs = await running(service)
    sweeper = retention(service, days=1)
    await sweeper.sweep(NOW)
    assert await left(service) == {new, runs}
    assert [record.video_id for record in caplog.records if record.message == "expired"] == [old, failed]  # type: ignore[attr-defined]
    await sweeper.sweep(NOW)
    assert await left(service) == {new, runs}

    service.graph.gate("sample 1").open()
    record = await ended(service, runs)
    assert record.completed_at is not None
    await sweeper.sweep(record.completed_at + DAY_S - 1)
    assert await left(service) == {runs}
    await sweeper.sweep(record.completed_at + DAY_S + 1)
    assert await left(service) == set()
    assert await service.store.active() == []


async def test_bytes_are_all_that_a_video_that_ended_takes(service: LocalService) -> None:
    old, _ = await put_video(service, sizes=(1000, 1000), at=1.0)
    new, _ = await put_video(service, sizes=(1000, 2000), at=2.0)
    runs = await running(service)  # takes more than both
    sizes = {video_id: sum(item.bytes for item in await service.store.objects(video_id)) for video_id in (old, new)}
    assert sizes[old] > 2000 and sizes[new] > 3000, "the records count too"
    await retention(service, bytes=sum(sizes.values())).sweep(NOW)
    assert await left(service) == {old, new, runs}
    await retention(service, bytes=sum(sizes.values()) - 1).sweep(NOW)
    assert await left(service) == {new, runs}
    await retention(service, bytes=0).sweep(NOW)
    assert await left(service) == {runs}


async def test_what_has_not_ended_or_cannot_be_read_stays(service: LocalService) -> None:
    assert service.store.folder is not None
    unreadable, _ = await put_video(service, at=1.0)
    (service.store.folder / "videos" / unreadable / "record.t1.json").write_text("{}")
    uploading, accepted, tidying = new_video_id(2.0), request(), await put_video(service, at=4.0)
    await service.store.put_init(uploading, b"")
    await service.store.accept(accepted)
    await service.store.prepare(tidying[0])
    await retention(service, days=1, bytes=0).sweep(NOW)
    assert await left(service) == {unreadable, uploading, accepted.id, tidying[0]}


async def test_a_video_is_looked_at_once(service: LocalService) -> None:
    class Counting(Store):
        looks: int = 0

        async def objects(self, video_id: str) -> list[Listed]:
            self.looks += 1
            return await super().objects(video_id)

    ids = [(await put_video(service, at=float(k)))[0] for k in range(3)]
    store = Counting(service.store.url)
    sweeper = Retention(store, 1, Keep(days=1), service.director.delete)
    for _ in range(3):
        await sweeper.sweep(DAY_S)
    assert store.looks == 3
    await put_video(service, at=9.0)
    await service.director.delete(ids[0])
    await sweeper.sweep(DAY_S)
    assert store.looks == 4


async def test_a_video_that_somebody_else_deletes_stops_no_sweep(service: LocalService) -> None:
    for k in range(3):
        await put_video(service, at=float(k))

    async def delete(video_id: str) -> None:
        await service.director.delete(video_id)
        await service.director.delete(video_id)  # as if it had been gone

    await Retention(service.store, 1, Keep(bytes=0), delete).sweep(NOW)
    assert await left(service) == set()


async def test_a_director_that_leads_no_more_deletes_nothing(service: LocalService) -> None:
    video_id, _ = await put_video(service, at=1.0)
    sweeper = retention(service, bytes=0)
    await service.store.claim_term()
    with pytest.raises(Superseded):
        await sweeper.sweep(NOW)
    await sweeper.run()  # ends
    assert await left(service) == {video_id}


async def test_claims_of_idempotency_keys_are_forgotten(service: LocalService) -> None:
    assert service.store.folder is not None
    await service.store.claim("", "a key", "ab", new_video_id(1.0), 1.0)
    claims = service.store.folder / "idempotency"
    put_at = next(claims.rglob("*.json")).stat().st_mtime
    sweeper = retention(service)
    await sweeper.sweep(put_at + DAY_S)
    assert len(list(claims.rglob("*.json"))) == 1
    await sweeper.sweep(put_at + 9 * DAY_S)
    assert list(claims.rglob("*.json")) == []


# ── again and again ──────────────────────────────────────────────────────────


class SweptStore(Store):
    """A Store that tells what was deleted, and is away for as many sweeps as the test says."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.away = 0
        self.deleted: asyncio.Queue[str] = asyncio.Queue()

    async def forget_claims(self, now: float) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable(f"{self.url}: away")
        await super().forget_claims(now)

    async def delete(self, video_id: str) -> None:
        await super().delete(video_id)
        self.deleted.put_nowait(video_id)


@asynccontextmanager
async def leading(folder: Path, keep: Keep | None, away: int = 0) -> AsyncIterator[tuple[Director, SweptStore]]:
    config = AppConfig(store=str(folder)).with_model("random")
    store = SweptStore(config.store)
    store.away = away
    director = await Director.start(GatedGraph(config), store, Tracer("director"), keep=keep)
    yield director, store
    await director.stop()


@pytest.mark.parametrize("away", [0, 3])
async def test_a_director_sweeps_from_its_start_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: int) -> None:
    monkeypatch.setattr("deployments.retention.SWEEP_EVERY_S", 0.0)
    async with leading(tmp_path, Keep(bytes=0), away) as (director, store):
        for _ in range(2):
            asked = request(chunks=1)
            await director.create(asked)
            assert await store.deleted.get() == asked.id
        assert store.away == 0
        assert await store.video_ids() == []
    assert director._sweeping is not None and director._sweeping.cancelled()


async def test_without_settings_nothing_goes(tmp_path: Path) -> None:
    async with leading(tmp_path, None) as (director, _):
        assert director._sweeping is None
