"""Whether a store holds what its records name, no less and no more: `helios store check`.

It takes no lock, so a service may be writing all the while. Three rules make that safe. Of an active video, which is
its Director's, only what its record names is looked at. A video that has not ended and was written to within YOUNG_S
may be on its way to be accepted. And what is found counts only if a second look finds it too: the video may have ended,
or gone, during the first.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deployments.records import StoredObject, VideoRecord, VideoRequestRecord
from deployments.store import Listed, ObjectMissing, Store
from helios_core.errors import HeliosError, InvalidInput

YOUNG_S = 3600.0
VIDEOS_AT_ONCE = 8

app = typer.Typer(no_args_is_help=True, help="Look after a store.")
console = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command("check")
def check_command(
    url: Annotated[str, typer.Argument(help="folder, or s3://, gs://, az:// URL")],
    deep: Annotated[bool, typer.Option("--deep", help="also read what is named, and compare its SHA-256")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="remove what nothing names")] = False,
) -> None:
    """Name what is inconsistent in a store, one line each. A service may be running on it.

    Exit status 1 if something inconsistent remains.
    """
    if "://" not in url and not Path(url).is_dir():  # a Store would make it
        raise InvalidInput("url", url, "the folder of a store, or an s3://, gs:// or az:// URL")
    found, remain = asyncio.run(_check(Store(url), deep, repair))
    console.print(f"{url}: {found} inconsistent, {remain} remain", markup=False)
    if remain:
        raise typer.Exit(1)


async def _check(store: Store, deep: bool, repair: bool) -> tuple[int, int]:
    """How much was inconsistent, and how much of it remains."""
    if not await store.newest_term():
        raise HeliosError(f"{store.url}: no service was ever started on this store")
    found = remain = 0
    async for finding in check(store, time.time(), deep):
        found += 1
        if repair and finding.repair is not None:
            await finding.repair()
            typer.echo(f"{finding.key}: {finding.problem}; removed")
        else:
            remain += 1
            typer.echo(f"{finding.key}: {finding.problem}")
    return found, remain


@dataclass(frozen=True)
class Finding:
    """What is inconsistent about the object at `key`. `repair` removes it; None if something names it, or if nobody can
    say what it is."""

    key: str
    problem: str
    repair: Callable[[], Awaitable[None]] | None = field(default=None, compare=False)


async def check(store: Store, now: float, deep: bool = False) -> AsyncGenerator[Finding, None]:
    """What is inconsistent at the Unix time `now`, video by video, the oldest first. `deep`: reads what is named, to
    compare its SHA-256. Raises StoreUnavailable."""
    ids = sorted({*await store.video_ids(), *await store.active()})
    for start in range(0, len(ids), VIDEOS_AT_ONCE):
        some = ids[start : start + VIDEOS_AT_ONCE]
        for findings in await asyncio.gather(*(_confirmed(store, video_id, now, deep) for video_id in some)):
            for finding in findings:
                yield finding


async def _confirmed(store: Store, video_id: str, now: float, deep: bool) -> list[Finding]:
    """What two looks at a video find."""
    first = await _look(store, video_id, now, deep)
    second = await _look(store, video_id, now, deep) if first else []
    return [finding for finding in second if finding in first]


async def _look(store: Store, video_id: str, now: float, deep: bool) -> list[Finding]:
    marker = await store.marker(video_id)  # before the record: one that ended and is not active is written no more
    request: VideoRequestRecord | None = None
    record: VideoRecord | None = None
    unreadable = set()
    try:
        request = await store.request(video_id)
    except ValueError:
        unreadable.add("request")
    try:
        record = await store.record(video_id)
    except ValueError:
        unreadable.add("record")
    objects = await store.objects(video_id)
    records = sorted((item for item in objects if item.kind == "record"), key=lambda item: item.term)
    if unreadable:  # nobody can say what it names
        keys = [item.key for item in objects if item.kind in unreadable and item not in records[:-1]]
        return [Finding(key, "cannot be read, perhaps of another version") for key in keys]
    quiet = all(now - item.modified_at > YOUNG_S for item in (objects if marker is None else [*objects, marker]))
    if record is None:
        return _unmade(store, video_id, request, objects) if marker is None and quiet and not records else []
    if not records or (request is None and marker is not None):
        return []  # its deletion goes on, here or with the next Director

    newest, found = records[-1].key, []
    if request is None:
        found.append(Finding(newest, "the record of a video without a request"))
    if not record.ended and marker is None and quiet:
        found.append(Finding(newest, f"{record.status}, but not active: no Director goes on with this video"))
    if record.ended and marker is not None and quiet:
        found.append(Finding(marker.key, f"active, but this video is {record.status}", partial(store.end, video_id)))
    named = dict(_named(request, record))
    there = {item.key: item for item in objects}
    for item, required in named.items():
        if problem := await _problem(store, item, there.get(item.key), required, deep):
            found.append(Finding(item.key, problem))
    if record.ended and marker is None and request is not None:
        found += _leftovers(store, objects, {newest, *(item.key for item in named)})
    return found


def _unmade(
    store: Store, video_id: str, request: VideoRequestRecord | None, objects: Sequence[Listed]
) -> list[Finding]:
    """A video that nobody will make: its acceptance was interrupted, or a late writer wrote after its deletion."""
    for item in objects:
        if request is None or item.kind == "request":
            what = "of a video that has neither request nor record" if request is None else "a request never accepted"
            return [Finding(item.key, what, partial(store.delete, video_id))]
    return []  # deleted since


def _named(request: VideoRequestRecord | None, record: VideoRecord) -> Iterator[tuple[StoredObject, bool]]:
    """Each object that is named, and whether it must be there. Of the states that is the one to go on from; earlier
    ones may have been removed."""
    for item in (None if request is None else request.input, record.init, record.thumbnail):
        if item is not None:
            yield item, True
    start, made = record.start, len(record.chunks)
    sampled = start is not None and start.seen > made  # then a copied last chunk came without its state
    if start is not None:
        yield start.state, sampled and not record.ended
    for number, chunk in enumerate(record.chunks, 1):
        yield chunk.fragment, True
        yield chunk.state, number == made and not sampled


async def _problem(store: Store, item: StoredObject, there: Listed | None, required: bool, deep: bool) -> str | None:
    """What is wrong with an object that is named."""
    if there is None:
        return "named, but missing" if required else None
    if there.bytes != item.bytes:
        return f"has {there.bytes} bytes, and {item.bytes} where it is named"
    if not deep:
        return None
    try:
        data = await store.read(item.key) if item.bytes else b""
    except ObjectMissing:
        return "named, but missing" if required else None
    return None if hashlib.sha256(data).hexdigest() == item.sha256 else "has another SHA-256 than where it is named"


def _leftovers(store: Store, objects: Sequence[Listed], named: set[str]) -> Iterator[Finding]:
    """What nothing names of a video that has ended."""
    for item in objects:
        if item.key in named or item.kind in ("request", "text"):
            continue
        if item.kind is None:
            yield Finding(item.key, "nothing that this version stores")
        else:
            what = "a record of an older term" if item.kind == "record" else f"{item.kind} that nothing names"
            yield Finding(item.key, what, partial(store.remove, item.key))
