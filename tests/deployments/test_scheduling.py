"""Whose turn it is between the videos of one owner: the pure rules as tables, and `Turns`, which hands the turns out,
in virtual time. Owners, batch and deadlines are test_fair_turns.py's."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from deployments.scheduling import Taken, Waiting, granted, in_order, turns_on_asking
from deployments.turns import Turns
from tests.deployments.virtual_time import run_in_virtual_time

# (turns taken, in the order of asking): the order in which they get a sampler, as indexes
ORDERS = [
    ([], []),
    ([3], [0]),
    ([0, 0, 0], [0, 1, 2]),
    ([2, 1, 0], [2, 1, 0]),
    ([1, 0, 1, 0], [1, 3, 0, 2]),
    ([5, 5, 4, 9, 4], [2, 4, 0, 1, 3]),
]


def videos(turns: list[int]) -> list[Waiting]:
    return [Waiting(f"v{k}", "", "realtime", 0.0, turns_, asked=k) for k, turns_ in enumerate(turns)]


def ordered(waiting: list[Waiting]) -> list[Waiting]:
    return list(in_order(waiting, {"": Taken(last=0)}, since_batch=0, now=0.0))


@pytest.mark.parametrize(("turns", "order"), ORDERS)
def test_the_fewest_turns_go_first_and_whoever_asked_earlier_among_equals(turns: list[int], order: list[int]) -> None:
    waiting = videos(turns)
    expected = [f"v{k}" for k in order]
    for given in (waiting, waiting[::-1], random.Random(1).sample(waiting, len(waiting))):
        assert [video.video_id for video in ordered(given)] == expected


@pytest.mark.parametrize(
    ("sampling", "samplers", "count"), [(0, 1, 1), (1, 1, 0), (0, 3, 3), (1, 3, 2), (2, 9, 3), (3, 1, 0), (0, 0, 0)]
)
def test_as_many_are_granted_as_samplers_are_free(sampling: int, samplers: int, count: int) -> None:
    order = ordered(videos([1, 0, 2]))
    assert granted(order, sampling, samplers) == order[:count]


@pytest.mark.parametrize(
    ("turns", "round_", "counts"),
    [
        (None, 0, 0),
        (None, 7, 7),  # a newcomer starts where the others are
        (8, 7, 8),  # had its turn in this round
        (7, 7, 7),
        (6, 7, 6),  # is owed the turn that it could not ask for,
        (5, 7, 6),
        (0, 7, 6),  # but no more than that
        (0, 0, 0),
    ],
)
def test_who_could_not_ask_for_a_while_is_owed_one_turn(turns: int | None, round_: int, counts: int) -> None:
    assert turns_on_asking(turns, round_) == counts


# Turns


class Floor:
    """Turns, and what happened: `taken` has the videos in the order in which they got a sampler."""

    def __init__(self, samplers: int = 1) -> None:
        self.samplers = samplers
        self.turns = Turns(lambda: self.samplers)
        self.taken: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.ends: dict[str, asyncio.Event] = {}

    async def ask(self, video_id: str, again: bool = False) -> None:
        """`video_id` asks for a turn, which it keeps until its `end`."""
        self.ends[video_id] = asyncio.Event()

        async def take() -> None:
            async with self.turns.turn(video_id, "", "realtime", 0.0, again):
                self.taken.append(video_id)
                self.check()
                await self.ends[video_id].wait()

        self.tasks[video_id] = asyncio.create_task(take())
        await settled()

    async def end(self, video_id: str, again: bool | None = None) -> None:
        """Its turn ends; it asks for the next one, if `again` is given."""
        self.ends[video_id].set()
        await self.tasks.pop(video_id)
        if again is not None:
            await self.ask(video_id, again)
        await settled()

    async def leave(self, *video_ids: str) -> None:
        for video_id in video_ids:
            self.tasks[video_id].cancel()
        await asyncio.wait([self.tasks.pop(video_id) for video_id in video_ids])
        await settled()

    def check(self) -> None:
        assert self.turns.sampling <= self.samplers

    def check_empty(self) -> None:
        for video_id in self.ends:
            self.turns.forget(video_id, "")
        assert (
            self.turns.sampling,
            self.turns._queue._waiting,
            self.turns._queue._turns,
            self.turns._queue._taken,
        ) == (0, {}, {}, {})
        assert self.turns._look_again is None


async def settled() -> None:
    """Whatever can happen without time passing has happened."""
    await asyncio.sleep(1e-9)  # virtual


def test_turns_are_taken_in_the_order_of_asking() -> None:
    async def test() -> None:
        floor = Floor()
        for video_id in "abc":
            await floor.ask(video_id)
        assert [floor.turns.place(video_id) for video_id in "abcx"] == [None, 0, 1, None]
        assert (floor.turns.sampling, floor.turns.waiting) == (1, 2)
        for video_id in "abcabc":
            await floor.end(video_id, again=False)
        assert "".join(floor.taken) == "abcabca"
        await floor.leave(*"abc")
        floor.check_empty()

    run_in_virtual_time(test())


def test_turns_follow_the_number_of_samplers() -> None:
    async def test() -> None:
        floor = Floor(samplers=3)
        for video_id in "abcdef":
            await floor.ask(video_id)
        assert "".join(floor.taken) == "abc"
        floor.samplers = 1  # two are gone: their calls end, and grant nothing
        for video_id in "ab":
            await floor.end(video_id)
            assert "".join(floor.taken) == "abc"
        await floor.end("c")
        assert "".join(floor.taken) == "abcd"
        floor.samplers = 3  # two come up, which no call tells of
        await asyncio.sleep(1)
        assert "".join(floor.taken) == "abcdef"
        for video_id in "def":
            await floor.end(video_id)
        floor.check_empty()

    run_in_virtual_time(test())


@pytest.mark.parametrize("leaving", ["b", "c", "bc", "a", "ab", "abc"])
def test_who_leaves_takes_nothing_along(leaving: str) -> None:
    """`a` holds the turn; the others wait."""

    async def test() -> None:
        floor = Floor()
        for video_id in "abcd":
            await floor.ask(video_id)
        await floor.leave(*leaving)
        for video_id in "abcd":
            if video_id not in leaving:
                assert floor.turns.place(video_id) is None, "its turn has come"
                await floor.end(video_id)
        assert [video_id for video_id in floor.taken if video_id not in leaving] == sorted({*"abcd"} - {*leaving})
        floor.check_empty()

    run_in_virtual_time(test())


def test_who_leaves_at_the_moment_of_its_turn_hands_it_on() -> None:
    async def test() -> None:
        floor = Floor()
        for video_id in "abc":
            await floor.ask(video_id)
        floor.ends["a"].set()
        while floor.turns.place("b") is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        floor.tasks["b"].cancel()  # it has its turn, and has not run since
        assert floor.taken == ["a"]
        await settled()
        assert floor.taken == ["a", "c"]
        await floor.leave("c")
        floor.check_empty()

    run_in_virtual_time(test())


def test_who_leaves_is_passed_over_at_once() -> None:
    async def test() -> None:
        floor = Floor()
        for video_id in "abc":
            await floor.ask(video_id)
        floor.tasks["b"].cancel()  # and does not run before the next line
        assert (floor.turns.place("b"), floor.turns.place("c")) == (None, 0)
        floor.ends["a"].set()
        await settled()
        assert floor.taken == ["a", "c"]
        await floor.leave("c")
        floor.check_empty()

    run_in_virtual_time(test())


@pytest.mark.parametrize(("lost", "taken"), [(True, "abcabcac"), (False, "abcabcab")])
def test_a_lost_turn_does_not_count(lost: bool, taken: str) -> None:
    """c goes before b if its second turn was lost, although b asked earlier."""

    async def test() -> None:
        floor = Floor()
        for video_id in "abc":
            await floor.ask(video_id)
        for video_id in "abcab":
            await floor.end(video_id, again=False)
        await floor.end("c", again=lost)
        await floor.end("a", again=False)
        assert "".join(floor.taken) == taken
        await floor.leave(*"abc")
        floor.check_empty()

    run_in_virtual_time(test())


def test_a_newcomer_goes_before_those_who_had_their_turn_in_this_round() -> None:
    async def test() -> None:
        floor = Floor()
        for video_id in "abcd":
            await floor.ask(video_id)
        for video_id in "abcdab":
            await floor.end(video_id, again=False)
        assert floor.taken.pop() == "c"
        await floor.ask("n")
        floor.taken.clear()
        for _ in range(4):
            video_id = "c" if not floor.taken else floor.taken[-1]
            await floor.end(video_id, again=False)
        assert "".join(floor.taken) == "danb"  # b had its turn, and c
        await floor.leave(*"abcdn")
        floor.check_empty()

    run_in_virtual_time(test())


def test_a_stream_of_newcomers_starves_nobody() -> None:
    """Each takes one turn, and the next one is there before it ends."""

    async def test() -> None:
        floor = Floor()
        await floor.ask("old")
        await floor.ask("n0")
        await floor.end("old", again=False)
        for k in range(1, 20):
            await floor.ask(f"n{k}")
            await floor.end(floor.taken[-1], again=False if floor.taken[-1] == "old" else None)
        assert floor.taken.count("old") >= 5
        assert floor.taken[1:] != sorted(floor.taken[1:])
        newcomers = [video_id for video_id in floor.taken if video_id != "old"]
        assert newcomers == [f"n{k}" for k in range(len(newcomers))]
        await floor.leave(*floor.tasks)
        floor.check_empty()

    run_in_virtual_time(test())


# Simulations


class Crowd:
    """Random videos that join, take turns of random lengths, lose some of them and leave; counts who passes whom."""

    def __init__(self, seed: int, changing: float, pausing: float, losing: float, leaving: float) -> None:
        """Each how likely it is. `changing`: the number of samplers, which is 1 at first."""
        self.random = random.Random(seed)
        self.changing, self.pausing, self.losing, self.leaving = changing, pausing, losing, leaving
        self.samplers = 1
        self.turns = Turns(lambda: self.samplers)
        self.taken: Counter[str] = Counter()
        self.joined: dict[str, Counter[str]] = {}  # what the others had taken when a video joined
        self.asked_at: dict[str, float] = {}
        self.passed: Counter[tuple[str, str]] = Counter()  # (who has waited since it asked, by whom)
        self.most_passed = self.most_apart = 0

    async def run(self) -> Crowd:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self.video(f"v{k}")) for k in range(self.random.randrange(2, 9))]
        for task in tasks:
            if self.random.random() < self.leaving:
                loop.call_later(self.random.randrange(60), task.cancel)
        await asyncio.sleep(0.5)  # from here on at moments at which nothing else happens
        while not all(task.done() for task in tasks):
            self.check_places()
            if self.random.random() < self.changing:
                self.samplers = self.random.randrange(1, 4)
            await asyncio.sleep(self.random.randrange(1, 9))
        assert [error for task in tasks if not task.cancelled() and (error := task.exception())] == []
        assert (
            self.turns.sampling,
            self.turns._queue._waiting,
            self.turns._queue._turns,
            self.turns._queue._taken,
        ) == (0, {}, {}, {})
        assert self.turns._look_again is None
        return self

    async def video(self, video_id: str) -> None:
        try:
            await asyncio.sleep(self.random.randrange(40))
            self.joined[video_id] = self.taken.copy()
            lost = False
            for _ in range(self.random.randrange(1, 20)):
                if self.random.random() < self.pausing:
                    await asyncio.sleep(self.random.randrange(20))
                self.asked_at[video_id] = asyncio.get_running_loop().time()
                async with self.turns.turn(video_id, "", "realtime", 0.0, again=lost):
                    assert self.turns.sampling <= self.samplers
                    lost = self.random.random() < self.losing
                    if not lost:
                        self.count(video_id)
                    await asyncio.sleep(self.random.choice((1, 1, 1, 2, 9)))
        finally:
            self.turns.forget(video_id, "")
            self.joined.pop(video_id, None)

    def count(self, taker: str) -> None:
        """`taker` has taken a turn, and passed all that have waited for longer than this moment."""
        now = asyncio.get_running_loop().time()
        self.taken[taker] += 1
        for video_id in self.joined:
            self.passed[taker, video_id] = 0
            if self.turns.place(video_id) is not None and self.asked_at[video_id] < now:
                self.passed[video_id, taker] += 1
        self.most_passed = max(self.most_passed, *self.passed.values())
        self.most_apart = max([self.most_apart, *(self.apart(taker, other) for other in self.joined)])

    def apart(self, one: str, other: str) -> int:
        """How many more turns than the other one of two has taken since the later one joined."""
        later, earlier = sorted((one, other), key=[*self.joined].index, reverse=True)
        return abs(self.taken[later] - (self.taken[earlier] - self.joined[later][earlier]))

    def check_places(self) -> None:
        places = [place for video_id in self.joined if (place := self.turns.place(video_id)) is not None]
        assert sorted(places) == list(range(self.turns.waiting))


SEEDS = range(250)  # of each kind


def crowds(**how: float) -> list[Crowd]:
    how = {"changing": 0.0, "pausing": 0.0, "losing": 0.0, "leaving": 0.0, **how}
    return [run_in_virtual_time(Crowd(seed, **how).run()) for seed in SEEDS]


def test_videos_that_always_ask_take_the_same_number_of_turns() -> None:
    """Nobody who waits is passed twice by the same, and no two differ by more than one since the later one joined."""
    every = crowds()
    assert {seed: crowd for seed, crowd in enumerate(every) if crowd.most_passed > 1 or crowd.most_apart > 1} == {}
    assert 1 in [crowd.most_passed for crowd in every], "there was something to see"


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ({"pausing": 0.3}, 2),
        ({"changing": 1.0}, 2),
        ({"changing": 1.0, "pausing": 0.3, "leaving": 0.3}, 2),
        ({"changing": 1.0, "pausing": 0.3, "leaving": 0.3, "losing": 0.2}, 3),
    ],
)
def test_nobody_starves(how: dict[str, float], most: int) -> None:
    """While one waits, another takes at most two turns: one that it could not ask for, and one of its own. A third if
    it lost one before."""
    every = crowds(**how)
    assert {seed: crowd.most_passed for seed, crowd in enumerate(every) if crowd.most_passed > most} == {}
    assert most in [crowd.most_passed for crowd in every], "there was something to see"
