"""The sampler's replica by itself: pace, and how soon a cancelled call frees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.config import AppConfig, ConfigError
from deployments.records import Call, StoredObject
from deployments.sampler import Sampler
from deployments.store import Store, new_video_id
from deployments.text_encoder import TextEncoder
from deployments.watchdog import Overdue, Watchdog
from helios_core.spec import VideoSpec

SPEC = VideoSpec("a red sun", "random", 64, 64, 2 * 33 / 24, 1, (2, 2, 2), False)


@pytest.fixture
def config(tmp_path: Path) -> Callable[[float], AppConfig]:
    def paced(min_chunk_seconds: float) -> AppConfig:
        config = AppConfig(store=str(tmp_path / "store"), trace_file=str(tmp_path / "spans"), testing=True)
        return config.override(models=[{"model": "random", "sampler": {"min_chunk_seconds": min_chunk_seconds}}])

    return paced


def call() -> Call:
    return Call(video_id=new_video_id(1.0), traceparent=f"00-{'1' * 32}-{'2' * 16}-01")


def sampler_of(config: AppConfig) -> Sampler:
    return Sampler(config, config.models[0].sampler, "random")


async def sampled(sampler: Sampler, text: Any, state: Any = None, index: int = 0) -> Any:
    after, _ = [item async for item in sampler.sample_chunk(call(), SPEC, index, (1.0,), state, text)]
    return after


async def test_a_cancelled_call_frees_the_sampler_within_one_step(
    tmp_path: Path, config: Callable[[float], AppConfig]
) -> None:
    """Paced at one step in ten minutes: whoever waited for a second one would wait in vain."""
    hour = config(3600.0)
    text, _ = [item async for item in TextEncoder(hour, "random").encode(call(), SPEC.prompt)]
    sampler = sampler_of(hour)
    for _ in range(2):  # the second one gets its turn because the first one is gone
        calling = asyncio.ensure_future(sampled(sampler, text))
        await asyncio.sleep(0)
        assert sampler._free.locked()  # at work
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    ended = [span for span in spans if span["name"] == "sample"]
    assert [span["attributes"]["cancelled"] for span in ended] == [True, True]
    assert all(len(span["events"]) <= 1 for span in ended)


async def test_pace_changes_no_bit_and_inputs_may_come_from_the_store(config: Callable[[float], AppConfig]) -> None:
    store = Store(config(0.0).store)
    text, encoded = [item async for item in TextEncoder(config(0.0), "random").encode(call(), SPEC.prompt)]
    first = await sampled(sampler_of(config(0.0)), text)
    stored_state = await store.put_state(new_video_id(1.0), 1, 1, first.to_bytes())
    stored_text: StoredObject = encoded.stored
    expected = (await sampled(sampler_of(config(0.0)), text, first, 1)).to_bytes()
    assert (await sampled(sampler_of(config(0.2)), stored_text, stored_state, 1)).to_bytes() == expected


async def test_what_is_approximate_says_so(config: Callable[[float], AppConfig]) -> None:
    text, _ = [item async for item in TextEncoder(config(0.0), "random").encode(call(), SPEC.prompt)]
    ways = {
        (): {},
        ("fp8",): {"fp8": True},
        ("history once a chunk",): {"history_refresh": "chunk"},
        ("fp8", "history once a stage"): {"fp8": True, "history_refresh": "stage"},
    }
    latents = []
    for names, pool in ways.items():
        sampler = sampler_of(config(0.0).override(models=[{"model": "random", "sampler": pool}]))
        after, report = [item async for item in sampler.sample_chunk(call(), SPEC, 0, (1.0,), None, text)]
        assert report.run.approximations == names
        latents.append(after.latents)
    exact, *others = latents
    for each in others:
        assert 1e-5 < (each - exact).norm() / exact.norm() < 0.2
    with pytest.raises(ConfigError, match="'step', 'stage' or 'chunk'"):
        config(0.0).override(models=[{"model": "random", "sampler": {"history_refresh": "never"}}])


def test_a_call_that_does_not_end_makes_its_replica_unhealthy() -> None:
    now = 100.0
    watchdog = Watchdog(60.0, clock=lambda: now)
    watchdog.check()
    with watchdog.watching("large"):
        now = 150.0
        with watchdog.watching("small"):  # of two calls the longer one counts
            now = 160.0
            watchdog.check()
            now = 161.0
            with pytest.raises(Overdue, match=r"taken 61 s; allowed: 60 s"):
                watchdog.check()
    watchdog.check()


@pytest.mark.parametrize(("took", "allowed"), [(0.5, 5.0), (2.0, 8.0), (40.0, 60.0)])
def test_a_call_may_take_four_times_as_long_as_the_longest_of_its_kind(took: float, allowed: float) -> None:
    now = 0.0
    watchdog = Watchdog(60.0, clock=lambda: now)
    for seconds in (took, took / 2):
        with watchdog.watching("small"):
            now += seconds
    for kind, may_take in (("small", allowed), ("large", 60.0)):
        with watchdog.watching(kind):
            now += may_take
            watchdog.check()
            now += 0.1
            with pytest.raises(Overdue):
                watchdog.check()
