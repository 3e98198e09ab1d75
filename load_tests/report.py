"""One report of one run: what it was, every video, what the service says of itself, and a verdict.

`MEASURES` is the table of all that can be asked for in an SLO file; `docs/load-tests.md` has it for people. A report is
plain data, written as JSON; page.py makes a page of it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from load_tests import service_metrics
from load_tests.service_metrics import Look
from load_tests.watching import CHUNK_S

Videos = Sequence[Mapping[str, Any]]
"""As product.py's Video has them."""
Memory = Mapping[str, Sequence[Mapping[str, float]]]
"""Role and id of a process ▸ [{at, rss_mb}], as observing.py sees them."""
KNEE = ("first_fragment_p95_s", "stall_free_share")  # beyond the knee one of these leaves the SLO
SETTLED = 0.25  # a process' memory is judged after this share of its time, when caches are full


@dataclass(frozen=True)
class Run:
    """What measures are taken from. `answers`: HTTP status ▸ how often; 0 is no answer."""

    videos: Videos
    answers: Mapping[int, int]
    memory: Memory


@dataclass(frozen=True)
class Measure:
    """`value`: None if there was nothing to measure, which only a measure with `may_lack` passes."""

    meaning: str
    unit: str
    bound: Literal["at most", "at least"]
    value: Callable[[Run], float | None]
    may_lack: bool = False


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of them does not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else None


def each(videos: Videos, name: str) -> list[float]:
    return [video[name] for video in videos if video[name] is not None]


def watched(run: Run) -> list[Mapping[str, Any]]:
    """Videos of which somebody saw a fragment live."""
    return [video for video in run.videos if video["first_fragment_s"] is not None]


def first_fragment(share: float) -> Callable[[Run], float | None]:
    return lambda run: quantile(each(run.videos, "first_fragment_s"), share)


def cadence(share: float) -> Callable[[Run], float | None]:
    return lambda run: quantile([gap for video in run.videos for gap in video["cadence_s"]], share)


def stall_free_share(run: Run) -> float | None:
    videos = watched(run)
    return sum(not video["stalls"] for video in videos) / len(videos) if videos else None


def stall_ratio(run: Run) -> float | None:
    videos = watched(run)
    seconds = sum(CHUNK_S * (1 + len(video["cadence_s"])) for video in videos)
    return sum(video["stall_s"] for video in videos) / seconds if videos else None


def realtime_factor(run: Run) -> float | None:
    """Of a video that was watched to its end: what came after the first fragment, over the time in which it came."""
    whole = [video for video in watched(run) if video["status"] == "completed" and video["left_at_s"] is None]
    return quantile(
        [(video["seconds"] - CHUNK_S) / sum(video["cadence_s"]) for video in whole if video["cadence_s"]], 0.5
    )


def refused_share(run: Run) -> float | None:
    return sum(video["status"] == "refused" for video in run.videos) / len(run.videos) if run.videos else None


def lost(run: Run) -> float:
    return sum(video["accepted_s"] is not None and video["status"] in ("failed", "lost") for video in run.videos)


def not_accepted(run: Run) -> float:
    return sum(video["accepted_s"] is None and video["status"] in ("failed", "unfinished") for video in run.videos)


def changes_accepted(run: Run) -> float | None:
    changes = each(run.videos, "prompt_changed")
    return sum(changes) / len(changes) if changes else None


def errors(run: Run) -> float:
    return sum(count for status, count in run.answers.items() if status == 0 or status >= 500)


def growth(run: Run) -> float | None:
    """The steepest of lines through what each process holds, by least squares, in MB per minute. Each for itself: of
    several together one that dies would hide that others grow. One that was there for a short while has not settled."""
    times = [point["at"] for points in run.memory.values() for point in points]
    slopes = []
    for points in run.memory.values():
        begin, end = points[0]["at"], points[-1]["at"]
        late = [point for point in points if point["at"] >= begin + SETTLED * (end - begin)]
        if len(late) >= 3 and end - begin >= SETTLED * (max(times) - min(times)):
            at, held = [point["at"] for point in late], [point["rss_mb"] for point in late]
            slopes.append(60 * statistics.linear_regression(at, held).slope)
    return max(slopes, default=None)


