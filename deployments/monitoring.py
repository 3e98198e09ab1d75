"""Grafana dashboards, Prometheus rules and a scrape job, for `helios config monitoring`. k8s/monitoring has them.

Queries name metrics by `series` alone, which raises for a name, a label or a value that METRICS does not have: a
renamed metric ends in an error here, and not in a panel that stays empty. What is recorded for an alert is what the
dashboards show of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from deployments.metrics import CHUNK_SECONDS, METRICS, PARTS, Metric
from deployments.rendering import RAY_SERVICE
from helios_core.config import NATIVE_FPS

# What we promise. None was measured on Helios 14B: whoever serves it sets them, and makes the files again.
FIRST_FRAGMENT_SECONDS = 5.0  # from a video's acceptance, p95; an edge of its buckets, so that no interpolation decides
STALLED_SHARE = 0.01  # seconds that live viewers stall, per second of video
SLOW_VIDEOS_SHARE = 0.05  # of completed videos: made more slowly than they play
FAILED_VIDEOS_SHARE = 0.01  # of videos that completed or failed: the error budget
RETRIES_PER_CHUNK = 0.05

# When somebody is told. Failures: the usual two speeds at which a month's budget burns, 2 % of it in an hour (14.4
# times as fast as it may) and 5 % in six (6 times); the short window ends the alert soon after the failures ended.
FAST_BURN, SLOW_BURN = 14.4, 6.0
FEW_FAILED_VIDEOS = 3  # where a video takes minutes, one that fails is soon a large share of an hour's
INDICATOR_WINDOW = "30m"  # of the other indicators
HOLDS_FOR = "5m"
COLD_START_HOLDS_FOR = "10m"  # longer than a sampler takes from nothing: a node, the image, the weights; not measured
OUTAGE_HOLDS_FOR = "1m"  # no longer than videos wait for a store (store_patience_s, 60 s)

# Dollars per hour of one replica, where the cost dashboard begins; they are no offer of anybody's.
PRICES = {"text_encoder": 1.0, "sampler": 3.0, "vae_decoder": 1.0}
# Grafana: chunks come seconds apart and videos minutes, so that what is counted over less time shows gaps.
MIN_INTERVAL = "2m"
SCRAPE_INTERVAL = "15s"
# Where the operator's Prometheus has a Secret `helios-metrics` with a `token`, if it is named among its `secrets`.
TOKEN_FILE = "/etc/prometheus/secrets/helios-metrics/token"
TARGET = f"{RAY_SERVICE}-serve-svc:8000"

# Grafana's own: at least four scrapes, with no event left out between two points; and all of the time shown.
RATE, RANGE = "$__rate_interval", "$__range"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
NOTE = "# Made by `helios config monitoring -o k8s/monitoring` from deployments/monitoring.py; change that instead.\n"


# ── PromQL ───────────────────────────────────────────────────────────────────


def series(name: str, kind: str, end: str = "", **labels: str) -> str:
    """The selector of a metric's series; `end`: of a histogram's, such as _bucket. Raises ValueError if METRICS has no
    such metric, none of this kind, or not this label with this value."""
    metric = _metric(name)
    if metric.kind != kind:
        raise ValueError(f"{name} is a {metric.kind}; it is used as a {kind}")
    edges = tuple(map(_edge, metric.buckets))
    for label, value in labels.items():
        values = edges if (label, end) == ("le", "_bucket") else _values(metric, label)
        if value not in values:
            raise ValueError(f"label {label} of {name} is never {value!r}; it is one of {', '.join(values)}")
    chosen = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{end}{{{chosen}}}" if chosen else f"{name}{end}"


def _metric(name: str) -> Metric:
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise ValueError(f"no metric is named {name!r}; METRICS has {', '.join(metric.name for metric in METRICS)}")


def _values(metric: Metric, label: str) -> tuple[str, ...]:
    if label not in metric.labels:
        raise ValueError(f"{metric.name} has no label {label!r}; it has {', '.join(metric.labels) or 'none'}")
    return metric.labels[label]


def _edge(edge: float) -> str:
    """As prometheus_client writes it: 1 as 1.0."""
    return str(float(edge))


def _sum(name: str, by: Sequence[str], of: str) -> str:
    for label in by:
        _values(_metric(name), label)
    return f"sum by ({', '.join(by)}) ({of})" if by else f"sum({of})"


def gauge(name: str, *by: str, **labels: str) -> str:
    return _sum(name, by, series(name, "gauge", **labels))


def mean(name: str, window: str = RATE, **labels: str) -> str:
    """Of a gauge over time."""
    return _sum(name, (), f"avg_over_time({series(name, 'gauge', **labels)}[{window}])")


def per_second(name: str, *by: str, window: str = RATE, **labels: str) -> str:
    """How fast a counter rises."""
    return _sum(name, by, f"rate({series(name, 'counter', **labels)}[{window}])")


def per_minute(name: str, *by: str) -> str:
    return f"60 * {per_second(name, *by)}"


def busy(name: str) -> str:
    """Seconds per second that what a histogram of seconds observes takes."""
    return _sum(name, (), f"rate({series(name, 'histogram', '_sum')}[{RATE}])")


def at_most(name: str, edge: float, window: str = RATE) -> str:
    """The share of a histogram's observations that are at or below an edge of its buckets."""
    low = series(name, "histogram", "_bucket", le=_edge(edge))
    every = series(name, "histogram", "_count")
    return f"sum(rate({low}[{window}])) / sum(rate({every}[{window}]))"


