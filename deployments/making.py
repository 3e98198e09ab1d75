"""One video's way, from its prompt to its last commit: the loop over chunks, and what is done when a call is lost.

Holds references and metadata; never latents, never pixels. It knows the computing deployments as a `Graph` of four
awaitables, so that tests run this very loop in one process, and imports neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from opentelemetry.trace import Span

from deployments.logs import event
from deployments.metrics import Metrics
from deployments.records import (
    Call,
    Rendered,
    SampleReport,
    StoredObject,
    VideoRecord,
    VideoRequestRecord,
)
from deployments.store import Store, StoreUnavailable
from deployments.tracing import Tracer, ending, traceparent
from deployments.turns import Turns
from helios_core.errors import HeliosError
from helios_core.spec import VideoSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ref = Any  # to a value that lives elsewhere: an ObjectRef in the service

# Seconds before each retry of a chunk. There are three: what takes a fourth replica with it is more likely the cause
# than a victim.
RETRY_AFTER_S = (0.0, 1.0, 3.0)


class Lost(Exception):
    """What a call needed is gone. `part`: the deployment that was called."""

    part = ""


class ReplicaLost(Lost):
    """The replica that worked on a call is gone; the inputs are sound, so the call can be made again."""


class InputLost(Lost):
    """A reference that was handed to a call leads nowhere; what it led to must come from the store."""


class Graph(Protocol):
    """The computing deployments, as the Director sees them.

    Every call raises an error of ours (HeliosError) as it was raised, ReplicaLost or InputLost. A cancelled caller is
    released when nothing is stored for the call any more.
    """

    def samplers(self) -> int:
        """How many calls of `sample` may be under way at once, at least 1."""
        ...

    async def encode(self, call: Call, prompt: str) -> tuple[Ref, StoredObject]:
        """The prompt's TextEmbeddings, by reference and as they were stored."""
        ...

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, text: Ref, state: Ref | None
    ) -> tuple[Ref, SampleReport]:
        """The StreamState after chunk `index`, by reference. `text`, `state`: references, or StoredObjects to be read
        from the store; `state` is the one before the chunk, None for a new video."""
        ...

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        """Decodes and encodes the chunk that `state` ends with; stores its fragment, and the state."""
        ...


class ChunkLost(HeliosError):
    """A chunk could not be made because replicas died over it again and again."""

    code = "chunk_lost"


class RunningVideo:
    """A video that has not ended: its newest record, a way to wait for the next one, and who watches."""

    def __init__(self, request: VideoRequestRecord) -> None:
        self.request = request
        self.record = VideoRecord(id=request.id, created_at=request.created_at, spec=request.spec)
        self.changed = asyncio.Event()
        self.cancelled = False  # somebody wants it to end
        self.ending = False  # nothing is left to cancel
        self.text: StoredObject | None = None
        self.retries: Counter[int] = Counter()  # by chunk
        self.watchers = 0
        self.unwatched: asyncio.TimerHandle | None = None
        self.making: asyncio.Task[None]  # its chunks; this is what a cancel stops
        self.leading: asyncio.Task[None]  # the video, to its end; never cancelled

    def update(self, record: VideoRecord) -> None:
        self.record = record
        self.changed.set()
        self.changed = asyncio.Event()

    def call(self, span: Span, attempt: int) -> Call:
        """A call to a replica whose work is a part of `span`."""
        return Call(video_id=self.request.id, traceparent=traceparent(span), attempt=attempt)

    def retry(self, chunk: int, error: Lost) -> float:
        """Counts a retry of a chunk; after how many seconds it may begin. Raises ChunkLost if it had its share."""
        self.retries[chunk] += 1
        if self.retries[chunk] > len(RETRY_AFTER_S):
            raise ChunkLost(f"chunk {chunk} was lost {self.retries[chunk]} times, at last because {error}") from error
        return RETRY_AFTER_S[self.retries[chunk] - 1]


