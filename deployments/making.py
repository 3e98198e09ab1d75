"""One video's way, from its prompt to its last commit: the loop over chunks, and what is done when a call is lost.

Holds references and metadata; never latents, never pixels. It knows the computing deployments as a `Graph` of four
awaitables, so that tests run this very loop in one process, and imports neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from opentelemetry.trace import Span

from deployments.admission import Room
from deployments.logs import event
from deployments.metrics import Metrics
from deployments.playback import Playback
from deployments.records import (
    Call,
    Encoded,
    Rendered,
    Run,
    SampleReport,
    StoredObject,
    VideoError,
    VideoRecord,
    VideoRequestRecord,
)
from deployments.safety import Unsafe
from deployments.store import Store, StoreUnavailable
from deployments.tracing import Tracer, ending, traceparent
from deployments.turns import Turns
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError, Spoilt
from helios_core.spec import PromptChange, VideoSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ref = Any  # to a value that lives elsewhere: an ObjectRef in the service

# Seconds before each retry of a chunk. There are two: what took three replicas with it is more likely the cause than a
# victim.
RETRY_AFTER_S = (0.0, 1.0)
MOST_TEXTS = 128  # prompts of one video, whose embeddings are held until it ends: up to 4 MB each


class Lost(Exception):
    """What a call needed is gone. `part`: the deployment that was called; `chunk`: the one that it was called for."""

    part = ""
    chunk = 0


class ReplicaLost(Lost):
    """The replica that worked on a call is gone; the inputs are sound, so the call can be made again."""


class InputLost(Lost):
    """A reference that was handed to a call leads nowhere; what it led to must come from the store."""


class ResultLost(Lost):
    """The replica is sound, and what it made is not. Once more: `error` is what the second time is told of."""

    def __init__(self, error: Spoilt) -> None:
        super().__init__(str(error))
        self.error = error


class Graph(Protocol):
    """The computing deployments, as the Director sees them: one or more of each kind, found by the model's id.

    Every call raises an error of ours (HeliosError) as it was raised, ReplicaLost or InputLost. A cancelled caller is
    released when nothing is stored for the call any more.
    """

    @property
    def models(self) -> Sequence[str]:
        """The ids of the models that are served."""
        ...

    def fingerprint(self, model: str) -> str:
        """Of the model's weights and configuration: another one makes other videos of the same seeds."""
        ...

    def samplers(self, model: str) -> int:
        """How many calls of `sample` for this model may be under way at once; 0 while there is no sampler."""
        ...

    def replicas(self, part: str) -> int:
        """How many replicas of all models' text_encoder, sampler or vae_decoder can take calls now."""
        ...

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Ref, Encoded]:
        """The prompt's TextEmbeddings, by reference and as they were stored."""
        ...

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> tuple[Ref, float]:
        """The StreamState before chunk 0 of a video from an uploaded image or video, by reference, and the seconds that
        it took its replica."""
        ...

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Ref | None, *texts: Ref
    ) -> tuple[Ref, SampleReport]:
        """The StreamState after chunk `index`, by reference. `state`: the one before the chunk, None for a new
        video; `texts`: one for each of the `weights` with which they are blended, then the negative prompt of a guided
        video. All are references, or StoredObjects to be read from the store."""
        ...

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Ref, sampled: SampleReport) -> Rendered:
        """Decodes and encodes the chunk that `state` ends with, a reference or a StoredObject; stores its fragment, and
        the state."""
        ...


class ChunkLost(HeliosError):
    """A chunk could not be made because replicas died over it again and again."""

    code = "chunk_lost"


def first_record(request: VideoRequestRecord) -> VideoRecord:
    """Where a video stands of which nothing is there yet."""
    return VideoRecord(
        id=request.id,
        created_at=request.created_at,
        spec=request.spec,
        origin=request.origin,
        owner=request.owner,
        priority=request.priority,
        deadline_s=request.deadline_s,
    )


class TextLost(HeliosError):
    """A change of the prompt could not be made because replicas died over its text again and again."""

    code = "unavailable"
    public = "the prompt could not be encoded; try again"


class EncoderChanged(HeliosError):
    """A video cannot go on, because another version of the encoder made its first fragments."""

    code = "encoder_changed"


class ModelChanged(HeliosError):
    """A video cannot go on, because its model is another one now or not served any more."""

    code = "model_changed"


