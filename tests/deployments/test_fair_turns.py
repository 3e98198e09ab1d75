"""Turns between owners, between realtime and batch, and by deadlines: the pure rules over seeded traffic, `Turns` and
the very Director in virtual time. Turns are counted, never timed.

Between the videos of one owner that are all alike: test_scheduling.py.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deployments.director import Director
from deployments.playback import Playback
from deployments.records import Call, SampleReport, VideoRequestRecord
from deployments.scheduling import (
    BATCH_EVERY,
    Priority,
    Taken,
    Waiting,
    granted,
    in_order,
    turns_on_asking,
    turns_since_batch,
)
from deployments.turns import Turns
from helios_core.config import CHUNK_FRAMES
from helios_core.spec import VideoSpec
from tests.deployments.test_director import request
from tests.deployments.test_races import NONE, TRACER, RacingGraph, State, Video, World
from tests.deployments.virtual_time import VirtualTime, run_in_virtual_time

CHUNK = CHUNK_FRAMES / 24  # seconds

# The rules


def video(name: str, deadline: float = 0.0, turns: int = 0, asked: int = 0) -> Waiting:
    """Of the owner that the name begins with; a batch video if it ends with b."""
    return Waiting(name, name[0], "batch" if name.endswith("b") else "realtime", deadline, turns, asked)


def order(*waiting: Waiting, last: str = "abcd", since_batch: int = 0, own_since_batch: int = 0) -> str:
    """`last`: the owners, by how long ago each had its last turn."""
    taken = {owner: Taken(last.index(owner), own_since_batch) for owner in last}
    return " ".join(each.video_id for each in in_order(waiting, taken, since_batch, now=10.0))


def test_owners_take_turns_whoever_has_more_videos() -> None:
    waiting = [video("a1", turns=9), video("a2"), video("a3"), video("b1", turns=99), video("b2", turns=98)]
    assert order(*waiting) == "a2 b2 a3 b1 a1"
    assert order(*waiting, last="ba") == "b2 a2 b1 a3 a1"


def test_realtime_goes_by_the_earliest_deadline_and_who_is_late_is_as_late_as_any_other() -> None:
    soon, later = video("a1", deadline=11.0, turns=5), video("a2", deadline=12.0)
    assert order(later, soon) == "a1 a2"
    late, very_late = video("a3", deadline=9.0, turns=1, asked=2), video("a4", deadline=1.0, turns=2)
    assert order(later, soon, very_late, late) == "a3 a4 a1 a2"
    assert order(late, very_late._replace(turns=1, asked=3)) == "a3 a4"


def test_batch_goes_by_turns() -> None:
    assert (
        order(video("a1b", deadline=1.0, turns=1), video("a2b", deadline=99.0), video("a3b", asked=1)) == "a2b a3b a1b"
    )


@pytest.mark.parametrize("owner", ["a", "b"])
@pytest.mark.parametrize("before", [0, 5, BATCH_EVERY - 1, 99])
def test_batch_has_one_turn_in_ten(owner: str, before: int) -> None:
    """Inside an owner, and between two. `before`: what realtime had since the last one."""
    realtime = [video(f"a{k}", deadline=20 + k) for k in range(30)]
    batch = [video(f"{owner}{k}b", asked=k) for k in range(40, 43)]
    names = order(*batch, *realtime, since_batch=before, own_since_batch=before).split()
    first = max(0, BATCH_EVERY - 1 - before)
    assert [k for k, name in enumerate(names) if name.endswith("b")] == [first, first + 10, first + 20]
    assert [name for name in names if not name.endswith("b")] == [f"a{k}" for k in range(30)]


def test_an_owner_who_has_but_batch_left_yields_from_then_on() -> None:
    assert order(video("a1"), video("a2b"), video("b1"), video("b2"), video("b3")) == "a1 b1 b2 b3 a2b"


# The rules, over 1,000 patterns of traffic

SEEDS = range(1000)


class Line:
    """Who waits and what was taken, as Turns keeps it; one sampler, and a turn takes a second."""

    def __init__(self) -> None:
        self.waiting: dict[str, Waiting] = {}
        self.taken: dict[str, Taken] = {}
        self.turns: dict[str, int] = {}
        self.since_batch = self.places = 0

    def place(self) -> int:
        self.places += 1
        return self.places

    def ask(self, name: str, owner: str, priority: Priority, deadline: float) -> None:
        asked = self.place()
        taken = self.taken.setdefault(owner, Taken(last=asked))
        turns = turns_on_asking(self.turns.get(name), taken.round_)
        self.waiting[name] = Waiting(name, owner, priority, deadline, turns, asked)

    def grant(self, now: float) -> Waiting:
        first = next(in_order(self.waiting.values(), self.taken, self.since_batch, now))
        own = [other for other in self.waiting.values() if other.owner == first.owner]
        self.since_batch = turns_since_batch(self.since_batch, own)
        self.taken[first.owner] = self.taken[first.owner].with_turn(
            first, first.video_id not in self.turns, self.place()
        )
        self.turns[first.video_id] = first.turns + 1
        return self.waiting.pop(first.video_id)


@dataclass
class Wait:
    """Of a video, or of an owner. `by_others`: turns since it began; `only_realtime`: an owner had a realtime video
    waiting all the time."""

    since: float
    by_others: int = 0
    only_realtime: bool = True


@dataclass
class Customer:
    """A video of a pattern. `arrives`: in seconds; `speed`: seconds of video that a chunk has."""

    name: str
    owner: str
    priority: Priority
    arrives: int
    chunks: int
    pausing: float
    speed: float
    playback: Playback = field(init=False)
    asks_at: int = field(init=False)

    def __post_init__(self) -> None:
        self.playback, self.asks_at = Playback(None, 0.0, float(self.arrives)), self.arrives


def drawn(seed: int) -> list[Customer]:
    draw = random.Random(seed)
    batch, pausing, speed = draw.random(), draw.choice((0.0, 0.3)), draw.choice((0.5, 2.0, 5.0))
    return [
        Customer(
            f"{owner}{k}",
            owner,
            "batch" if draw.random() < batch else "realtime",
            draw.choice((0, draw.randrange(30))),
            draw.randint(1, 30),
            pausing,
            speed,
        )
        for owner in "abc"[: draw.randint(1, 3)]
        for k in range(draw.randint(1, 3))
    ]


def most_waited(seed: int) -> dict[str, float]:
    """The longest waits of one pattern, each as a part of what is promised for it."""
    customers, line, draw, now = {each.name: each for each in drawn(seed)}, Line(), random.Random(seed), 0
    alike = Counter((each.owner, each.priority) for each in customers.values())
    most_owners = len({each.owner for each in customers.values()})
    owners, videos = dict[str, Wait](), dict[str, Wait]()
    most: dict[str, float] = {"owner": 0, "realtime owner": 0, "realtime": 0, "batch": 0}
    while any(each.chunks for each in customers.values()):
        for each in customers.values():
            if each.chunks and each.name not in line.waiting and each.asks_at <= now:
                line.ask(each.name, each.owner, each.priority, each.playback.deadline(0.0))
                videos[each.name] = Wait(now)
        realtime = {each.owner for each in line.waiting.values() if each.priority == "realtime"}
        there = {each.owner for each in line.waiting.values()}
        owners = {owner: owners.get(owner, Wait(now)) for owner in there}
        if line.waiting:
            first = line.grant(now)
            for owner, wait in owners.items():
                wait.only_realtime &= owner in realtime
                wait.by_others += owner != first.owner
            for name in line.waiting:
                videos[name].by_others += line.waiting[name].owner == first.owner
            wait, own = owners.pop(first.owner), videos[first.video_id]
            kind, bound = ("realtime owner", 1.0) if wait.only_realtime else ("owner", BATCH_EVERY)
            most[kind] = max(most[kind], wait.by_others / (bound * most_owners))
            turns = 2 * alike[first.owner, first.priority] - 1.0
            if first.priority == "realtime":
                turns += max(0.0, first.deadline - own.since)
                bound = turns * BATCH_EVERY / (BATCH_EVERY - 1) + 1
            else:
                bound = turns * BATCH_EVERY
            most[first.priority] = max(most[first.priority], own.by_others / bound)
            taker = customers[first.video_id]
            taker.chunks -= 1
            taker.playback.committed(taker.speed, now + 1.0)
            taker.asks_at = now + (draw.randrange(2, 20) if draw.random() < taker.pausing else 1)
        now += 1
    return most


def test_nobody_starves() -> None:
    """While an owner waits, the others take at most BATCH_EVERY turns for each owner that there is; one for each, if it
    is one with a realtime video that waits. While a video waits, its owner takes at most two turns for each other of
    its videos of that priority, and one: ten times as many beside a batch video; beside a realtime one a ninth more,
    and those that fit in before its deadline."""
    every = [most_waited(seed) for seed in SEEDS]
    assert {seed: most for seed, most in zip(SEEDS, every, strict=True) if max(most.values()) > 1} == {}
    closest = {kind: max(most[kind] for most in every) for kind in every[0]}
    assert min(closest.values()) > 0.5, f"there was something to see: {closest}"


@pytest.mark.parametrize("samplers", [1, 2, 3])
def test_deadlines_are_met_whenever_they_can_be(samplers: int) -> None:
    """Chunks of one owner that take a second each. They can all be in time if no stretch of time has more of them than
    fit into it, of those that come and are due in it (Jackson, Horn)."""
    possible = 0
    for seed in SEEDS:
        draw = random.Random(seed)
        comes = [draw.randrange(8) for _ in range(draw.randint(1, 14 * samplers))]
        due = [come + draw.choice((1, 2, 3, 5)) for come in comes]
        fits = all(
            sum(start <= come and end >= is_due for come, is_due in zip(comes, due, strict=True))
            <= samplers * (end - start)
            for start in range(8)
            for end in range(start + 1, 14)
        )
        possible += fits
        left = [Waiting(str(k), "a", "realtime", float(end), draw.randrange(9), k) for k, end in enumerate(due)]
        late, now = 0, 0
        while left:
            there = [each for each in left if comes[each.asked] <= now]
            for each in granted(in_order(there, {"a": Taken(last=0)}, draw.randrange(20), now), 0, samplers):
                late += each.deadline < now + 1
                left.remove(each)
            now += 1
        assert (late == 0) == fits, f"seed {seed}: {late} late"
    assert 300 < possible < 900, "some can be met, and some can not"


# Turns


async def take(
    turns: Turns, log: list[str], name: str, chunks: int, owner: str = "", priority: Priority = "realtime"
) -> None:
    """A video that asks for its next chunk at once; each takes a second."""
    for _ in range(chunks):
        async with turns.turn(name, owner, priority, 0.0):
            log.append(name)
            await asyncio.sleep(1)
    turns.forget(name, owner)


def taken(samplers: int, *videos: tuple[str, int, str, Priority]) -> str:
    """The order in which these videos get samplers: name, chunks, owner, priority of each."""

    async def test() -> str:
        loop, log, turns = asyncio.get_running_loop(), list[str](), Turns(lambda: samplers)
        async with asyncio.TaskGroup() as tasks:
            for each in videos:
                tasks.create_task(take(turns, log, *each))
        await asyncio.sleep(1)
        assert (turns.sampling, turns._queue._waiting, turns._queue._turns, turns._queue._taken) == (0, {}, {}, {})
        assert isinstance(loop, VirtualTime) and loop.timers() == []
        return "".join(log)

    return run_in_virtual_time(test())


@pytest.mark.parametrize("other", ["a", "b"])
def test_batch_yields_to_a_single_realtime_video_and_does_not_starve(other: str) -> None:
    """Also though that one does not wait at the moment at which its turn ends."""
    assert taken(1, ("r", 30, "a", "realtime"), ("b", 5, other, "batch")) == "rrrrrrrrrb" * 3 + "rrrbb"


def test_batch_takes_what_is_left() -> None:
    assert Counter(taken(2, ("r", 30, "a", "realtime"), ("b", 30, "b", "batch"))[:40]) == {"r": 20, "b": 20}
    assert taken(1, ("b", 3, "b", "batch")) == "bbb"


def test_an_owner_who_comes_goes_last_and_then_takes_turns() -> None:
    """`a` has its first turn before the others ask."""
    assert (
        taken(1, ("a", 5, "a", "realtime"), ("b", 5, "b", "realtime"), ("c", 5, "c", "realtime"))
        == "a" + "abc" * 4 + "bc"
    )

    async def test() -> None:
        log, turns = list[str](), Turns(lambda: 1)
        async with asyncio.TaskGroup() as tasks:
            for name in "ab":
                tasks.create_task(take(turns, log, name, 9, name))
            await asyncio.sleep(4.5)
            tasks.create_task(take(turns, log, "c", 3, "c"))
        assert "".join(log) == "aabab" + "abc" * 3 + "abababb"

    run_in_virtual_time(test())


# The Director


class ServedGraph(RacingGraph):
    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Any, *texts: Any
    ) -> tuple[State, SampleReport]:
        assert isinstance(self.world, ServedWorld)
        self.world.serve(call.video_id)
        return await super().sample(call, spec, index, weights, state, *texts)


class ServedWorld(World):
    """A World in which nothing goes wrong: the sampling of a chunk takes a second, its rendering a tenth of one.

    `served`: the videos in the order in which they got a sampler, each with the owners who waited then, or got it.
    """

    def __init__(self, folder: Path, requests: Sequence[VideoRequestRecord], samplers: int = 1) -> None:
        super().__init__(1, folder)
        self.samplers, self.over = samplers, True
        self.requests = requests
        self.videos = {request.id: Video(request, NONE) for request in requests}
        self.served: list[tuple[str, set[str]]] = []

    async def pause(self, most: int) -> None:
        await asyncio.sleep({4: 1.0, 3: 0.1}.get(most, 0.0))  # sampling, rendering

    def later(self, step: Any) -> None:
        asyncio.get_running_loop().call_soon(step)

    async def next_director(self) -> Director:
        asyncio.get_running_loop().set_default_executor(self.store._threads)
        self.director = await Director.start(ServedGraph(self), self.store, TRACER)
        return self.director

    def serve(self, video_id: str) -> None:
        owners = {each.owner for each in self.director._turns["random"]._queue._waiting.values()}
        self.served.append((video_id, owners | {self.videos[video_id].request.owner}))

    async def all_ended(self) -> None:
        await asyncio.wait([video.leading for video in self.director._running.values()])
        assert self.wrong == []

    def names(self) -> str:
        """Of the videos in the order in which they were served, by the order of their requests."""
        names = {request.id: "abcdefgh"[k] for k, request in enumerate(self.requests)}
        return "".join(names[video_id] for video_id, _ in self.served)


def asked(chunks: int, **changes: Any) -> VideoRequestRecord:
    return request(chunks).model_copy(update=changes)


@pytest.mark.parametrize("samplers", [1, 2])
def test_two_owners_get_as_much_though_one_sends_ten_times_as_many_videos(tmp_path: Path, samplers: int) -> None:
    async def test() -> None:
        many = [asked(3, owner="many") for _ in range(20)]
        few = [asked(8, owner="few") for _ in range(2)]
        world = ServedWorld(tmp_path, [*many, *few], samplers)
        director = await world.next_director()
        for each in world.requests:
            await director.create(each)
        await world.all_ended()
        counts, apart, both_wait = Counter[str](), 0, 0
        for video_id, owners in world.served:
            if len(owners) < 2:
                counts.clear()
                continue
            both_wait += 1
            counts[world.videos[video_id].request.owner] += 1
            apart = max(apart, abs(counts["many"] - counts["few"]))
        assert apart == 1 and both_wait >= 25, (apart, both_wait)
        assert len(world.served) == 20 * 3 + 2 * 8

    run_in_virtual_time(test())


def test_a_realtime_video_of_the_director_leaves_batch_one_turn_in_ten(tmp_path: Path) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(25), asked(4, priority="batch")])
        director = await world.next_director()
        for each in world.requests:
            await director.create(each)
        await world.all_ended()
        assert world.names() == "aaaaaaaaab" * 2 + "aaaaaaabb"

    run_in_virtual_time(test())


def test_the_video_whose_viewer_runs_out_first_goes_first(tmp_path: Path) -> None:
    """`a` is 4 x 1.375 - 4 s ahead when `b` comes, whose next two chunks are due before `a`'s, and then each second
    one. By the number of turns they would take them one by one."""

    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(9), asked(9)])
        director = await world.next_director()
        await director.create(world.requests[0])
        await asyncio.sleep(3.5)
        await director.create(world.requests[1])
        await world.all_ended()
        first = world.names()
        assert first.startswith("aaaabb"), first

    run_in_virtual_time(test())


def test_what_is_being_rendered_counts_as_there(tmp_path: Path) -> None:
    async def test() -> None:
        world = ServedWorld(tmp_path, [asked(2), asked(2)])
        director = await world.next_director()
        for each in world.requests:
            await director.create(each)
        await asyncio.sleep(1.05)  # chunk 0 of the first is sampled, and not committed
        (waits,) = director._turns["random"]._queue._waiting.values()
        assert (waits.video_id, waits.deadline) == (world.requests[0].id, CHUNK)
        await world.all_ended()

    run_in_virtual_time(test())


def test_a_viewer_who_comes_later_counts_from_then() -> None:
    playback = Playback(None, unseen_s=2.0, now=10.0)
    assert playback.deadline(0.0) == 12.0 and playback.deadline(1.5) == 13.5
    playback.committed(1.0, now=11.0)
    assert playback.deadline(0.0) == 13.0  # as if somebody had played since 10.0
    playback.committed(1.0, now=20.0)
    assert playback.deadline(0.0) == 21.0  # and had waited
    assert playback.watched(30.0)
    assert playback.deadline(0.0) == 34.0  # all of it is to be seen
    playback.committed(1.0, now=40.0)
    assert playback.deadline(0.0) == 41.0
