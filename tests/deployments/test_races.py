"""Races of the Director's loop: hundreds of seeded interleavings of all that can happen to a plain Director.

One interleaving is one World: a few videos, made by a Director over a Graph that computes hashes instead of pixels and
over a real Store, while viewers come and go, change prompts, cancel, delete and list, replicas and references are lost,
and puts fail. Some videos that ended are extended, forked or remixed, while they may be deleted.
Every delay is drawn from the seed, in whole seconds of virtual time and in rounds of the event loop, so that many
things happen at the same moment, and the same seed is the same World. At the end it must be as was promised.

`BLOCKS=10` tries ten times two hundred seeds. One seed alone, with its log:
`python -m tests.deployments.test_races SEED`.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
import pytest

from deployments.director import UNWATCHED_S, Director, NoSuchVideo
from deployments.making import (
    RETRY_AFTER_S,
    InputLost,
    Lost,
    NotPossible,
    ReplicaLost,
    RunningVideo,
    TextLost,
)
from deployments.records import (
    Call,
    ChunkRecord,
    Encoded,
    Origin,
    Rendered,
    SampleReport,
    StoredObject,
    Timings,
    VideoRecord,
    VideoRequestRecord,
    VideoStatus,
)
from deployments.store import Store, StoreUnavailable
from deployments.tracing import Tracer
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import MediaError
from helios_core.spec import Limits, PromptChange, VideoSpec
from tests.deployments.virtual_time import VirtualTime, run_in_virtual_time

T = TypeVar("T")

RETRIES = len(RETRY_AFTER_S)  # of a chunk
TRACER = Tracer("director")
TRACEPARENT = f"00-{'1' * 32}-{'2' * 16}-01"
SAMPLERS = 3  # at most
MOST_VIDEOS = 8


# What is computed: a chain of hashes


@dataclass(frozen=True)
class Text:
    """A reference to a prompt's embeddings."""

    data: bytes


@dataclass(frozen=True)
class State:
    """A reference to the state after `index` chunks."""

    index: int
    data: bytes


def text_of(prompt: str) -> bytes:
    return f"text of {prompt}".encode()


def blend_of(texts: Sequence[bytes], weights: Sequence[float]) -> bytes:
    return b" and ".join(b"%.9f of %s" % part for part in zip(weights, texts, strict=True))


def next_state(text: bytes, state: bytes, spec: VideoSpec, index: int) -> bytes:
    seed = dict(spec.reseeds).get(index)
    return hashlib.sha256(f"{seed} {text!r} {state!r}".encode()).hexdigest().encode()


def fragment_of(state: bytes, frames: int) -> bytes:
    return b"%d frames of %s" % (frames, state)


def undisturbed(spec: VideoSpec) -> list[str]:
    """The digests of the fragments that a video has, whatever happens to it or others, and wherever it comes from."""
    state, digests = b"", list[str]()
    for index in range(spec.chunks):
        mix = dict(spec.mix_of_chunk(index))
        state = next_state(blend_of([text_of(prompt) for prompt in mix], list(mix.values())), state, spec, index)
        digests.append(hashlib.sha256(fragment_of(state, spec.frames_of_chunk(index))).hexdigest())
    return digests


# One interleaving


@dataclass(frozen=True)
class Trouble:
    """What shall happen to a video's calls and puts. Probabilities are per point at which it can."""

    replica_lost: float = 0.0
    input_lost: float = 0.0
    fails_at: int = 0  # the point at which an error of ours is raised
    store_fails: float = 0.0


NONE = Trouble()


@dataclass
class View:
    """What a watcher who stayed got: the chunks from `start` on, and the status in the end. None: it was deleted."""

    start: int
    chunks: list[ChunkRecord]
    status: str | None


class Video:
    """One video: its trouble, and what happened to it."""

    def __init__(self, request: VideoRequestRecord, trouble: Trouble, source: Video | None = None) -> None:
        """`source`: the video that it comes from."""
        self.id, self.request, self.trouble, self.source = request.id, request, trouble, source
        self.points = 0  # passed by its calls
        self.under_way: Counter[str] = Counter()  # calls, by part
        self.raised: list[Exception] = []  # by calls whose callers were there to hear
        self.store_failed = False
        self.stored: VideoRecord | None = None  # the record in the store
        self.committed_at: list[float] = []  # by chunk
        self.created_at = math.inf  # when it was asked for
        self.begun_at = math.inf  # when its first call was made
        self.created = False  # its creator has heard of it
        self.cancelled = False  # somebody asked for it while there was something to cancel
        self.deletions = self.deleted = 0  # asked for; done
        self.watchers, self.watched_at = 0, 0.0
        self.watched_throughout = False
        self.views: list[View] = []
        self.texts = 0  # of changes that were asked for
        self.answered: list[PromptChange] = []  # in the order of their answers

    def refused(self) -> bool:
        """Whether its creation may have failed."""
        source_went = self.source is not None and self.source.deletions > 0
        return (self.store_failed or source_went) and not self.created

    def knew(self, prompt: str) -> bool:
        """Whether it was created with this prompt. Another one is a change's, and its loss is the change's alone."""
        spec = self.request.spec
        return prompt == spec.prompt or any(change.prompt == prompt for change in spec.prompts)


