"""Shares and bottlenecks of hand-made metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from load_tests.observing import role_of
from load_tests.service_metrics import Look, Series, bottleneck, increase, parse, series, times, utilisation
from load_tests.shapes import SHAPES
from load_tests.wanted import WEIGHTS, draw, rng_of

# part ▸ the counter of its work
WORK = {
    "vae": "helios_decode_seconds_sum",
    "text": "helios_text_encode_seconds_sum",
    "director": "helios_director_cpu_seconds_total",
    "ingress": 'helios_ingress_cpu_seconds_total{process="a:1"}',
    "store": "helios_commit_seconds_sum",
}


def run(running: float = 4.0, replicas: int = 1, seconds: int = 30, **busy: float) -> list[Look]:
    """Looks at a service whose parts are busy for so many seconds in a second, each second."""

    def at(second: int) -> Series:
        return {
            **{WORK[part]: share * second for part, share in busy.items() if part != "sampler"},
            "helios_sampling": busy.get("sampler", 0.0),
            **{f'helios_replicas{{part="{part}"}}': replicas for part in ("sampler", "vae_decoder", "text_encoder")},
            "helios_videos_running": running,
            "helios_videos_queued": 0.0,
        }

    return [Look(float(second), 4, at(second)) for second in range(seconds)]


def test_metrics_are_read_without_their_buckets() -> None:
    text = '# HELP a b\na_sum 1.5\na_bucket{le="1.0"} 3.0\nhelios_replicas{part="sampler"} 2.0\n'
    assert parse(text) == {"a_sum": 1.5, 'helios_replicas{part="sampler"}': 2.0}


@pytest.mark.parametrize(
    ("values", "grew"),
    [([], None), ([5.0], 0.0), ([5.0, 7.0, 7.0, 8.5], 3.5), ([5.0, 7.0, 1.0, 2.0], 4.0), ([None, 2.0, None, 5.0], 3.0)],
)
def test_a_counter_that_begins_anew_loses_nothing_that_was_seen(values: list[Any], grew: float | None) -> None:
    looks = [Look(float(k), 0, {} if value is None else {"c": value}) for k, value in enumerate(values)]
    assert increase(looks, "c") == grew


def test_shares_are_of_one_replica() -> None:
    shares = utilisation(run(replicas=2, sampler=1.5, vae=0.5, text=0.2, director=0.3, ingress=0.25, store=1.0))
    assert shares == pytest.approx(
        {"sampler": 0.75, "vae": 0.25, "text": 0.1, "director": 0.3, "ingress": 0.25, "store": 0.25}
    )


def test_what_a_service_does_not_count_is_none() -> None:
    shares = utilisation([Look(0.0, 1, {}), Look(1.0, 1, {})])
    assert set(shares.values()) == {None}
    assert set(times([]).values()) == {None}


def test_of_several_ingresses_the_busiest_counts() -> None:
    looks = [
        Look(float(k), 1, {f'helios_ingress_cpu_seconds_total{{process="{"ab"[k % 2]}"}}': (0.2, 0.6)[k % 2] * k})
        for k in range(10)
    ]
    assert utilisation(looks)["ingress"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("busy", "part"),
    [
        ({"sampler": 0.99, "vae": 0.7}, "sampler"),
        ({"sampler": 0.7, "vae": 0.9}, "vae"),
        ({"sampler": 0.3, "text": 0.95}, "text"),
        ({"sampler": 0.5, "director": 0.97}, "director"),
        ({"sampler": 0.5, "ingress": 0.9}, "ingress"),
        ({"sampler": 0.5, "store": 3.8}, "store"),  # of four videos
        ({"sampler": 0.5, "store": 1.0}, "none"),
        ({"sampler": 0.84, "vae": 0.5}, "none"),
    ],
)
def test_the_busiest_part_is_short_if_it_has_hardly_a_rest(busy: dict[str, float], part: str) -> None:
    found = bottleneck(run(**busy))
    assert found.part == part
    assert found.share == pytest.approx(max(share or 0.0 for share in utilisation(run(**busy)).values()))


def test_nothing_is_short_where_nobody_waits() -> None:
    assert bottleneck(run(running=1.0, sampler=0.99)).part == "none"
    assert bottleneck([]).part == "none"


def test_the_bottleneck_is_that_of_the_time_in_which_videos_waited() -> None:
    calm, rush = run(running=1.0, seconds=100, sampler=0.1), run(running=8.0, seconds=30, sampler=0.95)
    found = bottleneck([*calm, *(replace(look, at=look.at + 100) for look in rush)])
    assert found.part == "sampler" and found.share == pytest.approx(0.95)


def test_means_are_of_what_ended_in_the_run() -> None:
    def at(sums: float, count: float) -> Series:
        return {
            "helios_sample_seconds_sum": sums,
            "helios_sample_seconds_count": count,
            "helios_chunks_committed_total": count,
            "helios_director_cpu_seconds_total": sums / 10,
        }

    found = times([Look(0.0, 1, at(100.0, 10)), Look(60.0, 1, at(130.0, 30))])
    assert (found["sample_s"], found["director_s"], found["media_s"]) == (1.5, 0.15, None)


def test_what_a_process_does_when_no_video_runs_is_not_a_chunks() -> None:
    """It takes 0.2 s of a processor in each second, and 0.05 s more for each of two chunks in each of 20."""

    def looks(idle: int) -> list[Look]:
        def at(second: int) -> Series:
            worked = max(0, min(20, second - idle))
            busy = 0 < second - idle <= 20
            cpu = 0.2 * second + 0.1 * worked
            return {
                "helios_videos_running": float(busy),
                "helios_chunks_committed_total": 2.0 * worked,
                "helios_director_cpu_seconds_total": cpu,
                'helios_ingress_cpu_seconds_total{process="a:1"}': cpu,
            }

        return [Look(float(second), 1, at(second)) for second in range(idle + 21)]

    for name in ("director_s", "ingress_s"):
        assert times(looks(10))[name] == pytest.approx(0.05)
        assert times(looks(4))[name] == pytest.approx((0.2 * 24 + 0.1 * 20) / 40)  # too short to know


def test_a_videos_first_turn_is_told_apart() -> None:
    looks = [
        Look(0.0, 1, {}),
        Look(1.0, 1, {"helios_first_turn_seconds_sum": 1.0, "helios_first_turn_seconds_count": 1.0}),
        Look(2.0, 1, {"helios_first_turn_seconds_sum": 5.0, "helios_first_turn_seconds_count": 3.0}),
    ]
    assert (times(looks)["first_turn_s"], times(looks)["turn_s"]) == (2.0, None)


def test_a_row_tells_how_busy_the_last_seconds_were() -> None:
    rows = series(run(sampler=0.5))
    assert len(rows) == 30
    assert rows[-1]["sampler_busy"] == pytest.approx(0.5)
    assert (rows[-1]["users"], rows[-1]["running"], rows[0]["sampler_busy"]) == (4.0, 4.0, None)


@pytest.mark.parametrize(
    ("command", "name", "role"),
    [
        (["ray::ServeReplica:helios:Director"], "ray::ServeRepli", "Director"),
        (["ray::ServeReplica:helios:VaeDecoder.render_chunk"], "ray::ServeRepli", "VaeDecoder"),
        (["ray::ProxyActor"], "ray::ProxyActor", "ProxyActor"),
        (["ray::IDLE", ""], "ray::IDLE", None),
        (["/x/raylet", "--port"], "raylet", "raylet"),
        (["python", "-m", "locust"], "python", None),
        ([], "kthreadd", None),
    ],
)
def test_processes_of_ray_are_told_by_their_titles(command: list[str], name: str, role: str | None) -> None:
    assert role_of(command, name) == role


@pytest.mark.parametrize(
    ("shape", "users"),
    [
        ("steady", [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        ("ramp", [1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8]),
        ("spike", [2, 2, 2, 2, 8, 8, 8, 8, 2, 2, 2, 2]),
        ("soak", [1, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
    ],
)
def test_shapes(shape: str, users: list[int]) -> None:
    assert [SHAPES[shape](8, k / 12) for k in range(12)] == users


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_somebody_always_and_everybody_once(shape: str) -> None:
    for most in (1, 2, 5, 50):
        users = [SHAPES[shape](most, k / 100) for k in range(100)]
        assert min(users) >= 1 and max(users) == most


def test_the_same_seed_wants_the_same() -> None:
    def wanted(seed: int, number: int) -> list[Any]:
        rng = rng_of(seed, 0, number)
        return [draw(rng, 5.5, WEIGHTS) for _ in range(20)]

    assert wanted(1, 0) == wanted(1, 0)
    assert wanted(1, 0) != wanted(1, 1)
    assert wanted(1, 0) != wanted(2, 0)
    assert all(1 <= each.patience <= 3 for each in wanted(1, 0))  # of four fragments