class NotPossible(HeliosError):
    """A request that does not fit where a video stands. The message says what would."""

    code = "not_possible"


class RunningVideo:
    """A video that has not ended: its newest record, a way to wait for the next one, and who watches."""

    def __init__(self, request: VideoRequestRecord, record: VideoRecord | None = None) -> None:
        """`record`: where it stands, if it does not begin with nothing."""
        self.request = request
        self.record = first_record(request) if record is None else record
        self.changed = asyncio.Event()
        self.over = asyncio.Event()  # its end was told
        self.writing = asyncio.Lock()  # held by whoever puts the record, from reading the one that it follows
        self.cancelled = False  # somebody wants it to end
        self.failure: VideoError | None = None  # why it is cancelled, if that is not because somebody asked for it
        self.ending = False  # nothing is left to cancel
        # Chunks whose texts are fixed: a change of the prompt begins with the next one.
        self.issued = max(len(self.record.chunks), self.record.start.seen if self.record.start else 0)
        self.texts: dict[str, Ref] = {}  # the prompts that were encoded, by reference while that is good
        self.stored_texts: dict[str, StoredObject] = {}
        self.changes: set[asyncio.Task[Any]] = set()  # that clients asked for, under way
        self.retries: Counter[int] = Counter()  # by chunk
        self.spoilt: set[int] = set()  # chunks of which a result was lost
        self.watchers = 0
        # An earlier Director did not say how much of it was played: as little as its lead allowed.
        made_s, lead_s = sum(chunk.frames for chunk in self.record.chunks) / request.spec.fps, request.lead_seconds
        unseen_s = min(made_s, (lead_s or 0.0) + CHUNK_FRAMES / request.spec.fps)
        self.playback = Playback(lead_s, unseen_s, asyncio.get_running_loop().time())
        self.unwatched: asyncio.TimerHandle | None = None
        # When viewers of a service that led before this one were last noted, by the store's clock; None if there can be
        # none, since this Director accepted it.
        self.noted: float | None = None
        self.inside = AsyncExitStack()  # holds its place among the videos that take turns, as long as it
        self.is_inside = False  # is one of them
        self.asked_at = 0.0  # when it wanted its newest chunk, by the loop's clock
        self.making: asyncio.Task[None]  # its chunks; this is what a cancel stops
        self.leading: asyncio.Task[None]  # the video, to its end; never cancelled

    def update(self, record: VideoRecord) -> None:
        self.record = record
        self.changed.set()
        self.changed = asyncio.Event()
        if record.ended:
            self.over.set()

    def watch(self) -> None:
        """Somebody watches."""
        self.watchers += 1
        self.play()

    def play(self) -> None:
        """Somebody watches, here or through another service."""
        if self.playback.watched(asyncio.get_running_loop().time()):
            self.update(self.record)  # who waits for the first one goes on

    def begun_s(self, chunk: int) -> float:
        """How many seconds of the video before a chunk have begun to be made and are not there yet."""
        return (chunk - len(self.record.chunks)) * CHUNK_FRAMES / self.request.spec.fps

    def call(self, attempt: int, span: Span | None = None) -> Call:
        """A call to a replica whose work is a part of `span`, or of the video's own span."""
        parent = self.request.traceparent if span is None else traceparent(span)
        return Call(video_id=self.request.id, traceparent=parent, attempt=attempt)

    def retry(self, error: Lost) -> float:
        """Counts a retry of a chunk; after how many seconds it may begin. Raises ChunkLost if it had its share, Spoilt
        if a result was lost before."""
        self.retries[error.chunk] += 1
        if isinstance(error, ResultLost):
            if error.chunk in self.spoilt:
                raise error.error
            self.spoilt.add(error.chunk)
        count = self.retries[error.chunk]
        if count > len(RETRY_AFTER_S):
            raise ChunkLost(f"chunk {error.chunk} was lost {count} times") from error
        return RETRY_AFTER_S[count - 1]