def quantile(name: str, q: float, window: str = RATE) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({series(name, 'histogram', '_bucket')}[{window}])))"


def quantiles(name: str, *qs: float) -> dict[str, str]:
    return {f"p{100 * q:g}": quantile(name, q) for q in qs}


def video_seconds(window: str = RATE) -> str:
    """Seconds of video made per second, at the native frame rate."""
    return f"({per_second('helios_frames_committed_total', window=window)} / {NATIVE_FPS})"


# ── rules ────────────────────────────────────────────────────────────────────

FIRST_FRAGMENT = f"helios:time_to_first_fragment_seconds:p95_rate{INDICATOR_WINDOW}"
STALLED = f"helios:viewer_stall_seconds:per_video_second_rate{INDICATOR_WINDOW}"
SLOW_VIDEOS = f"helios:slow_videos:ratio_rate{INDICATOR_WINDOW}"
RETRIES = f"helios:retries:per_chunk_rate{INDICATOR_WINDOW}"
FAILED_VIDEOS = {window: f"helios:failed_videos:ratio_rate{window}" for window in ("5m", "30m", "1h", "6h")}


@dataclass(frozen=True)
class Alert:
    """`expr`: a comparison with a number, several joined by `and`, or `absent`. `summary`: with the value of the first;
    `runbook`: what to do first."""

    name: str
    expr: str
    holds_for: str
    severity: Literal["critical", "warning"]  # somebody must act now; somebody must look today
    summary: str
    runbook: str


def recordings() -> dict[str, str]:
    """Recorded series ▸ query: the indicators, of which alerts and dashboards tell."""
    window, ended = INDICATOR_WINDOW, "helios_videos_ended_total"

    def failed_share(window: str) -> str:
        failed = per_second(ended, window=window, status="failed")
        return f"{failed} / ({failed} + {per_second(ended, window=window, status='completed')})"

    return {
        FIRST_FRAGMENT: quantile("helios_time_to_first_fragment_seconds", 0.95, window),
        STALLED: f"{per_second('helios_viewer_stall_seconds_total', window=window)} / {video_seconds(window)}",
        SLOW_VIDEOS: at_most("helios_real_time_factor", 1, window),
        RETRIES: f"{per_second('helios_retries_total', window=window)} / "
        f"{per_second('helios_chunks_committed_total', window=window)}",
        **{name: failed_share(window) for window, name in FAILED_VIDEOS.items()},
    }


