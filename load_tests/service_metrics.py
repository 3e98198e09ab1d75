"""What the service's own metrics say of a run: how busy each part was, how long each step took, what was short first.

All are pure functions of `Look`s, one a second (observing.py). What the service does not count, an older one or one
whose metrics are not ours to read, is None.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Series = dict[str, float]
"""name{labels} as the service writes it ▸ value."""

BUSY = 0.85  # from this share of its time on, a part is what videos wait for
WINDOW_S = 10.0  # of the run, in which a share is measured
IDLE_S = 5.0  # so long at least no video has to run, for it to be known what a process does then
PARTS = ("sampler", "vae", "text", "director", "ingress", "store")
# step of a chunk ▸ the histogram of its seconds
STEPS = {
    "first_turn_s": "helios_first_turn_seconds",
    "turn_s": "helios_turn_seconds",
    "sample_s": "helios_sample_seconds",
    "decode_s": "helios_decode_seconds",
    "encode_s": "helios_encode_seconds",
    "store_s": "helios_store_seconds",
    "commit_s": "helios_commit_seconds",
    "text_s": "helios_text_encode_seconds",
    "media_s": "helios_media_encode_seconds",
}
# name in the report ▸ gauge
GAUGES = {
    "running": "helios_videos_running",
    "queued": "helios_videos_queued",
    "waiting_for_sampler": "helios_queue_depth",
    "sampling": "helios_sampling",
    "watchers": "helios_watchers",
    "store_up": "helios_store_up",
    "samplers": 'helios_replicas{part="sampler"}',
    "vae_decoders": 'helios_replicas{part="vae_decoder"}',
    "text_encoders": 'helios_replicas{part="text_encoder"}',
}
DIRECTOR_CPU, INGRESS_CPU = "helios_director_cpu_seconds_total", "helios_ingress_cpu_seconds_total"
CHUNKS, RETRIES = "helios_chunks_committed_total", "helios_retries_total"


@dataclass(frozen=True)
class Look:
    """What /metrics said `at` seconds of the run, and how many users there were."""

    at: float
    users: int
    series: Series


@dataclass(frozen=True)
class Bottleneck:
    """The part that was short first, or `none`; the share of its time in which it was busy; why it is this one."""

    part: str
    share: float | None
    why: str


def parse(text: str) -> Series:
    """Prometheus' text format, without the buckets, which are most of it."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in lines if "_bucket{" not in name}


def increase(looks: Sequence[Look], series: str) -> float | None:
    """By how much a counter grew. What it counted before a process was followed by another one is not lost, but for
    what came after the last look at it. None: it is not there."""
    values = [look.series[series] for look in looks if series in look.series]
    if not values:
        return None
    return sum(after - before if after >= before else after for before, after in itertools.pairwise(values))


def mean(looks: Sequence[Look], series: str) -> float | None:
    """Of a gauge; None: it is not there."""
    values = [look.series[series] for look in looks if series in look.series]
    return sum(values) / len(values) if values else None


def times(looks: Sequence[Look]) -> dict[str, float | None]:
    """Mean seconds of each step, of those that ended in the run, and processor seconds of Director and ingress for each
    chunk committed, without what they do when no video runs. None: not counted, or there was none."""
    steps = {
        step: ratio(increase(looks, f"{name}_sum"), increase(looks, f"{name}_count")) for step, name in STEPS.items()
    }
    chunks = increase(looks, CHUNKS)
    ingress = [worked(looks, series) for series in labelled(looks, INGRESS_CPU)]
    return steps | {
        "director_s": ratio(worked(looks, DIRECTOR_CPU), chunks),
        "ingress_s": ratio(total(ingress), chunks),
    }


def worked(looks: Sequence[Look], series: str) -> float | None:
    """By how much a counter of processor seconds grew, without what it grows by when no video runs: as much in a second
    as in those in which none did, if there were IDLE_S of them. None: it is not there."""
    if increase(looks, series) is None:
        return None
    idle = idle_s = 0.0
    for running, stretch in itertools.groupby(looks, lambda look: look.series.get(GAUGES["running"])):
        if running == 0:
            grew, seconds = growth(list(stretch), series)
            idle, idle_s = idle + grew, idle_s + seconds
    grew, seconds = growth(looks, series)
    return max(0.0, grew - seconds * idle / idle_s) if idle_s >= IDLE_S else grew


def growth(looks: Sequence[Look], series: str) -> tuple[float, float]:
    """By how much a counter grew, and in how many seconds: from the first look that has it to the last."""
    at = [look.at for look in looks if series in look.series]
    return (increase(looks, series) or 0.0, at[-1] - at[0]) if at else (0.0, 0.0)


