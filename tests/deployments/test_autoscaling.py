"""The rules of autoscaling as tables, and what the Director tells of its demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import for_all, rate, recent, replicas, samplers
from deployments.graph import Load, ModelHandles, ServeGraph


@dataclass
class Figure:
    timestamp: float
    value: float


@dataclass
class Context:
    """As much of Serve's as its wrapper and the policy read."""

    deployment_name: str
    raw_metrics: dict[str, dict[str, list[Figure]]] = field(default_factory=dict)
    total_num_requests: float = 0.0
    current_num_replicas: int = 1
    target_num_replicas: int = 1
    policy_state: dict[str, Any] = field(default_factory=dict)
    config: AutoscalingConfig = field(
        default_factory=lambda: AutoscalingConfig(
            min_replicas=0, max_replicas=9, target_ongoing_requests=200, upscale_delay_s=0, downscale_delay_s=0
        )
    )


@pytest.mark.parametrize(
    ("wanting", "expected"), [(0, 0), (0.05, 0), (0.4, 1), (1, 1), (1.1, 1), (1.2, 2), (2.9, 3), (3, 3), (200, 200)]
)
def test_a_sampler_for_each_video_that_wants_a_chunk(wanting: float, expected: int) -> None:
    assert samplers(wanting) == expected


@pytest.mark.parametrize(
    ("work", "calls", "expected"),
    [
        (0, 0, 0),  # idle
        (0, 0.2, 1),  # the first call of all, which has told no seconds yet
        (0.1, 0, 1),
        (0.5, 1.05, 1),
        (0.5, 1.5, 2),  # long calls, of which few are over yet: what waits tells more
        (0.8, 0.8, 1),
        (0.81, 1, 2),
        (1.0, 1, 2),  # one that is always at work may be too few
        (2.4, 2.4, 3),
        (2.41, 0, 4),
    ],
)
def test_as_many_decoders_as_work_four_fifths_of_their_time(work: float, calls: float, expected: int) -> None:
    assert for_all(work, calls) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([], 0), ([(1, 5)], 0), ([(1, 5), (1, 6)], 0), ([(1, 5), (2, 5), (5, 7)], 0.5), ([(1, 5), (3, 5)], 0)],
)
def test_rate(counts: list[tuple[float, float]], expected: float) -> None:
    assert rate([Figure(*count) for count in counts]) == expected


@pytest.mark.parametrize(
    ("values", "expected"), [([], 0), ([3], 3), ([9, 9, 1, 2, 3, 4, 5], 3), ([0] * 30 + [2] * 5, 2)]
)
def test_what_is_wanted_now_is_the_mean_of_five_seconds(values: list[float], expected: float) -> None:
    assert recent([Figure(10 + second, value) for second, value in enumerate(values)]) == expected


@pytest.mark.parametrize("seconds", [0.4, 3, 8, 10])
def test_one_decoder_that_is_always_at_work_is_too_few_whenever_one_looks(seconds: float) -> None:
    """Its calls, of which several wait, tell of their seconds only when they are over."""
    for now in range(30, 60):
        work = [Figure(t, t // seconds * seconds) for t in range(now - 30, now + 1)]
        assert for_all(rate(work), calls=1.5) >= 2


def told(**figures: float) -> Context:
    """A Director that has told these for half a minute; a count grew by as much a second."""
    raw = {}
    for name, value in figures.items():
        values = [value * second if name.endswith("work") else value for second in range(31)]
        raw[name.replace("__", "/")] = {"replica": [Figure(10.0 + t, each) for t, each in enumerate(values)]}
    return Context("Director", raw)


def test_the_policy_sizes_what_the_director_tells_of() -> None:
    director = told(Sampler__wanting=3, VaeDecoder__calls=0.9, VaeDecoder__work=0.9, TextEncoder__calls=0)
    director.raw_metrics["TextEncoder/work"] = {"replica": []}
    contexts = {name: Context(name) for name in ("Sampler", "VaeDecoder", "TextEncoder")}
    ingress = Context("Ingress", total_num_requests=300)
    wanted, state = replicas({"Director": director, **contexts, "Ingress": ingress})
    assert (wanted, state) == ({"Sampler": 3, "VaeDecoder": 2, "TextEncoder": 0, "Ingress": 1.5}, {})


@pytest.mark.parametrize(("alive", "wanting", "expected"), [(0, 8, 8), (0, 1, 1), (0, 0, 0), (1, 0, 0), (2, 5, 5)])
def test_what_serve_makes_of_it(alive: int, wanting: float, expected: int) -> None:
    """An empty pool grows at once to what is wanted, as no call waits in Serve; then it would begin with one."""
    contexts = {
        "Director": told(Sampler__wanting=wanting),
        "Sampler": Context("Sampler", current_num_replicas=alive, target_num_replicas=alive),
    }
    decided, _ = _apply_app_level_autoscaling_config(replicas)(contexts)
    assert decided["Sampler"] == expected


def test_nothing_changes_while_there_is_no_director() -> None:
    """An old one that died has no figures left, and the next one has told none yet."""
    for director in ({}, {"Director": Context("Director")}):
        wanted, _ = replicas({**director, "Sampler": Context("Sampler"), "VaeDecoder": Context("VaeDecoder")})
        assert wanted == {}


class Handle:
    def __init__(self, name: str) -> None:
        self.deployment_name = name


def test_the_demand_is_told_by_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    vae: Any = Handle("VaeDecoder")
    models: Any = {
        model: ModelHandles("", Handle(f"TextEncoder-{model}"), Handle(f"Sampler-{model}"), vae)  # type: ignore[arg-type]
        for model in ("a", "b")
    }
    lives = {"TextEncoder-a": 1, "TextEncoder-b": 0, "Sampler-a": 2, "Sampler-b": 0, "VaeDecoder": 4}
    monkeypatch.setattr("deployments.graph.live_replicas", lambda handle: lives[handle.deployment_name])
    graph = ServeGraph(models)
    with graph._loads["VaeDecoder"].call():
        assert graph.demand({"a": 2, "b": 0}) == {
            "Sampler-a/wanting": 2,
            "Sampler-b/wanting": 0,
            **{f"{name}/{what}": 0 for name in ("TextEncoder-a", "TextEncoder-b") for what in ("calls", "work")},
            "VaeDecoder/calls": 0.5,
            "VaeDecoder/work": 0,
        }
    parts = ("text_encoder", "sampler", "vae_decoder")
    assert [graph.replicas(part) for part in parts] == [1, 2, 4]  # what several models share counts once
    assert [graph.samplers(model) for model in "ab"] == [2, 0]


def test_a_call_that_fails_is_under_way_no_more() -> None:
    load = Load(1)
    with pytest.raises(ValueError), load.call():
        raise ValueError
    assert load.calls == 0
