"""What `helios plan` says, and what it refuses to say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from deployments import planning, scheduling
from deployments.chunk_times import GPUS, SERVICE, Times, estimated, of_report, read_times
from deployments.config import ConfigError
from deployments.plan_config import DAY_HOURS, PlanConfig, Targets, Traffic
from deployments.planning import DIRECTOR_BUSY, Figures, Plan, Unreachable, plan
from deployments.simulation import Asked, Fleet, Seen
from helios_core.errors import HeliosError, InvalidInput
from tests.deployments.test_cli import Run, helios

__all__ = ["helios"]

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs/plans").glob("*.yaml"))
# Little traffic in few hours, so that a day is simulated in a second or two.
NIGHT = [0.0] * 18 + [120.0, 240.0, 120.0] + [0.0] * 3
SMALL: dict[str, Any] = {"traffic": {"videos_per_hour": NIGHT, "seconds": 10}}


def config(**changes: Any) -> PlanConfig:
    data = json.loads(json.dumps(SMALL))
    for name, value in changes.items():
        data.setdefault(name, {})
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    return PlanConfig.parse(data, "test")


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(config())


# The plan


def test_it_meets_its_targets_and_one_sampler_less_would_not(small: Plan) -> None:
    assert small.peak.missed(small.config.targets) == [] and small.knee is not None and small.knee >= 1
    cell = planning._Cell(small.config, small.times)
    fewer = small.replicas["sampler"] - 1
    assert fewer >= 1 and cell.figures(cell._with(cell._fleet(9), fewer)).missed(small.config.targets)
    loads = list(small.loads)
    assert small.loads[loads[-1]].missed(small.config.targets) or small.knee == loads[-1] == max(planning.LOADS)


def test_it_is_the_same_every_time_and_another_with_another_seed(small: Plan) -> None:
    assert plan(config()) == small
    assert plan(config(seed=2)).hours != small.hours


def test_its_costs_are_its_hours(small: Plan) -> None:
    prices = small.config.hardware.prices()
    others = sum(prices[part] * count for part, count in small.replicas.items() if part != "sampler")
    assert small.cost_per_day == pytest.approx(small.sampler_hours * prices["sampler"] + DAY_HOURS * others)
    videos = sum(row.videos for row in small.hours)
    assert small.cost_per_minute == pytest.approx(small.cost_per_day / (videos * 10 / 60))
    assert small.sampler_hours == pytest.approx(sum(row.samplers for row in small.hours))
    assert small.replicas["sampler"] < small.sampler_hours < small.replicas["sampler"] * DAY_HOURS
    fixed = plan(config(autoscale=False))
    assert fixed.replicas == small.replicas and fixed.sampler_hours == pytest.approx(3 * DAY_HOURS)
    assert small.replicas["sampler"] == 3


def test_more_traffic_steps_or_slower_chips_take_more(small: Plan) -> None:
    samplers = small.replicas["sampler"]
    assert plan(config(traffic={"peak_factor": 3.0})).replicas["sampler"] > samplers
    assert plan(config(hardware={"gpu": "h200-fp8"})).replicas["sampler"] <= samplers
    fast, slow = (
        config(hardware={"gpu": "h100", "steps": steps}, targets={"stall_free": 0, "first_fragment_p95_s": 10})
        for steps in ([1, 1, 1], [2, 2, 2])
    )
    assert plan(slow).replicas["sampler"] > plan(fast).replicas["sampler"]


def test_a_change_in_the_directors_scheduling_changes_the_plan(small: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: one turn at a time, however many samplers there are."""
    granted = scheduling.granted
    monkeypatch.setattr(scheduling, "granted", lambda order, sampling, samplers: granted(order, sampling, 1))
    monkeypatch.setattr(planning, "MOST_SAMPLERS", 4)
    with pytest.raises(Unreachable):
        plan(config())


