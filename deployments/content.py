"""A video's file over HTTP (RFC 9110): live while it is being made, by parts and cacheable once it is finished.

The file is never put together: it is the init segment and the fragments, one after the other, and a part of it is read
from those objects that hold it. News of a running video is asked for again and again, in calls that end by themselves:
one long call would live on in the Director when an ingress dies. Viewers share what they ask and what they read in
deployments/watching.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Protocol, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from deployments.director import NoSuchVideo
from deployments.errors import CutOff, RequestError
from deployments.making import ReplicaLost
from deployments.records import ChunkRecord, News, StoredObject
from deployments.store import ObjectMissing, StoreUnavailable, Superseded

LIVE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: proxies must not hold it back
FOREVER = "private, max-age=31536000, immutable"
LAST_LIVE_BYTE = 2**53 - 2  # RFC 8673: the last position of a range whose end nobody knows yet
ASK_AGAIN_S = 0.5
PIECE_BYTES = 2**18  # of what is read at once: a viewer who stops reading holds up a few of them, and no more

# At most 19 digits: more than that is no position in any file, and Python refuses to read some thousands.
RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.IGNORECASE | re.ASCII)
RESUME = re.compile(r"bytes=([0-9]{1,19})-", re.IGNORECASE | re.ASCII)
ETAG = re.compile(r'(?:W/)?("[^"]*")')

AskNews = Callable[[int], Awaitable[News]]
"""The News of one video after the chunks that the caller has seen: `Director.news`, or that of a watch."""


class Reader(Protocol):
    """A Store, or what keeps a copy of what it read of one."""

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes: ...


class VideoResponse(StreamingResponse):
    """A video, or what is told of it, from a generator, which is closed as soon as nobody listens, and not when memory
    is tidied up."""

    media_type = "video/mp4"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[bytes, None], self.body_iterator)):
            await super().stream_response(send)


def live_response(request: Request, body: Callable[[int], AsyncGenerator[bytes, None]]) -> Response:
    """A running video from its start, or from the byte N of `Range: bytes=N-`, which may not exist yet. `body`: the
    file from a byte on."""
    start = live_start(request)
    headers = {**LIVE_HEADERS, "Accept-Ranges": "bytes"}
    if start is not None:
        headers["Content-Range"] = f"bytes {start}-{LAST_LIVE_BYTE}/*"
    return media(request, body(start or 0), 200 if start is None else 206, headers)


def file_response(
    request: Request, objects: Sequence[StoredObject], store: Reader, whole: bool, media_type: str = "video/mp4"
) -> Response:
    """A file that nobody writes any more, or the part of it that is asked for. `whole`: it will never be another one,
    and so can be cached for ever. Raises RequestError 416 for a part that there is not."""
    size = sum(item.bytes for item in objects)
    etag = etag_of(objects)
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": FOREVER if whole else "private, no-cache",
        "Content-Type": media_type,
        "ETag": etag,
    }
    unless = header(request, "if-none-match")
    if unless is not None and (unless == "*" or etag in ETAG.findall(unless)):
        return Response(status_code=304, headers=headers)
    status, (start, end) = 200, (0, size)
    # An If-Range that is a date never holds: the file has none.
    if header(request, "if-range") in (None, etag) and (part := asked_part(request, size)) is not None:
        status, (start, end) = 206, part
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    return media(request, file_bytes(objects, store, start, end), status, headers)


def media(request: Request, body: AsyncGenerator[bytes, None], status: int, headers: dict[str, str]) -> Response:
    """The response to a GET, or its head alone."""
    return VideoResponse(() if request.method == "HEAD" else body, status, headers)


async def live_bytes(news: AskNews, store: Reader, start: int = 0) -> AsyncGenerator[bytes, None]:
    """The file from byte `start` on, fragment by fragment, as its chunks are committed.

    Raises CutOff when the video fails, is cancelled or is deleted.
    """
    seen = 0
    while True:
        new = await next_news(news, seen)
        objects = objects_of(new.init, new.chunks) if seen == 0 else [chunk.fragment for chunk in new.chunks]
        size = sum(item.bytes for item in objects)
        async for data in file_bytes(objects, store, min(start, size), size):
            yield data
        start = max(0, start - size)
        seen += len(new.chunks)
        if new.status == "completed":
            return
        if new.ended:
            raise CutOff(f"the video is {new.status} after {seen} chunks")


async def next_news(news: AskNews, seen: int) -> News:
    """What is new after the chunks `seen`, from the next Director if this one dies. Raises CutOff for no such video."""
    while True:
        try:
            return await news(seen)
        except (ReplicaLost, Superseded, StoreUnavailable):
            await asyncio.sleep(ASK_AGAIN_S)
        except NoSuchVideo as error:
            raise CutOff("the video was deleted") from error


async def file_bytes(
    objects: Sequence[StoredObject], store: Reader, start: int, end: int
) -> AsyncGenerator[bytes, None]:
    """The bytes [start, end) of the objects, one after the other. Raises CutOff if one has been deleted."""
    for key, first, stop in pieces(objects, start, end):
        try:
            yield await store.read(key, first, stop)
        except ObjectMissing as error:
            raise CutOff("the video was deleted") from error


def objects_of(init: StoredObject | None, chunks: Sequence[ChunkRecord]) -> list[StoredObject]:
    """The parts of the file that these first chunks make."""
    if not chunks:
        return []
    assert init is not None, "a committed chunk has an init segment"
    return [init, *(chunk.fragment for chunk in chunks)]


def pieces(objects: Sequence[StoredObject], start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """What to read for the bytes [start, end) of the objects, one after the other: (key, first byte, byte after)."""
    offset = 0
    for item in objects:
        first, stop = max(start - offset, 0), min(end - offset, item.bytes)
        for begin in range(first, stop, PIECE_BYTES):
            yield item.key, begin, min(begin + PIECE_BYTES, stop)
        offset += item.bytes


def etag_of(objects: Sequence[StoredObject]) -> str:
    """A strong one: it names the bytes."""
    return f'"{hashlib.sha256("".join(item.sha256 for item in objects).encode()).hexdigest()}"'


def asked_part(request: Request, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) of a file of `size` bytes that its Range asks for, None if that is the whole.

    Several ranges, other units and what makes no sense are ignored, as RFC 9110 allows, and so is a Range on anything
    but a GET. Raises RequestError 416 if the file has none of these bytes.
    """
    asked = header(request, "range")
    match = RANGE.fullmatch(asked) if asked is not None and request.method == "GET" else None
    first, last = match.groups() if match else ("", "")
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    elif last:
        start, end = max(0, size - int(last)), size
    else:
        return None
    if start >= end:
        message = f"Range is {asked!r}; allowed: bytes of 0 to {size - 1}"
        raise RequestError(416, "range_not_satisfiable", message, "Range", {"Content-Range": f"bytes */{size}"})
    return start, end


def live_start(request: Request) -> int | None:
    """N, if the Range is `bytes=N-`. A running video has no ETag, so no If-Range can hold."""
    match = RESUME.fullmatch(header(request, "range") or "")
    if match is None or int(match[1]) > LAST_LIVE_BYTE or request.method != "GET" or "if-range" in request.headers:
        return None
    return int(match[1])


def header(request: Request, name: str) -> str | None:
    """A header that may come in several lines, as the list that they are."""
    return ", ".join(request.headers.getlist(name)) or None
