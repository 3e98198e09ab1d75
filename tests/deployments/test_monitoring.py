"""Dashboards, rules and the scrape job: as they lie in k8s/monitoring, before promtool and before a real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from deployments import monitoring
from deployments.cli import app
from deployments.keys import new_key
from deployments.metrics import METRICS, SECONDS, Metric
from helios_core.errors import InvalidInput
from tests.deployments.listening import listening
from tests.deployments.prometheus import assert_all_queries_answer, binary

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
RULES = FOLDER / "rules.yaml"


# ── the files ────────────────────────────────────────────────────────────────


def test_the_files_in_k8s_are_those_that_the_command_writes(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert CliRunner().invoke(app, ["config", "monitoring", "-o", str(folder)]).exit_code == 0
    made = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert set(made) == set(monitoring.files())
    for name, text in made.items():
        assert text == (FOLDER / name).read_text(), f"{name} is old: helios config monitoring -o k8s/monitoring"
    answer = CliRunner().invoke(app, ["config", "monitoring", "-o", str(folder / "rules.yaml")])
    assert isinstance(answer.exception, InvalidInput) and "can be written" in str(answer.exception)


def test_the_kustomization_names_every_file_that_a_cluster_gets() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (dashboards,) = kustomization["configMapGenerator"]
    assert dashboards["options"]["labels"] == {"grafana_dashboard": "1"}
    named = {*kustomization["resources"], *dashboards["files"]}
    assert named == set(monitoring.files()) - {"rules.yaml", "scrape.yaml"}  # for a Prometheus without the operator


def test_dashboards_are_told_apart_and_explained() -> None:
    boards = [json.loads(text) for name, text in monitoring.files().items() if name.endswith(".json")]
    assert len({board["uid"] for board in boards}) == len(boards) == 3
    for board in boards:
        panels = [panel for panel in board["panels"] if panel["type"] != "row"]
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in board["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24  # none lies on another


def test_the_target_of_the_first_fragment_is_an_edge_of_its_buckets() -> None:
    assert monitoring.FIRST_FRAGMENT_SECONDS in SECONDS


# ── names ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_shown_and_is_missed_under_another_name(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = [replace(each, name="helios_other") if each == metric else each for each in METRICS]
    monkeypatch.setattr(monitoring, "METRICS", renamed)
    with pytest.raises(ValueError, match=f"no metric is named '{metric.name}'; METRICS has .*helios_other"):
        monitoring.files()


@pytest.mark.parametrize("name", ["helios_retries_total", "helios_videos_ended_total", "helios_replicas"])
def test_a_label_that_is_renamed_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = [replace(each, labels={"other": ("a", "b")}) if each.name == name else each for each in METRICS]
    monkeypatch.setattr(monitoring, "METRICS", renamed)
    with pytest.raises(ValueError, match=rf"{name} has no label '\w+'; it has other"):
        monitoring.files()


@pytest.mark.parametrize(
    ("arguments", "labels", "message"),
    [
        (("helios_sampling", "counter"), {}, "helios_sampling is a gauge; it is used as a counter"),
        (("helios_sampling", "gauge"), {"part": "sampler"}, "helios_sampling has no label 'part'; it has none"),
        (
            ("helios_videos_ended_total", "counter"),
            {"status": "done"},
            "label status of helios_videos_ended_total is never 'done'; it is one of completed, failed, cancelled",
        ),
        (("helios_real_time_factor", "histogram", "_bucket"), {"le": "1"}, "label le .* is never '1'; .* 1.0, 1.1"),
        (("helios_real_time_factor", "histogram", "_count"), {"le": "1.0"}, "has no label 'le'"),
    ],
)
def test_a_wrong_kind_label_or_value_is_refused(
    arguments: tuple[str, ...], labels: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        monitoring.series(*arguments, **labels)


# ── rules, before promtool ───────────────────────────────────────────────────


def promtool(*arguments: object) -> str:
    run = subprocess.run([binary("promtool"), *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_rules_and_scrape_job_are_valid() -> None:
    count = len(monitoring.recordings()) + len(monitoring.alerts())
    assert f"{count} rules found" in promtool("check", "rules", "--lint-fatal", RULES)
    promtool("check", "config", "--syntax-only", "--lint-fatal", FOLDER / "scrape.yaml")


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for alert in monitoring.alerts():
        assert re.fullmatch(r"[A-Z`].+[.]", alert.runbook) and re.fullmatch(r"[A-Z{].+[.]", alert.summary)
        assert re.fullmatch(r"\d+m", alert.holds_for) and alert.severity in ("critical", "warning")


# A value a minute, 0 to 90, of a service that makes a video of 4 chunks (5 s) a minute and keeps its promises.
MINUTES = 90
COMPLETED = 'helios_videos_ended_total{status="completed"}'
FAILED = 'helios_videos_ended_total{status="failed"}'
FIRST = "helios_time_to_first_fragment_seconds_bucket"
SAMPLERS = 'helios_replicas{part="sampler"}'
LOST = 'helios_retries_total{part="sampler",reason="replica_lost"}'
CHECKED = 'helios_safety_checks_total{part="frames",outcome="allowed"}'
REFUSED = 'helios_safety_checks_total{part="frames",outcome="refused"}'
LET_THROUGH = 'helios_safety_checks_total{part="prompt",outcome="let_through"}'


def rising(by: float) -> str:
    return f"0+{by}x{MINUTES}"


def steady(value: float) -> str:
    return f"{value}x{MINUTES}"


HEALTHY = {
    "helios_videos_running": steady(2),
    "helios_queue_depth": steady(1),
    "helios_store_up": steady(1),
    SAMPLERS: steady(2),
    COMPLETED: rising(1),
    FAILED: rising(0),
    LOST: rising(0),
    CHECKED: rising(4),
    REFUSED: rising(0),
    LET_THROUGH: rising(0),
    "helios_chunks_committed_total": rising(4),
    "helios_frames_committed_total": rising(120),
    "helios_viewer_stall_seconds_total": rising(0),
    FIRST + '{le="1.0"}': rising(1),
    FIRST + '{le="5.0"}': rising(1),
    FIRST + '{le="10.0"}': rising(1),
    FIRST + '{le="+Inf"}': rising(1),
    'helios_real_time_factor_bucket{le="1.0"}': rising(0),
    "helios_real_time_factor_count": rising(1),
}
# What is otherwise ▸ the alerts that fire in the end.
CASES: list[tuple[str, dict[str, str | None], set[str]]] = [
    ("all is well", {}, set()),
    ("nothing happens", dict.fromkeys(HEALTHY, steady(0)) | {SAMPLERS: steady(2), "helios_store_up": steady(1)}, set()),
    ("94 % in time", {FIRST + '{le="1.0"}': rising(0.5), FIRST + '{le="5.0"}': rising(0.94)}, {"FirstFragmentLate"}),
    ("96 % in time", {FIRST + '{le="1.0"}': rising(0.5), FIRST + '{le="5.0"}': rising(0.96)}, set()),
    ("late for four minutes", {FIRST + '{le="5.0"}': "_x86 0x3"}, set()),
    ("6 s of stalls in 500", {"helios_viewer_stall_seconds_total": rising(0.06)}, {"ViewersStall"}),
    ("4 s of stalls in 500", {"helios_viewer_stall_seconds_total": rising(0.04)}, set()),
    ("6 % slow", {'helios_real_time_factor_bucket{le="1.0"}': rising(0.06)}, {"VideosSlowerThanPlayback"}),
    ("4 % slow", {'helios_real_time_factor_bucket{le="1.0"}': rising(0.04)}, set()),
    ("every fifth video fails", {FAILED: rising(0.25)}, {"VideosFail", "VideosFailSlowly"}),
    ("every tenth video fails", {FAILED: rising(0.111)}, {"VideosFailSlowly"}),
    ("one in twenty fails", {FAILED: rising(0.05)}, set()),
    ("every second video failed, 50 minutes ago", {FAILED: "0x30 1+1x9 10x50"}, set()),
    ("every video fails for five minutes", {FAILED: "0x85 8+8x4", COMPLETED: "0+1x85 85x4"}, {"VideosFail"}),
    ("three videos, and all fail", {COMPLETED: rising(0), FAILED: "0x85 1 2 3x2"}, {"VideosFail"}),
    ("two videos, and both fail", {COMPLETED: rising(0), FAILED: "0x86 1 2x2"}, set()),
    ("6 retries in 100 chunks", {LOST: rising(0.24)}, {"Retries"}),
    ("4 retries in 100 chunks", {LOST: rising(0.16)}, set()),
    ("retries and no chunk", {LOST: rising(1), "helios_chunks_committed_total": rising(0)}, {"Retries"}),
    ("every check fails", {CHECKED: rising(0), REFUSED: rising(4)}, {"SafetyChecksFail"}),
    ("now and then a check fails, open", {LET_THROUGH: rising(0.5)}, {"SafetyChecksFail"}),
    ("checks failed, 20 minutes ago", {REFUSED: "0x60 1+1x9 10x20"}, set()),
    ("the store is away", {"helios_store_up": steady(0)}, {"StoreAway"}),
    ("the store was away", {"helios_store_up": "0x80 1x9"}, set()),
    ("no sampler", {SAMPLERS: steady(0)}, {"NoSampler"}),
    ("no sampler, for nine minutes", {SAMPLERS: "2x80 0x9"}, set()),
    ("no sampler, and nobody waits", {SAMPLERS: steady(0), "helios_queue_depth": steady(0)}, set()),
    ("no Director", dict.fromkeys(HEALTHY), {"DirectorAbsent"}),
    ("no Director, for a minute", {"helios_videos_running": "2x88 stale"}, set()),
]


def test_alerts_fire_and_do_not(tmp_path: Path) -> None:
    assert {name for _, _, firing in CASES for name in firing} == {
        alert.name.removeprefix("Helios") for alert in monitoring.alerts()
    }
    tests = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [
                {"series": series, "values": values} for series, values in {**HEALTHY, **changed}.items() if values
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{MINUTES}m",
                    "exp_samples": [
                        {"labels": f'{{alertname="Helios{alert}"}}', "value": 1} for alert in sorted(firing)
                    ],
                }
            ],
        }
        for name, changed, firing in CASES
    ]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)


def test_a_summary_is_a_sentence_with_the_value(tmp_path: Path) -> None:
    late = {**HEALTHY, FIRST + '{le="1.0"}': rising(0), FIRST + '{le="5.0"}': rising(0)}
    (alert,) = [alert for alert in monitoring.alerts() if alert.name == "HeliosFirstFragmentLate"]
    expected = {
        "exp_labels": {"severity": "warning"},
        "exp_annotations": {
            "summary": "One video in twenty has its first fragment after 9.75s or later; promised are 5 s.",
            "runbook": alert.runbook,
        },
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in late.items()],
        "alert_rule_test": [{"eval_time": f"{MINUTES}m", "alertname": alert.name, "exp_alerts": [expected]}],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", file)


# ── before a real Prometheus ─────────────────────────────────────────────────


@contextmanager
def videos_all_the_while(url: str, token: str) -> Iterator[None]:
    """One after the other, of three chunks."""
    over, errors = threading.Event(), list[BaseException]()

    def make() -> None:
        try:
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as http:
                while not over.is_set():
                    body: dict[str, Any] = {"prompt": "a red sun", "seconds": 4, "size": "64x64"}
                    http.post("/v1/videos/stream", json=body).raise_for_status()
        except httpx.HTTPError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not errors


def test_every_query_answers_on_a_real_prometheus(tmp_path: Path) -> None:
    (token, key), (metrics_token, metrics_key) = new_key("acme", "videos", None), new_key(None, "metrics", None)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [key.model_dump(), metrics_key.model_dump()]}))
    with listening(tmp_path, keys=str(keys)) as service, videos_all_the_while(service.url, token):
        assert_all_queries_answer(f"{service.url}/metrics", metrics_token, FOLDER)