def test_past_one_director_there_are_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = config(traffic={"videos_per_hour": None, "viewers": 8, "seconds": 5, "keys": 3})
    monkeypatch.setattr(planning, "DAY_HOURS", 1)
    monkeypatch.setattr(planning, "WINDOW_S", 300.0)
    one = plan(whole)
    monkeypatch.setattr(planning, "DIRECTOR_BUSY", 0.04)  # a Director that is busy with few chunks
    several = plan(whole)
    led = 8 / 1.375 * SERVICE.director_s
    assert one.cells == 1 and led > 2 * 0.04
    assert several.cells == several.replicas["director"] == -(-led * 1.1 // 0.04)  # five seconds are four chunks
    assert several.replicas["sampler"] > one.replicas["sampler"]  # what waits in one cell cannot be made in another
    assert DIRECTOR_BUSY > 0.04


def test_batch_may_be_left_from_the_day_before() -> None:
    """What can only just be done has no end on the first day, when it begins with nothing."""
    steady = {"videos_per_hour": 100, "seconds": 1, "realtime": 0}
    slow = {"gpu": "l40s", "steps": [16, 16, 16], "amplify_first_chunk": False}
    for due_s in (None, 86_400):
        planned = plan(config(traffic=steady, hardware=slow, targets={"batch_p95_s": due_s}))
        assert 1.2 < 100 / 3600 * planned.times.turn_s < 1.4 and planned.replicas["sampler"] == 2


def test_what_nobody_saw_the_end_of_is_missed() -> None:
    def video(status: Any, **seen: Any) -> Seen:
        return Seen(Asked(0, 10), status, **seen)

    fleet, targets = Fleet(1), Targets(first_fragment_p95_s=5)
    for seen, missed in [
        ([video("completed", first_fragment_s=2.0, ended_s=9.0)], []),
        ([video("unfinished")], ["first_fragment_p95_s"]),
        ([video("left", ended_s=6.0)], ["first_fragment_p95_s"]),
        ([video("left", ended_s=3.0)], []),
        ([video("completed", first_fragment_s=2.0, stalls=1, ended_s=9.0)], ["stall_free"]),
        ([video("completed", first_fragment_s=2.0, ended_s=9.0), video("refused")], ["refused"]),
        ([], []),
    ]:
        assert Figures.of(seen, [], 1.0, fleet).missed(targets) == missed


def test_decoders_are_added_where_they_are_what_is_missing() -> None:
    """One is at work for 79 % of the time, and makes first fragments wait for three seconds."""
    slow = config(traffic={"videos_per_hour": 2227, "seconds": 5.5}, targets={"first_fragment_p95_s": 3})
    cell = planning._Cell(slow, slow.hardware.chunk_times())
    few = cell._fleet(40)
    assert few.vae_decoders == 1 and "first_fragment_p95_s" in cell.figures(few).missed(slow.targets)
    assert cell._with_others(few).vae_decoders == 2


def test_batch_is_judged_by_the_day() -> None:
    night = config(traffic={"realtime": 0, "seconds": 5}, targets={"batch_p95_s": 3600})
    planned = plan(night)
    assert planned.peak.batch_p95_s is not None and planned.peak.batch_p95_s <= 3600
    assert planned.peak.first_fragment_p95_s is None and planned.peak.refused is None
    assert plan(night.model_copy(update={"targets": Targets(batch_p95_s=8)})).replicas["sampler"] > 1
    both = plan(config(traffic={"realtime": 0.5, "seconds": 5}, targets={"batch_p95_s": 600}))
    assert both.day.batch_p95_s is not None and both.day.batch_p95_s <= 600
    assert both.peak.first_fragment_p95_s is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": {"first_fragment_p95_s": 2}},
            "first_fragment_p95_s is 2; allowed: more than 2.29, .*NOT MEASURED",
        ),
        (
            {"hardware": {"steps": [2, 2, 2]}},
            r"stall_free is 0.95; allowed: 0, as a chunk takes 1.85 s and plays .*1.38",
        ),
        ({"targets": {"stall_free": 1.0}, "traffic": {"image": 1.0, "seconds": 60}}, "miss .*stall_free; allowed: 3"),
    ],
)
def test_what_no_fleet_can_do_is_said(changes: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_SAMPLERS", 3)
    with pytest.raises(Unreachable, match=message):
        plan(config(**changes))


# What it is told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traffic": {"viewers": 5}}, "test: traffic is .* allowed: one of the two"),
        ({"traffic": {"videos_per_hour": None}}, "allowed: one of the two"),
        ({"traffic": {"videos_per_hour": [1, 2]}}, "videos_per_hour has 2 numbers; allowed: one, or 24"),
        ({"traffic": {"videos_per_hour": 0}}, "0 videos are asked for in a day; allowed: 1 or more"),
        ({"traffic": {"videos_per_hour": [-1.0] * 24}}, r"test: traffic.videos_per_hour.0 is -1.0: .* equal to 0"),
        ({"traffic": {"videos_per_hour": float("nan")}}, "test: traffic.videos_per_hour.0 is nan: .* finite"),
        ({"traffic": {"videos_per_hour": "5"}}, "test: traffic.videos_per_hour.* is '5'"),
        ({"traffic": {"videos_per_hour": None, "viewers": 5, "realtime": 0}}, "viewers is 5 and realtime 0; allowed"),
        ({"traffic": {"seconds": {}}}, "seconds is .*; allowed: lengths with weights"),
        ({"traffic": {"seconds": 0}}, r"test: traffic.seconds.* is 0.0: .*greater than 0"),
        ({"traffic": {"seconds": {"-1": 1}}}, r"test: traffic.seconds.*is -1.0: .*greater than 0"),
        ({"hardware": {"steps": [0, 1, 1]}}, "test: hardware.steps.0 is 0: .*greater than or equal to 1"),
        ({"hardware": {"preset": "draft"}}, "preset is 'draft'; allowed: realtime, quality, and no steps"),
        ({"hardware": {"times": "bench.json"}}, "times are of a machine whose price is not known; allowed: a price"),
        ({"autoscale": "off"}, "test: autoscale is 'off'"),
        ({"traffic": {"realtime": 1.5}}, "test: traffic.realtime is 1.5: .*less than or equal to 1"),
        ({"traffic": {"peak_factor": 0.5}}, "test: traffic.peak_factor is 0.5"),
        ({"traffic": {"viewer": 5}}, "test: traffic.viewer is 5: Extra inputs"),
        ({"targets": {"first_fragment_p99_s": 5}}, "test: targets.first_fragment_p99_s is 5"),
        ({"hardware": {"steps": "1,1,1"}}, "test: hardware.steps is '1,1,1'"),
        ({"seed": "one"}, "test: seed is 'one'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        ({"gpu": "h300"}, "hardware.gpu is 'h300'; allowed: one of h100, h200"),
        ({"steps": [50]}, "hardware.steps is '50'; allowed: 3 numbers"),
        ({"times": "nowhere.json", "price": 1}, "hardware.times is 'nowhere.json'; allowed: a readable JSON file"),
    ],
)
def test_hardware_that_is_not_known_is_named(hardware: Any, message: str) -> None:
    with pytest.raises(HeliosError, match=message):
        plan(config(hardware=hardware))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_read(file: Path) -> None:
    assert PlanConfig.parse(yaml.safe_load(file.read_text()), str(file)).hardware.chunk_times().mark == "NOT MEASURED"