def alerts() -> list[Alert]:
    failed = series("helios_videos_ended_total", "counter", status="failed")

    def burns(speed: float, window: str, short: str) -> str:
        limit = f"{speed * FAILED_VIDEOS_SHARE:g}"
        enough = f"sum(increase({failed}[{window}])) >= {FEW_FAILED_VIDEOS}"
        return f"{FAILED_VIDEOS[window]} > {limit} and {FAILED_VIDEOS[short]} > {limit} and {enough}"

    def unchecked(outcome: str) -> str:
        return per_second("helios_safety_checks_total", window="5m", outcome=outcome)

    return [
        Alert(
            "HeliosFirstFragmentLate",
            f"{FIRST_FRAGMENT} > {FIRST_FRAGMENT_SECONDS:g}",
            HOLDS_FOR,
            "warning",
            "One video in twenty has its first fragment after {{ $value | humanizeDuration }} or later; "
            f"promised are {FIRST_FRAGMENT_SECONDS:g} s.",
            "See on the video dashboard whether the wait for a sampler or the making of a chunk grew: add samplers for "
            "the one, look at the slower part's logs for the other.",
        ),
        Alert(
            "HeliosViewersStall",
            f"{STALLED} > {STALLED_SHARE:g}",
            HOLDS_FOR,
            "warning",
            f"Live viewers stall {{{{ $value | humanizePercentage }}}} of the video's time; "
            f"promised is at most {STALLED_SHARE:.0%}.",
            f"Compare the seconds from chunk to chunk with a chunk's length, {CHUNK_SECONDS:g} s: if the wait for a "
            "sampler is long, too many videos share the samplers, so add some or lower admission.videos_per_sampler; "
            "else see which part of a chunk is slow.",
        ),
        Alert(
            "HeliosVideosSlowerThanPlayback",
            f"{SLOW_VIDEOS} > {SLOW_VIDEOS_SHARE:g}",
            HOLDS_FOR,
            "warning",
            f"{{{{ $value | humanizePercentage }}}} of completed videos were made more slowly than they play; "
            f"promised is at most {SLOW_VIDEOS_SHARE:.0%}.",
            "See on the video dashboard which part of a chunk takes most of its time, and on the fleet's whether a "
            "part has fewer replicas than it is to have.",
        ),
        Alert(
            "HeliosVideosFail",
            burns(FAST_BURN, "1h", "5m"),
            "2m",
            "critical",
            f"{{{{ $value | humanizePercentage }}}} of the last hour's videos failed; "
            f"promised is at most {FAILED_VIDEOS_SHARE:.0%}.",
            "`helios videos list` names the videos and `helios videos show` the error of one, whose video_id leads to "
            "its lines in the logs.",
        ),
        Alert(
            "HeliosVideosFailSlowly",
            burns(SLOW_BURN, "6h", "30m"),
            "15m",
            "warning",
            f"{{{{ $value | humanizePercentage }}}} of the last six hours' videos failed; "
            f"promised is at most {FAILED_VIDEOS_SHARE:.0%}.",
            "`helios videos list` names the videos and `helios videos show` the error of one: look for the code that "
            "most of them share.",
        ),
        Alert(
            "HeliosRetries",
            f"{RETRIES} > {RETRIES_PER_CHUNK:g}",
            HOLDS_FOR,
            "warning",
            "{{ $value | humanize }} calls are repeated per chunk; replicas die, or what they made is lost.",
            "The fleet dashboard says of which part: `kubectl get pods` shows whether its pods restart, and their last "
            "lines why (memory, as a rule).",
        ),
        Alert(
            "HeliosSafetyChecksFail",
            f"{unchecked('refused')} + {unchecked('let_through')} > 0",
            HOLDS_FOR,
            "critical",
            "{{ $value | humanize }} safety checks a second fail: what they were of is refused or, with "
            "safety.fail_open, passes unchecked.",
            "The logs of ingresses and VAE decoders have a line `safety check failed` for each, with its reason: mend "
            "the hook or what it asks, or give it longer (safety.max_seconds).",
        ),
        Alert(
            "HeliosStoreAway",
            f"min({series('helios_store_up', 'gauge')}) < 1",
            OUTAGE_HOLDS_FOR,
            "critical",
            "Videos cannot be stored: new ones are refused, and running ones fail after store_patience_s.",
            "Look at the store itself, and whether it is full or the service's credentials have expired; the service "
            "goes on by itself when the store is back.",
        ),
        Alert(
            "HeliosNoSampler",
            f"{gauge('helios_replicas', part='sampler')} < 1 and {gauge('helios_queue_depth')} > 0",
            COLD_START_HOLDS_FOR,
            "critical",
            "Videos wait for a sampler, and none is alive.",
            "`kubectl get pods` shows whether sampler pods wait for a GPU (see their events) or restart (see their "
            "logs).",
        ),
        Alert(
            "HeliosDirectorAbsent",
            f"absent({series('helios_videos_running', 'gauge')})",
            "2m",
            "critical",
            "Nothing is heard of the Director: no video can be asked for, or nobody would know.",
            "`up` of the job says whether the service is reached and /metrics answers (401: the token file); if so, "
            "`kubectl get rayservice` and the head's logs show whether the Director starts.",
        ),
    ]


