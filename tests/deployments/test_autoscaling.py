"""The rules of autoscaling as tables, and what the Director tells of its demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import for_all, rate, replicas, samplers
from deployments.graph import Load, ServeGraph


@dataclass
class Count:
    timestamp: float
    value: float


@dataclass
class Context:
    """As much of Serve's as the policy reads."""

    deployment_name: str
    aggregated_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    raw_metrics: dict[str, dict[str, list[Count]]] = field(default_factory=dict)
    total_num_requests: float = 0.0
    config: AutoscalingConfig = field(default_factory=lambda: AutoscalingConfig(target_ongoing_requests=200))


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
        (0.8, 0.8, 1),
        (0.81, 5, 2),
        (1.0, 9, 2),  # one that is always at work may be too few
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
    assert rate([Count(*count) for count in counts]) == expected


def told(**figures: float) -> Context:
    """A Director that reports means, and counts that grew by as much a second."""
    names = {name.replace("__", "/"): value for name, value in figures.items()}
    return Context(
        "Director",
        {name: {"replica": value} for name, value in names.items()},
        {name: {"replica": [Count(10, 3), Count(12, 3 + 2 * value)]} for name, value in names.items()},
    )


def test_the_policy_sizes_what_the_director_tells_of() -> None:
    director = told(Sampler__wanting=3, VaeDecoder__calls=2, VaeDecoder__work=0.9, TextEncoder__calls=0)
    director.raw_metrics["TextEncoder/work"] = {"replica": []}
    contexts = {name: Context(name) for name in ("Sampler", "VaeDecoder", "TextEncoder")}
    ingress = Context("Ingress", total_num_requests=300)
    wanted, state = replicas({"Director": director, **contexts, "Ingress": ingress})
    assert (wanted, state) == ({"Sampler": 3, "VaeDecoder": 2, "TextEncoder": 0, "Ingress": 1.5}, {})


def test_nothing_changes_while_there_is_no_director() -> None:
    """An old one that died has no figures left, and the next one has told none yet."""
    for director in ({}, {"Director": Context("Director")}):
        wanted, _ = replicas({**director, "Sampler": Context("Sampler"), "VaeDecoder": Context("VaeDecoder")})
        assert wanted == {}


class Handle:
    def __init__(self, name: str) -> None:
        self.deployment_name = name


def test_the_demand_is_told_by_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.graph import ModelHandles

    vae: Any = Handle("VaeDecoder")
    models: Any = {
        model: ModelHandles("", Handle(f"TextEncoder-{model}"), Handle(f"Sampler-{model}"), vae)  # type: ignore[arg-type]
        for model in ("a", "b")
    }
    graph = ServeGraph(models)
    with graph._loads["VaeDecoder"].call():
        assert graph.demand({"a": 2, "b": 0}) == {
            "Sampler-a/wanting": 2,
            "Sampler-b/wanting": 0,
            **{f"{name}/{what}": 0 for name in ("TextEncoder-a", "TextEncoder-b") for what in ("calls", "work")},
            "VaeDecoder/calls": 1,
            "VaeDecoder/work": 0,
        }
    lives = {"TextEncoder-a": 1, "TextEncoder-b": 0, "Sampler-a": 2, "Sampler-b": 3, "VaeDecoder": 4}
    monkeypatch.setattr("deployments.graph.live_replicas", lambda handle: lives[handle.deployment_name])
    parts = ("text_encoder", "sampler", "vae_decoder")
    assert [graph.replicas(part) for part in parts] == [1, 5, 4]  # what several models share counts once


def test_a_call_that_fails_is_under_way_no_more() -> None:
    load = Load()
    with pytest.raises(ValueError), load.call():
        raise ValueError
    assert load.calls == 0