def counted(status: str) -> Callable[[Run], float]:
    return lambda run: sum(video["status"] == status for video in run.videos)


MEASURES: dict[str, Measure] = {
    "completed": Measure("videos that were made to their end", "videos", "at least", counted("completed")),
    "first_fragment_p50_s": Measure("request to first fragment, live: median", "s", "at most", first_fragment(0.5)),
    "first_fragment_p95_s": Measure(
        "request to first fragment, live: 95th percentile", "s", "at most", first_fragment(0.95)
    ),
    "first_fragment_p99_s": Measure(
        "request to first fragment, live: 99th percentile", "s", "at most", first_fragment(0.99)
    ),
    "cadence_p50_s": Measure("between two fragments of 1.375 s, live: median", "s", "at most", cadence(0.5)),
    "cadence_p95_s": Measure("between two fragments of 1.375 s, live: 95th percentile", "s", "at most", cadence(0.95)),
    "stall_free_share": Measure(
        "of the videos watched live, those that never stalled", "share", "at least", stall_free_share
    ),
    "stall_ratio": Measure("seconds of stalls, per second of video watched live", "share", "at most", stall_ratio),
    "realtime_factor_p50": Measure(
        "seconds of video that come in a second, after the first fragment: median",
        "factor",
        "at least",
        realtime_factor,
    ),
    "accept_p50_s": Measure(
        "request to acceptance: median", "s", "at most", lambda run: quantile(each(run.videos, "accepted_s"), 0.5)
    ),
    "accept_p99_s": Measure(
        "request to acceptance: 99th percentile",
        "s",
        "at most",
        lambda run: quantile(each(run.videos, "accepted_s"), 0.99),
    ),
    "refusal_p99_s": Measure(
        "request to a 429: 99th percentile",
        "s",
        "at most",
        lambda run: quantile(each(run.videos, "refused_s"), 0.99),
        may_lack=True,
    ),
    "refused_share": Measure("of the requests for a video, those that got a 429", "share", "at most", refused_share),
    "not_accepted": Measure(
        "requests for a video that had no answer, or another one than acceptance or a 429",
        "videos",
        "at most",
        not_accepted,
    ),
    "changes_accepted": Measure(
        "of the changes of a prompt, those that were accepted", "share", "at least", changes_accepted
    ),
    "lost": Measure(
        "videos that were accepted and failed, broke off, came wrong, or are not known any more",
        "videos",
        "at most",
        lost,
    ),
    "unfinished": Measure(
        "videos that were accepted and being made when the stop timeout was over",
        "videos",
        "at most",
        lambda run: sum(v["accepted_s"] is not None and v["status"] == "unfinished" for v in run.videos),
    ),
    "errors_5xx": Measure("answers of 500 and above, and requests without an answer", "answers", "at most", errors),
    "range_mismatches": Measure(
        "videos whose bytes, live or resumed, were not those of the finished file",
        "videos",
        "at most",
        lambda run: sum(video["mismatch"] for video in run.videos),
    ),
    "rss_growth_mb_per_min": Measure(
        "growth of what a process of the service on this machine holds, of the one that grows fastest",
        "MB/min",
        "at most",
        growth,
    ),
}


class SloError(Exception):
    """An SLO file that cannot be used. The message names the file, the name, the value and what is allowed."""


