"""A plan as a picture: the day, and where the knee is."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

from deployments.planning import Plan

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw(plan: Plan, file: Path) -> None:
    """Writes a PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.2), layout="constrained")
    targets, hours = plan.config.targets, [row.hour for row in plan.hours]
    day, first, load, stalls = axes.flat

    day.bar(hours, [row.samplers for row in plan.hours], color="#c9d6ea", label="samplers that are up")
    busy = [row.samplers * row.sampler_busy for row in plan.hours]
    day.bar(hours, busy, width=0.5, color="#2f6db5", label="of these, at work")
    day.set(title="A day: samplers", xlabel="hour", ylabel="in the mean")
    day.legend(frameon=False, loc="upper left", ncols=2)
    day.set_ylim(0, 1.25 * max(row.samplers for row in plan.hours))

    seconds = [row.first_fragment_p95_s for row in plan.hours]
    first.plot(hours, [_or_nan(each) for each in seconds], color="#2f6db5", marker=".")
    first.set(title="A day: first fragment, p95", xlabel="hour", ylabel="seconds", ylim=(0, None))

    loads = list(plan.loads)
    load.plot(loads, [_or_nan(each.first_fragment_p95_s) for each in plan.loads.values()], color="#2f6db5", marker="o")
    load.set(title="Busiest minutes: first fragment, p95", xlabel="times the planned traffic", ylabel="seconds")
    load.set_ylim(0, None)
    for ax in (first, load):
        if targets.first_fragment_p95_s is not None:
            ax.axhline(targets.first_fragment_p95_s, color="#b5432f", lw=1, ls="--", label="target")
            ax.legend(frameon=False, loc="upper left")
            ax.set_ylim(0, max(ax.get_ylim()[1], 1.15 * targets.first_fragment_p95_s))

    stalls.plot(loads, [100 * _or_nan(each.stall_free) for each in plan.loads.values()], color="#2f6db5", marker="o")
    stalls.plot(loads, [100 * each.sampler_busy for each in plan.loads.values()], color="#8a8a8a", marker=".")
    stalls.set(title="Busiest minutes: stall-free videos, samplers' time", xlabel="times the planned traffic")
    stalls.set(ylabel="percent", ylim=(0, 105))
    stalls.text(loads[-1], 100 * plan.loads[loads[-1]].sampler_busy - 8, "samplers busy", color="#6a6a6a", ha="right")
    stalls.text(loads[0], 90, "stall-free", color="#2f6db5")
    if targets.stall_free is not None:
        stalls.axhline(100 * targets.stall_free, color="#b5432f", lw=1, ls="--")
    if plan.knee is not None:
        for ax in (load, stalls):
            ax.axvline(plan.knee, color="#3a8f4d", lw=1)
            ax.text(plan.knee, ax.get_ylim()[1] * 0.02, " knee", color="#3a8f4d")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{plan.replicas['sampler']} samplers in {plan.cells} cell(s). Times {plan.times.told}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None or value == math.inf else value
