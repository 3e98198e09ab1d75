"""A video that was accepted arrives: a Director that stops anywhere is followed by one that goes on, to the same bytes.

A process that dies and one that is only frozen look the same to everybody else, so the first Director of these tests is
frozen, at one write after the other, and thawed when the second one is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
import pytest

from deployments.config import AppConfig
from deployments.content import file_bytes, live_bytes, objects_of
from deployments.director import Director
from deployments.making import ReplicaLost
from deployments.records import News, VideoRecord, VideoRequestRecord
from deployments.store import Store, Superseded
from deployments.tracing import Tracer
from tests.deployments.local import LocalGraph
from tests.deployments.test_director import request

WRITES = {obstore.put, obstore.delete, obstore.copy}
TRACER = Tracer("director")


@dataclass
class Freezer:
    """Stops every store of one process at its write number `at`, just before or just after it is done."""

    at: int
    after: bool
    writes: int = 0
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    thawed: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_(self, done: bool) -> None:
        if self.writes == self.at and done == self.after:
            self.frozen.set()
        if self.frozen.is_set():
            await self.thawed.wait()


class FreezingStore(Store):
    def __init__(self, url: str, freezer: Freezer) -> None:
        super().__init__(url)
        self.freezer = freezer

    async def _run(self, operation: Callable[..., Any], *args: object, **options: object) -> Any:
        if self.freezer.frozen.is_set():
            await self.freezer.thawed.wait()
        if operation not in WRITES:
            return await super()._run(operation, *args, **options)
        self.freezer.writes += 1
        await self.freezer.pass_(done=False)
        result = await super()._run(operation, *args, **options)
        await self.freezer.pass_(done=True)
        return result


class Process:
    """A Director with replicas of its own, over one store."""

    def __init__(self, graph: LocalGraph, store: Store) -> None:
        self.graph, self.store = graph, store
        for replica in (graph.text_encoder, graph.vae_decoder, *graph._samplers.values()):
            replica._store = store
        self.director: Director | None = None

    async def run(self, asked: VideoRequestRecord, accepted: asyncio.Event) -> None:
        self.director = await Director.start(self.graph, self.store, TRACER)
        await self.director.create(asked)
        accepted.set()
        await asyncio.wait([self.director._running[asked.id].leading])


class Viewer:
    """Somebody who watches from the first byte on, through the ingress's own reader, whoever leads."""

    def __init__(self, store: Store, video_id: str) -> None:
        self.process: Process | None = None
        self.changed = asyncio.Event()
        self.video_id, self.store = video_id, store
        self.seen = bytearray()
        self.watching = asyncio.create_task(self._watch())

    def follow(self, process: Process) -> None:
        self.process = process
        self.changed.set()
        self.changed = asyncio.Event()

    async def _watch(self) -> None:
        async for data in live_bytes(self._news, self.store):
            self.seen += data

    async def _news(self, seen: int) -> News:
        changed = asyncio.ensure_future(self.changed.wait())
        if self.process is None or self.process.director is None:
            await changed
            raise ReplicaLost
        asking = asyncio.ensure_future(self.process.director.news(self.video_id, seen))
        await asyncio.wait([changed, asking], return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            changed.cancel()
            return asking.result()
        asking.cancel()
        raise ReplicaLost


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalGraph, LocalGraph]:
    """The replicas of two processes, loaded once."""
    config = AppConfig(store=str(tmp_path_factory.mktemp("unused"))).with_model("random")
    return LocalGraph(config), LocalGraph(config)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.content.ASK_AGAIN_S", 0.0)
    monkeypatch.setattr("deployments.director.STORE_AGAIN_S", 0.0)


async def whole_file(store: Store, record: VideoRecord | None) -> bytes:
    assert record is not None
    objects = objects_of(record.init, record.chunks)
    return b"".join([data async for data in file_bytes(objects, store, 0, sum(item.bytes for item in objects))])


def objects(folder: Path) -> set[str]:
    """All that is stored, but for the terms in the names."""
    return {
        "/".join(part for part in path.relative_to(folder).parts).replace(".t2.", ".t1.").replace(".t3.", ".t1.")
        for path in folder.rglob("*")
        if path.is_file() and "terms" not in path.parts
    }


async def undisturbed(graph: LocalGraph, folder: Path, asked: VideoRequestRecord) -> tuple[bytes, int]:
    """The bytes of a video that nothing happens to, and how many writes they take."""
    freezer = Freezer(at=0, after=False)
    process = Process(graph, FreezingStore(str(folder), freezer))
    await process.run(asked, asyncio.Event())
    return await whole_file(process.store, await process.store.record(asked.id)), freezer.writes


BLOCKS = 4


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("after", [False, True], ids=["just before", "just after"])
async def test_a_director_stopped_at_any_write_costs_no_byte(
    graphs: tuple[LocalGraph, LocalGraph], tmp_path: Path, block: int, after: bool
) -> None:
    asked = request()
    expected, writes = await undisturbed(graphs[0], tmp_path / "undisturbed", asked)
    assert writes > 20
    # Just after a write the store is as just before the next one, so every other one will do.
    for at in range(1 + block, writes + 1, 2 * BLOCKS if after else BLOCKS):
        folder = tmp_path / f"{at}"
        freezer, accepted = Freezer(at, after), asyncio.Event()
        old = Process(graphs[0], FreezingStore(str(folder), freezer))
        viewer = Viewer(Store(str(folder)), asked.id)
        running = asyncio.create_task(old.run(asked, accepted))
        viewer.follow(old)
        await freezer.frozen.wait()

        new = Process(graphs[1], Store(str(folder)))
        new.director = await Director.start(new.graph, new.store, TRACER)
        if not accepted.is_set():
            await new.director.create(asked, again=True)  # as the ingress does
        viewer.follow(new)
        await viewer.watching
        assert bytes(viewer.seen) == expected, f"stopped at write {at}"
        await asyncio.gather(*new.director._resuming.values())
        await asyncio.gather(*(video.leading for video in new.director._running.values()))
        assert await whole_file(new.store, await new.store.record(asked.id)) == expected
        assert objects(folder) == objects(tmp_path / "undisturbed"), f"stopped at write {at}"
        assert await new.store.active() == []

        freezer.thawed.set()  # the first one goes on, and finds that it leads no more
        await asyncio.wait([running])
        assert isinstance(running.exception(), Superseded | None)
        assert await whole_file(new.store, await new.store.record(asked.id)) == expected
        await new.director.stop()
        await old.director.stop() if old.director else None
