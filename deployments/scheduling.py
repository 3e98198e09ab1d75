"""Whose turn it is: which of the videos that want a chunk now get a sampler. Pure functions over plain values, and a
`Queue` that remembers what they need. Nothing here knows a clock or an event loop: so `helios plan` simulates these
very rules.

Between owners first: the one whose last turn is the longest ago goes first, so that two who both wait take turns one by
one, however many videos either has. A newcomer goes last: it is owed nothing, and a stream of newcomers passes nobody.

Then between the videos of an owner. The realtime ones go by the earliest deadline, at which a viewer runs out; who is
late already is as late as any other, and among equals goes who has taken the fewest turns, then who asked first. The
batch ones go by turns alone. A video that is new, or could not ask for a while, starts at the round that its owner's
others are in, less one turn of credit: it is not owed the turns that it did not ask for.

Batch yields to realtime, but for one turn in BATCH_EVERY, so that it never starves: inside an owner, and between
owners, where one who has only batch videos waiting yields to the others.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

Priority = Literal["realtime", "batch"]
BATCH_EVERY = 10

T = TypeVar("T")


class Waiting(NamedTuple):
    """A video that wants a chunk now. `deadline`: when its viewer runs out, in seconds by the event loop's clock;
    `turns`: how many it has taken; `asked`: its place in the order of all askings and turns."""

    video_id: str
    owner: str
    priority: Priority
    deadline: float
    turns: int
    asked: int


class Taken(NamedTuple):
    """What an owner has taken. `last`: the place of its last turn in the order of all askings and turns, or of its
    asking if it is a newcomer; `since_batch`: its turns since the last one of a batch video; `round_`: the round that
    its videos are in, which never falls, and goes on with the turn of whichever has taken the most, or of a new one."""

    last: int
    since_batch: int = 0
    round_: int = 0

    def with_turn(self, video: Waiting, new: bool, last: int) -> Taken:
        """`new`: it is the video's first turn, which opens the next round: else a stream of new videos would keep those
        waiting who had their first turn."""
        return Taken(last, turns_since_batch(self.since_batch, [video]), max(self.round_, video.turns + new))


def in_order(waiting: Iterable[Waiting], taken: Mapping[str, Taken], since_batch: int, now: float) -> Iterator[Waiting]:
    """The order in which they get a sampler, if nobody else asks. `taken`: by each owner; `since_batch`: turns since
    the last one of an owner with batch videos alone; `now`: by the clock of the deadlines. The first of many costs
    little, as only its owner's videos are sorted."""
    of_owner: dict[str, list[Waiting]] = {}
    for video in waiting:
        of_owner.setdefault(video.owner, []).append(video)
    realtime_left = {owner: sum(video.priority == "realtime" for video in videos) for owner, videos in of_owner.items()}
    owners = sorted(of_owner, key=lambda owner: taken[owner].last)
    realtime = deque(owner for owner in owners if realtime_left[owner])
    batch = deque(owner for owner in owners if not realtime_left[owner])
    own: dict[str, deque[Waiting]] = {}
    for owner in _sharing(realtime, batch, since_batch):
        if owner not in own:
            own[owner] = deque(_own_order(of_owner[owner], taken[owner].since_batch, now))
        video = own[owner].popleft()
        yield video
        realtime_left[owner] -= video.priority == "realtime"
        if own[owner]:  # its last turn is now the latest of all
            (realtime if realtime_left[owner] else batch).append(owner)


def _own_order(videos: Iterable[Waiting], since_batch: int, now: float) -> Iterator[Waiting]:
    """Of the videos of one owner."""
    by_turns = sorted(videos, key=lambda video: (video.turns, video.asked))
    realtime = [video for video in by_turns if video.priority == "realtime"]
    batch = [video for video in by_turns if video.priority == "batch"]
    return _sharing(deque(sorted(realtime, key=lambda video: max(video.deadline, now))), deque(batch), since_batch)


def _sharing(realtime: deque[T], batch: deque[T], since_batch: int) -> Iterator[T]:
    """Empties two queues, which may grow meanwhile."""
    while realtime or batch:
        if batch and (not realtime or since_batch >= BATCH_EVERY - 1):
            since_batch = 0
            yield batch.popleft()
        else:
            since_batch += 1
            yield realtime.popleft()


def turns_since_batch(before: int, candidates: Iterable[Waiting]) -> int:
    """The turns since the last one of batch, with one more: it counts as batch if only batch videos could have it."""
    return 0 if all(video.priority == "batch" for video in candidates) else before + 1


def granted(order: Iterable[Waiting], sampling: int, samplers: int) -> list[Waiting]:
    """Those that get a sampler now. `order`: of all who wait; `sampling`: calls under way; `samplers`: replicas that
    live."""
    return list(itertools.islice(order, max(0, samplers - sampling)))