def utilisation(looks: Sequence[Look]) -> dict[str, float | None]:
    """The share of the time in which each part was busy, of one replica of it.

    Sampler: a call was under way, as each look found it; VAE: it decoded, encoded, or read an input; text: it encoded a
    prompt. Director, ingress: processor seconds in a second, since each is one event loop. Store: of the time of the
    videos that take turns, the share in which they waited until something was stored. It has no replicas of which one
    could say that they are busy; but if videos do nothing else than wait for it, it is what is short.
    """
    if len(looks) < 2:
        return dict.fromkeys(PARTS)
    seconds = looks[-1].at - looks[0].at

    def share(part: str, *histograms: str) -> float | None:
        replicas = mean(looks, GAUGES[part])
        spent = total([increase(looks, f"{name}_sum") for name in histograms])
        return ratio(spent, None if replicas is None else replicas * seconds)

    running, queued = mean(looks, GAUGES["running"]), mean(looks, GAUGES["queued"])
    taking_turns = None if running is None else (running - (queued or 0.0)) * seconds
    stored = total([increase(looks, "helios_store_seconds_sum"), increase(looks, "helios_commit_seconds_sum")])
    return {
        "sampler": ratio(mean(looks, GAUGES["sampling"]), mean(looks, GAUGES["samplers"])),
        "vae": share("vae_decoders", "helios_decode_seconds", "helios_encode_seconds", "helios_media_encode_seconds"),
        "text": share("text_encoders", "helios_text_encode_seconds"),
        "director": ratio(increase(looks, DIRECTOR_CPU), seconds),
        "ingress": ingress_share(looks),
        "store": ratio(stored, taking_turns),
    }


def ingress_share(looks: Sequence[Look]) -> float | None:
    """Of the busiest one: each scrape is answered by one of them, which tells of itself alone."""
    shares = []
    for series in labelled(looks, INGRESS_CPU):
        grew, seconds = growth(looks, series)
        if seconds:
            shares.append(grew / seconds)
    return max(shares, default=None)


def windows(looks: Sequence[Look]) -> Iterable[Sequence[Look]]:
    """The run in pieces of WINDOW_S; each begins with the last look of the one before, and none is much shorter."""
    begin = 0
    for end, look in enumerate(looks):
        if look.at - looks[begin].at >= WINDOW_S:
            yield looks[begin : end + 1]
            begin = end


def bottleneck(looks: Sequence[Look]) -> Bottleneck:
    """The busiest part while videos waited, if it was busy for BUSY of its time. They wait where more of them take
    turns than there are samplers, or where some were accepted and may not take turns yet."""
    waited = [window for window in windows(looks) if waits(window)]
    if not waited:
        return Bottleneck("none", None, "there were never more videos than samplers for long")
    shares = dict.fromkeys(PARTS, 0.0)
    for window in waited:
        for part, share in utilisation(window).items():
            shares[part] += (share or 0.0) / len(waited)
    part = max(shares, key=lambda part: shares[part])
    seconds = sum(window[-1].at - window[0].at for window in waited)
    told = f"{shares[part]:.0%} busy in the {seconds:.0f} s in which videos waited"
    if shares[part] < BUSY:
        return Bottleneck(
            "none", shares[part], f"the busiest part, {part}, was {told}; short is what is {BUSY:.0%} busy"
        )
    return Bottleneck(part, shares[part], told)


def waits(window: Sequence[Look]) -> bool:
    """Whether there were more videos than samplers for most of the time."""
    running, samplers = GAUGES["running"], GAUGES["samplers"]
    more = [look for look in window if look.series.get(running, 0.0) > look.series.get(samplers, math.inf)]
    return 2 * len(more) > len(window)


def series(looks: Sequence[Look]) -> list[dict[str, float | None]]:
    """One row for each look: the gauges, and how busy each part was in the window before it."""
    rows, begin = [], 0
    for end, look in enumerate(looks):
        while look.at - looks[begin].at > WINDOW_S:
            begin += 1
        busy = utilisation(looks[begin : end + 1])
        gauges = {name: look.series.get(gauge) for name, gauge in GAUGES.items()}
        retries = total([look.series[name] for name in labelled([look], RETRIES)])
        rows.append(
            {"at": look.at, "users": float(look.users), **gauges, "retries": retries}
            | {f"{part}_busy": share for part, share in busy.items()}
        )
    return rows


def labelled(looks: Sequence[Look], name: str) -> list[str]:
    """The series of a metric, whatever their labels."""
    pattern = re.compile(rf"{name}(\{{.*\}})?")
    return sorted({series for look in looks for series in look.series if pattern.fullmatch(series)})


def total(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None if there is none."""
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