def rules() -> dict[str, Any]:
    """A rule file: one group, so that an alert is asked of what was recorded just before it."""
    recorded: list[dict[str, Any]] = [{"record": name, "expr": expr} for name, expr in recordings().items()]
    told = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.holds_for,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": alert.runbook},
        }
        for alert in alerts()
    ]
    return {"groups": [{"name": "helios", "rules": recorded + told}]}


def scrape() -> dict[str, Any]:
    """One target, although there are many pods: each ingress relays the same Director's counts."""
    job = {
        "job_name": RAY_SERVICE,
        "scrape_interval": SCRAPE_INTERVAL,
        "authorization": {"credentials_file": TOKEN_FILE},
        "static_configs": [{"targets": [TARGET]}],
    }
    return {"scrape_configs": [job]}


# ── dashboards ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Panel:
    """`queries`: legend ▸ PromQL, where {{label}} stands for its value; `unit`: as Grafana names it; `stacking`: its
    mode; `colors`: below a number and from it on, which makes it a panel of one number."""

    title: str
    unit: str
    queries: Mapping[str, str]
    stacking: Literal["none", "normal", "percent"] = "none"
    colors: tuple[str, float, str] | None = None


Rows = Mapping[str, Sequence[Panel]]
PER_MINUTE = "suffix: /min"


def fleet() -> Rows:
    def promised(title: str, unit: str, recorded: str, limit: float) -> Panel:
        return Panel(title, unit, {"": recorded}, colors=("green", limit, "red"))

    first, factor = "helios_time_to_first_fragment_seconds", "helios_real_time_factor"
    return {
        "Promises": [
            promised("First fragment, p95", "s", FIRST_FRAGMENT, FIRST_FRAGMENT_SECONDS),
            promised("Stalled, of the video's time", "percentunit", STALLED, STALLED_SHARE),
            promised("Videos slower than playback", "percentunit", SLOW_VIDEOS, SLOW_VIDEOS_SHARE),
            promised("Failed videos, 1 h", "percentunit", FAILED_VIDEOS["1h"], FAILED_VIDEOS_SHARE),
            promised("Retries per chunk", "none", RETRIES, RETRIES_PER_CHUNK),
            Panel("Store up", "none", {"": f"min({series('helios_store_up', 'gauge')})"}, colors=("red", 1, "green")),
        ],
        "Videos": [
            Panel(
                "Accepted",
                PER_MINUTE,
                {
                    "accepted": per_minute("helios_videos_accepted_total"),
                    "taken over": per_minute("helios_videos_resumed_total"),
                },
            ),
            Panel("Ended", PER_MINUTE, {"{{status}}": per_minute("helios_videos_ended_total", "status")}),
            Panel(
                "Running",
                "none",
                {
                    "running": gauge("helios_videos_running"),
                    "queued": gauge("helios_videos_queued"),
                    "wait for a sampler": gauge("helios_queue_depth"),
                },
            ),
        ],
        "Making": [
            Panel("Replicas", "none", {"{{part}}": gauge("helios_replicas", "part")}),
            Panel(
                "Sampling",
                "none",
                {
                    "sample calls": gauge("helios_sampling"),
                    "samplers": gauge("helios_replicas", part="sampler"),
                },
            ),
            Panel(
                "Retries", PER_MINUTE, {"{{part}}, {{reason}}": per_minute("helios_retries_total", "part", "reason")}
            ),
            Panel(
                "Safety checks",
                PER_MINUTE,
                {"{{part}}, {{outcome}}": per_minute("helios_safety_checks_total", "part", "outcome")},
            ),
            Panel("Chunks", "suffix: /s", {"chunks": per_second("helios_chunks_committed_total")}),
            Panel("Frames", "suffix: /s", {"frames": per_second("helios_frames_committed_total")}),
            Panel("Sampler steps", "suffix: /s", {"steps": per_second("helios_sampler_steps_total")}),
            Panel(
                "Processor of the Director", "percentunit", {"busy": per_second("helios_director_cpu_seconds_total")}
            ),
        ],
        "Viewers": [
            Panel("First fragment", "s", quantiles(first, 0.5, 0.95, 0.99)),
            Panel("Real-time factor", "suffix:x", quantiles(factor, 0.05, 0.5)),
            Panel(
                "Chunks that keep up with playback",
                "percentunit",
                {"keep up": at_most("helios_chunk_cadence_seconds", CHUNK_SECONDS)},
            ),
            Panel("Watchers", "none", {"watchers": gauge("helios_watchers")}),
            Panel("Stalls", PER_MINUTE, {"stalls": per_minute("helios_viewer_stalls_total")}),
            Panel(
                "Stalled, of the video's time",
                "percentunit",
                {"stalled": f"{per_second('helios_viewer_stall_seconds_total')} / {video_seconds()}"},
            ),
        ],
    }


