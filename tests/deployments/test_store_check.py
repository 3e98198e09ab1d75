"""`helios store check`: every inconsistency by its name, none where there is none, and what --repair removes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.cli import main
from deployments.config import AppConfig
from deployments.director import Director
from deployments.records import ChunkRecord, Timings, VideoRecord
from deployments.store import Store, new_video_id
from deployments.store_check import YOUNG_S, Finding, check
from deployments.tracing import Tracer
from tests.deployments.conftest import LocalService
from tests.deployments.local import LocalGraph
from tests.deployments.test_content import ended, running, stored
from tests.deployments.test_continuing import done, fresh, post
from tests.deployments.test_director import request
from tests.deployments.test_durability import WRITES

AGO_S = 2 * YOUNG_S
TERM = 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


async def put_video(store: Store, active: bool = False, is_ended: bool = True) -> str:
    """A video of two chunks with an input, of a few bytes an object, as term 3 leaves it: its id."""
    asked = request(chunks=2)
    video_id = asked.id
    source = folder_of(store) / "source"
    source.write_bytes(b"a picture")
    await store.accept(asked.model_copy(update={"input": await store.put_input(video_id, source)}))
    source.unlink()
    init, thumbnail = await store.put_init(video_id, b"head"), await store.put_thumbnail(video_id, b"first frame")
    await store.put_text(video_id, "ab" * 32, b"embeddings")
    timings = Timings(sample_started_at=1, sample_seconds=0, decode_seconds=0, encode_seconds=0, store_seconds=0)
    chunks = [
        ChunkRecord(
            index=index,
            frames=33,
            steps=3,
            fragment=await store.put_fragment(video_id, index, TERM, b"fragment %d" % index),
            state=await store.put_state(video_id, index + 1, TERM, b"state %d" % index),
            timings=timings,
        )
        for index in range(2)
    ]
    await store.remove(chunks[0].state.key)
    record = VideoRecord(id=video_id, created_at=1.0, spec=asked.spec, init=init, thumbnail=thumbnail)
    status = "completed" if is_ended else "in_progress"
    update = {"status": status, "chunks": tuple(chunks), "completed_at": 2.0 if is_ended else None}
    await store._put(f"terms/{TERM:06d}", b"")
    await store.put_record(record.model_copy(update=update), TERM)
    if not active:
        await store.end(video_id)
    return video_id


def folder_of(store: Store) -> Path:
    assert store.folder is not None
    return store.folder


def put(store: Store, key: str, data: bytes = b"x") -> None:
    path = folder_of(store) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def age(store: Store, seconds: float = AGO_S) -> None:
    """Makes all that is stored so old."""
    for path in folder_of(store).rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def remove(store: Store, key: str) -> None:
    (folder_of(store) / key).unlink()


def leave(store: Store, word: str) -> None:
    """Removes all but the terms and what has `word` in its key."""
    for key in keys(store):
        if word not in key and not key.startswith("terms/"):
            remove(store, key)


def changed(data: bytes, **fields: object) -> bytes:
    """A JSON object with other fields."""
    return json.dumps({**json.loads(data), **fields}).encode()


def keys(store: Store) -> set[str]:
    return {str(path.relative_to(folder_of(store))) for path in folder_of(store).rglob("*") if path.is_file()}


async def found(store: Store, deep: bool = False) -> list[Finding]:
    return [finding async for finding in check(store, time.time(), deep)]


async def lines(store: Store, deep: bool = False) -> list[tuple[str, str]]:
    return [(finding.key, finding.problem) for finding in await found(store, deep)]


async def repair(store: Store) -> None:
    for finding in await found(store):
        if finding.repair is not None:
            await finding.repair()


class LookedAtStore(Store):
    """A Store that is looked at after every write, by a Store of another process."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.looks: list[list[tuple[str, str]]] = []

    async def _run(self, operation: Callable[..., Any], *args: object, **options: object) -> Any:
        result = await super()._run(operation, *args, **options)
        if operation in WRITES:
            self.looks.append(await lines(Store(self.url)))
        return result


# ── nothing inconsistent ─────────────────────────────────────────────────────