class Maker:
    """Makes videos: its Director's hands. `term`: the Director's, which every stored name carries."""

    def __init__(self, graph: Graph, store: Store, tracer: Tracer, term: int, turns: Turns, metrics: Metrics) -> None:
        self._graph, self._store, self._tracer, self._term = graph, store, tracer, term
        self._turns, self._metrics = turns, metrics

    async def make(self, video: RunningVideo) -> None:
        """All chunks. If an input is lost on the way, again from the last commit, with what the store has."""
        while True:
            try:
                return await self._make_from_last_commit(video)
            except ExceptionGroup as group:
                lost = next(leaves(group))
                if not isinstance(lost, InputLost) or group.split(InputLost)[1] is not None:
                    raise
            if video.cancelled:  # a task group on its way out with an error forgets a cancel
                raise asyncio.CancelledError
            await self._wait_for_retry(video, len(video.record.chunks), lost, "input_lost")

    async def _make_from_last_commit(self, video: RunningVideo) -> None:
        spec, made = video.request.spec, video.record.chunks
        async with asyncio.TaskGroup() as renders:
            text = await self._encode(video) if video.text is None else video.text
            state = made[-1].state if made else None
            commit = None
            for index in range(len(made), spec.chunks):
                chunk = self._tracer.start("chunk", video.request.traceparent, video_id=video.request.id, chunk=index)
                with ending(chunk, only_on_error=True):
                    state, sampled = await self._sample(video, chunk, index, text, state)
                    # Sampling of a chunk overlaps the rendering of the one before, and of no more: a slow VAE slows the
                    # sampler instead of letting states pile up.
                    if commit is not None:
                        await commit
                commit = renders.create_task(self._render_and_commit(video, chunk, index, state, sampled))
            if commit is not None:
                await commit  # a task group takes a task that was cancelled for one that is done

    async def _encode(self, video: RunningVideo) -> Ref:
        """The embeddings, by reference. From now on the video knows where they are stored."""

        async def attempt(number: int) -> Ref:
            call = Call(video_id=video.request.id, traceparent=video.request.traceparent, attempt=number)
            with self._losses(video, "text_encoder", "encode prompt", call):
                text, video.text = await self._graph.encode(call, video.request.spec.prompt)
                return text

        return await self._retried(video, 0, attempt)

    async def _sample(
        self, video: RunningVideo, chunk: Span, index: int, text: Ref, state: Ref | None
    ) -> tuple[Ref, SampleReport]:
        """The state after a chunk, when the video's turn has come."""

        async def attempt(number: int) -> tuple[Ref, SampleReport]:
            call, asked = video.call(chunk, number), time.time_ns()
            async with self._turns.turn(video.request.id, again=number > 0):
                now = time.time_ns()
                self._tracer.start("wait", call.traceparent, start_time=asked).end(now)
                self._metrics.waited((now - asked) / 1e9)
                if video.record.status == "queued":
                    video.update(video.record.model_copy(update={"status": "in_progress"}))
                    event(logger, "started", video.request)
                with self._losses(video, "sampler", "sample", call):
                    return await self._graph.sample(call, video.request.spec, index, text, state)

        return await self._retried(video, index, attempt)

    async def _render_and_commit(
        self, video: RunningVideo, chunk: Span, index: int, state: Ref, sampled: SampleReport
    ) -> None:
        async def attempt(number: int) -> Rendered:
            call = video.call(chunk, number)
            with self._losses(video, "vae_decoder", "render", call):
                return await self._graph.render(call, video.request.spec, self._term, state, sampled)

        with ending(chunk):
            rendered = await self._retried(video, index, attempt)
            with self._tracer.span("commit", traceparent(chunk)):
                await _finished(self._commit(video, rendered))

    async def _commit(self, video: RunningVideo, rendered: Rendered) -> None:
        record, chunk = video.record, rendered.chunk
        if chunk.index != len(record.chunks):
            raise RuntimeError(f"video {record.id}: chunk {chunk.index} came when {len(record.chunks)} was due")
        if record.init is not None and record.init.sha256 != rendered.init.sha256:
            raise RuntimeError(f"video {record.id}: chunk {chunk.index} has another init segment than chunk 0")
        committed = record.model_copy(update={"init": rendered.init, "chunks": (*record.chunks, chunk)})
        await self._store.put_record(committed, self._term)
        video.update(committed)
        self._metrics.committed(committed, time.time())
        event(logger, "committed", video.request, chunk=chunk.index, bytes=chunk.fragment.bytes)
        try:
            await self._store.keep_only_last_state(committed, self._term)
        except StoreUnavailable as error:  # only tidying up: it is tried again after the next chunk
            event(logger, "earlier states not removed", video.request, logging.WARNING, reason=str(error))

    async def _retried(self, video: RunningVideo, chunk: int, attempt: Callable[[int], Awaitable[T]]) -> T:
        """`attempt(0)`; if its replica is lost `attempt(1)`, and so on. Raises ChunkLost after the last retry."""
        for number in itertools.count():
            try:
                return await attempt(number)
            except ReplicaLost as lost:
                await self._wait_for_retry(video, chunk, lost, "replica_lost")
        raise AssertionError("unreachable")

    async def _wait_for_retry(self, video: RunningVideo, chunk: int, error: Lost, reason: str) -> None:
        """Returns when the retry may begin. Raises ChunkLost if there was one too many."""
        pause = video.retry(chunk, error)
        self._metrics.retried(error.part, reason)
        await asyncio.sleep(pause)

    @contextmanager
    def _losses(self, video: RunningVideo, part: str, name: str, call: Call) -> Iterator[None]:
        """Tells of what is lost in the block. A replica that dies takes its span along: ours stands in for it."""
        began = time.time_ns()
        try:
            yield
        except Lost as error:
            error.part = part
            what = "replica lost" if isinstance(error, ReplicaLost) else "input lost"
            event(logger, what, video.request, logging.WARNING, part=part, attempt=call.attempt, reason=str(error))
            span = self._tracer.start(
                name, call.traceparent, start_time=began, video_id=call.video_id, attempt=call.attempt, lost=True
            )
            with ending(span):
                raise


async def _finished(work: Awaitable[T]) -> T:
    """`work`, which a caller who is cancelled waits for all the same."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        _ = task.cancelled() or task.exception()  # nobody is left to hear of it
        raise


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group of groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
