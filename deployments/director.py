"""Leads each video from its request to its last chunk. Holds references and metadata; never latents, never pixels.

`Director` is a plain asyncio class over a `Graph` (text encoder, sampler, VAE decoder) and a store, so that tests run
this very loop in one process; deployments/app.py puts it into a Serve replica. It does not import torch.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from deployments.records import ChunkRecord, Rendered, SampleReport, Status, VideoError, VideoRecord, VideoRequestRecord
from deployments.store import Store, StoreUnavailable
from helios_core.errors import HeliosError
from helios_core.spec import VideoSpec

logger = logging.getLogger(__name__)

Ref = Any  # to a value that lives elsewhere: an ObjectRef in the service


class Graph(Protocol):
    """The computing deployments, as the Director sees them."""

    async def encode(self, video_id: str, prompt: str) -> Ref:
        """The prompt's TextEmbeddings, by reference."""
        ...

    async def sample(self, spec: VideoSpec, index: int, text: Ref, state: Ref | None) -> tuple[Ref, SampleReport]:
        """The StreamState after chunk `index`, by reference. `state`: the one before it, None for a new video."""
        ...

    async def render(self, video_id: str, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        """Decodes and encodes the chunk that `state` ends with; stores its fragment, and the state."""
        ...


class NoSuchVideo(HeliosError):
    """No video has this id."""

    code = "not_found"

    def __init__(self, video_id: str) -> None:
        super().__init__(video_id)
        self.video_id = video_id

    def __str__(self) -> str:
        return f"no video has the id {self.video_id!r}"


class RunningVideo:
    """A video that has not ended: its newest record, and a way to wait for the next one."""

    def __init__(self, record: VideoRecord) -> None:
        self.record = record
        self.changed = asyncio.Event()
        self.ending = False  # nothing is left to cancel
        self.task: asyncio.Task[None]

    def update(self, record: VideoRecord) -> None:
        self.record = record
        self.changed.set()
        self.changed = asyncio.Event()


class Director:
    """One per store. `start` it before use.

    Every public method is safe to call at any time from many tasks of one event loop.
    """

    def __init__(self, graph: Graph, store: Store, term: int) -> None:
        self._graph, self._store, self._term = graph, store, term
        self._running: dict[str, RunningVideo] = {}
        self._stopping = False

    @classmethod
    async def start(cls, graph: Graph, store: Store) -> Director:
        """Takes the lead of `store` with a new term. Videos that an earlier Director left unfinished end as failed."""
        director = cls(graph, store, await store.claim_term())
        for video_id in await store.active():
            try:
                await director._close_interrupted(video_id)
            except ValueError:  # another version wrote it; the rest of the store must still be served
                logger.exception("video %s cannot be read and stays as it is", video_id)
        return director

    async def ready(self) -> None:
        """Returns if videos can be accepted. Raises StoreUnavailable."""
        await self._store.newest_term()

    async def create(self, request: VideoRequestRecord) -> VideoRecord:
        """Accepts a video: it is stored before this returns, and made from then on, watched or not."""
        # Shielded: a caller that leaves now must not leave a stored video behind that nobody makes.
        return await asyncio.shield(asyncio.create_task(self._accept(request)))

    async def _accept(self, request: VideoRequestRecord) -> VideoRecord:
        await self._store.accept(request)
        record = VideoRecord(id=request.id, created_at=request.created_at, spec=request.spec)
        video = self._running[request.id] = RunningVideo(record)
        # In a context of its own: a video outlives the request that created it, but Ray cancels a request's calls with
        # the request.
        video.task = asyncio.create_task(self._lead(video), name=request.id, context=contextvars.Context())
        await asyncio.sleep(0)  # lets it begin: a task cancelled before its first step runs nothing, not even its end
        return record

    async def get(self, video_id: str) -> VideoRecord:
        """Where a video stands. Raises NoSuchVideo."""
        if video_id in self._running:
            return self._running[video_id].record
        record = await self._store.record(video_id)
        if record is None:
            raise NoSuchVideo(video_id)
        return record

    async def watch(self, video_id: str, from_chunk: int = 0) -> AsyncGenerator[ChunkRecord | VideoRecord, None]:
        """Every committed chunk from `from_chunk` on, as soon as it is committed; last, the record of the ended video.

        Raises NoSuchVideo.
        """
        video = self._running.get(video_id)
        if video is None:
            record = await self.get(video_id)
            for chunk in record.chunks[from_chunk:]:
                yield chunk
            yield record
            return
        index = from_chunk
        while True:
            changed, record = video.changed, video.record
            for chunk in record.chunks[index:]:
                yield chunk
            index = max(index, len(record.chunks))
            if record.ended:
                yield record
                return
            await changed.wait()

    async def create_and_watch(self, request: VideoRequestRecord) -> AsyncGenerator[ChunkRecord | VideoRecord, None]:
        """`create`, then `watch`, in one call; leaving it before the end cancels the video. First item: its record."""
        record = await self.create(request)
        try:
            yield record
            async with aclosing(self.watch(request.id)) as events:
                async for event in events:
                    yield event
        finally:
            self.cancel(request.id)

    async def stop(self) -> None:
        """Stops all work at once, without ending any video: for a service that is about to go."""
        self._stopping = True
        tasks = [video.task for video in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cancel(self, video_id: str) -> None:
        """Stops a running video; what was committed stays. Does nothing if it has ended."""
        video = self._running.get(video_id)
        if video is not None and not video.ending and not video.task.cancelling():
            video.task.cancel()

    async def _lead(self, video: RunningVideo) -> None:
        """From the prompt to the last commit, then the end, whatever it is."""
        error = None
        try:
            await self._make_chunks(video)
            status: Status = "completed"
        except asyncio.CancelledError as cancelled:
            if self._stopping:
                return  # it stays active in the store, for the next Director to find
            if video.task.cancelling():
                status = "cancelled"
            else:  # Ray reports a call that the cluster dropped in the same way as one that we dropped
                status, error = "failed", _reported(video.record.id, cancelled)
        except ExceptionGroup as group:
            status, error = "failed", _reported(video.record.id, group)
        video.ending = True
        await self._end(video, status, error)

    async def _end(self, video: RunningVideo, status: Status, error: VideoError | None) -> None:
        changes = {"status": status, "error": error, "completed_at": time.time()}
        ended = video.record.model_copy(update=changes)
        try:
            await self._store.put_record(ended, self._term)
            await self._store.end(ended.id)
            del self._running[ended.id]
        except StoreUnavailable as lost:
            # What was committed is safe, the end is not: memory keeps it for those who ask, and the next Director will
            # find the video active.
            logger.error("video %s: its end could not be stored: %s", ended.id, lost)
            failure = VideoError(code=lost.code, message=str(lost))
            ended = video.record.model_copy(update={**changes, "status": "failed", "error": failure})
        video.update(ended)

    async def _make_chunks(self, video: RunningVideo) -> None:
        spec = video.record.spec
        async with asyncio.TaskGroup() as renders:
            text = await self._graph.encode(video.record.id, spec.prompt)
            state, commit = None, None
            video.update(video.record.model_copy(update={"status": "in_progress"}))
            for index in range(spec.chunks):
                state, sampled = await self._graph.sample(spec, index, text, state)
                # Sampling of a chunk overlaps the rendering of the one before, and of no more: a slow VAE slows the
                # sampler instead of letting states pile up.
                if commit is not None:
                    await commit
                commit = renders.create_task(self._render_and_commit(video, state, sampled))
            if commit is not None:
                await commit  # a task group takes a task that was cancelled for one that is done

    async def _render_and_commit(self, video: RunningVideo, state: Ref, sampled: SampleReport) -> None:
        rendered = await self._graph.render(video.record.id, video.record.spec, self._term, state, sampled)
        record, chunk = video.record, rendered.chunk
        if chunk.index != len(record.chunks):
            raise RuntimeError(f"video {record.id}: chunk {chunk.index} came when {len(record.chunks)} was due")
        if record.init is not None and record.init.sha256 != rendered.init.sha256:
            raise RuntimeError(f"video {record.id}: chunk {chunk.index} has another init segment than chunk 0")
        committed = record.model_copy(update={"init": rendered.init, "chunks": (*record.chunks, chunk)})
        await self._store.put_record(committed, self._term)
        video.update(committed)
        try:
            await self._store.keep_only_last_state(committed, self._term)
        except StoreUnavailable as error:  # only tidying up: it is tried again after the next chunk
            logger.warning("video %s: earlier states were not removed: %s", record.id, error)

    async def _close_interrupted(self, video_id: str) -> None:
        request = await self._store.request(video_id)
        record = await self._store.record(video_id)
        if record is None and request is not None:
            record = VideoRecord(id=video_id, created_at=request.created_at, spec=request.spec)
        if record is not None and not record.ended:
            error = VideoError(code="interrupted", message="the service stopped while this video was being made")
            ended = record.model_copy(update={"status": "failed", "error": error, "completed_at": time.time()})
            await self._store.put_record(ended, self._term)
        await self._store.end(video_id)


def _reported(video_id: str, error: BaseException) -> VideoError:
    """What the client hears of a failure: an error of ours as it is, of anything else no inner detail."""
    whole = error
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, HeliosError):
        return VideoError(code=error.code, message=str(error))
    # A bug of ours, or a part of the cluster that died.
    logger.error("video %s failed", video_id, exc_info=whole)
    return VideoError(code="internal_error", message="the service failed while making this video")
