"""What a new video takes over from the one that it comes from: copies, so that each can be deleted alone."""

from __future__ import annotations

import asyncio

from deployments.making import NotPossible, first_record
from deployments.records import Origin, Start, VideoRecord, VideoRequestRecord
from deployments.store import ObjectMissing, Store, renamed
from helios_core.errors import InvalidInput


async def take_over(
    store: Store, term: int, request: VideoRequestRecord, origin: Origin, source: VideoRecord
) -> tuple[VideoRequestRecord, VideoRecord]:
    """The request of a new video, with an input of its own, and its first record, with its first chunks.

    Raises InvalidInput or NotPossible if `source` does not have the chunks or the state that are asked for, and
    ObjectMissing if it is deleted meanwhile.
    """
    asked = await _request(store, source)
    if asked.input is not None:
        request = request.model_copy(update={"input": await store.copy(asked.input, request.id, term)})
    new = first_record(request)
    if origin.how == "remix":
        return request, new
    if source.status != "completed":
        raise NotPossible(f"video {source.id} is {source.status}; allowed to {origin.how}: a completed video")
    if origin.chunks == 0:
        return request, new
    if origin.chunks > len(source.chunks):
        raise InvalidInput("chunk", origin.chunks, f"0 to {len(source.chunks)}, the end of video {source.id}")
    state = source.chunks[origin.chunks - 1].state
    kept = await store.states(source.id)
    if state.key not in kept:
        await _request(store, source)  # a deletion since the first look takes the states too: then that is the reason
        raise NotPossible(
            f"no state of video {source.id} is kept before chunk {origin.chunks}; allowed: chunk 0, or "
            f"{len(source.chunks)}, its end; any chunk if the service keeps all states (keep_states: all)"
        )

    # A last fragment that was cut is made again, from the state, where the new video goes on beyond it.
    taken = [chunk for chunk in source.chunks[: origin.chunks] if chunk.frames == new.spec.frames_of_chunk(chunk.index)]
    # All of them are done before an error is told: what fails is cleaned up after, and not at the same time.
    objects = [chunk.fragment for chunk in taken]
    objects += [chunk.state for chunk in source.chunks[: origin.chunks] if chunk.state.key in kept]
    copies = await asyncio.gather(*(store.copy(item, new.id, term) for item in objects), return_exceptions=True)
    if lost := next((copied for copied in copies if isinstance(copied, BaseException)), None):
        raise lost
    start = Start(copied=len(taken), seen=origin.chunks, state=renamed(state, new.id, term))
    changes = {
        "start": start,
        "init": None if source.init is None else await store.copy(source.init, new.id, term),
        "thumbnail": None if source.thumbnail is None else await store.copy(source.thumbnail, new.id, term),
        # As a rule only the last state is kept: the others' names lead nowhere.
        "chunks": tuple(
            chunk.model_copy(
                update={
                    "fragment": renamed(chunk.fragment, new.id, term),
                    "state": renamed(chunk.state, new.id, term),
                }
            )
            for chunk in taken
        ),
    }
    return request, new.model_copy(update=changes)


async def _request(store: Store, source: VideoRecord) -> VideoRequestRecord:
    """What was asked for, of which a deletion takes this first. Raises ObjectMissing."""
    request = await store.request(source.id)
    if request is None:
        raise ObjectMissing(f"video {source.id} was deleted")
    return request
