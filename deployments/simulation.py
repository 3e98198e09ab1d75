"""What a service would do with given requests: `simulate` runs them event by event in SimPy's time.

Nothing is decided here. Who comes in, whose turn it is, when a chunk is wanted and how many samplers there are to be is
asked of the very code that the Director runs: scheduling.py, playback.py, autoscaling.py. What is simulated is what
takes time, of which `Times` says how long.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import simpy

from deployments import autoscaling, scheduling
from deployments.chunk_times import Times
from deployments.playback import Playback
from deployments.scheduling import Priority
from helios_core.config import CHUNK_FRAMES

HOUR_S = 3600.0

Status = Literal["completed", "refused", "left", "unfinished"]


@dataclass(frozen=True)
class Asked:
    """One request for a video. `at`, in seconds from the beginning; `seconds`: its length; `leaves_s`: so long after
    asking its viewer leaves, which ends it; `lead_s`: how far ahead of its viewer it may be made."""

    at: float
    seconds: float
    owner: str = ""
    priority: Priority = "realtime"
    image: bool = False
    fps: float = 24.0
    lead_s: float | None = None
    leaves_s: float | None = None

    @property
    def chunks(self) -> int:
        return max(1, math.ceil(round(self.seconds * self.fps) / CHUNK_FRAMES))


@dataclass(frozen=True)
class Fleet:
    """How many of each there are. Samplers: at least `samplers`, and up to `most`, as the policy wants them; one that
    is wanted is there `start_s` later. The delays are Pool's."""

    samplers: int
    vae_decoders: int = 1
    text_encoders: int = 1
    most: int = 0  # 0: as many samplers as the least
    start_s: float = 0.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0


@dataclass(frozen=True)
class Seen:
    """What a client saw of one video; all from when it was asked for, in seconds. `first_fragment_s`, `ended_s`: None
    if it did not come to that."""

    asked: Asked
    status: Status
    first_fragment_s: float | None = None
    stalls: int = 0
    stall_s: float = 0.0
    ended_s: float | None = None


@dataclass
class Hour:
    """Seconds of work of each part, of samplers that are there or wanted, and of video made, in one hour."""

    sampling_s: float = 0.0
    samplers_s: float = 0.0
    rendering_s: float = 0.0
    encoding_s: float = 0.0
    shown_s: float = 0.0


@dataclass
class Outcome:
    """`seen`: every video, in the order of their ends; `hours`: by their number, those in which something happened;
    `until`: when the last video ended."""

    seen: list[Seen] = field(default_factory=list)
    hours: dict[int, Hour] = field(default_factory=lambda: defaultdict(Hour))
    until: float = 0.0


def simulate(
    asked: Iterable[Asked],
    times: Times,
    fleet: Fleet,
    videos_per_sampler: int = 32,
    queued: int = 256,
    until: float | None = None,
) -> Outcome:
    """Runs until every video has ended, or for so many seconds: what has not ended then is unfinished. `asked`: by
    time; `videos_per_sampler`, `queued`: as AdmissionSettings has them. What comes out depends on nothing else."""
    service = _Service(times, fleet, videos_per_sampler, queued)
    service.run(iter(asked), until)
    return service.outcome


class _Pool:
    """Replicas that take the calls of all videos in turn, each one at a time."""

    def __init__(self, replicas: int) -> None:
        self._free_at = [0.0] * replicas

    def call(self, seconds: float, now: float) -> float:
        """A call that is made now and takes so long: when it is over."""
        over = max(now, self._free_at[0]) + seconds
        heapq.heapreplace(self._free_at, over)
        return over