def read_slo(path: Path) -> dict[str, float]:
    """Name of a measure ▸ its limit. Raises SloError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SloError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(data, dict) or not data:
        raise SloError(f"{path}: {data!r:.200}; allowed: name: limit, one or more of {', '.join(MEASURES)}")
    for name, limit in data.items():
        if name not in MEASURES:
            raise SloError(f"{path}: {name} is no measure; allowed: {', '.join(MEASURES)}")
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise SloError(f"{path}: {name} is {limit!r}; allowed: a number, in {MEASURES[name].unit}")
    return {name: float(limit) for name, limit in data.items()}


def judged(name: str, limit: float, value: float | None) -> bool:
    measure = MEASURES[name]
    if value is None:
        return measure.may_lack
    return value <= limit if measure.bound == "at most" else value >= limit


def verdict(summary: Mapping[str, float | None], slo: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row for each limit: name, limit, value, passed."""
    return [
        {"name": name, "limit": limit, "value": summary[name], "passed": judged(name, limit, summary[name])}
        for name, limit in slo.items()
    ]


def knee(videos: Videos, looks: Sequence[Look], slo: Mapping[str, float]) -> dict[str, Any] | None:
    """For each number of users, how videos fared that were asked for then; `users`: the largest number up to which all
    of KNEE that the SLO names hold, None: not even the smallest one. None: the SLO names neither, or nobody looked."""
    names = [name for name in KNEE if name in slo]
    if not names or not looks:
        return None
    levels: dict[int, list[Mapping[str, Any]]] = {}
    for video in videos:
        users = min(looks, key=lambda look: abs(look.at - video["at"])).users
        if users:
            levels.setdefault(users, []).append(video)
    rows: list[dict[str, Any]] = []
    largest, holds = None, True
    for users, asked in sorted(levels.items()):
        if not any(video["priority"] == "realtime" for video in asked):
            continue  # nobody wanted to watch anything then; if somebody did and saw nothing, the SLO was left
        run = Run(asked, {}, {})
        values = {name: MEASURES[name].value(run) for name in KNEE}
        holds = holds and all(judged(name, slo[name], values[name]) for name in names)
        largest = users if holds else largest
        rows.append({"users": users, "videos": len(asked), **values})
    return {"users": largest, "levels": rows}


def make(
    setting: Mapping[str, Any],
    videos: Videos,
    answers: Mapping[int, int],
    looks: Sequence[Look],
    memory: Memory,
    slo: Mapping[str, float],
) -> dict[str, Any]:
    """The report, as JSON has it."""
    run = Run(sorted(videos, key=lambda video: video["at"]), answers, memory)
    summary = {name: measure.value(run) for name, measure in MEASURES.items()}
    rows = verdict(summary, slo)
    client = {
        "accept_s": summary["accept_p50_s"],
        "deliver_s": quantile(each(run.videos, "deliver_s"), 0.5),
    }
    return {
        "setting": dict(setting),
        "summary": summary,
        "slo": rows,
        "passed": all(row["passed"] for row in rows),
        "bottleneck": asdict(service_metrics.bottleneck(looks)),
        "utilisation": service_metrics.utilisation(looks),
        "times": service_metrics.times(looks) | client,
        "statuses": dict(Counter(video["status"] for video in run.videos)),
        "answers": {str(status): count for status, count in sorted(answers.items())},
        "knee": knee(run.videos, looks, slo),
        "videos": [dict(video) for video in run.videos],
        "series": service_metrics.series(looks),
        "memory": memory,
    }


def table(report: Mapping[str, Any]) -> str:
    """The verdict for a terminal."""
    lines = [("name", "limit", "value", "")]
    for row in report["slo"]:
        measure = MEASURES[row["name"]]
        told = "passed" if row["passed"] else "FAILED"
        lines.append((row["name"], f"{measure.bound} {row['limit']:g} {measure.unit}", number(row["value"]), told))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{name:{widths[0]}}  {limit:{widths[1]}}  {value:>{widths[2]}}  {told}".rstrip()
        for name, limit, value, told in lines
    )


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}" if value != int(value) else f"{value:.0f}"


def told(bottleneck: Mapping[str, Any]) -> str:
    return f"{bottleneck['part']}: {bottleneck['why']}"