def test_traffic_comes_as_it_was_told() -> None:
    traffic = Traffic(
        videos_per_hour=(600.0,) * 12 + (0.0,) * 12, seconds={5.0: 3.0, 20.0: 1.0}, realtime=0.75, image=0.5
    )
    asked = list(traffic.asked(traffic.by_hour.__getitem__, 24, seed=3))
    assert len(asked) == pytest.approx(7200, rel=0.05) and max(each.at for each in asked) < 12 * 3600
    assert [each.at for each in asked] == sorted(each.at for each in asked)
    share = {
        name: sum(getattr(each, name) == value for each in asked) / len(asked)
        for name, value in (("seconds", 5.0), ("priority", "realtime"), ("image", True))
    }
    assert share == pytest.approx({"seconds": 0.75, "priority": 0.75, "image": 0.5}, abs=0.03)
    assert traffic.mean_seconds == 8.75 and traffic.mean_chunks == (3 * 4 + 15) / 4
    assert Traffic(viewers=100, seconds={30.0: 1.0}).by_hour == (12_000,) * 24
    assert Traffic(viewers=100, seconds={30.0: 1.0}, leave=1.0, realtime=0.5).by_hour == (48_000,) * 24


# How long parts take


def test_estimates_are_those_of_performance_md_and_say_that_they_are() -> None:
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+), ([\d.]+), ([\d.]+) \| ([\d.]+) \| not measured \|$",
        (ROOT / "PERFORMANCE.md").read_text(),
        re.MULTILINE,
    )
    assert {name: (tuple(map(float, steps)), float(decode)) for name, *steps, decode in rows} == {
        name: (gpu.steps_s, gpu.decode_s) for name, gpu in GPUS.items()
    }
    times = estimated("h100", (1, 1, 1), amplified=True)
    assert times.told.startswith("NOT MEASURED: estimates for h100")
    sampled = 0.114 + 0.198 + 0.604
    assert times.turn_s == pytest.approx(sampled + SERVICE.turn_s)
    assert times.first_turn_s == pytest.approx(2 * sampled + SERVICE.turn_s)
    assert estimated("h100", (1, 1, 1), amplified=False).first_turn_s == times.turn_s


def test_times_of_a_bench_are_its_steps_and_its_decoder() -> None:
    file = ROOT / "benchmarks/cpu-10-layers.json"
    sections = json.loads(file.read_text())["sections"]
    rows = {row["what"]: row["median_s"] for name in ("begin", "stages", "vae") for row in sections[name]}
    steps = [next(s for what, s in rows.items() if what.startswith(f"a step of stage {stage},")) for stage in (1, 2, 3)]
    times = read_times(file, (2, 1, 3), amplified=True)
    sampled = 2 * steps[0] + steps[1] + 3 * steps[2]
    assert times.turn_s == pytest.approx(rows["begin_chunk"] + sampled + SERVICE.turn_s)
    assert times.first_turn_s == pytest.approx(times.turn_s + sampled)
    assert times.render_s == pytest.approx(rows["a chunk decoded"] + SERVICE.render_s)
    assert times.mark.startswith("measured, but NOT store_s, text_s") and "director_s" in times.mark
    assert "cpu-10-layers.json" in times.source and "AMD EPYC" in times.source