def video() -> Rows:
    parts = {
        "wait for a sampler": "helios_turn_wait_seconds",
        "sample": "helios_sample_seconds",
        "decode": "helios_decode_seconds",
        "encode": "helios_encode_seconds",
        "store": "helios_store_seconds",
        "commit": "helios_commit_seconds",
    }
    beside = {
        "a turn for a first chunk": "helios_first_turn_seconds",
        "a turn for another chunk": "helios_turn_seconds",
        "a prompt's encoding": "helios_text_encode_seconds",
    }
    a_chunk = {part: f"{busy(name)} / {per_second('helios_chunks_committed_total')}" for part, name in parts.items()}
    whole = {
        "first fragment": "helios_time_to_first_fragment_seconds",
        "from chunk to chunk": "helios_chunk_cadence_seconds",
    }

    def panels(names: Mapping[str, str]) -> list[Panel]:
        return [Panel(part.capitalize(), "s", quantiles(name, 0.5, 0.95, 0.99)) for part, name in names.items()]

    return {
        # Parts of several chunks run side by side: these add up to more than the cadence.
        "Where a chunk's time goes": [
            Panel("Seconds of a chunk, mean", "s", a_chunk, stacking="normal"),
            Panel("Shares of a chunk's seconds", "s", a_chunk, stacking="percent"),
        ],
        "As its viewers see it": panels(whole),
        "Parts of a chunk": panels(parts),
        "Turns, prompts and inputs": [
            *panels(beside),
            # Of few videos: quantiles of none at all would be none.
            Panel("Replicas that encode an input, mean", "none", {"inputs": busy("helios_media_encode_seconds")}),
            Panel("Safety checks under way, mean", "none", {"checks": busy("helios_safety_check_seconds")}),
        ],
    }


def cost() -> Rows:
    def by_part(window: str = RATE) -> dict[str, str]:
        return {part: f"{mean('helios_replicas', window, part=part)} * $price_{part}" for part in PARTS}

    def per_minute_of_video(window: str = RATE) -> str:
        # Seconds of video per second are minutes of video per minute.
        return f"({' + '.join(by_part(window).values())}) / (60 * {video_seconds(window)})"

    def idle(window: str = RATE) -> str:
        return f"1 - {mean('helios_sampling', window)} / {mean('helios_replicas', window, part='sampler')}"

    def one_number(title: str, unit: str, query: str) -> Panel:
        return Panel(title, unit, {"": query}, colors=("text", 0, "text"))

    samplers = mean("helios_replicas", part="sampler")
    rendering = {
        "decode": "helios_decode_seconds",
        "encode": "helios_encode_seconds",
        "store": "helios_store_seconds",
    }
    return {
        # With the hours in which nothing was made, of which a curve of quotients says nothing.
        "Over the time shown": [
            one_number("Cost per minute of video", "currencyUSD", per_minute_of_video(RANGE)),
            one_number("Idle share of samplers", "percentunit", idle(RANGE)),
            one_number("Minutes of video per hour", "none", f"60 * {video_seconds(RANGE)}"),
        ],
        "Money": [
            Panel("Cost per hour", "currencyUSD", by_part(), stacking="normal"),
            Panel("Cost per minute of video", "currencyUSD", {"per minute": per_minute_of_video()}),
            Panel("Idle share of samplers", "percentunit", {"idle": idle()}),
        ],
        "Replica-seconds per minute of video": [
            Panel(
                "Samplers",
                "s",
                {
                    "sampling of what was committed": f"60 * {busy('helios_sample_seconds')} / {video_seconds()}",
                    "alive": f"60 * {samplers} / {video_seconds()}",
                },
            ),
            Panel(
                "VAE decoders",
                "s",
                {part: f"60 * {busy(name)} / {video_seconds()}" for part, name in rendering.items()},
                stacking="normal",
            ),
            Panel(
                "Sampler-seconds per step",
                "s",
                {"per step": f"{busy('helios_sample_seconds')} / {per_second('helios_sampler_steps_total')}"},
            ),
        ],
        "What comes of it": [
            Panel("Minutes of video per hour", "none", {"minutes": f"60 * {video_seconds()}"}),
            Panel(
                "Bytes per minute of video",
                "bytes",
                {"bytes": f"60 * {per_second('helios_fragment_bytes_total')} / {video_seconds()}"},
            ),
        ],
    }


