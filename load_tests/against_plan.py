"""`make plan-check`: what `helios plan` says of a service on this machine, beside what a load test finds.

The demo service with its chunks paced at two seconds, as a GPU's, on one, two and three samplers: first one user alone,
which tells how long each part takes; then, with as many samplers, everybody at once, whose videos cannot be made faster
than the samplers go (throughput), and users who come and go (first fragments). The simulation is given the requests and
the times of the user alone, and nothing else. Prints a Markdown table; all reports stay in build/plan. The exit status
is 1 if throughput is off by more than 10 %, or first fragments by more than 25 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("build/plan")
SAMPLERS = (1, 2, 3)
SERVICE = """\
testing: true
torch_threads: 1
models: [{{model: demo, sampler: {{min_replicas: {0}, max_replicas: {0}, min_chunk_seconds: 2.0}}}}]
"""
# Small pictures, so that two cores have little to do and what takes time is what is paced.
VIDEOS = ["--size", "128x128", "--preset", "realtime", "--seconds", "2.75,5.5,11"]
THROUGHPUT, P50, P95 = "seconds of video made a second", "first fragment p50, s", "first fragment p95, s"
MOST = {THROUGHPUT: 0.10, P50: 0.25, P95: 0.25}  # by so much the simulation may be off
ALONE = ["--users", "1", "--run-time", "40s", "--think", "2"]
FIGURES = {"burst": (THROUGHPUT,), "steady": (THROUGHPUT, P50, P95)}


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    times = load("alone", 1, ALONE)
    rows = []
    for samplers in SAMPLERS:
        users = {"burst": 4 * samplers, "steady": 2 * samplers}
        options = {"burst": ["--run-time", "5s", "--spawn-rate", "100"], "steady": ["--run-time", "100s"]}
        for kind, figures in FIGURES.items():
            chosen = ["--users", str(users[kind]), "--stop-timeout", "300", *options[kind]]
            compared = replay(load(f"{kind}-{samplers}", samplers, chosen), times)
            rows += [(f"{samplers}, {kind}", figure, compared[figure]) for figure in figures]
    lines = ["| samplers, users | | measured | simulated | off by |", "|---|---|---|---|---|"]
    for run, figure, found in rows:
        measured, simulated = found["measured"], found["simulated"]
        lines.append(f"| {run} | {figure} | {measured:.2f} | {simulated:.2f} | {simulated / measured - 1:+.0%} |")
    setting = json.loads(times.read_text())["setting"]
    told = {name: setting[name] for name in ("date", "commit", "hardware", "versions")}
    sys.stdout.write("\n".join([*lines, "", json.dumps(told)]) + "\n")
    return int(any(abs(found["simulated"] / found["measured"] - 1) > MOST[figure] for _, figure, found in rows))


def load(name: str, samplers: int, options: list[str]) -> Path:
    """The report of a load test of a service with so many samplers. Its verdict is of no interest here."""
    folder, service = FOLDER / name, FOLDER / f"{samplers}.yaml"
    (folder / "report.json").unlink(missing_ok=True)  # of a run before
    service.write_text(SERVICE.format(samplers))
    command = [sys.executable, "-m", "load_tests.run", "--service", str(service), "--report", str(folder)]
    subprocess.run([*command, *VIDEOS, *options])
    return folder / "report.json"


def replay(report: Path, times: Path) -> dict[str, Any]:
    """Figure ▸ what was measured, what the simulation says."""
    file = report.with_name("plan.json")
    helios = str(Path(sys.executable).parent / "helios")
    command = [helios, "plan", "--replay", str(report), "--times", str(times), "--json", str(file)]
    subprocess.run(command, check=True)
    compared: dict[str, Any] = json.loads(file.read_text())
    return compared


if __name__ == "__main__":
    sys.exit(main())