async def test_videos_of_all_kinds_that_end_and_run(service: LocalService, folder: Path) -> None:
    cut = await fresh(service, seconds=2)
    for path, fields in (
        ("extend", {"seconds": 1}),
        ("remix", {"prompt": "a moon"}),
        ("fork", {"chunk": 2, "seconds": 4}),
    ):
        await done(service, f"/{cut.id}/{path}", **fields)
    picture = {"input_reference": ("picture.png", (folder / "picture.png").read_bytes(), "image/png")}
    form = {"prompt": "a sea", "seconds": "1", "size": "64x64", "steps": "1,1,1"}
    from_picture = (await service.http.post("/v1/videos", data=form, files=picture)).json()["id"]
    assert (await ended(service, from_picture)).status == "completed"

    gate = service.graph.gate("render 1")  # where the copied fragment that was cut is made again
    cancelled = await post(service, f"/{cut.id}/extend", seconds=3)
    await gate.reached.wait()
    assert await lines(service.store, deep=True) == []
    await service.director.cancel(cancelled["id"])
    assert [chunk.index for chunk in (await stored(service, cancelled["id"])).chunks] == [0]
    await running(service, "sample 2")
    age(service.store)
    await service.store.put_input(new_video_id(time.time()), folder / "picture.png")  # an upload that goes on
    assert await lines(service.store, deep=True) == []


async def test_a_video_at_each_moment_of_its_life(tmp_path: Path) -> None:
    """From its acceptance to its deletion."""
    graph = LocalGraph(AppConfig(store=str(tmp_path)).with_model("random"))
    store = LookedAtStore(str(tmp_path))
    for replica in (graph.text_encoder, graph.vae_decoder, *graph._samplers.values()):
        replica._store = store
    director = await Director.start(graph, store, Tracer("director"))
    asked = request(chunks=2)
    await director.create(asked)
    await asyncio.wait([director._running[asked.id].leading])
    await director.delete(asked.id)
    assert len(store.looks) > 20
    assert store.looks == [[]] * len(store.looks)
    await director.stop()


# ── what is inconsistent, by its name ────────────────────────────────────────

# name ▸ (what is done to a store with one video that has ended, key, problem, whether --repair removes it)
INCONSISTENT: dict[str, tuple[Callable[[Store, str], object], str, str, bool]] = {
    "a fragment too many": (
        lambda store, id: put(store, f"videos/{id}/chunks/00002.t3.m4s"),
        "videos/{id}/chunks/00002.t3.m4s",
        "fragment that nothing names",
        True,
    ),
    "a fragment of another term": (
        lambda store, id: put(store, f"videos/{id}/chunks/00001.t4.m4s"),
        "videos/{id}/chunks/00001.t4.m4s",
        "fragment that nothing names",
        True,
    ),
    "a state too many": (
        lambda store, id: put(store, f"videos/{id}/states/00002.t1.safetensors"),
        "videos/{id}/states/00002.t1.safetensors",
        "state that nothing names",
        True,
    ),
    "an older record": (
        lambda store, id: put(store, f"videos/{id}/record.t2.json", b"{}"),
        "videos/{id}/record.t2.json",
        "a record of an older term",
        True,
    ),
    "something unknown": (
        lambda store, id: put(store, f"videos/{id}/notes.txt"),
        "videos/{id}/notes.txt",
        "nothing that this version stores",
        False,
    ),
    "a fragment too few": (
        lambda store, id: remove(store, f"videos/{id}/chunks/00001.t3.m4s"),
        "videos/{id}/chunks/00001.t3.m4s",
        "named, but missing",
        False,
    ),
    "no last state": (
        lambda store, id: remove(store, f"videos/{id}/states/00002.t3.safetensors"),
        "videos/{id}/states/00002.t3.safetensors",
        "named, but missing",
        False,
    ),
    "no init segment": (
        lambda store, id: remove(store, f"videos/{id}/init.mp4"),
        "videos/{id}/init.mp4",
        "named, but missing",
        False,
    ),
    "no thumbnail": (
        lambda store, id: remove(store, f"videos/{id}/thumbnail.jpg"),
        "videos/{id}/thumbnail.jpg",
        "named, but missing",
        False,
    ),
    "no input": (
        lambda store, id: remove(store, f"videos/{id}/input"),
        "videos/{id}/input",
        "named, but missing",
        False,
    ),
    "a shorter fragment": (
        lambda store, id: put(store, f"videos/{id}/chunks/00000.t3.m4s", b"frag"),
        "videos/{id}/chunks/00000.t3.m4s",
        "has 4 bytes, and 10 where it is named",
        False,
    ),
    "no request": (
        lambda store, id: remove(store, f"videos/{id}/request.json"),
        "videos/{id}/record.t3.json",
        "the record of a video without a request",
        False,
    ),
    "an unreadable request": (
        lambda store, id: put(store, f"videos/{id}/request.json", b'{"id": 1}'),
        "videos/{id}/request.json",
        "cannot be read, perhaps of another version",
        False,
    ),
    "an unreadable record": (
        lambda store, id: put(store, f"videos/{id}/record.t4.json", b"no JSON"),
        "videos/{id}/record.t4.json",
        "cannot be read, perhaps of another version",
        False,
    ),
    "an active marker": (
        lambda store, id: put(store, f"active/{id}"),
        "active/{id}",
        "active, but this video is completed",
        True,
    ),
    "a request never accepted": (
        lambda store, id: leave(store, "request"),
        "videos/{id}/request.json",
        "a request never accepted",
        True,
    ),
    "an upload of no request": (
        lambda store, id: leave(store, "input"),
        "videos/{id}/input",
        "of a video that has neither request nor record",
        True,
    ),
    "what was written after a deletion": (
        lambda store, id: leave(store, "00001.t3"),
        "videos/{id}/chunks/00001.t3.m4s",
        "of a video that has neither request nor record",
        True,
    ),
    "a video that nobody makes": (
        lambda store, id: put(
            store,
            f"videos/{id}/record.t4.json",
            changed((folder_of(store) / f"videos/{id}/record.t3.json").read_bytes(), status="in_progress"),
        ),
        "videos/{id}/record.t4.json",
        "in_progress, but not active: no Director goes on with this video",
        False,
    ),
}