class Maker:
    """Makes videos: its Director's hands. `term`: the Director's, which every stored name carries."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        tracer: Tracer,
        term: int,
        rooms: Mapping[str, Room],
        turns: Mapping[str, Turns],
        metrics: Metrics,
        keep_all_states: bool,
    ) -> None:
        """`rooms`: of each model's videos; `turns`: on its samplers; `keep_all_states`: not only the last one of each
        video."""
        self._graph, self._store, self._tracer, self._term = graph, store, tracer, term
        self._rooms, self._turns, self._metrics, self._keep_all_states = rooms, turns, metrics, keep_all_states
        self._suspects: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)  # by model and part

    async def make(self, video: RunningVideo) -> None:
        """All chunks. If an input is lost on the way, again from the last commit, with what the store has.

        Raises ModelChanged if the video was to be made by another model than the one that is served.
        """
        self._check_model(video.request)
        async with video.inside:
            while True:
                await self._come_in(video)
                try:
                    return await self._make_from_last_commit(video)
                except ExceptionGroup as group:
                    lost = next(leaves(group))
                    if not isinstance(lost, InputLost) or group.split(InputLost)[1] is not None:
                        raise
                video.texts = dict(video.stored_texts)
                if video.cancelled:  # a task group on its way out with an error forgets a cancel
                    raise asyncio.CancelledError
                await self._wait_for_retry(video, lost)

    async def _come_in(self, video: RunningVideo) -> None:
        """Returns when the video is one of those that take turns."""
        request, deadline = video.request, video.playback.deadline(0.0)
        entrance = self._rooms[request.spec.model].entrance
        if not video.is_inside:
            turn = entrance.turn(request.id, request.owner, request.priority, deadline)
            await video.inside.enter_async_context(turn)
            video.is_inside = True

    def _check_model(self, request: VideoRequestRecord) -> None:
        model = request.spec.model
        if model not in self._graph.models:
            raise ModelChanged(f"model {model} made this video and is not served any more")
        if request.fingerprint != self._graph.fingerprint(model):
            raise ModelChanged(f"model {model} has other weights or another configuration than when this video began")

    async def _make_from_last_commit(self, video: RunningVideo) -> None:
        spec, made = video.record.spec, video.record.chunks
        async with asyncio.TaskGroup() as renders:
            state, seen = await self._start(video)
            commit = None
            for index in range(len(made), spec.chunks):
                chunk = self._tracer.start("chunk", video.request.traceparent, video_id=video.request.id, chunk=index)
                with ending(chunk, only_on_error=True):
                    if seen > index:  # sampled for the video that this one goes on from; its fragment was cut
                        await self._begin(video, seen)
                        sampled = SampleReport(steps=0, started_at=time.time(), seconds=0.0)
                    else:
                        state, sampled = await self._sample(video, chunk, index, state)
                    # Sampling of a chunk overlaps the rendering of the one before, and of no more: a slow VAE slows the
                    # sampler instead of letting states pile up.
                    if commit is not None:
                        await commit
                    if sampled.run is not None and not video.retries[index]:
                        self._rooms[spec.model].took(asyncio.get_running_loop().time() - video.asked_at)
                commit = renders.create_task(self._render_and_commit(video, chunk, index, state, sampled))
            if commit is not None:
                await commit  # a task group takes a task that was cancelled for one that is done

    async def _start(self, video: RunningVideo) -> tuple[Ref | None, int]:
        """The state to go on from, None for the beginning of a text-to-video, and how many chunks it has seen."""
        record, media = video.record, video.request.input
        if record.start is not None and record.start.seen > len(record.chunks):
            return record.start.state, record.start.seen
        if record.chunks:
            return record.chunks[-1].state, len(record.chunks)
        if media is None:
            return None, 0

        async def attempt(number: int) -> Ref:
            call = video.call(number)
            async with self._alone(video, "vae_decoder", number):
                with self._losses(video, "vae_decoder", "encode input", call):
                    state, seconds = await self._graph.encode_media(call, record.spec, media)
            self._metrics.encoded_media(seconds)
            return state

        return await self._retried(video, 0, attempt), 0

    async def _encode(self, video: RunningVideo, prompt: str, number: int) -> None:
        """Sees to it that the video has the embeddings of `prompt`, for the time `number` of trying."""
        if prompt in video.texts:
            return
        call = video.call(number)
        async with self._alone(video, "text_encoder", number):
            with self._losses(video, "text_encoder", "encode prompt", call):
                text, encoded = await self._graph.encode(call, video.request.spec.model, prompt)
        self._metrics.encoded_text(encoded.seconds)
        video.texts[prompt], video.stored_texts[prompt] = text, encoded.stored

    async def change_prompt(self, video: RunningVideo, prompt: str, transition_chunks: int) -> PromptChange:
        """Commits a change of the prompt with the next chunk whose texts are not fixed yet. Raises NotPossible, or
        TextLost."""
        self._check_changeable(video)
        if prompt not in video.stored_texts and len(video.stored_texts) >= MOST_TEXTS:
            raise NotPossible(
                f"video {video.request.id} had {MOST_TEXTS} prompts; allowed: one of them, or another video"
            )
        await self._encode_change(video, prompt)
        async with video.writing:
            self._check_changeable(video)
            change = PromptChange(video.issued, prompt, transition_chunks)
            changed = video.record.model_copy(update={"spec": video.record.spec.changed(change)})
            await self._store.put_record(changed, self._term)
            video.update(changed)
            return change

    def _check_changeable(self, video: RunningVideo) -> None:
        if video.issued >= video.record.spec.chunks or video.ending or video.cancelled:
            raise NotPossible(f"all chunks of video {video.request.id} have begun; allowed: to extend it later")

    async def _encode_change(self, video: RunningVideo, prompt: str) -> None:
        """`_encode`, whose losses cost no chunk a retry: what a client asks for on the way must not end the video."""
        for number, pause in enumerate((*RETRY_AFTER_S, None)):
            try:
                return await self._encode(video, prompt, number)
            except Lost as lost:
                if pause is None:
                    raise TextLost(f"the prompt could not be encoded, at last because {lost}; try again") from lost
                self._metrics.retried(lost.part, _reason(lost))
                await asyncio.sleep(pause)

    async def _begin(self, video: RunningVideo, chunks: int) -> bool:
        """From here on the texts of the first `chunks` chunks are fixed, for every attempt at them; unless the video is
        paused: then nothing begins."""
        async with video.writing:
            if video.record.paused:
                return False
            video.issued = max(video.issued, chunks)
            if video.record.status == "queued":
                video.update(video.record.model_copy(update={"status": "in_progress"}))
                event(logger, "started", video.request)
        return True

    async def _sample(
        self, video: RunningVideo, chunk: Span, index: int, state: Ref | None
    ) -> tuple[Ref, SampleReport]:
        """The state after a chunk, when the video's turn has come."""
        spec, texts_of = video.request.spec, video.record.spec.mix_of_chunk
        negative = [spec.negative_prompt] if spec.guided else []
        # A change that comes while the video waits for its turn has its text encoded before it counts. It is blended
        # with what was in force before the chunk, which may be another video's.
        for prompt in [*dict(texts_of(max(0, index - 1))), *dict(texts_of(index)), *negative]:
            await self._retried(video, index, partial(self._encode, video, prompt))

        async def attempt(number: int) -> tuple[Ref, SampleReport]:
            call = video.call(number, chunk)
            while True:
                await self._wanted(video, index)
                asked, video.asked_at = time.time_ns(), asyncio.get_running_loop().time()
                deadline = video.playback.deadline(video.begun_s(index))
                async with self._turns[spec.model].turn(
                    video.request.id, video.request.owner, video.request.priority, deadline, again=number > 0
                ):
                    now = time.time_ns()
                    self._tracer.start("wait", call.traceparent, start_time=asked).end(now)
                    self._metrics.waited((now - asked) / 1e9)
                    if not await self._begin(video, index + 1):
                        continue  # paused since it asked: another video may have the turn
                    mix = dict(video.record.spec.mix_of_chunk(index))
                    texts = [video.texts[prompt] for prompt in [*mix, *negative]]
                    timed = self._metrics.timed("helios_turn_seconds" if index else "helios_first_turn_seconds")
                    with self._losses(video, "sampler", "sample", call), timed:
                        return await self._graph.sample(call, spec, index, tuple(mix.values()), state, *texts)

        return await self._retried(video, index, attempt)

    async def _wanted(self, video: RunningVideo, index: int) -> None:
        """Returns when a chunk is wanted: the video is not paused, nor made too far ahead of its playback."""
        clock = asyncio.get_running_loop().time
        while True:
            if video.record.paused:
                await video.inside.aclose()  # others may come in meanwhile
                video.is_inside = False
                while video.record.paused:
                    await video.changed.wait()
                await self._come_in(video)
            wait = video.playback.wait(video.begun_s(index), clock())
            if wait <= 0 and not video.record.paused:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(None if wait == math.inf else wait):
                    await video.changed.wait()

    async def set_paused(self, video: RunningVideo, paused: bool) -> None:
        """Commits that no further chunk is wanted for now, or that one is. Raises Superseded or StoreUnavailable."""
        async with video.writing:
            if video.record.paused == paused:
                return
            changed = video.record.model_copy(update={"paused": paused})
            await self._store.put_record(changed, self._term)
            video.update(changed)
        if not paused:
            self._metrics.unpaused(video.request.id, time.time())
        event(logger, "paused" if paused else "unpaused", video.request)

    async def _render_and_commit(
        self, video: RunningVideo, chunk: Span, index: int, state: Ref, sampled: SampleReport
    ) -> None:
        async def attempt(number: int) -> Rendered:
            call = video.call(number, chunk)
            try:
                async with self._alone(video, "vae_decoder", number):
                    with self._losses(video, "vae_decoder", "render", call):
                        rendered = await self._graph.render(call, video.request.spec, self._term, state, sampled)
            except Unsafe as error:
                self._metrics.checked(error.check)
                raise
            if rendered.check is not None:
                self._metrics.checked(rendered.check)
            return rendered

        with ending(chunk):
            rendered = await self._retried(video, index, attempt)
            with self._tracer.span("commit", traceparent(chunk)):
                await _finished(self._commit(video, rendered, sampled.run))

    async def _commit(self, video: RunningVideo, rendered: Rendered, run: Run | None) -> None:
        chunk = rendered.chunk
        async with video.writing:
            record = video.record
            if chunk.index != len(record.chunks):
                raise RuntimeError(f"video {record.id}: chunk {chunk.index} came when {len(record.chunks)} was due")
            if record.init is not None and record.init.sha256 != rendered.init.sha256:
                raise EncoderChanged(f"chunk {chunk.index} has another init segment than the chunks before it")
            committed = record.with_chunk(rendered, run)
            with self._metrics.timed("helios_commit_seconds"):
                await self._store.put_record(committed, self._term)
            video.playback.committed(chunk.frames / record.spec.fps, asyncio.get_running_loop().time())
            video.update(committed)
        self._metrics.committed(committed, time.time())
        event(logger, "committed", video.request, chunk=chunk.index, bytes=chunk.fragment.bytes)
        if self._keep_all_states:
            return
        try:
            await self._store.keep_only_last_state(committed, self._term)
        except StoreUnavailable as error:  # only tidying up: it is tried again after the next chunk
            event(logger, "earlier states not removed", video.request, logging.WARNING, reason=str(error))

    async def _retried(self, video: RunningVideo, chunk: int, attempt: Callable[[int], Awaitable[T]]) -> T:
        """`attempt(0)`; if its replica is lost `attempt(1)`, and so on. Raises ChunkLost after the last retry."""
        for number in itertools.count():
            try:
                return await attempt(number)
            except Lost as lost:
                lost.chunk = chunk
                if isinstance(lost, InputLost):
                    raise
                await self._wait_for_retry(video, lost)
        raise AssertionError("unreachable")

    async def _wait_for_retry(self, video: RunningVideo, error: Lost) -> None:
        """Returns when the retry may begin. Raises ChunkLost if there was one too many."""
        pause = video.retry(error)
        self._metrics.retried(error.part, _reason(error))
        await asyncio.sleep(pause)

    def _alone(self, video: RunningVideo, part: str, number: int) -> AbstractAsyncContextManager[Any]:
        """Around the time `number` of trying a call to a replica that takes several at once: of those that were lost
        before, one at a time. Else what kills replicas takes the same neighbour along each time, and both are given up.
        """
        return self._suspects[video.request.spec.model, part] if number else nullcontext()

    @contextmanager
    def _losses(self, video: RunningVideo, part: str, name: str, call: Call) -> Iterator[None]:
        """Tells of what is lost in the block. A replica that dies takes its span along: ours stands in for it."""
        began = time.time_ns()
        try:
            try:
                yield
            except Spoilt as error:
                raise ResultLost(error) from error
        except Lost as error:
            error.part = part
            what = _reason(error).replace("_", " ")
            event(logger, what, video.request, logging.WARNING, part=part, attempt=call.attempt, reason=str(error))
            span = self._tracer.start(
                name, call.traceparent, start_time=began, video_id=call.video_id, attempt=call.attempt, lost=True
            )
            with ending(span):
                raise


def _reason(lost: Lost) -> str:
    """Of a retry, as the metrics call it."""
    return {ReplicaLost: "replica_lost", InputLost: "input_lost", ResultLost: "result_lost"}[type(lost)]


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