REPORT = {
    "turn_s": 1.0,
    "first_turn_s": 2.0,
    "decode_s": 0.2,
    "encode_s": 0.05,
    "store_s": 0.02,
    "commit_s": 0.01,
    "text_s": 0.03,
    "media_s": None,
    "accept_s": 0.04,
    "deliver_s": None,
    "director_s": 0.01,
    "ingress_s": 0.005,
}


def test_times_of_a_load_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"times": REPORT}))
    times = read_times(tmp_path / "report.json", (1, 1, 1), amplified=True)
    assert times.mark == "measured, but NOT media_s, deliver_s"
    assert replace(times, source="", estimated=()) == Times(
        turn_s=1.0,
        first_turn_s=2.0,
        render_s=0.25,
        store_s=0.03,
        text_s=0.03,
        media_s=SERVICE.media_s,
        accept_s=0.04,
        deliver_s=SERVICE.deliver_s,
        director_s=0.01,
        ingress_s=0.005,
    )
    with pytest.raises(InvalidInput, match=r"hardware.times is 'here'; allowed: a load report with turn_s"):
        of_report({**REPORT, "turn_s": None}, "here")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InvalidInput, match="what helios bench --json or a load test wrote"):
        read_times(tmp_path / "other.json", (1, 1, 1), amplified=True)


# The command


def test_the_command_compares_draws_and_writes(helios: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(SMALL))
    status, errors = helios(
        "plan", tmp_path / "plan.yaml", "--set", "traffic.keys=3", "--what-if", "hardware.gpu=h200 autoscale=false",
        "--plot", tmp_path / "plan.png", "--json", tmp_path / "plan.json",
    )  # fmt: skip
    assert (status, errors) == (0, "")
    made = json.loads((tmp_path / "plan.json").read_text())
    assert set(made) == {"as asked", "hardware.gpu=h200 autoscale=false"}
    assert made["as asked"]["config"]["traffic"]["keys"] == 3
    assert ["turn_s" in each["times"]["estimated"] for each in made.values()] == [True, True]
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((40, 40)).getdata())) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "traffic.viewers"], "--set is 'traffic.viewers'; allowed: SETTING=VALUE"),
        (["--set", "traffic=1", "--set", "traffic.viewers=2"], "allowed: a setting inside traffic"),
        (["nowhere.yaml"], "FILE is 'nowhere.yaml'; allowed: readable YAML"),
        (["--set", "traffic.viewers=["], "--set is 'traffic.viewers=['; allowed: a VALUE in YAML"),
        (["--replay", "nowhere.json"], "--replay is 'nowhere.json'; allowed: a load test's report"),
        (["--replay", "a.json", "--set", "seed=1"], "allowed: no FILE, --set"),
        ([], "the command line: traffic is {}: Field required"),
    ],
)
def test_the_command_refuses_in_a_line(helios: Run, arguments: list[str], message: str) -> None:
    status, errors = helios("plan", *arguments)
    assert status in (1, 2) and message in " ".join(errors.split())


def test_a_replay_compares_what_was_measured_with_what_is_simulated(helios: Run, tmp_path: Path) -> None:
    """Two videos of two chunks on one sampler: as it would go, but that the second took a second longer."""
    common = {"seconds": 2.75, "priority": "realtime", "image": False, "key": 0, "stalls": 0, "stall_s": 0.0}
    videos = [
        {**common, "at": 0.0, "status": "completed", "first_fragment_s": 1.35, "ended_s": 3.35, "left_at_s": None},
        {**common, "at": 0.5, "status": "completed", "first_fragment_s": 2.85, "ended_s": 4.85, "left_at_s": 1.0},
    ]
    report = {
        "setting": {"samplers": 1, "vae_decoders": 1, "text_encoders": 1},
        "videos": videos,
        "times": {**REPORT, "first_turn_s": 1.0, "text_s": 0.0, "accept_s": 0.02, "deliver_s": 0.05, "store_s": 0.02},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    status, errors = helios("plan", "--replay", tmp_path / "report.json", "--json", tmp_path / "replay.json")
    assert (status, errors) == (0, "")
    made = json.loads((tmp_path / "replay.json").read_text())
    assert made["seconds of video made a second"]["measured"] == pytest.approx(5.5 / 5.35)
    assert made["seconds of video made a second"]["simulated"] == pytest.approx(5.5 / 4.35)
    assert made["first fragment p50, s"] == {"measured": 1.35, "simulated": pytest.approx(1.35)}
    assert made["first fragment p95, s"] == {"measured": 2.85, "simulated": pytest.approx(1.85)}