@pytest.mark.parametrize("name", INCONSISTENT)
async def test_what_is_inconsistent_is_named_and_what_nothing_names_removed(store: Store, name: str) -> None:
    break_, key, problem, repaired = INCONSISTENT[name]
    video_id = await put_video(store)
    break_(store, video_id)
    age(store)
    assert await lines(store) == [(key.format(id=video_id), problem)]
    before = keys(store)
    await repair(store)
    assert await lines(store) == ([] if repaired else [(key.format(id=video_id), problem)])
    gone = before - keys(store)
    assert gone == ({key.format(id=video_id)} if repaired else set())


async def test_all_of_a_video_that_was_never_accepted_goes(store: Store) -> None:
    """Its request and its upload, by one line."""
    video_id = await put_video(store)
    for key in keys(store) - {"terms/000003", f"videos/{video_id}/request.json", f"videos/{video_id}/input"}:
        remove(store, key)
    age(store)
    assert await lines(store) == [(f"videos/{video_id}/request.json", "a request never accepted")]
    await repair(store)
    assert keys(store) == {"terms/000003"}
    assert await store.video_ids() == []


async def test_only_a_deep_look_sees_other_bytes_of_the_same_length(store: Store) -> None:
    video_id = await put_video(store)
    key = f"videos/{video_id}/chunks/00000.t3.m4s"
    put(store, key, b"Fragment 0")
    assert await lines(store) == []
    assert await lines(store, deep=True) == [(key, "has another SHA-256 than where it is named")]


async def test_states_before_the_last_may_be_there_or_not(store: Store) -> None:
    video_id = await put_video(store)
    put(store, f"videos/{video_id}/states/00001.t3.safetensors", b"state 0")
    assert await lines(store, deep=True) == []
    put(store, f"videos/{video_id}/states/00001.t3.safetensors", b"st")
    assert [problem for _, problem in await lines(store)] == ["has 2 bytes, and 7 where it is named"]


# ── what is left alone ───────────────────────────────────────────────────────