class World:
    """`seen` counts the races that it had; `wrong` says which promises were broken."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.people: list[asyncio.Task[None]] = []
        self.over = False  # nobody does anything any more
        self.samplers = self.random.randint(1, SAMPLERS)
        self.keep_all_states = self.random.random() < 0.5
        self.videos = {video.id: video for video in map(self.drawn_video, range(self.random.randint(2, 4)))}
        self.store = RacingStore(self)
        self.director: Director

    def drawn_video(self, k: int) -> Video:
        draw = self.random
        chunks = draw.randint(1, 5)
        spec = VideoSpec(
            prompt=f"video {k}",
            model="random",
            width=64,
            height=64,
            seconds=(chunks * CHUNK_FRAMES - draw.choice((0, 5))) / 24,
            seed=1,
            steps=(1, 1, 1),
            amplify_first_chunk=False,
        )
        for index in range(chunks):
            if draw.random() < 0.2:
                spec = spec.changed(PromptChange(index, f"prompt {index} of video {k}", draw.randint(1, 3)))
        return Video(
            VideoRequestRecord(
                id=f"video_{k:032x}",
                created_at=1.0,
                spec=spec,
                traceparent=TRACEPARENT,
                while_watched=(watched := draw.random() < 0.3),
                lead_seconds=draw.choice((None, 0.0, 2.0)) if watched else None,
            ),
            self.drawn_trouble(chunks),
        )

    def drawn_trouble(self, chunks: int) -> Trouble:
        draw = self.random
        return draw.choice(
            (
                NONE,
                NONE,
                Trouble(replica_lost=draw.choice((0.03, 0.1, 0.3)), input_lost=draw.choice((0, 0.03))),
                Trouble(replica_lost=draw.choice((0, 0.03)), input_lost=draw.choice((0.03, 0.1, 0.3))),
                Trouble(fails_at=draw.randint(1, 8 * chunks), input_lost=draw.choice((0, 0.1))),
                Trouble(store_fails=draw.choice((0.03, 0.1, 0.3))),
            )
        )

    # Chance and time

    def saw(self, race: str) -> None:
        self.seen[race] += 1

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(f"{self.now():g} s: {otherwise}")

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def pause(self, most: int) -> None:
        """Some rounds of the loop, and at most so many seconds."""
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)
        if seconds := self.random.randint(0, most):
            await asyncio.sleep(seconds)

    def later(self, step: Callable[[], Any]) -> None:
        loop, draw = asyncio.get_running_loop(), self.random.random()
        if draw < 0.8:
            loop.call_soon(step)
        else:
            loop.call_later(1, step)

    # What people do

    async def run(self) -> World:
        asyncio.get_running_loop().set_default_executor(self.store._threads)
        self.director = await self.next_director()
        self.director._cancel_unwatched = self.unwatched(self.director._cancel_unwatched)  # type: ignore[assignment,method-assign]
        for second, action in self.actions():
            self.start(self.at(second, action))
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)  # what never ends is found out by the clock
        self.over = True
        for task in self.people:
            if error := task.exception():
                self.check(False, f"a caller got {error!r}")
        await asyncio.sleep(2 * UNWATCHED_S)  # no clock may go off any more
        await self.check_end()
        return self

    def actions(self) -> Iterator[tuple[int, Coroutine[Any, Any, None]]]:
        """Each with the second at which it begins."""
        draw = self.random
        for video in self.videos.values():
            length = 2 + 7 * video.request.spec.chunks
            yield draw.randrange(4), self.create(video)
            if draw.random() < 0.3:
                yield draw.randrange(4, 8), self.watch(video, 0)
            actions: tuple[tuple[Callable[[Video], Coroutine[Any, Any, None]], float], ...] = (
                (self.cancel, 0.25),
                (self.delete, 0.25),
                (self.get, 0.5),
                (self.watch_from_somewhere, 0.6),
                (self.watch_and_leave, 0.7 if video.request.while_watched else 0.2),
                (self.change, 0.4),
                (self.hold_up, 0.2),
            )
            for action, likely in actions:
                while draw.random() < likely:
                    yield draw.randrange(length), action(video)
        for other in (self.page, self.scale, self.metrics):
            while draw.random() < 0.6:
                yield draw.randrange(12), other()

    async def at(self, second: int, action: Coroutine[Any, Any, None]) -> None:
        await asyncio.sleep(second)
        await self.pause(0)
        await action

    def start(self, action: Coroutine[Any, Any, None]) -> None:
        self.people.append(asyncio.create_task(action))

    def perhaps_stopped(self, video: Video, likely: float) -> None:
        """Somebody may act at this very moment."""
        if not self.over and self.random.random() < likely:
            self.start(self.at(0, self.random.choice((self.cancel, self.cancel, self.delete))(video)))

    async def perhaps_leaving(self, call: Coroutine[Any, Any, T]) -> T | None:
        """What the call returns; None to a caller who left."""
        task = asyncio.create_task(call)
        if self.random.random() < 0.2:
            await asyncio.sleep(0)
            await self.pause(4)
            task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    async def create(self, video: Video) -> None:
        video.created_at = self.now()
        try:
            status = await self.perhaps_leaving(self.director.create(video.request))
        except StoreUnavailable:
            self.check(video.store_failed, f"{video.id} was refused")
        except NoSuchVideo:
            self.check(video.source is not None and video.source.deletions > 0, f"{video.id} was refused")
            self.saw("the source was deleted meanwhile")
        else:
            video.created = status is not None

    async def go_on(self, source: Video) -> None:
        """Another video that comes from one that ended, as the ingress asks for it."""
        status = await self.status(source)
        if status is None or status.status != "completed" or self.over or len(self.videos) > MOST_VIDEOS:
            return
        draw, spec, chunks = self.random, status.spec, status.usage.chunks
        how = draw.choice(("extend", "extend", "fork", "remix"))
        prompt = draw.choice((None, f"what comes after {source.id}"))
        at = {"extend": chunks, "remix": 0, "fork": draw.randint(0, chunks)}[how]
        if how == "fork" and not self.state_is_kept(status, at):
            at = 0
        match how:
            case "extend":
                longer = draw.choice((2 * CHUNK_FRAMES, CHUNK_FRAMES, 2)) / 24
                if longer < 1:
                    prompt = None
                spec = spec.extend(longer, chunks, prompt, draw.randint(1, 3), Limits())
            case "fork":
                seconds = draw.choice((spec.seconds, spec.seconds + 1.375)) if at < chunks else spec.seconds + 1.375
                spec = spec.fork(at, prompt, draw.randint(1, 3), draw.choice((None, 7)), seconds, Limits())
            case "remix":
                spec = spec.remix(f"another {source.id}", Limits())
        request = VideoRequestRecord(
            id=f"video_{len(self.videos):032x}",
            created_at=1.0,
            spec=spec,
            origin=Origin(how=how, video_id=source.id, chunks=at),
            traceparent=TRACEPARENT,
        )
        trouble = draw.choice((self.drawn_trouble(spec.chunks), Trouble(store_fails=0.2)))
        video = self.videos[request.id] = Video(request, trouble, source)
        self.saw(how)
        for action, likely, most in ((self.change, 0.8, 4), (self.watch_from_somewhere, 0.5, 8), (self.cancel, 0.1, 8)):
            if draw.random() < likely:
                self.start(self.at(draw.randint(1, most), action(video)))
        if draw.random() < 0.3:
            self.start(self.at(draw.randrange(2), self.delete(source)))
        await self.create(video)

    def state_is_kept(self, status: VideoStatus, chunk: int) -> bool:
        """Whether the video can be forked there."""
        record = self.videos[status.id].stored
        assert record is not None
        if chunk == 0 or chunk == len(record.chunks):
            return True
        return self.keep_all_states and (record.start is None or chunk >= record.start.seen)

    async def change(self, video: Video) -> None:
        created, chunks = video.created, video.request.spec.chunks
        video.texts += 1
        prompt, transition = f"change {video.texts} of {video.id}", self.random.randint(1, 3)

        async def change() -> None:
            self.note("changed", video)
            video.under_way["a change"] += 1
            try:
                made = await self.director.change_prompt(video.id, prompt, transition)
            finally:
                video.under_way["a change"] -= 1
            assert video.stored is not None
            stored = {each.chunk: each for each in video.stored.spec.prompts}
            self.check(made.chunk in stored, f"{video.id}: a change was answered before it was stored")
            self.check(made == PromptChange(made.chunk, prompt, transition), f"{video.id}: {made} was answered")
            video.answered.append(made)
            self.saw("a change was made")

        try:
            await self.perhaps_leaving(change())
        except NoSuchVideo:
            self.check(not created or video.deletions > 0, f"{video.id} is not there")
        except NotPossible:
            self.saw("a change came too late")
            running = self.running(video)
            late = running is None or running.ending or running.cancelled or running.issued >= chunks
            self.check(late, f"{video.id} refused a change")
        except StoreUnavailable:
            self.check(video.store_failed, f"{video.id}: the store failed its change")
        except TextLost:
            self.check(video.trouble.replica_lost + video.trouble.input_lost > 0, f"{video.id} lost a text")
        except MediaError:
            self.check(video.trouble.fails_at > 0, f"{video.id} failed its change")

    async def hold_up(self, video: Video) -> None:
        """Pauses a video, and resumes it after a while, whatever that takes."""
        created = video.created
        for paused in (True, False):
            await self.pause(6)
            while True:
                if paused:
                    self.note("paused", video)
                try:
                    status = await (self.director.pause if paused else self.director.resume)(video.id)
                except StoreUnavailable:
                    self.check(video.store_failed, f"{video.id}: the store failed its pause")
                    continue
                except NotPossible:
                    running = self.running(video)
                    self.check(running is None or running.ending or running.cancelled, f"{video.id} refused a pause")
                    return
                except NoSuchVideo:
                    self.check(not created or video.deletions > 0, f"{video.id} is not there")
                    return
                self.check(status.paused == paused or status.ended, f"{video.id}: the answer is {status.paused}")
                break

    async def watch_from_somewhere(self, video: Video) -> None:
        await self.watch(video, self.random.choice((0, 0, 1, 2, 5)))

    async def watch_and_leave(self, video: Video) -> None:
        task = asyncio.create_task(self.watch(video, 0))
        await self.pause(15)
        task.cancel()
        await asyncio.wait([task])

    async def watch(self, video: Video, start: int) -> None:
        self.note_joining(video)
        joined_at, view, status = self.now(), View(start, [], None), None
        while status is None:
            video.watchers += 1
            asked_at, seen, running = self.now(), start + len(view.chunks), self.running(video)
            try:
                news = await self.director.news(video.id, seen)
            except NoSuchVideo:
                self.check(bool(video.deletions) or not view.chunks, f"{video.id} is not there for its watcher")
                if not view.chunks:
                    return
                break
            finally:
                video.watchers -= 1
                video.watched_at = self.now()
            view.chunks += news.chunks
            if news.chunks:
                assert video.stored is not None
                stored = video.stored.chunks[seen : start + len(view.chunks)]
                self.check(stored == news.chunks, f"{video.id}: a watcher heard of a chunk before it was stored")
                late = self.now() - max(asked_at, video.committed_at[seen])
                self.check(
                    late <= 4 or running is None, f"{video.id}: a watcher heard of a chunk {late} s after it was stored"
                )
                self.check(news.init is not None, f"{video.id} has chunks without init")
            status = news.status if news.ended else None
        view.status = status
        video.views.append(view)
        # Its first question came before the clock could, and there was no gap after it.
        video.watched_throughout |= joined_at - video.created_at < UNWATCHED_S - 1

    def note_joining(self, video: Video) -> None:
        if (running := self.running(video)) is not None:
            missing = video.request.spec.chunks - len(running.record.chunks)
            if missing <= 1:
                self.saw("a watcher joined at the last chunk" if missing else "a watcher joined after the last commit")

    def running(self, video: Video) -> RunningVideo | None:
        return self.director._running.get(video.id)

    async def cancel(self, video: Video) -> None:
        created = video.created

        async def cancel() -> None:
            running = self.running(video)
            self.note("cancelled", video)
            if running is not None and not running.making.done():
                video.cancelled = True
                if running.making.cancelling() and not running.cancelled:
                    self.saw("cancelled while it makes a new start")
            status = await self.director.cancel(video.id)
            self.check(status.ended, f"{video.id} is {status.status} after it was cancelled")

        try:
            await self.perhaps_leaving(cancel())
        except NoSuchVideo:
            self.check(not created or video.deletions > 0, f"{video.id} is not there")

    async def delete(self, video: Video) -> None:
        created = video.created

        async def delete() -> None:
            self.note("deleted", video)
            if video.id in self.director._hidden:
                self.saw("deleted while it is being stored or deleted")
            video.deletions += 1
            await self.director.delete(video.id)
            video.deleted += 1
            with pytest.raises(NoSuchVideo):
                await self.director.get(video.id)

        try:
            await self.perhaps_leaving(delete())
        except NoSuchVideo:
            self.check(not created or video.deletions > 1, f"{video.id} is not there")
        except StoreUnavailable:
            self.check(video.store_failed, f"{video.id}: the store failed its deletion")

    def note(self, what: str, video: Video) -> None:
        """Counts the race of a caller with what is under way."""
        for part in +video.under_way:
            self.saw(f"{what} while {part} is under way")
        if self.director._turns["random"].place(video.id) is not None:
            self.saw(f"{what} while it waits for its turn")

    async def get(self, video: Video) -> None:
        """Where it stands never goes back, once it is there."""
        if not video.created:
            return
        before = await self.status(video)
        for _ in range(4):
            await self.pause(2)
            now = await self.status(video)
            if before is None or now is None:
                self.check(bool(video.deletions), f"{video.id} is gone")
                return
            self.check(now.usage.chunks >= before.usage.chunks, f"{video.id}: its chunks went back")
            self.check(not before.ended or now == before, f"{video.id} changed after its end")
            before = now

    async def status(self, video: Video) -> VideoStatus | None:
        try:
            return await self.director.get(video.id)
        except NoSuchVideo:
            return None

    async def page(self) -> None:
        limit, newest_first = self.random.randint(1, 4), self.random.random() < 0.5
        after = self.random.choice((None, *self.videos))
        page = await self.director.page(limit, after, newest_first)
        ids = [status.id for status in page.videos]
        self.check(ids == sorted(ids, reverse=newest_first) and after not in ids and len(ids) <= limit, f"page {ids}")

    async def scale(self) -> None:
        self.samplers = self.random.randint(1, SAMPLERS)

    async def metrics(self) -> None:
        await self.director.metrics()

    def unwatched(self, cancel: Callable[[RunningVideo], None]) -> Callable[[RunningVideo], None]:
        def checked(video: RunningVideo) -> None:
            self.check(not video.record.ended, f"{video.request.id}: its clock went off after its end")
            cancel(video)

        return checked

    # What must be so in the end

    def was_put(self, key: str, data: bytes) -> None:
        """What is stored never goes back: behind no commit and no end."""
        if "/record." not in key:
            return
        record = VideoRecord.model_validate_json(data)
        video = self.videos[record.id]
        if (before := video.stored) is not None and not video.store_failed:
            self.check(not before.ended, f"{video.id} was written after its end")
            self.check(record.chunks[: len(before.chunks)] == before.chunks, f"{video.id}: the stored record went back")
            missing = {each.chunk for each in before.spec.prompts} - {each.chunk for each in record.spec.prompts}
            self.check(not missing, f"{video.id}: changes at {missing} are no longer stored")
        video.stored = record
        video.committed_at += [self.now()] * (len(record.chunks) - len(video.committed_at))
        if len(record.chunks) == record.spec.chunks and not self.over and self.random.random() < 0.3:
            self.start(self.at(0, self.watch_from_somewhere(video)))
        if record.status == "completed" and not self.over and self.random.random() < 0.5:
            self.start(self.at(self.random.randrange(2, 12), self.go_on(video)))

    async def next_director(self) -> Director:
        return await Director.start(RacingGraph(self), self.store, TRACER, keep_all_states=self.keep_all_states)

    async def check_end(self) -> None:
        director, loop = self.director, asyncio.get_running_loop()
        assert isinstance(loop, VirtualTime)
        gc.collect()  # an error that nobody heard of is told when its task is forgotten
        self.check(loop.timers() == [], f"timers are left: {loop.timers()}")
        turns = director._turns["random"]
        left = (turns.sampling, turns._queue._waiting, turns._queue._turns, turns._queue._taken, turns._look_again)
        self.check(left == (0, {}, {}, {}, None), f"turns are left: {left}")
        self.check(director._metrics._clocks == {}, "the metrics keep a video")
        self.check(director._hidden == set(), "a deletion is under way for ever")
        self.check(director._running == {}, f"{list(director._running)} run for ever")
        active = await self.store.active()
        self.check(all(self.videos[video_id].store_failed for video_id in active), f"active: {active}")
        for video in self.videos.values():
            await self.check_video(video)
            if not video.store_failed:
                await self.check_files(video)
            video.trouble = NONE
        # It mends what a store that was away has left.
        mending = await self.next_director()
        await asyncio.gather(*mending._resuming.values())
        await asyncio.gather(*(running.leading for running in mending._running.values()))
        self.check(await self.store.active() == [], "the next Director left a video active")
        for video in self.videos.values():
            await self.check_files(video)

    async def check_video(self, video: Video) -> None:
        spec = video.request.spec
        losses = sum(isinstance(error, Lost) for error in video.raised)
        self.check(losses <= (RETRIES + 1) * spec.chunks, f"{video.id}: {losses} losses")
        try:
            record = await self.director._record(video.id)
        except NoSuchVideo:
            self.check(bool(video.deletions) or video.refused(), f"{video.id} is not there")
            if video.stored is not None:
                self.check_views(video, video.stored, strict=False)
            return
        self.check(not video.deleted, f"{video.id} was deleted")
        self.check_views(video, record, strict=not video.deletions)
        self.check(video.store_failed or record == video.stored, f"{video.id} is not as it is stored")
        digests = [chunk.fragment.sha256 for chunk in record.chunks]
        self.check(digests == undisturbed(record.spec)[: len(digests)], f"{video.id} has other bytes")
        self.check_changes(video, record)
        allowed = self.allowed_ends(video, losses)
        end = record.status if record.error is None else record.error.code
        self.check(end in allowed, f"{video.id} is {end}, not {' or '.join(allowed)}: {record.error}")
        self.check(end != "completed" or len(digests) == spec.chunks, f"{video.id} has {len(digests)} chunks")
        self.saw(f"ended: {end}")
        if end == "cancelled" and not video.cancelled and not video.deletions:
            self.saw("ended unwatched")

    def check_changes(self, video: Video, record: VideoRecord) -> None:
        """A change that was answered is in the record, unless another at its chunk came after."""
        made = {change.chunk: change for change in record.spec.prompts}
        last = {change.chunk: change for change in video.answered}
        for chunk, change in last.items():
            unanswered = made.get(chunk) not in video.answered and f"of {video.id}" in made[chunk].prompt
            self.check(made.get(chunk) == change or unanswered, f"{video.id}: {change} was answered, and is not there")
        asked = {change.chunk: change for change in video.request.spec.prompts}
        self.check(all(chunk in made for chunk in asked), f"{video.id} has lost a prompt that it was created with")
        copied = 0 if record.start is None else record.start.seen
        changeable = range(copied, record.spec.chunks)
        self.check(all(change.chunk in changeable for change in video.answered), f"{video.id}: its past was changed")

    def allowed_ends(self, video: Video, losses: int) -> list[str]:
        """How a video may have ended after what happened to it."""
        failed = any(isinstance(error, MediaError) for error in video.raised)
        unwatched = video.request.while_watched and not video.watched_throughout
        allowed = []
        if not failed and not video.cancelled:
            allowed.append("completed")
        if not failed and (video.cancelled or video.deletions or unwatched):
            allowed.append("cancelled")
        if failed:
            allowed.append(MediaError.code)
        if losses > RETRIES:
            allowed.append("chunk_lost")
        if video.store_failed:
            allowed.append("store_unavailable")
        if video.refused() and video.source is not None:  # and the store did not let it be removed
            allowed.append("interrupted")
        return allowed

    def check_views(self, video: Video, record: VideoRecord, strict: bool) -> None:
        """Each watcher got every chunk once, in order, and the end."""
        for view in video.views:
            expected = list(record.chunks[view.start :])
            if view.status is None or not strict:
                self.check(view.chunks == expected[: len(view.chunks)], f"{video.id}: a watcher saw other chunks")
            else:
                self.check(view.chunks == expected, f"{video.id}: a watcher saw {len(view.chunks)} chunks")
                self.check(view.status == record.status, f"{video.id}: a watcher saw it {view.status}")

    async def check_files(self, video: Video) -> None:
        """The store has what the record names, and nothing besides."""
        folder = self.folder / "videos" / video.id
        files = {str(path.relative_to(self.folder)) for path in folder.rglob("*") if path.is_file()}
        if video.deleted or not files:
            self.check(files == set() and not folder.exists(), f"{video.id} was deleted, and has left {files}")
            self.check(bool(video.deletions) or video.refused(), f"{video.id} has no files")
            return
        record = await self.store.record(video.id)
        self.check(await self.store.request(video.id) is not None, f"{video.id} has no request, but {files}")
        if record is None:
            self.check(video.refused(), f"{video.id} has no record")
            return
        # Copied are the states that were kept: as a rule the one that it went on from alone.
        seen = 0 if record.start is None else record.start.seen
        kept = record.chunks if self.keep_all_states else record.chunks[-1:]
        states = [chunk.state for chunk in kept if self.keep_all_states or chunk.index + 1 >= seen]
        named = [chunk.fragment for chunk in record.chunks] + states
        large = {name for name in files if "/chunks/" in name or "/states/" in name}
        self.check(record.ended and large == {item.key for item in named}, f"{video.id} {record.status} has {large}")
        for item in [*named, *([record.init] if record.init else [])]:
            data = (self.folder / item.key).read_bytes()
            self.check(hashlib.sha256(data).hexdigest() == item.sha256, f"{item.key} has other bytes")


class Threads(ThreadPoolExecutor):
    """A Store's threads, without threads: an operation waits, begins, happens and is reported at drawn moments."""

    def __init__(self, world: World) -> None:
        super().__init__(1)
        self.world = world

    def submit(self, operation: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        call: Future[Any] = Future()
        later = self.world.later

        def begin() -> None:
            if call.set_running_or_notify_cancel():
                later(happen)

        def happen() -> None:
            try:
                result = operation(*args, **options)
            except Exception as error:  # noqa: BLE001
                later(partial(call.set_exception, error))
                return
            if operation is obstore.put:
                self.world.was_put(args[1], args[2])
            later(partial(call.set_result, result))

        later(begin)
        return call


class RacingStore(Store):
    """A Store whose puts and deletions fail as the video's trouble says, before they have happened or after."""

    def __init__(self, world: World) -> None:
        super().__init__(str(world.folder))
        self.world = world
        self._threads = Threads(world)

    async def _put(self, key: str, data: bytes, mode: str = "overwrite") -> StoredObject:
        with self._failing("commit" if "/record." in key else "put", key):
            return await super()._put(key, data, mode)

    async def put_record(self, record: VideoRecord, term: int) -> None:
        video, part = self.world.videos[record.id], "the end" if record.ended else "a commit"
        self.world.perhaps_stopped(video, 0.1)
        if record.status == "completed" and video.request.while_watched:
            alone = 0.0 if video.watchers else self.world.now() - max(video.watched_at, video.begun_at)
            self.world.check(alone <= UNWATCHED_S, f"{video.id} was made for nobody for {alone:g} s")
        video.under_way[part] += 1
        try:
            await super().put_record(record, term)
        finally:
            video.under_way[part] -= 1

    async def sweep(self, record: VideoRecord, term: int, all_states: bool = False) -> None:
        video = self.world.videos[record.id]
        self.world.perhaps_stopped(video, 0.5 if video.trouble.store_fails else 0.1)
        await super().sweep(record, term, all_states)

    async def _delete(self, keys: list[str]) -> None:
        with self._failing("deletion", *keys[:1]):
            await super()._delete(keys)

    async def copy(self, item: StoredObject, video_id: str, term: int) -> StoredObject:
        await self.world.pause(1)
        with self._failing("copy", video_id):
            return await super().copy(item, video_id, term)

    @contextmanager
    def _failing(self, what: str, key: str = "") -> Iterator[None]:
        draw = self.world.random.random
        video = next((video for video_id, video in self.world.videos.items() if video_id in key), None)
        before, after = (draw() < video.trouble.store_fails / 2 for _ in range(2)) if video else (False, False)
        if video is not None and (before or after):
            video.store_failed = True
            self.world.saw(f"the store failed a {what}")
        if before:
            raise StoreUnavailable("away")
        yield
        if after:
            raise StoreUnavailable("away, but the operation had happened")


class RacingGraph:
    """A Graph that keeps its contract, and is as bad as that allows."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def models(self) -> list[str]:
        return ["random"]

    def fingerprint(self, model: str) -> str:
        return "of the only one"

    def samplers(self, model: str) -> int:
        return self.world.samplers

    def replicas(self, part: str) -> int:
        return 1

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Text, Encoded]:
        async def work() -> tuple[Text, Encoded]:
            await self._point(call)
            data = text_of(prompt)
            stored = await self.world.store.put_text(call.video_id, hashlib.sha256(data).hexdigest(), data)
            await self._point(call)
            return Text(data), Encoded(stored=stored, seconds=0.0)

        known = self.world.videos[call.video_id].knew(prompt)
        return await self._call("encode" if known else "the text of a change", call, work())

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> tuple[State, float]:
        raise NotImplementedError("no video here begins with an upload")

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Any, *texts: Any
    ) -> tuple[State, SampleReport]:
        async def work() -> tuple[State, SampleReport]:
            running = self.world.running(self.world.videos[call.video_id])
            self.world.check(
                running is None or not running.record.paused, f"{call.video_id} goes on while it is paused"
            )
            await self._point(call)
            if isinstance(state, StoredObject):
                self.world.saw("a chunk is made from a stored state")
            text = blend_of([await self._value(text) for text in texts], weights)
            data = next_state(text, b"" if state is None else await self._value(state), spec, index)
            await self.world.pause(4)
            await self._point(call)
            return State(index + 1, data), SampleReport(steps=3, started_at=self.world.now(), seconds=1.0)

        return await self._call("sample", call, work())

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Any, sampled: SampleReport) -> Rendered:
        async def work() -> Rendered:
            store, data = self.world.store, await self._value(state)
            if isinstance(state, StoredObject):
                self.world.saw("a fragment is made from a stored state")
                seen = int(Path(state.key).name.partition(".")[0])
            else:
                seen = state.index
            index, frames = seen - 1, spec.frames_of_chunk(seen - 1)
            await self._point(call)
            await self.world.pause(3)
            init = await store.put_init(call.video_id, b"init")
            await self._point(call)
            fragment = await store.put_fragment(call.video_id, index, term, fragment_of(data, frames))
            await self._point(call)
            stored = await store.put_state(call.video_id, seen, term, data)
            await self._point(call)
            timings = Timings(
                sample_started_at=sampled.started_at,
                sample_seconds=sampled.seconds,
                decode_seconds=self.world.now(),  # two renderings of a chunk are not the same
                encode_seconds=0,
                store_seconds=0,
            )
            chunk = ChunkRecord(index=index, frames=frames, steps=3, fragment=fragment, state=stored, timings=timings)
            return Rendered(init=init, chunk=chunk)

        return await self._call("render", call, work())

    async def _value(self, reference: Any) -> bytes:
        """What a reference leads to, in memory or in the store."""
        if isinstance(reference, StoredObject):
            data = await self.world.store.read(reference.key)
            self.world.check(hashlib.sha256(data).hexdigest() == reference.sha256, f"{reference.key} has other bytes")
            return data
        return bytes(reference.data)

    async def _point(self, call: Call) -> None:
        """A point inside a call, where time passes and something may be lost."""
        await self.world.pause(1)
        video, draw = self.world.videos[call.video_id], self.world.random.random
        video.points += 1
        if video.points == video.trouble.fails_at:
            raise MediaError("no frames")
        if draw() < video.trouble.replica_lost:
            raise ReplicaLost("killed")
        if draw() < video.trouble.input_lost:
            raise InputLost("gone")

    async def _call(self, part: str, call: Call, work: Coroutine[Any, Any, T]) -> T:
        """A caller who is cancelled is released when the work has ended: of itself or because it was cancelled too."""
        world, video = self.world, self.world.videos[call.video_id]
        video.under_way[part] += 1
        video.begun_at = min(video.begun_at, world.now())
        sampling = sum(video.under_way["sample"] for video in world.videos.values())
        world.check(sampling <= SAMPLERS, f"{sampling} sample calls at once")
        alone = video.under_way[part] == 1 or part == "the text of a change"
        world.check(alone, f"{video.id}: two {part} calls at once")
        world.check(call.attempt <= RETRIES, f"{video.id}: attempt {call.attempt} of {part}")
        task = asyncio.create_task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if world.random.random() < 0.5:
                task.cancel()
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    continue  # being cancelled twice changes nothing
            _ = task.cancelled() or task.exception()  # nobody is left to hear of it
            raise
        except Exception as error:
            world.saw(f"{type(error).__name__} in {part}")
            if part != "the text of a change":
                video.raised.append(error)
            world.perhaps_stopped(video, 0.6 if isinstance(error, InputLost) else 0.05)
            raise
        finally:
            video.under_way[part] -= 1


PARTS = ("encode", "sample", "render", "a commit", "the end", "a change")

# What happens at least so many times in each block of seeds. A race that no longer happens is no longer tested.
RACES = {
    **{f"{what} while {part} is under way": 5 for what in ("cancelled", "deleted") for part in PARTS},
    "cancelled while it waits for its turn": 3,
    "cancelled while it makes a new start": 1,
    "deleted while it is being stored or deleted": 5,
    "a watcher joined at the last chunk": 50,
    "a watcher joined after the last commit": 10,
    "ended unwatched": 5,
    "the store failed a commit": 3,
    "the store failed a deletion": 3,
    "a chunk is made from a stored state": 2,
    "a fragment is made from a stored state": 2,
    "the store failed a copy": 3,
    "the source was deleted meanwhile": 1,
    **{how: 3 for how in ("extend", "fork", "remix")},
    **{f"changed while {part} is under way": 2 for part in PARTS},
    "changed while it waits for its turn": 5,
    **{f"paused while {part} is under way": 2 for part in PARTS},
    "paused while it waits for its turn": 3,
    "a change was made": 50,
    "a change came too late": 5,
    **{f"{loss} in {part}": 10 for loss in ("ReplicaLost", "InputLost") for part in ("encode", "sample", "render")},
    **{f"MediaError in {part}": 2 for part in ("encode", "sample", "render")},
    **{f"ended: {end}": 3 for end in ("completed", "cancelled", "media_error", "chunk_lost", "store_unavailable")},
}
BLOCK = 200
BLOCKS = int(os.environ.get("BLOCKS", "1"))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_races(block: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "deployments")
    seen: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # each World collects its own garbage only
    try:
        for seed in range(BLOCK * block, BLOCK * (block + 1)):
            seen += interleaving(seed).seen
    finally:
        gc.unfreeze()
    assert {race: seen[race] for race, least in RACES.items() if seen[race] < least} == {}


def interleaving(seed: int) -> World:
    """The World of one seed, which has kept every promise."""
    memory = Path("/dev/shm")  # where there is one
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        try:
            world = run_in_virtual_time(World(seed, Path(folder)).run())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert world.wrong == [], f"seed {seed}: {world.wrong}"
    return world


class BothAtOnce(RacingGraph):
    """The sampling of chunk 1 fails at the very moment at which the rendering of chunk 0 loses its input."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.moment = asyncio.Event()

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Any, *texts: Any
    ) -> Any:
        if index == 1:
            asyncio.get_running_loop().call_later(1, self.moment.set)
            await asyncio.sleep(0)  # the rendering waits first, and so hears first: it cannot be cancelled any more
            await self.moment.wait()
            raise MediaError("no frames")
        return await super().sample(call, spec, index, weights, state, *texts)

    async def render(self, call: Call, spec: VideoSpec, term: int, state: State, sampled: SampleReport) -> Rendered:
        await self.moment.wait()
        raise InputLost("gone")


