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

from deployments import autoscaling, playback, scheduling, turns
from deployments.chunk_times import Times
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
