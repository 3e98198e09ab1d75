"""`make figures`: what the README says of speed, measured again on this machine, over HTTP alone.

Prints one Markdown table for people; the last line is the same as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPEATS = 5
BODY = {"prompt": "a red sun over a blue sea, drifting left", "seconds": 33 * 8 / 24, "steps": [1, 1, 1]}
FRAMES = 33 * 8


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as store:
        begin = time.perf_counter()
        command = [str(Path(sys.executable).parent / "helios"), "serve", "--port", str(port), "--store", store]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as service:
            try:
                wait_until_ready(url, service)
                start = time.perf_counter() - begin
                stream(url)  # warms up
                runs = [stream(url) for _ in range(REPEATS)]
            finally:
                service.terminate()
    report(start, runs)


def wait_until_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if service.poll() is not None:
                raise SystemExit(f"helios serve ended with status {service.returncode}") from None
            time.sleep(0.05)


def stream(url: str) -> dict[str, float]:
    """Watches one video live. Seconds to the first fragment, frames per second after it, the sampler's share."""
    request = urllib.request.Request(
        f"{url}/v1/videos/stream", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    begin = time.perf_counter()
    first = 0.0
    with urllib.request.urlopen(request) as response:
        video_id = response.headers["X-Video-Id"]
        size = 0
        while part := response.read1():
            size += len(part)
            if not first and size > 2000:  # more than the head of the file, which comes with the first fragment
                first = time.perf_counter() - begin
    total = time.perf_counter() - begin
    with urllib.request.urlopen(f"{url}/v1/videos/{video_id}") as answer:
        sampled = json.load(answer)["usage"]["sampler_seconds"]
    return {"first": first, "rate": (FRAMES - 33) / (total - first), "share": sampled / total}


def report(start: float, runs: list[dict[str, float]]) -> None:
    figures: dict[str, Any] = {
        "service ready after (s)": round(start, 1),
        "first fragment after the request (s)": spread([run["first"] for run in runs]),
        "frames per second after it": spread([run["rate"] for run in runs]),
        "share of a video's time in which its sampler works": spread([run["share"] for run in runs]),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    setting = {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}, no GPU used",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "av", "helios-serve")),
        "commit": commit,
        "command": "make figures",
        "video": f"demo model, its default size, steps 1,1,1 (first chunk amplified), {FRAMES} frames, {REPEATS} runs",
    }
    lines = ["| figure | median (min to max) |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in figures.items()]
    lines += ["", *(f"{name}: {value}" for name, value in setting.items())]
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps({**setting, **figures}) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