def test_an_error_of_ours_is_told_though_an_input_was_lost_at_the_same_moment(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(1, tmp_path)
        world.director = director = await Director.start(BothAtOnce(world), world.store, TRACER)
        video = next(video for video in world.videos.values() if video.request.spec.chunks > 1)
        video.trouble = NONE
        await director.create(video.request)
        await asyncio.wait([director._running[video.id].leading])
        error = (await director.get(video.id)).error
        assert error is not None and (error.code, error.message) == (MediaError.code, "no frames")

    run_in_virtual_time(test())


class SlowToTidy(RacingStore):
    """Tidying takes until the deletion would long be over. `log` has what ended, in order."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.tidying, self.log = asyncio.Event(), list[str]()

    async def sweep(self, record: VideoRecord, term: int, all_states: bool = False) -> None:
        self.tidying.set()
        await asyncio.sleep(100)
        await super().sweep(record, term, all_states)

    async def end(self, video_id: str) -> None:
        await super().end(video_id)
        self.log.append("the active marker is removed")

    async def delete(self, video_id: str) -> None:
        self.log.append("a deletion sets it")
        await super().delete(video_id)


def test_a_deletion_begins_when_nothing_else_is_done_to_the_video(tmp_path: Path) -> None:
    """Else its active marker, by which an interrupted deletion is found again, could be removed under its hands."""

    async def test() -> None:
        world = World(0, tmp_path)
        store = world.store = SlowToTidy(world)
        asyncio.get_running_loop().set_default_executor(store._threads)
        director = await Director.start(RacingGraph(world), store, TRACER)
        video = next(iter(world.videos.values()))
        video.trouble, world.over = NONE, True
        await director.create(video.request)
        await store.tidying.wait()
        await director.delete(video.id)
        assert store.log == ["the active marker is removed", "a deletion sets it", "the active marker is removed"]

    run_in_virtual_time(test())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s %(video_id)s")
    interleaving(int(sys.argv[1]))
