"""What happens to a video, as server-sent events (WHATWG HTML, 9.2): `chunk`, `prompt`, `done` and `error`.

Every event has an id, and what follows an id never changes: a client that comes back with the last one that it saw in
`Last-Event-ID` gets the rest, while the video is made and for as long as it is stored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from deployments.content import AskNews, next_news
from deployments.errors import CutOff
from deployments.records import ChunkRecord, News, VideoStatus
from helios_core.errors import InvalidInput
from helios_core.spec import PromptChange, VideoSpec

PING = b": ping\n\n"
PING_S = 15.0  # between two pings, so that proxies keep the connection
EVENT_ID = re.compile(r"(0|[1-9][0-9]{0,8})(-prompt)?", re.ASCII)
END = "done"  # the id of the last event, whichever that is

Position = tuple[int, bool]
"""A chunk, and whether it was told of, or only that its prompt is another one than before."""

BEGINNING: Position = (-1, True)


def position_of(event_id: str | None, video: VideoStatus) -> Position | None:
    """What a client has seen whose last event had this id; None if there is nothing more to see.

    Raises InvalidInput for an id that no event of this video has had.
    """
    if not event_id:
        return BEGINNING
    if event_id == END and video.ended:
        return None
    match = EVENT_ID.fullmatch(event_id)
    chunk, of_prompt = (int(match[1]), match[2] is not None) if match else (-1, False)
    if not 0 <= chunk < video.usage.chunks or (of_prompt and new_prompt(video.spec, chunk) is None):
        last = video.usage.chunks - 1
        had = [f"0 to {last}", f"0-prompt to {last}-prompt where the prompt changed"] if video.usage.chunks else []
        allowed = ", ".join([*had, *[END] * video.ended]) or "none"
        raise InvalidInput("Last-Event-ID", event_id, f"the id of an event that the video has had: {allowed}")
    return chunk, not of_prompt


async def events(news: AskNews, seen: Position) -> AsyncGenerator[bytes, None]:
    """The events after `seen` of a video that somebody watches, the last one when it has ended or was deleted; and a
    comment every PING_S."""
    clock = asyncio.get_running_loop().time
    ping_at = clock() + PING_S
    known: list[ChunkRecord] = []
    offset = 0  # in the file, of the next fragment
    while True:
        try:
            async with asyncio.timeout_at(ping_at):
                new = await next_news(news, len(known))
        except TimeoutError:
            yield PING
            ping_at = clock() + PING_S
            continue
        except CutOff as error:
            yield failure("not_found", str(error), len(known))
            return
        if new.init is not None and not known:
            offset = new.init.bytes
        for chunk in new.chunks:
            change = new_prompt(new.spec, chunk.index)
            if change is not None and (chunk.index, False) > seen:
                yield event("prompt", f"{chunk.index}-prompt", dataclasses.asdict(change))
            if (chunk.index, True) > seen:
                before = known[-1] if known else None
                yield event("chunk", str(chunk.index), chunk_data(new.spec, chunk, before, offset))
            offset += chunk.fragment.bytes
            known.append(chunk)
        if new.ended:
            yield last_event(new, known, offset)
            return


def chunk_data(spec: VideoSpec, chunk: ChunkRecord, before: ChunkRecord | None, offset: int) -> dict[str, Any]:
    """What is told of a chunk, all times in seconds. `before`: the chunk before it; `offset`: where its fragment begins
    in the file.

    `made_s`: of sampling, decoding, encoding and storing; `cadence_s`: from the beginning of the sampling of the chunk
    before to its own.
    """
    first_frame, timings = spec.first_frame_of_chunk(chunk.index), chunk.timings
    return {
        "index": chunk.index,
        "first_frame": first_frame,
        "frames": chunk.frames,
        "pts_s": first_frame / spec.fps,
        "duration_s": chunk.frames / spec.fps,
        "bytes": chunk.fragment.bytes,
        "offset": offset,
        "made_s": timings.sample_seconds + timings.decode_seconds + timings.encode_seconds + timings.store_seconds,
        "cadence_s": None if before is None else timings.sample_started_at - before.timings.sample_started_at,
        "prompt": prompt_in_force(spec, chunk.index),
    }


def last_event(new: News, chunks: Sequence[ChunkRecord], size: int) -> bytes:
    """The end of a video that has ended, with these chunks and so many bytes."""
    if new.error is not None:
        return failure(new.error.code, new.error.message, len(chunks))
    if new.status == "cancelled":
        return failure("cancelled", "the video was cancelled", len(chunks))
    frames = sum(chunk.frames for chunk in chunks)
    totals = {"chunks": len(chunks), "frames": frames, "bytes": size, "duration_s": frames / new.spec.fps}
    return event("done", END, totals)


def failure(code: str, message: str, chunks: int) -> bytes:
    """The end of a video that will never be whole. `chunks`: those that are there."""
    return event("error", END, {"code": code, "message": message, "last_chunk": chunks - 1 if chunks else None})


def event(name: str, event_id: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\nid: {event_id}\ndata: {json.dumps(data)}\n\n".encode()


def prompt_in_force(spec: VideoSpec, chunk: int) -> str:
    """The prompt that drives a chunk, or that is on its way to."""
    return [spec.prompt, *(change.prompt for change in spec.prompts if change.chunk <= chunk)][-1]


def new_prompt(spec: VideoSpec, chunk: int) -> PromptChange | None:
    """The change with which a chunk begins to follow another prompt than the chunk before it."""
    before = prompt_in_force(spec, chunk - 1)
    return next((change for change in spec.prompts if change.chunk == chunk and change.prompt != before), None)