def has_room(videos: int, places: int, queued: int) -> bool:
    """Whether one more video is taken in. `videos`: that have not ended; `places`: that take turns on the samplers;
    `queued`: that may wait until one of those ends."""
    return videos < places + queued


def turns_on_asking(turns: int | None, round_: int) -> int:
    """What counts as taken by a video that asks for a sampler. `turns`: what it took, None if it is new; `round_`: the
    round that its owner's videos are in."""
    return round_ if turns is None else max(turns, round_ - 1)


def forecast(
    inside: Mapping[str, float], queue: Mapping[str, float], samplers: int, places: int
) -> dict[str, tuple[float, float]]:
    """When each video may expect its first turn, and its end: in times that a chunk takes, from now. Infinite for what
    waits for one without an end.

    Those that are `inside` share the samplers equally, none on more than one at a time (processor sharing); of the
    `queue`, in its order, one comes in for each that ends, and at once where fewer than `places` are inside. Both: id ▸
    chunks that are left to make, infinite without an end. `samplers` and `places` are at least 1.
    """
    waiting = deque(queue.items())
    ending = [(left, video_id) for video_id, left in inside.items()]  # by the work that each had by then
    heapq.heapify(ending)
    told = {video_id: (0.0, math.inf) for video_id in inside}
    now = work = 0.0  # `work`: chunks that a video had that was inside from the beginning
    while True:
        while waiting and len(ending) < places:
            video_id, left = waiting.popleft()
            told[video_id] = now, math.inf
            heapq.heappush(ending, (work + left, video_id))
        if not ending or ending[0][0] == math.inf:
            return {**told, **{video_id: (math.inf, math.inf) for video_id, _ in waiting}}
        share = min(1.0, samplers / len(ending))
        until, video_id = heapq.heappop(ending)
        now, work = now + (until - work) / share, until
        told[video_id] = told[video_id][0], now


class Queue:
    """Videos that wait for a turn, and what each owner has taken. A turn is on a sampler, or inside a room."""

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._turns: dict[str, dict[str, int]] = {}  # owner ▸ video ▸ taken by it, of each that may ask again
        self._taken: dict[str, Taken] = {}  # by the owners of these videos and of those that wait
        self._since_batch = 0  # turns since the last one of an owner with batch videos alone
        self._places = itertools.count()  # in the order of all askings and turns
        self.under_way = 0  # turns

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def waits(self, video_id: str) -> bool:
        return video_id in self._waiting

    def ask(self, video_id: str, owner: str, priority: Priority, deadline: float, again: bool = False) -> None:
        """A video waits from now on. `deadline`: when its viewer runs out; `again`: the turn before was lost, and does
        not count."""
        asked = next(self._places)
        taken = self._taken.setdefault(owner, Taken(last=asked))
        turns = turns_on_asking(self._turns.get(owner, {}).get(video_id), taken.round_)
        if again:
            turns = max(0, turns - 1)
        self._waiting[video_id] = Waiting(video_id, owner, priority, deadline, turns, asked)

    def order(self, now: float) -> list[str]:
        """Those that wait, in the order in which they get a turn. `now`: by the clock of the deadlines."""
        return [place.video_id for place in self._order(now)]

    def grant(self, samplers: int, now: float) -> list[str]:
        """Those whose turn begins now, and lasts until `end`. `samplers`: how many turns there may be at once."""
        if not self._waiting or self.under_way >= samplers:
            return []
        begun = granted(self._order(now), self.under_way, samplers)
        for place in begun:
            own = [other for other in self._waiting.values() if other.owner == place.owner]
            self._since_batch = turns_since_batch(self._since_batch, own)
            videos = self._turns.setdefault(place.owner, {})
            new = place.video_id not in videos
            self._taken[place.owner] = self._taken[place.owner].with_turn(place, new, next(self._places))
            videos[place.video_id] = place.turns + 1
            del self._waiting[place.video_id]
            self.under_way += 1
        return [place.video_id for place in begun]

    def end(self) -> None:
        """A turn is over."""
        self.under_way -= 1

    def leave(self, video_id: str) -> None:
        """A video does not wait any more."""
        del self._waiting[video_id]

    def forget(self, video_id: str, owner: str) -> None:
        """A video asks no more."""
        videos = self._turns.get(owner, {})
        videos.pop(video_id, None)
        if not videos:
            self._turns.pop(owner, None)
            if all(place.owner != owner for place in self._waiting.values()):
                self._taken.pop(owner, None)

    def _order(self, now: float) -> Iterable[Waiting]:
        if len(self._waiting) == 1:  # as it is where there are samplers enough
            return list(self._waiting.values())
        return in_order(self._waiting.values(), self._taken, self._since_batch, now)