async def test_of_an_active_video_only_what_is_named_is_looked_at(store: Store) -> None:
    video_id = await put_video(store, active=True, is_ended=False)
    put(store, f"videos/{video_id}/chunks/00002.t3.m4s")
    put(store, f"videos/{video_id}/record.t2.json", b"{}")
    age(store)
    assert await lines(store, deep=True) == []
    key = f"videos/{video_id}/chunks/00000.t3.m4s"
    remove(store, key)
    assert await lines(store) == [(key, "named, but missing")]
    before = keys(store)
    await repair(store)
    assert keys(store) == before


@pytest.mark.parametrize("left", [{"request.json"}, {"request.json", "input"}, {"input"}, {"chunks/00001.t3.m4s"}])
async def test_what_is_young_may_be_accepted_yet(store: Store, left: set[str]) -> None:
    video_id = await put_video(store)
    for key in keys(store) - {f"videos/{video_id}/{name}" for name in left} - {"terms/000003"}:
        remove(store, key)
    age(store, YOUNG_S - 60)
    assert await lines(store) == []
    age(store, YOUNG_S + 60)
    assert len(await lines(store)) == 1


async def test_a_video_that_ended_just_now_may_be_active(store: Store) -> None:
    await put_video(store, active=True)
    assert await lines(store) == []


async def test_a_deletion_that_was_interrupted_is_the_next_directors(store: Store) -> None:
    video_id = await put_video(store, active=True)
    remove(store, f"videos/{video_id}/request.json")
    remove(store, f"videos/{video_id}/chunks/00000.t3.m4s")
    age(store)
    assert await lines(store) == []


async def test_leftovers_of_an_ended_video_need_not_be_old(store: Store) -> None:
    video_id = await put_video(store)
    put(store, f"videos/{video_id}/chunks/00002.t3.m4s")
    await repair(store)
    assert await lines(store) == []


# ── the command ──────────────────────────────────────────────────────────────


@pytest.fixture
def helios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`helios store check` with these arguments: (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["helios", "store", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
            sys.exit(0)
        assert isinstance(end.value.code, int | None)
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_names_repairs_and_tells_what_remains(
    helios: Callable[..., tuple[int, str, str]], store: Store
) -> None:
    video_id = asyncio.run(put_video(store))
    assert helios(store.folder) == (0, "", f"{store.folder}: 0 inconsistent, 0 remain\n")
    more, less = f"videos/{video_id}/chunks/00009.t3.m4s", f"videos/{video_id}/chunks/00001.t3.m4s"
    put(store, more)
    remove(store, less)
    named = f"{less}: named, but missing\n{more}: fragment that nothing names"
    assert helios(store.folder) == (1, f"{named}\n", f"{store.folder}: 2 inconsistent, 2 remain\n")
    assert helios(store.folder, "--repair") == (
        1,
        f"{named}; removed\n",
        f"{store.folder}: 2 inconsistent, 1 remain\n",
    )
    put(store, less, b"fragment 2")
    put(store, more)
    assert helios(store.folder, "--repair")[0] == 0
    status, stdout, _ = helios(store.folder, "--deep")
    assert (status, stdout) == (1, f"{less}: has another SHA-256 than where it is named\n")


@pytest.mark.parametrize(
    ("make", "expected", "words"),
    [
        (lambda folder: None, 2, ["url is '", "the folder of a store"]),
        (lambda folder: folder.write_text("a file"), 2, ["url is '", "the folder of a store"]),
        (lambda folder: folder.mkdir(), 1, ["no service was ever started"]),
    ],
    ids=["missing", "file", "empty"],
)
def test_what_is_no_store_is_refused(
    helios: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    make: Callable[[Path], object],
    expected: int,
    words: list[str],
) -> None:
    make(tmp_path / "sea")
    existed = (tmp_path / "sea").exists()
    status, stdout, stderr = helios(tmp_path / "sea")
    assert (status, stdout) == (expected, "")
    [line] = stderr.splitlines()
    assert line.startswith("helios: ") and all(word in line for word in words)
    assert (tmp_path / "sea").exists() == existed


def test_a_url_of_another_scheme_is_refused(helios: Callable[..., tuple[int, str, str]]) -> None:
    status, _, stderr = helios("ftp://somewhere")
    assert status == 2
    assert "url is 'ftp://somewhere'" in stderr or "store is 'ftp://somewhere'" in stderr
