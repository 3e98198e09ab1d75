"""Which videos there are, who watches them, and how each ends. How one is made is deployments/making.py's.

`Director` is a plain asyncio class, which deployments/graph.py puts into a Serve replica. It imports neither torch nor
ray.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from deployments.admission import Admission, Room, TooMany
from deployments.config import NO_QUOTA, AdmissionSettings, Quota
from deployments.logs import event, shown
from deployments.making import Graph, Maker, NotPossible, RunningVideo, first_record, leaves
from deployments.metrics import Metrics
from deployments.origins import take_over
from deployments.records import (
    Check,
    News,
    Page,
    Status,
    StoredObject,
    VideoError,
    VideoRecord,
    VideoRequestRecord,
    VideoStatus,
)
from deployments.retention import Keep, Retention
from deployments.store import ONE, ObjectMissing, Retired, Store, StoreUnavailable, Superseded
from deployments.tracing import Tracer
from deployments.turns import Turns
from helios_core.errors import HeliosError
from helios_core.spec import PromptChange

logger = logging.getLogger(__name__)

T = TypeVar("T")
COLLECT_AFTER_S = 1.0
NEWS_S = 5.0  # how long a watcher's question may stay open
STORE_AGAIN_S = 5.0  # between two tries to store an end, or to read what is to be resumed
UNWATCHED_S = 10.0  # unless it is told how long
NOTED_WITHIN_S = 2 * NEWS_S  # an ingress that follows the records notes its viewers with each question
AS_MANY_AS_USUAL = AdmissionSettings()


class NoSuchVideo(HeliosError):
    """No video has this id."""

    code = "not_found"

    def __init__(self, video_id: str) -> None:
        super().__init__(video_id)
        self.video_id = video_id

    def __str__(self) -> str:
        return f"no video has the id {self.video_id!r:.80}"


class Unreadable(HeliosError):
    """A video that this version cannot read. It can be deleted."""

    code = "unreadable"


class Director:
    """One per store. `start` it before use.

    Every public method is safe to call at any time from many tasks of one event loop. Those that take a video's id
    raise Superseded if another Director has been found to lead the store, and StoreUnavailable if what is asked for
    cannot be read.
    """

    def __init__(
        self,
        graph: Graph,
        store: Store,
        tracer: Tracer,
        term: int,
        patience_s: float,
        keep_all_states: bool,
        log_prompts: bool,
        unwatched_s: float,
        admission: AdmissionSettings,
    ) -> None:
        self._graph, self._store, self._tracer, self._term = graph, store, tracer, term
        self._patient = store.patient(patience_s)  # for what a video needs; who asks is told at once
        self._log_prompts = log_prompts
        self._unwatched_s = unwatched_s
        self._running: dict[str, RunningVideo] = {}
        self._resuming: dict[str, asyncio.Task[None]] = {}  # videos that an earlier Director left behind
        self._accepting: dict[str, asyncio.Task[VideoStatus]] = {}
        self._superseded: Superseded | None = None
        self._took_over = False  # from another service
        self._looking: asyncio.Task[None] | None = None
        self._hidden: set[str] = set()  # videos that are being stored or removed: to the outside there are none
        self._stopping = False
        self._collecting: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._keep_all_states = keep_all_states
        self._turns = {model: Turns(partial(graph.samplers, model)) for model in graph.models}
        self._rooms = {
            model: Room(partial(_samplers, graph, model), admission.videos_per_sampler) for model in graph.models
        }
        self._admission = Admission(admission, store, self._rooms, self._ends_s)
        self._metrics = Metrics()
        self._maker = Maker(
            graph, self._patient, tracer, term, self._rooms, self._turns, self._metrics, keep_all_states
        )
        self._metrics.observe(
            running=lambda: sum(not (video.record.ended or video.leading.done()) for video in self._running.values()),
            queued=lambda: sum(room.entrance.waiting for room in self._rooms.values()),
            waiting=lambda: sum(turns.waiting for turns in self._turns.values()),
            sampling=lambda: sum(turns.sampling for turns in self._turns.values()),
            replicas=graph.replicas,
            watchers=lambda: sum(video.watchers for video in self._running.values()),
            store_up=lambda: not store.health.away,
            cpu_seconds=time.process_time,
        )

    @classmethod
    async def start(
        cls,
        graph: Graph,
        store: Store,
        tracer: Tracer,
        patience_s: float = 0.0,
        keep_all_states: bool = False,
        log_prompts: bool = False,
        unwatched_s: float = UNWATCHED_S,
        keep: Keep | None = None,
        admission: AdmissionSettings = AS_MANY_AS_USUAL,
        service: str = ONE,
    ) -> Director:
        """Takes the lead of `store` with a new term, and goes on with the videos that an earlier Director left behind:
        not here, so that none can keep it from starting.

        `patience_s`: how long a video waits for a store that is away; `keep_all_states`: of each video, not only the
        last; `unwatched_s`: how long one that is made for its watchers goes on without one; `keep`: what is kept of the
        videos that have ended; None: all, and nothing is deleted by itself; `admission`: how many videos come in;
        `service`: for which the term is claimed. If another one has led since, this Director leads nothing.
        Raises StoreUnavailable.
        """
        retired = None
        try:
            term = await store.claim_term(service)
        except Retired as error:
            term, retired = 0, error
        director = cls(graph, store, tracer, term, patience_s, keep_all_states, log_prompts, unwatched_s, admission)
        if retired is not None:
            director._superseded = retired
            return director
        director._took_over = await store.takes_over(term)
        for video_id in await store.active():
            task = asyncio.create_task(director._resume(video_id), name=f"resuming {video_id}")
            director._resuming[video_id] = task
        if keep is not None:
            retention = Retention(store, term, keep, director.delete)
            director._sweeping = asyncio.create_task(retention.run(), name="sweeping")
        return director

    def check_health(self) -> None:
        """Raises Superseded if another Director of this service leads the store: then this one is to be replaced. If
        it is another service's there is nothing to replace it with."""
        if self._superseded is not None and not isinstance(self._superseded, Retired):
            raise self._superseded

    def check_leads(self) -> None:
        """Raises Superseded if another Director is known to lead the store."""
        if self._superseded is not None:
            raise self._superseded

    async def _check_still_leads(self) -> None:
        """`check_leads`, by a look at the store: who commits nothing hears of no other Director. Raises
        StoreUnavailable."""
        self.check_leads()
        try:
            await self._store.check_leads(self._term)
        except Superseded as superseded:
            self._step_down(superseded)
            raise

    def _look(self) -> None:
        """`_check_still_leads`, for which nobody waits."""

        async def look() -> None:
            with suppress(Superseded, StoreUnavailable):
                await self._check_still_leads()

        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(look(), context=contextvars.Context())

    async def ready(self) -> None:
        """Returns if videos can be accepted. Raises Superseded or StoreUnavailable."""
        await self._check_still_leads()

    def wanting(self) -> dict[str, int]:
        """Model ▸ how many of its videos want a chunk now: those that have a sampler, and all that wait for one."""
        return {
            model: turns.sampling + turns.waiting + self._rooms[model].entrance.waiting
            for model, turns in self._turns.items()
        }

    async def checked(self, check: Check) -> None:
        """Counts a safety check that an ingress made."""
        self._metrics.checked(check)

    async def metrics(self) -> bytes:
        """What was counted, in Prometheus' text format."""
        return self._metrics.text()

    # What clients ask for

    async def admit(self, owner: str, quota: Quota) -> None:
        """Returns if this owner may ask for a video, whatever it is. Raises TooMany, or StoreUnavailable."""
        self.check_leads()
        await self._admission.check(owner, quota)

    async def create(self, request: VideoRequestRecord, again: bool = False, quota: Quota = NO_QUOTA) -> VideoStatus:
        """Accepts a video: it is stored before this returns, and made from then on, watched or not, unless it is to be
        made `while_watched`. What it takes over from the video of its origin is copied. `again`: it may have been asked
        for before, of an earlier Director too, and be accepted already: then this is how it stands. Of many who ask at
        the same time one has it accepted, and the others hear of that; if it fails the next one tries.

        Raises TooMany if there is no room for it, or if it is more than `quota` allows its owner; NoSuchVideo,
        Unreadable, NotPossible or InvalidInput if the video of its origin cannot give it; StoreUnavailable also if its
        input has to be sent again.
        """
        while other := self._accepting.get(request.id):
            await asyncio.wait([other])
        accepting = asyncio.create_task(self._create(request, again, quota))
        self._accepting[request.id] = accepting
        accepting.add_done_callback(lambda _: self._accepting.pop(request.id))
        # Shielded: a caller that leaves now must not leave a stored video behind that nobody makes.
        return await _whole(accepting)

    async def _create(self, request: VideoRequestRecord, again: bool, quota: Quota) -> VideoStatus:
        if request.id in self._hidden:  # it was accepted before, and is being deleted
            raise NoSuchVideo(request.id)
        if again and await self._found(request.id) is None and await self._store.request(request.id) is not None:
            await self._check_still_leads()  # another Director may make it
            await self._store.prepare(request.id)
            await self._take_up(request.id)
            return await self.get(request.id)
        if request.id in self._running:
            return await self.get(request.id)
        self.check_leads()
        if again and request.input is not None:
            await self._check_input(request.id, request.input)
        if self._resuming:  # what an earlier Director left behind counts, too
            await asyncio.wait(self._resuming.values(), timeout=NEWS_S)
        return await self._accept(
            request.model_copy(update={"fingerprint": self._graph.fingerprint(request.spec.model)}), quota
        )

    async def _check_input(self, video_id: str, media: StoredObject) -> None:
        """Raises StoreUnavailable if what an attempt before left behind was removed, and this input with it."""
        try:
            await self._store.read(media.key, 0, 1)
        except ObjectMissing as error:
            raise StoreUnavailable(f"the input of video {video_id} was removed; send it again") from error

    async def _begun(self, request: VideoRequestRecord) -> tuple[VideoRequestRecord, VideoRecord]:
        """The request, and where its video stands before it is made."""
        origin = request.origin
        if origin is None:
            return request, first_record(request)
        source = await self._record(origin.video_id)
        await self._store.prepare(request.id)
        try:
            request, record = await take_over(self._store, self._term, request, origin, source)
        except ObjectMissing as error:
            raise NoSuchVideo(origin.video_id) from error
        if record.chunks:
            await self._store.put_record(record, self._term)  # watchers hear of them at once
        return request, record

    async def _accept(self, request: VideoRequestRecord, quota: Quota) -> VideoStatus:
        with self._hiding(request.id):
            try:
                await self._admission.enter(request, quota)
                await self._check_still_leads()  # who leads by now would not hear of what is stored here
                request, record = await self._begun(request)
                await self._store.accept(request)
                await self._check_still_leads()  # who claims a term from here on finds it active
            except Superseded:
                raise  # what was stored is for the other Director, who may be asked for it again
            except (HeliosError, OSError) as error:
                with suppress(StoreUnavailable):
                    await self._admission.turn_away(request)
                    if request.input is not None or not isinstance(error, TooMany):  # else nothing is there yet
                        await self._store.delete(request.id)  # its input, and what was copied
                raise
        self._metrics.accepted(request.id, request.created_at)
        prompt = shown(request.spec.prompt, self._log_prompts)
        event(logger, "accepted", request, prompt=prompt, chunks=request.spec.chunks)
        self._run(RunningVideo(request, record))
        await asyncio.sleep(0)  # it has a place in the queue when its making has begun
        return self._status(self._running[request.id].record)

    def _run(self, video: RunningVideo) -> None:
        """Makes a video to its end."""
        self._watch_out(video)
        self._running[video.request.id] = video
        self._admission.go_on(video.request)
        # In a context of its own: a video outlives the request that created it, but Ray cancels a request's calls with
        # the request.
        apart, name = contextvars.Context(), video.request.id
        video.making = asyncio.create_task(self._maker.make(video), name=f"making {name}", context=apart)
        video.leading = asyncio.create_task(self._lead(video), name=f"leading {name}", context=apart)

    # What an earlier Director left behind

    async def _resume(self, video_id: str) -> None:
        """Goes on with a video, or finishes what is left to do of it. What goes wrong is its own affair."""
        try:
            while not self._stopping:
                try:
                    return await self._take_up(video_id)
                except StoreUnavailable as away:
                    logger.warning("not resumed yet: %s", away, extra={"video_id": video_id})
                    await asyncio.sleep(STORE_AGAIN_S)
        except ValueError as error:  # another version's: it can only be deleted
            logger.warning("not resumed: unreadable: %s", error, extra={"video_id": video_id})
        except Exception:
            logger.exception("not resumed", extra={"video_id": video_id})
        finally:
            del self._resuming[video_id]

    async def _take_up(self, video_id: str) -> None:
        request = await self._store.request(video_id)
        if request is None:
            return await self._store.delete(video_id)  # an acceptance or a deletion that was interrupted
        record = await self._store.record(video_id)
        if record is not None and record.ended:
            return await self._tidy(request, record)
        video = RunningVideo(request, record)
        video.noted = 0.0
        if self._took_over:  # who watches it there goes on, and this Director does not hear of them at first
            video.play()
        self._metrics.resumed(video.record, time.time())
        event(logger, "resumed", request, chunks=len(video.record.chunks))
        self._run(video)

    async def _found(self, video_id: str) -> RunningVideo | None:
        """A video that has not ended. Raises Superseded if that is not this Director's to say, StoreUnavailable if what
        an earlier one left behind cannot be read yet."""
        self.check_leads()
        if task := self._resuming.get(video_id):
            await asyncio.wait([task], timeout=NEWS_S)
            if not task.done():
                raise StoreUnavailable(f"video {video_id} cannot be read yet; try again")
        return self._running.get(video_id)

    async def change_prompt(self, video_id: str, prompt: str, transition_chunks: int) -> PromptChange:
        """Changes the prompt of a running video, from the next chunk on that has not begun: which, the answer says.

        Raises NoSuchVideo, Unreadable, or NotPossible if the video has ended or all its chunks have begun.
        """
        video = await self._unended(video_id, "to change the prompt of")
        return await self._changed(video, self._maker.change_prompt(video, prompt, transition_chunks))

    async def pause(self, video_id: str) -> VideoStatus:
        """Stops a running video before its next chunk, and leaves its sampler to others; one that is paused stays so.

        Raises NoSuchVideo, Unreadable, or NotPossible if the video has ended.
        """
        return await self._set_paused(video_id, True)

    async def resume(self, video_id: str) -> VideoStatus:
        """Goes on with a paused video; one that is not paused goes on anyway. Raises as `pause`."""
        return await self._set_paused(video_id, False)

    async def _set_paused(self, video_id: str, paused: bool) -> VideoStatus:
        video = await self._unended(video_id, "to pause or resume")
        await self._changed(video, self._maker.set_paused(video, paused))
        return self._status(video.record)

    async def _unended(self, video_id: str, what: str) -> RunningVideo:
        """A running video. Raises NotPossible, which says `what` is allowed for one, if it is over."""
        video = await self._found(video_id)
        if video is None or video.ending or video.cancelled:
            status = await self.get(video_id)
            raise NotPossible(f"video {video_id} is {status.status}; allowed: {what} a running video")
        return video

    async def _changed(self, video: RunningVideo, change: Coroutine[Any, Any, T]) -> T:
        """The result of a change, before which the video does not end."""
        task = asyncio.create_task(change, context=contextvars.Context())
        video.changes.add(task)
        task.add_done_callback(video.changes.discard)
        return await _whole(task)

    async def get(self, video_id: str) -> VideoStatus:
        """Where a video stands. Raises NoSuchVideo or Unreadable."""
        return self._status(await self._record(video_id))

    async def _record(self, video_id: str) -> VideoRecord:
        video = await self._found(video_id)
        if video_id in self._hidden:
            raise NoSuchVideo(video_id)
        if video is not None:
            return video.record
        try:
            record = await self._store.record(video_id)
        except ValueError as error:
            logger.warning("unreadable: %s", error, extra={"video_id": video_id})
            raise Unreadable(f"video {video_id} was stored by another version; it can only be deleted") from error
        if record is not None and record.ended:
            return record
        await self._check_still_leads()  # another Director may make it
        if record is None:
            raise NoSuchVideo(video_id)
        return _interrupted(record)

    async def page(
        self, limit: int, after: str | None = None, newest_first: bool = True, owner: str | None = None
    ) -> Page:
        """At most `limit` videos, of `owner` unless that is None: those after the id `after` in the order of their
        creation, or its reverse."""
        ids = await (self._store.video_ids() if owner is None else self._store.owned(owner))
        if not newest_first:
            ids.reverse()
        if after is not None:  # it may have been deleted since
            ids = [video_id for video_id in ids if (video_id < after if newest_first else video_id > after)]
        found: list[VideoStatus] = []
        rest = iter(ids)
        while len(found) <= limit and (some := list(itertools.islice(rest, limit + 1 - len(found)))):
            found += [status for status in await asyncio.gather(*map(self._listed, some)) if status is not None]
        return Page(videos=tuple(found[:limit]), has_more=len(found) > limit)

    async def _listed(self, video_id: str) -> VideoStatus | None:
        try:
            return await self.get(video_id)
        except (NoSuchVideo, Unreadable):
            return None

    async def news(self, video_id: str, seen: int) -> News:
        """The chunks from index `seen` on, as soon as there is one; after NEWS_S without any, none. At once if the
        video has ended. Raises NoSuchVideo or Unreadable.

        Whoever watches asks again and again. A question that stays open is one that ends by itself: if its asker dies,
        Ray does not tell.
        """
        video = await self._found(video_id)
        if video is None:
            record = await self._record(video_id)
        else:
            with self._watched(video):
                try:
                    async with asyncio.timeout(NEWS_S):
                        while len(video.record.chunks) <= seen and not video.record.ended:
                            await video.changed.wait()
                            self.check_leads()
                except TimeoutError:  # no news; another Director may have some
                    self._look()
            if video_id in self._hidden:  # it ended because it is being deleted
                raise NoSuchVideo(video_id)
            record = video.record
        return News.of(record, seen)

    async def cancel(self, video_id: str) -> VideoStatus:
        """Stops a video and returns when it has ended; what was committed stays. One that has ended stays as it is.

        Raises NoSuchVideo or Unreadable.
        """
        video = await self._found(video_id)
        if video is None:
            return await self.get(video_id)
        self._cancel(video)
        over = asyncio.create_task(video.over.wait())
        await asyncio.wait([over, video.leading], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        self.check_leads()
        return self._status(video.record)

    async def delete(self, video_id: str) -> None:
        """Stops a video if it runs and removes all of it. Raises NoSuchVideo or StoreUnavailable."""
        await _whole(self._delete(video_id))

    async def _delete(self, video_id: str) -> None:
        stored = await self._store.has(video_id)  # asked first: what was not there then may be under way now
        await self._check_still_leads()  # another Director may make it
        video = await self._found(video_id)
        if video_id in self._hidden or (video is None and not stored):
            raise NoSuchVideo(video_id)
        with self._hiding(video_id):
            if not await self._store.has(video_id):  # another deletion was faster
                raise NoSuchVideo(video_id)
            request = await self._request(video_id) if video is None else video.request
            if video is not None:
                self._cancel(video)
                await asyncio.wait([video.leading])
                self.check_leads()
            await self._store.delete(video_id)
        if request is not None:
            event(logger, "deleted", request)
            with suppress(StoreUnavailable):  # then a note stays that leads to no video
                await self._admission.deleted(request)

    @contextmanager
    def _hiding(self, video_id: str) -> Iterator[None]:
        self._hidden.add(video_id)
        try:
            yield
        finally:
            self._hidden.discard(video_id)

    async def _request(self, video_id: str) -> VideoRequestRecord | None:
        try:
            return await self._store.request(video_id)
        except ValueError:
            return None  # another version's

    async def stop(self) -> None:
        """Stops all work at once, without ending any video: for a service that is about to go."""
        await self._drop_all()
        await asyncio.to_thread(self._tracer.close)

    async def _drop_all(self) -> None:
        self._stopping = True
        apart = [*self._resuming.values(), *(task for task in (self._sweeping, self._looking) if task)]
        for task in apart:
            task.cancel()
        await asyncio.gather(*apart, return_exceptions=True)
        videos = list(self._running.values())
        for video in videos:
            self._cancel(video)
            if video.record.ended:  # all that is left is to store that
                video.leading.cancel()
        await asyncio.gather(*(video.leading for video in videos), return_exceptions=True)

    def _step_down(self, superseded: Superseded) -> None:
        """Another Director leads the store: this one leaves all videos to it."""
        if self._superseded is None:
            logger.error("superseded: %s", superseded)
            self._superseded = superseded
            for video in self._running.values():
                video.update(video.record)  # wakes those who watch, who then ask the other one
            self._dropping = asyncio.create_task(self._drop_all(), context=contextvars.Context())

    def _status(self, record: VideoRecord) -> VideoStatus:
        room = self._rooms.get(record.spec.model)  # a stored video's model may be served no more
        if room is None or record.ended or record.id not in self._running:
            return VideoStatus.of(record)
        turns = self._turns[record.spec.model]
        position, outside = turns.place(record.id), room.entrance.place(record.id)
        if outside is not None:  # all that wait inside get a sampler before
            position = turns.waiting + outside
        start_s, end_s = self._forecast(room, record)
        return VideoStatus.of(
            record,
            queue_position=position,
            estimated_start_at=None if record.status != "queued" or start_s == math.inf else time.time() + start_s,
            estimated_completion_at=None if end_s == math.inf else time.time() + end_s,
        )

    def _forecast(self, room: Room, record: VideoRecord) -> tuple[float, float]:
        """In how many seconds a video's first chunk may begin, and its last one be there; infinite if nobody knows."""
        return room.forecast(record.id, partial(self._left, record.spec.model))

    def _left(self, model: str) -> dict[str, float | None]:
        """How many chunks are left to make of each video that has not ended, None of one that is paused."""
        return {
            video.request.id: _chunks_left(video.record)
            for video in self._running.values()
            if video.request.spec.model == model and not video.ending
        }

    def _ends_s(self, videos: Iterable[str]) -> float:
        """In how many seconds the first of these is expected to end, or infinite."""
        running = [self._running[video_id] for video_id in videos if video_id in self._running]
        rooms = [(self._rooms.get(video.request.spec.model), video.record) for video in running]
        return min((self._forecast(room, record)[1] for room, record in rooms if room is not None), default=math.inf)

    def _cancel(self, video: RunningVideo, failure: VideoError | None = None) -> None:
        """Stops the making of a video, which ends as cancelled, or as failed because of `failure`."""
        if not video.ending and not video.cancelled:
            video.cancelled, video.failure = True, failure
            video.making.cancel()
            if video.unwatched is not None:
                video.unwatched.cancel()

    @contextmanager
    def _watched(self, video: RunningVideo) -> Iterator[None]:
        video.watch()
        try:
            yield
        finally:
            video.watchers -= 1
            self._watch_out(video)

    def _watch_out(self, video: RunningVideo) -> None:
        """From here on, `video` has `unwatched_s` to find a watcher, if it has none and needs one."""
        if video.unwatched is not None:
            video.unwatched.cancel()
        if video.request.while_watched and not video.ending and not video.cancelled:
            wait = self._unwatched_s if video.noted is None else max(self._unwatched_s, NOTED_WITHIN_S)
            video.unwatched = asyncio.get_running_loop().call_later(wait, self._cancel_unwatched, video)

    def _cancel_unwatched(self, video: RunningVideo) -> None:
        if video.watchers:
            return
        if video.noted is None:
            event(logger, "unwatched", video.request)
            return self._cancel(video)
        asking = asyncio.create_task(
            self._cancel_unless_watched_elsewhere(video, video.noted), context=contextvars.Context()
        )
        video.changes.add(asking)
        asking.add_done_callback(video.changes.discard)

    async def _cancel_unless_watched_elsewhere(self, video: RunningVideo, noted_before: float) -> None:
        """The service that led before this one may still have viewers of it, of whom its ingress tells by the store.
        That it told anew is what counts, and not when: so no two clocks are compared."""
        try:
            noted = await self._store.noted_watched(video.request.id)
        except StoreUnavailable:  # nobody can say
            return self._watch_out(video)
        if video.watchers or video.ending:
            return
        video.noted = noted if noted > noted_before else None
        if video.noted is None:
            self._cancel_unwatched(video)
        else:
            video.play()
            self._watch_out(video)

    # How a video ends

    async def _lead(self, video: RunningVideo) -> None:
        """Waits until the video is made, or not, and ends it."""
        with self._tracer.span("video", video.request.traceparent, video_id=video.request.id) as span:
            await asyncio.wait([video.making], timeout=_time_left(video.request))
            if not video.making.done():
                self._cancel(video, _too_late(video.request))
                await asyncio.wait([video.making])
            if self._stopping:
                return  # it stays active in the store, for the next Director to find
            video.ending = True
            if video.changes:
                await asyncio.wait(video.changes)
            try:
                _raise_superseded(video.making)
                await self._end(video, *_outcome(video))
            except Superseded as superseded:
                return self._step_down(superseded)
            span.set_attributes({"status": video.record.status, "chunks": len(video.record.chunks)})
        if video.record.status != "completed" or video.retries:
            self._collect_soon()

    def _collect_soon(self) -> None:
        """What goes wrong leaves exceptions and frames that hold each other, and so references to states: megabytes
        each, in the object store, of which Python's collector knows nothing when it takes its time."""
        if self._collecting is None:
            self._collecting = asyncio.get_running_loop().call_later(COLLECT_AFTER_S, self._collect)

    def _collect(self) -> None:
        self._collecting = None
        gc.collect()

    async def _end(self, video: RunningVideo, status: Status, error: VideoError | None) -> None:
        if turns := self._turns.get(video.request.spec.model):
            turns.forget(video.request.id, video.request.owner)
            self._rooms[video.request.spec.model].entrance.forget(video.request.id, video.request.owner)
        self._admission.leave(video.request.id)
        if video.unwatched is not None:
            video.unwatched.cancel()
        changes: dict[str, Any] = {"status": status, "error": error, "completed_at": time.time(), "paused": False}
        spec, made = video.record.spec, len(video.record.chunks)
        if spec.open_ended and made and error is None:  # it has no length that it could fall short of
            changes |= {"status": "completed", "spec": spec.ended_after(made)}
        ended = video.record.model_copy(update=changes)
        try:
            await self._patient.put_record(ended, self._term)
        except StoreUnavailable as lost:
            # What was committed is safe, the end is not: those who wait are told, and it is stored when that can be.
            event(logger, "end not stored", video.request, logging.ERROR, reason=str(lost))
            failure = VideoError(code=lost.code, message=lost.told)
            ended = video.record.model_copy(update={**changes, "status": "failed", "error": failure})
            self._tell_end(video, ended)
            await self._put_when_back(ended)
        await self._tidy(video.request, ended)
        del self._running[ended.id]  # not before: whoever deletes it waits until nothing more is done to it
        if not video.record.ended:
            self._tell_end(video, ended)

    def _tell_end(self, video: RunningVideo, ended: VideoRecord) -> None:
        video.update(ended)
        self._metrics.ended(ended)
        code = ended.error.code if ended.error else None
        event(logger, "ended", video.request, status=ended.status, code=code, chunks=len(ended.chunks))

    async def _put_when_back(self, ended: VideoRecord) -> None:
        while True:
            await asyncio.sleep(STORE_AGAIN_S)
            with suppress(StoreUnavailable):
                return await self._store.put_record(ended, self._term)

    async def _tidy(self, request: VideoRequestRecord, ended: VideoRecord) -> None:
        """Removes what an ended video leaves behind: what no record names, and its active marker, last."""
        try:
            await self._admission.settle(request, sum(chunk.frames for chunk in ended.own_chunks))
            await self._store.sweep(ended, self._term, self._keep_all_states)
            await self._store.end(ended.id)
        except StoreUnavailable as error:  # it stays active: the next Director tries again
            event(logger, "not tidied up", request, logging.WARNING, reason=str(error))


def _samplers(graph: Graph, model: str) -> int:
    """Those that there are, or the one that will be."""
    return max(1, graph.samplers(model))


async def _whole(work: Awaitable[T]) -> T:
    """`work`, done to its end also if the caller leaves."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a caller who left does not hear of it
    return await asyncio.shield(task)


def _raise_superseded(making: asyncio.Task[None]) -> None:
    """Raises what ended the making of a video, if that was another Director."""
    error = None if making.cancelled() else making.exception()
    for leaf in () if error is None else leaves(error):
        if isinstance(leaf, Superseded):
            raise leaf


def _chunks_left(record: VideoRecord) -> float | None:
    if record.paused:
        return None
    return math.inf if record.spec.open_ended else record.spec.chunks - len(record.chunks)


def _time_left(request: VideoRequestRecord) -> float | None:
    """Seconds until a video's deadline, below 0 if that has passed; None if it has none."""
    return None if request.deadline_s is None else request.created_at + request.deadline_s - time.time()


def _too_late(request: VideoRequestRecord) -> VideoError:
    message = f"the deadline passed: deadline_s is {request.deadline_s:g}, counted from created_at"
    return VideoError(code="deadline_exceeded", message=message)


def _outcome(video: RunningVideo) -> tuple[Status, VideoError | None]:
    """How the making of a video ended."""
    if video.making.cancelled():
        if video.cancelled:
            return ("cancelled", None) if video.failure is None else ("failed", video.failure)
        return "failed", _reported(video.request, asyncio.CancelledError("a call was dropped"))
    error = video.making.exception()
    return ("completed", None) if error is None else ("failed", _reported(video.request, error))


def _interrupted(record: VideoRecord) -> VideoRecord:
    """The record of a video that has not ended and that nobody makes."""
    error = VideoError(code="interrupted", message="the service stopped while this video was being made")
    return record.model_copy(update={"status": "failed", "error": error})


def _reported(video: VideoRequestRecord, error: BaseException) -> VideoError:
    """What the client hears of a failure: an error of ours as it may be told, of anything else no inner detail."""
    for leaf in leaves(error):
        if isinstance(leaf, HeliosError):
            event(logger, "failed", video, logging.WARNING, code=leaf.code, reason=str(leaf))
            return VideoError(code=leaf.code, message=leaf.told)
    # A bug of ours, or a part of the cluster that died.
    event(logger, "internal error", video, logging.ERROR, exc_info=error)
    return VideoError(code="internal_error", message="the service failed while making this video")