def dashboard(name: str, title: str, rows: Rows, variables: Mapping[str, float]) -> dict[str, Any]:
    """Grafana's JSON. `variables`: fields in which a number can be typed, and what stands there first."""
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, row in rows.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "gridPos": place, "type": "row", "title": heading, "panels": []})
        y, x = y + 1, 0
        height, width = (4, 4) if row[0].colors else (8, 12 if len(row) == 2 else 8)
        for panel in row:
            if x == 24:
                x, y = 0, y + height
            place = {"h": height, "w": width, "x": x, "y": y}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel(panel)})
            x += width
        y += height
    source: dict[str, Any] = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    fields = [_field(name, value) for name, value in variables.items()]
    return {
        "uid": f"helios-{name}",
        "title": title,
        "tags": ["helios"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [{"title": "Helios", "type": "dashboards", "tags": ["helios"], "keepTime": True}],
        "templating": {"list": [source, *fields]},
        "panels": panels,
    }


def _field(name: str, value: float) -> dict[str, Any]:
    shown: dict[str, Any] = {"selected": True, "text": f"{value:g}", "value": f"{value:g}"}
    label = name.replace("_", " ") + ", $ per hour"
    return {"name": name, "label": label, "type": "textbox", "query": shown["value"], "current": shown}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    options: dict[str, Any]
    if panel.colors is None:
        area = 0 if panel.stacking == "none" else 30
        defaults["custom"] = {
            "fillOpacity": area,
            "showPoints": "auto",
            "stacking": {"group": "A", "mode": panel.stacking},
        }
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    else:
        below, limit, above = panel.colors
        steps = [{"color": below, "value": None}, {"color": above, "value": limit}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        options = {"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
    return {
        "type": "timeseries" if panel.colors is None else "stat",
        "title": panel.title,
        "description": _description(panel),
        "datasource": SOURCE,
        "interval": MIN_INTERVAL,
        "targets": [
            {
                "refId": chr(ord("A") + k),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "instant": RANGE in expr,
                "range": RANGE not in expr,
            }
            for k, (legend, expr) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _description(panel: Panel) -> str:
    """What METRICS says of the metrics that it shows."""
    recorded = recordings()
    queries = " ".join(recorded.get(expr, expr) for expr in panel.queries.values())
    named = set(re.findall(r"\w+", queries))
    ends = ("", "_bucket", "_count", "_sum")
    return " ".join(metric.help for metric in METRICS if named & {metric.name + end for end in ends})


# ── files ────────────────────────────────────────────────────────────────────


def files() -> dict[str, str]:
    """File name ▸ text of all that `helios config monitoring` writes. Raises ValueError as `series` does."""
    prices = {f"price_{part}": PRICES[part] for part in PARTS}
    dashboards = {
        "fleet": dashboard("fleet", "Helios: fleet", fleet(), {}),
        "video": dashboard("video", "Helios: a video's life", video(), {}),
        "cost": dashboard("cost", "Helios: cost", cost(), prices),
    }
    operator = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": RAY_SERVICE},
        "spec": rules(),
    }
    return {
        **{f"grafana/{name}.json": json.dumps(board, indent=2) + "\n" for name, board in dashboards.items()},
        "rules.yaml": _yaml(rules()),
        "prometheus-rule.yaml": _yaml(operator),
        "scrape.yaml": _yaml(scrape()),
    }


def _yaml(content: Any) -> str:
    return NOTE + yaml.safe_dump(content, sort_keys=False, width=math.inf)
