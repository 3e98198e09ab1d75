"""The simulation of a service: against queueing theory, against the Director itself, and that it decides nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from deployments import autoscaling, scheduling, turns
from deployments.chunk_times import Times
from deployments.playback import Playback
from deployments.simulation import Asked, Fleet, Outcome, simulate
from tests.deployments.test_director import request
from tests.deployments.test_fair_turns import ServedWorld
from tests.deployments.virtual_time import run_in_virtual_time

CHUNK_S = 1.375  # of playback, at 24 fps
INSTANT = Times(turn_s=1.0, first_turn_s=1.0, render_s=0.0)
MANY = 10**6
SECONDS = 60_000


def poisson(rate: float, seconds: float, seed: int, of: Callable[[float, random.Random], Asked]) -> Iterator[Asked]:
    draw, at = random.Random(seed), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        yield of(at, draw)


def chunks(count: int, at: float = 0.0, **others: Any) -> Asked:
    return Asked(at, count * CHUNK_S, **others)


# Theory


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_with_videos_of_one_chunk_the_mean_wait_is_that_of_m_d_1(busy: float) -> None:
    """Pollaczek and Khinchine: rho s / 2 (1 - rho), with the rho that the draw came to. Whose turn it is makes no
    difference to the mean."""
    asked = poisson(busy, SECONDS, 1, lambda at, draw: chunks(1, at, owner=f"key {draw.randrange(5)}"))
    seen = simulate(asked, INSTANT, Fleet(1), MANY, MANY).seen
    waits = [each.first_fragment_s - INSTANT.turn_s for each in seen if each.first_fragment_s is not None]
    rho = len(waits) * INSTANT.turn_s / SECONDS
    assert len(waits) == len(seen) and rho == pytest.approx(busy, rel=0.02)
    assert fmean(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.03)


@pytest.mark.parametrize("busy", [0.5, 0.7])
def test_videos_of_exponential_length_in_turns_share_the_sampler_as_processor_sharing_has_it(busy: float) -> None:
    """Kleinrock: a video of x seconds' work takes x / (1 - rho) in the mean."""
    mean_chunks, turn_s = 30, 0.05
    asked = poisson(
        busy / (mean_chunks * turn_s),
        8_000,
        3,
        lambda at, draw: chunks(1 + round(draw.expovariate(1 / (mean_chunks - 1))), at, priority="batch"),
    )
    times = Times(turn_s=turn_s, first_turn_s=turn_s, render_s=0.0)
    seen = simulate(asked, times, Fleet(1), MANY, MANY).seen
    work = fmean(each.asked.chunks * turn_s for each in seen)
    rho = work * len(seen) / 8_000
    took = fmean(each.ended_s for each in seen if each.ended_s is not None)
    assert took == pytest.approx(work / (1 - rho), rel=0.05)
    # … and not only in the mean: short videos are not held up by long ones.
    for few, many in ((1, 15), (16, 45), (46, 200)):
        those = [each for each in seen if few <= each.asked.chunks <= many]
        stretch = sum(each.ended_s or 0 for each in those) / sum(each.asked.chunks * turn_s for each in those)
        assert stretch == pytest.approx(1 / (1 - rho), rel=0.15)


# The Director itself, in virtual time, over chunks that are hashes


class PacedWorld(ServedWorld):
    """A ServedWorld in which parts take `times`, and so many VAE decoders as there are videos."""

    def __init__(self, folder: Path, asked: list[Asked], samplers: int, times: Times) -> None:
        spec = request().spec
        requests = {
            request_id(k): request(each.chunks).model_copy(
                update={
                    "id": request_id(k),
                    "spec": replace(spec, seconds=each.seconds),
                    "owner": each.owner,
                    "priority": each.priority,
                }
            )
            for k, each in enumerate(asked)
        }
        super().__init__(folder, list(requests.values()), samplers)
        self.asked, self.times = asked, times
        self.ended_s: dict[Asked, float] = {}

    async def pause(self, most: int) -> None:
        await asyncio.sleep({4: self.times.turn_s, 3: self.times.render_s}.get(most, 0.0))

    async def ask(self, k: int) -> None:
        asked, wanted = self.asked[k], self.requests[k]
        await asyncio.sleep(asked.at)
        await self.director.create(wanted)
        await asyncio.wait([self.director._running[wanted.id].leading])
        self.ended_s[asked] = self.now() - asked.at


def request_id(k: int) -> str:
    return f"video_{k:032x}"