class _Service:
    """Director, replicas and clients."""

    def __init__(self, times: Times, fleet: Fleet, videos_per_sampler: int, queued: int) -> None:
        self.times, self._fleet = times, fleet
        self._videos_per_sampler, self._queued = videos_per_sampler, queued
        self._env = simpy.Environment()
        self.turns, self.entrance = scheduling.Queue(), scheduling.Queue()
        self.text_encoders, self.vae_decoders = _Pool(fleet.text_encoders), _Pool(fleet.vae_decoders)
        self._samplers = self._wanted = fleet.samplers
        self.videos: dict[str, _Video] = {}  # that were taken in and have not ended
        self.outcome = Outcome()
        self._coming, self._open = True, 0  # _open: requests that came and have not ended
        self._outside: deque[_Video] = deque()  # batch that found no room
        self._ids = itertools.count()
        self._hour, self._hour_ends = Hour(), 0.0

    @property
    def now(self) -> float:
        now: float = self._env.now
        return now

    @property
    def hour(self) -> Hour:
        if self._env.now >= self._hour_ends:
            number = int(self._env.now // HOUR_S)
            self._hour, self._hour_ends = self.outcome.hours[number], (number + 1) * HOUR_S
        return self._hour

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.after(when - self.now, what)

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Does something later, or now if that is no time at all."""
        if seconds <= 0:
            what(*args)
        else:
            self._env.timeout(seconds).callbacks.append(lambda _: what(*args))

    def run(self, asked: Iterator[Asked], until: float | None) -> None:
        self._next(asked)
        scales = self._fleet.most > self._fleet.samplers
        if scales:
            self._env.process(self._scale())
        self._env.run(until)
        for video in list(self.videos.values()):
            video.end("unfinished")
        if not scales:
            for hour in range(math.ceil(self.outcome.until / HOUR_S)):
                length = min(HOUR_S, self.outcome.until - hour * HOUR_S)
                self.outcome.hours[hour].samplers_s = length * self._fleet.samplers

    def _next(self, asked: Iterator[Asked]) -> None:
        """The next request comes at its time."""
        request = next(asked, None)
        if request is None:
            self._coming = False
            return
        video = _Video(self, f"{next(self._ids)}", request)

        def come() -> None:
            self._open += 1
            self.after(self.times.accept_s, self.enter, video)
            self._next(asked)

        self.after(request.at - self.now, come)

    def _scale(self) -> Iterator[simpy.Event]:
        """Once a second: how many samplers the policy wants, and what Serve makes of it."""
        fleet = self._fleet
        recent: deque[int] = deque(maxlen=round(autoscaling.RECENT_S))
        since, direction = 0.0, 0
        while self._coming or self._open:
            recent.append(self.turns.under_way + len(self.turns) + len(self.entrance))
            wanted = min(max(autoscaling.samplers(sum(recent) / len(recent)), fleet.samplers), fleet.most)
            heading = (wanted > self._wanted) - (wanted < self._wanted)
            if heading != direction:
                since, direction = self.now, heading
            delay = fleet.upscale_delay_s if heading > 0 else fleet.downscale_delay_s
            if heading and self.now - since >= delay:
                more, self._wanted, direction = wanted - self._wanted, wanted, 0
                for _ in range(more):
                    self.after(fleet.start_s, self._started)
                self._samplers = min(self._samplers, wanted)
            self.hour.samplers_s += self._wanted
            yield self._env.timeout(1.0)

    def _started(self) -> None:
        if self._samplers < self._wanted:
            self._samplers += 1
            self._let_in()
            self.grant_room()
            self.grant()

    def places(self) -> int:
        return max(1, self._samplers) * self._videos_per_sampler

    def enter(self, video: _Video) -> None:
        """A request is accepted, or refused."""
        request = video.asked
        if not scheduling.has_room(len(self.videos), self.places(), self._queued):
            if request.priority == "batch":
                self._outside.append(video)  # its client comes again until there is room
            else:
                self.ended(Seen(request, "refused"))
            return
        self.videos[video.id] = video
        self.entrance.ask(video.id, request.owner, request.priority, video.playback.deadline(0.0))
        if request.leaves_s is not None:
            self.after(request.at + request.leaves_s - self.now, video.leave)
        self.grant_room()

    def ended(self, seen: Seen) -> None:
        self._open -= 1
        self.outcome.seen.append(seen)
        self.outcome.until = max(self.outcome.until, self.now)
        if seen.status != "refused":
            self._let_in()

    def _let_in(self) -> None:
        """Those who came before there was room for them."""
        while self._outside and scheduling.has_room(len(self.videos), self.places(), self._queued):
            self.enter(self._outside.popleft())

    def grant_room(self) -> None:
        for video_id in self.entrance.grant(self.places(), self.now):
            self.videos[video_id].begin()

    def grant(self) -> None:
        for video_id in self.turns.grant(self._samplers, self.now):
            self.videos[video_id].sample()


class _Video:
    """One video, from its request to its end: the loop of making.py, as far as it takes time."""

    def __init__(self, service: _Service, video_id: str, asked: Asked) -> None:
        self.id, self.asked, self._service = video_id, asked, service
        self.playback = Playback(asked.lead_s, 0.0, asked.at + service.times.accept_s)
        self.playback.watched(asked.at + service.times.accept_s)
        self._chunk_s = CHUNK_FRAMES / asked.fps  # of playback
        self._chunks = asked.chunks
        self._inside = self._sampling = self._held = self._over = (
            False  # _held: sampled, and the chunk before is not there
        )
        self._sampled = self._committed = 0
        self._first: float | None = None
        self._shown_until = 0.0
        self._stalls, self._stall_s = 0, 0.0

    def begin(self) -> None:
        """It is one of those that take turns."""
        times, service = self._service.times, self._service
        self._inside = True
        service.hour.encoding_s += times.text_s
        service.at(service.text_encoders.call(times.text_s, service.now), self._encoded)

    def _encoded(self) -> None:
        service, media_s = self._service, self._service.times.media_s
        if self.asked.image and not self._over:
            service.hour.rendering_s += media_s
            service.at(service.vae_decoders.call(media_s, service.now), self._want)
        else:
            self._want()

    def _want(self) -> None:
        """Its next chunk is wanted, as soon as its viewer is not too far behind."""
        if self._over or self._sampled == self._chunks:
            return
        service = self._service
        begun_s = (self._sampled - self._committed) * self._chunk_s
        wait = self.playback.wait(begun_s, service.now)
        if wait > 0:
            service.after(wait, self._want)
            return
        request = self.asked
        service.turns.ask(self.id, request.owner, request.priority, self.playback.deadline(begun_s))
        service.grant()

    def sample(self) -> None:
        """Its turn has come."""
        times, service = self._service.times, self._service
        seconds = times.turn_s if self._sampled else times.first_turn_s
        service.hour.sampling_s += seconds
        self._sampling = True
        service.after(seconds, self._has_sampled)

    def _has_sampled(self) -> None:
        if self._over:
            return
        self._sampling = False
        self._sampled += 1
        self._service.turns.end()
        if self._committed == self._sampled - 1:
            self._render()
        else:
            self._held = True  # no more than one chunk waits for the VAE decoder
        self._service.grant()

    def _render(self) -> None:
        times, service = self._service.times, self._service
        service.hour.rendering_s += times.render_s
        service.at(service.vae_decoders.call(times.render_s, service.now) + times.store_s, self._commit)
        self._want()

    def _commit(self) -> None:
        if self._over:
            return
        service, now = self._service, self._service.now
        self._committed += 1
        last = self._committed == self._chunks
        shown_s = self.asked.seconds - (self._chunks - 1) * self._chunk_s if last else self._chunk_s
        service.hour.shown_s += shown_s
        self.playback.committed(shown_s, now)
        arrived = now + service.times.deliver_s
        if self._first is None:
            self._first = arrived
        else:
            self._stalled_until(arrived)
        self._shown_until = max(arrived, self._shown_until) + shown_s
        if last:
            self.end("completed")
        elif self._held:
            self._held = False
            self._render()

    def _stalled_until(self, now: float) -> None:
        """Its viewer waited from when all was played that was there, if that was before."""
        if now > self._shown_until + 1e-9:
            self._stalls += 1
            self._stall_s += now - self._shown_until

    def leave(self) -> None:
        """Its viewer leaves the stream that made it, which ends it: a sampler that is at it is free after its step."""
        if self._over:
            return
        if not self._inside:
            self._service.entrance.leave(self.id)
        elif self._sampling:
            self._service.turns.end()
        elif self._sampled < self._chunks and not self._held and self._service.turns.waits(self.id):
            self._service.turns.leave(self.id)
        self.end("left")

    def end(self, status: Status) -> None:
        service, request = self._service, self.asked
        self._over = True
        del service.videos[self.id]
        service.turns.forget(self.id, request.owner)
        if self._inside:
            service.entrance.end()
        service.entrance.forget(self.id, request.owner)
        if self._first is not None and self._committed < self._chunks:
            self._stalled_until(service.now)
        first = None if self._first is None else self._first - request.at
        ended = None if status == "unfinished" else service.now + service.times.deliver_s - request.at
        service.ended(Seen(request, status, first, self._stalls, self._stall_s, ended))
        if status != "unfinished":
            service.grant_room()
            service.grant()
