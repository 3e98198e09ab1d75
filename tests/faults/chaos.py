"""`make chaos TRIALS=20`: every scenario so many times, and a table of what came of it, for RELIABILITY.md.

A trial counts if the fault found its replica at work. The last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config import free_port
from tests.faults.scenarios import SCENARIOS, Scenario, Trial, trial, undisturbed
from tests.faults.service import Service, serving

TRIES = 4  # for each trial that counts, at most


def wilson(successes: int, trials: int, z: float = 1.96) -> float:
    """The lower bound of the 95 % interval of a share (Wilson 1927)."""
    share, square = successes / trials, z * z / trials
    return (share + square / 2 - z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))) / (1 + square)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds, p)), 2) for p in (50, 95, 99)}


def run(service: Service, name: str, scenario: Scenario, trials: int, videos: int) -> dict[str, Any]:
    calm = undisturbed(service, scenario, videos)
    tried: list[Trial] = []
    for seed in range(TRIES * trials):
        tried.append(trial(service, scenario, seed, videos))
        if sum(each.hit for each in tried) == trials:
            break
    hits = [each for each in tried if each.hit]
    good = sum(each.good for each in hits)
    streams, whole = sum(each.streams for each in tried), sum(each.whole for each in tried)
    back = [each.recovered_s for each in hits if each.recovered_s is not None]
    return {
        "scenario": name,
        "row": scenario.row,
        "trials": len(tried),
        "hits": len(hits),
        "good": good,
        "streams": streams,
        "whole": whole,
        # Of trials: streams of one share their fault.
        "wilson_95": round(wilson(good, len(hits)), 4) if hits else None,
        "undisturbed_pause_s": percentiles(calm),
        "pause_s": percentiles([pause for each in hits for pause in each.pauses_s]) if hits else None,
        "recovered_s": round(statistics.median(back), 1) if back else None,
        "errors": [error for each in tried for error in each.errors],
        "left_behind": [f"seed {seed}: {each.left}" for seed, each in enumerate(tried) if each.left],
    }


HEAD = (
    "| what happens | row | trials | at work: good | at least (95 %) | streams whole "
    "| longest pause p50 / p95 / p99, s | if nothing happens | back after, s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    pauses, calm = (
        "none" if times is None else " / ".join(f"{seconds:.2f}" for seconds in times.values())
        for times in (row["pause_s"], row["undisturbed_pause_s"])
    )
    return (
        f"| {row['scenario']} | {row['row']} | {row['trials']} | {row['good']} of {row['hits']} "
        f"| {row['wilson_95'] or 0:.1%} | {row['whole']} of {row['streams']} "
        f"| {pauses} | {calm} | {row['recovered_s'] or ''} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--videos", type=int, default=8, help="at once, where a scenario has not fewer")
    parser.add_argument("--only", nargs="+", default=list(SCENARIOS), metavar="SCENARIO", choices=SCENARIOS)
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in the tests
    rows = []
    print(HEAD)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), free_port()) as service:
        for name in options.only:
            rows.append(run(service, name, SCENARIOS[name], options.trials, options.videos))
            print(line(rows[-1]), flush=True)  # noqa: T201
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "cpus": os.cpu_count(), "machine": platform.processor() or platform.machine()}
    versions = {name: version(name) for name in ("ray", "torch")}
    print(json.dumps({**about, "versions": versions, "scenarios": rows}))  # noqa: T201
    good = [row["whole"] == row["streams"] and row["good"] >= options.trials for row in rows]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