@pytest.mark.parametrize("seed", range(12))
def test_the_director_does_what_the_simulation_says(tmp_path: Path, seed: int) -> None:
    """Mixed traffic, at random: every video ends at the very moment at which it was to."""
    draw = random.Random(seed)
    samplers = draw.randint(1, 3)
    # In time that is exact in binary, and no two things at once: whose turn it is then nobody has promised.
    times = Times(turn_s=1 + draw.randrange(64) / 64, first_turn_s=0.0, render_s=draw.randrange(1, 64) / 64)
    times = replace(times, first_turn_s=times.turn_s)
    asked = [
        Asked(
            at=draw.randrange(2**16) / 2**11,
            seconds=draw.randint(1, 8) * CHUNK_S,
            owner=draw.choice("abc"),
            priority="realtime" if draw.random() < 0.6 else "batch",
        )
        for _ in range(12)
    ]

    async def test() -> dict[Asked, float]:
        world = PacedWorld(tmp_path, asked, samplers, times)
        await world.next_director()
        await asyncio.gather(*map(world.ask, range(len(asked))))
        assert world.wrong == []
        return world.ended_s

    outcome = simulate(sorted(asked, key=lambda each: each.at), times, Fleet(samplers, vae_decoders=len(asked)))
    assert run_in_virtual_time(test()) == {each.asked: pytest.approx(each.ended_s, abs=1e-3) for each in outcome.seen}


# What it decides nothing of


ONE = Fleet(1)


def outcome_of(asked: list[Asked], fleet: Fleet = ONE, **limits: int) -> Outcome:
    return simulate(asked, INSTANT, fleet, **limits)


