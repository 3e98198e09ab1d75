"""Measures, verdict and knee of hand-made videos, against figures that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from load_tests import page, report
from load_tests.report import MEASURES, Run, SloError, judged, knee, quantile, read_slo, verdict
from load_tests.service_metrics import Look

ROOT = Path(__file__).parents[2]
VIDEO: dict[str, Any] = {
    "at": 0.0,
    "kind": "watch",
    "seconds": 4.125,
    "priority": "realtime",
    "key": 0,
    "image": False,
    "status": "completed",
    "accepted_s": 0.1,
    "refused_s": None,
    "again": False,
    "first_fragment_s": 1.0,
    "deliver_s": None,
    "stalls": 0,
    "stall_s": 0.0,
    "cadence_s": [1.0, 0.375],
    "left_at_s": None,
    "ended_s": 2.5,
    "prompt_changed": None,
    "mismatch": False,
    "why": None,
}
REFUSED = VIDEO | {
    "status": "refused",
    "accepted_s": None,
    "first_fragment_s": None,
    "cadence_s": [],
    "refused_s": 0.05,
}
SETTING = {
    "shape": "steady",
    "users": 2,
    "run_time_s": 60,
    "host": "http://h",
    "date": "2026-01-01",
    "versions": {"a": "1"},
}


def value(name: str, *videos: dict[str, Any], **more: Any) -> float | None:
    return MEASURES[name].value(replace(Run(videos, {}, {}), **more))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 5.0), (0.9, 9.0), (0.95, 10.0), (0.99, 10.0), (1.0, 10.0), (0.01, 1.0)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(share: float, expected: float) -> None:
    assert quantile([float(k) for k in range(10, 0, -1)], share) == expected
    assert quantile([], share) is None
    assert quantile([3.0], share) == 3.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("completed", 2),
        ("first_fragment_p50_s", 1.0),
        ("first_fragment_p95_s", 3.0),
        ("cadence_p50_s", 1.0),
        ("cadence_p95_s", 4.0),
        ("stall_free_share", 0.5),
        ("stall_ratio", 2.75 / (2 * 3 * 1.375)),
        ("realtime_factor_p50", 2.75 / 5.0),
        ("accept_p99_s", 0.2),
        ("refusal_p99_s", 0.05),
        ("refused_share", 1 / 3),
    ],
)
def test_measures_of_two_videos_and_one_that_was_refused(name: str, expected: float) -> None:
    slow = VIDEO | {"accepted_s": 0.2, "first_fragment_s": 3.0, "stalls": 1, "stall_s": 2.75, "cadence_s": [4.0, 1.0]}
    assert value(name, VIDEO, slow, REFUSED) == pytest.approx(expected)


def test_only_what_was_accepted_can_be_lost() -> None:
    ends = ["completed", "cancelled", "refused", "unfinished", "failed", "lost"]
    videos = [VIDEO | {"status": status} for status in ends]
    assert value("lost", *videos) == 2
    assert value("unfinished", *videos) == 1
    never = [VIDEO | {"status": status, "accepted_s": None} for status in ("failed", "unfinished")]
    assert value("lost", *never) == value("unfinished", *never) == 0
    assert value("not_accepted", *never, *videos, REFUSED) == 2


def test_changes_of_a_prompt_are_counted_of_those_who_wanted_one() -> None:
    videos = [VIDEO | {"prompt_changed": changed} for changed in (True, False, False, None, True, False)]
    assert value("changes_accepted", *videos) == 2 / 5
    assert value("changes_accepted", VIDEO) is None


def test_errors_are_answers_of_500_and_above_and_none_at_all() -> None:
    assert value("errors_5xx", answers={0: 1, 200: 9, 409: 1, 429: 3, 500: 2, 503: 4}) == 7


def test_memory_is_judged_when_it_has_settled() -> None:
    def points(*sizes: float) -> list[dict[str, float]]:
        return [{"at": 15.0 * k, "rss_mb": size} for k, size in enumerate(sizes)]

    grows = {"A 1": points(0, 100, 101, 102, 103), "B 2": points(50, 50, 52, 54, 56)}  # 1 and 2 MB in 15 s
    assert value("rss_growth_mb_per_min", memory=grows) == pytest.approx(8.0)
    dies = {"B 3": points(500, 500, 500)}
    assert value("rss_growth_mb_per_min", memory=grows | dies) == pytest.approx(8.0)
    begun = {"B 4": [{"at": 50.0 + k, "rss_mb": 100.0 * k} for k in range(10)]}  # not there for a quarter of the minute
    assert value("rss_growth_mb_per_min", memory=grows | begun) == pytest.approx(8.0)
    flat = {"A": points(0, 100, 100, 100, 100)}
    assert value("rss_growth_mb_per_min", memory=flat) == pytest.approx(0.0)
    assert value("rss_growth_mb_per_min", memory={}) is None


@pytest.mark.parametrize(
    ("name", "limit", "measured", "passed"),
    [
        ("first_fragment_p95_s", 2.0, 2.0, True),
        ("first_fragment_p95_s", 2.0, 2.1, False),
        ("stall_free_share", 0.9, 0.9, True),
        ("stall_free_share", 0.9, 0.89, False),
        ("lost", 0, 0.0, True),
        ("lost", 0, 1.0, False),
        ("first_fragment_p95_s", 2.0, None, False),  # nobody saw anything: that is no pass
        ("rss_growth_mb_per_min", 1.0, None, False),
        ("refusal_p99_s", 0.1, None, True),  # nobody was refused
    ],
)
def test_a_limit_is_kept_or_not(name: str, limit: float, measured: float | None, passed: bool) -> None:
    assert judged(name, limit, measured) is passed
    assert verdict({name: measured}, {name: limit}) == [
        {"name": name, "limit": limit, "value": measured, "passed": passed}
    ]


@pytest.mark.parametrize("file", sorted((ROOT / "load_tests").glob("slo*.yaml")), ids=lambda file: file.name)
def test_the_limits_that_are_shipped_can_be_read(file: Path) -> None:
    assert read_slo(file)["lost"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first_fragment_p59_s: 1", ["first_fragment_p59_s", "first_fragment_p50_s", "lost"]),
        ("lost: none", ["lost", "'none'", "a number", "videos"]),
        ("lost: true", ["lost", "True", "a number"]),
        ("[lost]", ["['lost']", "name: limit"]),
        ("", ["None", "name: limit"]),
        ("a: [", ["YAML"]),
    ],
)
def test_an_slo_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text(text)
    with pytest.raises(SloError) as error:
        read_slo(file)
    assert all(word in str(error.value) for word in [str(file), *words])


def test_the_knee_is_the_last_number_of_users_before_it_leaves_the_slo() -> None:
    looks = [Look(float(at), 1 + at // 10, {}) for at in range(40)]  # 1 to 4 users, ten seconds each
    videos = [
        VIDEO | {"at": 10.0 * level + 3, "first_fragment_s": after, "stalls": stalls}
        for level, (after, stalls) in enumerate([(1.0, 0), (2.0, 0), (5.0, 0), (1.0, 0)])
    ]
    slo = {"first_fragment_p95_s": 4.0, "lost": 0.0}
    found = knee(videos, looks, slo)
    assert found is not None
    assert found["users"] == 2  # beyond it is beyond it, whatever comes later
    assert [(level["users"], level["first_fragment_p95_s"]) for level in found["levels"]] == [
        (1, 1.0),
        (2, 2.0),
        (3, 5.0),
        (4, 1.0),
    ]
    assert knee(videos, looks, {"lost": 0.0}) is None
    strict = knee(videos, looks, {"first_fragment_p95_s": 0.5})
    assert strict is not None and strict["users"] is None


def test_where_nobody_sees_what_they_want_to_watch_is_beyond_the_knee(tmp_path: Path) -> None:
    looks = [Look(float(at), 1 + at // 10, {}) for at in range(40)]
    nothing: dict[str, Any] = {"first_fragment_s": None, "cadence_s": [], "status": "unfinished"}
    batch = {"kind": "poll", "priority": "batch", "first_fragment_s": None}
    videos = [VIDEO | {"at": 10.0 * level + 3} | more for level, more in enumerate([{}, batch, nothing, {}])]
    slo = {"first_fragment_p95_s": 4.0}
    found = knee(videos, looks, slo)
    assert found is not None and found["users"] == 1
    assert [(level["users"], level["first_fragment_p95_s"]) for level in found["levels"]] == [
        (1, 1.0),
        (3, None),
        (4, 1.0),
    ]
    page.write(report.make(SETTING, videos, {}, looks, {}, slo), tmp_path)
    assert "The knee" in (tmp_path / "report.html").read_text()


def test_the_page_has_every_limit_and_a_plot_of_what_there_is(tmp_path: Path) -> None:
    made = report.make(SETTING, [VIDEO, REFUSED], {200: 3, 429: 1}, [], {}, {"lost": 0.0, "first_fragment_p95_s": 0.5})
    assert not made["passed"]
    assert [row["passed"] for row in made["slo"]] == [True, False]
    page.write(made, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 2  # first fragments and cadence: nobody looked at the service
    assert "first_fragment_p95_s" in html and "not measured" in html
    assert "http" not in html.replace("http://h", "").replace("http://www.w3.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", ""), "the file needs no other"


def test_the_documentation_lists_every_measure() -> None:
    text = (ROOT / "docs/load-tests.md").read_text()
    missing = [name for name, each in MEASURES.items() if f"| `{name}` | {each.bound} | {each.unit} |" not in text]
    assert missing == []