MIXED = [
    chunks(4, 1.1 * k, owner="ab"[k % 2], priority="realtime" if k % 3 else "batch", lead_s=0.0 if k == 0 else None)
    for k in range(24)
]
RULES: dict[str, tuple[object, str, Any]] = {
    "whose turn it is": (scheduling, "_own_order", lambda videos, *_: sorted(videos, key=lambda each: -each.asked)),
    "how batch yields": (scheduling, "BATCH_EVERY", 2),
    "how many are granted": (scheduling, "granted", lambda order, sampling, samplers: list(order)[: 1 - sampling]),
    "who is taken in": (scheduling, "has_room", lambda videos, places, queued: videos < 5),
    "how far ahead is made": (Playback, "wait", lambda self, begun_s, now: 0.0),
    "how many samplers": (autoscaling, "samplers", lambda wanting: 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_of_the_director_that_changes_changes_the_outcome(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(2, most=4, upscale_delay_s=1.0, downscale_delay_s=5.0)
    before = outcome_of(MIXED, fleet)
    assert outcome_of(MIXED, fleet).seen == before.seen
    where, name, other = RULES[rule]
    monkeypatch.setattr(where, name, other)
    assert outcome_of(MIXED, fleet).seen != before.seen


def test_the_director_takes_turns_by_the_same_queue() -> None:
    assert turns.Queue is scheduling.Queue


# What takes time


def test_a_first_fragment_takes_what_its_parts_take() -> None:
    times = Times(2.0, 4.0, 0.5, store_s=0.25, text_s=0.125, media_s=8.0, accept_s=16.0, deliver_s=32.0)
    (seen,) = simulate([chunks(2)], times, Fleet(1)).seen
    assert seen.first_fragment_s == times.first_fragment_s == 16 + 0.125 + 4 + 0.5 + 0.25 + 32
    assert seen.ended_s == seen.first_fragment_s + 2.0  # sampled while the first was rendered
    assert (seen.stalls, seen.stall_s) == (1, 2.0 - CHUNK_S)
    (with_image,) = simulate([chunks(2, image=True)], times, Fleet(1)).seen
    assert with_image.first_fragment_s == seen.first_fragment_s + 8.0


def test_a_vae_decoder_that_is_slower_than_the_sampler_sets_the_pace() -> None:
    """The sampler is one chunk ahead, and waits with the next."""
    outcome = simulate([chunks(5)], Times(1.0, 1.0, 3.0), Fleet(1))
    assert outcome.seen[0].ended_s == 1.0 + 5 * 3.0
    assert outcome.hours[0].sampling_s == 5.0 and outcome.hours[0].rendering_s == 15.0
    two = simulate([chunks(5), chunks(5)], Times(1.0, 1.0, 3.0), Fleet(2, vae_decoders=1))
    assert max(each.ended_s or 0 for each in two.seen) == 1.0 + 10 * 3.0
    apart = simulate([chunks(5), chunks(5)], Times(1.0, 1.0, 3.0), Fleet(2, vae_decoders=2))
    assert [each.ended_s for each in apart.seen] == [16.0, 16.0]


def test_a_video_with_a_lead_is_made_as_its_viewer_plays() -> None:
    (ahead,) = simulate([chunks(40)], Times(0.1, 0.1, 0.0), Fleet(1)).seen
    (led,) = simulate([chunks(40, lead_s=3.0)], Times(0.1, 0.1, 0.0), Fleet(1)).seen
    assert ahead.ended_s == pytest.approx(4.0) and led.stalls == 0
    assert led.ended_s == pytest.approx(40 * CHUNK_S - 3.0, abs=CHUNK_S)


def test_who_finds_no_room_is_refused_unless_they_can_wait() -> None:
    asked = [chunks(60, 0.01 * k) for k in range(4)] + [chunks(1, 0.1, priority="batch")]
    outcome = outcome_of(asked, videos_per_sampler=1, queued=1)
    assert [each.status for each in outcome.seen] == ["refused", "refused", "completed", "completed", "completed"]
    assert outcome.seen[-1].asked.priority == "batch" or outcome.seen[-2].asked.priority == "batch"


@pytest.mark.parametrize(
    ("leaves_s", "made", "other_ends"),
    [(0.25, 0, 10.25), (2.5, 2, 12.0), (3.5, 2, 12.5)],  # in its first turn, while it waits, in its third turn
)
def test_who_leaves_frees_the_sampler_at_once(leaves_s: float, made: int, other_ends: float) -> None:
    asked = [chunks(10, leaves_s=leaves_s, owner="a"), chunks(10, 0.125, owner="b")]
    outcome = outcome_of(asked)
    left, other = outcome.seen
    assert left.status == "left" and left.ended_s == leaves_s and other.status == "completed"
    assert (outcome.until, other.ended_s) == (other_ends, other_ends - 0.125)
    assert outcome.hours[0].shown_s == (10 + made) * CHUNK_S


def test_a_stall_that_is_under_way_when_somebody_leaves_is_one() -> None:
    """Two chunks in two seconds, and then the turns of five others."""
    asked = [chunks(9, k / 64, owner=str(k), leaves_s=6.5 if k == 0 else None) for k in range(6)]
    left = next(each for each in outcome_of(asked).seen if each.status == "left")
    assert left.first_fragment_s == 1.0
    assert (left.stalls, left.stall_s) == (1, 6.5 - (1.0 + 2 * CHUNK_S))


def test_who_leaves_while_waiting_for_room_is_not_made() -> None:
    asked = [chunks(10), chunks(10, 0.5, leaves_s=1.0), chunks(10, 0.75)]
    outcome = outcome_of(asked, videos_per_sampler=1)
    assert [(each.status, each.ended_s) for each in outcome.seen] == [
        ("left", 1.0),
        ("completed", 10.0),
        ("completed", 19.25),
    ]


def test_samplers_follow_the_demand_and_their_hours_count_from_when_they_are_wanted() -> None:
    asked = [chunks(100, k) for k in range(4)]
    fleet = Fleet(1, most=4, start_s=10.0, upscale_delay_s=2.0, downscale_delay_s=20.0)
    scaled, one, four = (simulate(asked, INSTANT, each) for each in (fleet, Fleet(1), Fleet(4)))
    assert four.until < scaled.until < one.until == 400.0
    assert four.hours[0].sampling_s == scaled.hours[0].sampling_s == 400.0
    assert one.hours[0].samplers_s == 400.0 and four.hours[0].samplers_s == 4 * four.until
    assert 400.0 < scaled.hours[0].samplers_s <= 4 * scaled.until


def test_what_has_not_ended_in_time_is_unfinished() -> None:
    seen = simulate([chunks(10), chunks(3), chunks(1, 30.0)], INSTANT, Fleet(2), until=6.5).seen
    assert [(each.status, each.asked.chunks) for each in seen] == [("completed", 3), ("unfinished", 10)]
    assert seen[1].first_fragment_s == 1.0 and seen[1].ended_s is None


def test_nothing_is_lost_on_the_way() -> None:
    draw = random.Random(5)
    asked = list(
        poisson(
            1.0,
            2_000,
            5,
            lambda at, draw: chunks(
                draw.randint(1, 9),
                at,
                owner=draw.choice("abcd"),
                priority=draw.choice(("realtime", "batch")),
                image=draw.random() < 0.3,
                lead_s=draw.choice((None, 3.0)),
                leaves_s=draw.choice((None, None, draw.uniform(0, 20))),
            ),
        )
    )
    times = Times(1.0, 2.0, 0.4, 0.05, 0.1, 0.2, 0.05, 0.05)
    fleet = Fleet(draw.randint(3, 5), vae_decoders=2, most=8, start_s=5.0)
    outcome = simulate(asked, times, fleet, videos_per_sampler=2, queued=3)
    assert sorted(map(id, (each.asked for each in outcome.seen))) == sorted(map(id, asked))
    assert {each.status for each in outcome.seen} == {"completed", "left", "refused"}
    for each in outcome.seen:
        if each.status == "completed":
            assert each.first_fragment_s is not None and each.ended_s is not None
            assert times.first_fragment_s - 1e-6 <= each.first_fragment_s <= each.ended_s
    assert sum(hour.sampling_s for hour in outcome.hours.values()) <= 8 * outcome.until
