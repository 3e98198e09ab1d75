"""`make figures`: what the README says of speed, measured again on this machine, over HTTP alone.

First one video of the demo model at a time; the trace tells each part's share of its time. Then eight videos at once on
two samplers whose chunks are paced: there it tells how long a sampler stands idle between two chunks. Last, there, two
videos whose Director is killed: how long their viewers wait. And 200 requests for a video where there is room for 16:
how long the others wait to hear that. Prints one Markdown table for people; the last line is the
same as JSON.
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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

REPEATS = 5
VIDEOS = 8
CHUNKS = 8
BODY = {"prompt": "a red sun over a blue sea, drifting left", "seconds": 33 * CHUNKS / 24, "steps": [1, 1, 1]}
JSON = "application/json"
PARTS = ("encode prompt", "sample", "decode", "encode", "store", "commit")  # spans that do work
PACED = (
    "testing: true\nmodels: [{model: random, sampler: {min_replicas: 2, max_replicas: 2, min_chunk_seconds: 0.5}}]\n"
)
FULL = (
    "testing: true\nadmission: {videos_per_sampler: 4, queued: 8}\n"
    "models: [{model: random, sampler: {min_replicas: 2, max_replicas: 2, min_chunk_seconds: 1.0}}]\n"
)
REQUESTS, BURST_S = 200, 5.0
DIRECTOR = "ray::ServeReplica:helios:Director"


def main() -> None:
    with running_service() as (url, start, trace_file):
        stream(url)  # warms up
        runs = [stream(url) for _ in range(REPEATS)]
        shares = parts(trace_file, {run["video_id"] for run in runs})
    with running_service(PACED) as (url, _, trace_file):
        with ThreadPoolExecutor(VIDEOS) as pool:
            list(pool.map(stream, [url] * VIDEOS))
        idle, hops = idle_times(trace_file)
        undisturbed = [pause for _ in range(REPEATS) for pause in pauses(url)]
        killed = [pause for k in range(REPEATS) for pause in pauses(url, kill_after=0.1 * k)]
    with running_service(FULL) as (url, _, _):
        rejections = burst(url)
    report(start, runs, shares, idle, hops, undisturbed, killed, rejections)


@contextmanager
def running_service(config: str = "{}") -> Iterator[tuple[str, float, Path]]:
    """A service's URL, the seconds until it was ready, and its trace file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        settings, trace_file = Path(folder) / "helios.yaml", Path(folder) / "spans.jsonl"
        settings.write_text(config)
        helios = str(Path(sys.executable).parent / "helios")
        options = ["--config", str(settings), "--port", str(port), "--store", f"{folder}/store"]
        command = [helios, "serve", *options, "--trace-file", str(trace_file)]
        begin = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as service:
            try:
                wait_until_ready(url, service)
                yield url, time.perf_counter() - begin, trace_file
            finally:
                service.terminate()


def parts(trace_file: Path, videos: set[str]) -> dict[str, float]:
    """Of the time of these videos, from acceptance to end, the share in which each part works; they overlap."""
    spans = [json.loads(line) for line in trace_file.read_text().splitlines()]
    traces = {span["context"]["trace_id"] for span in spans if span["attributes"].get("video_id") in videos}
    spent = dict.fromkeys(("video", *PARTS), 0.0)
    for span in spans:
        if span["context"]["trace_id"] in traces and span["name"] in spent:
            spent[span["name"]] += at(span, "end_time") - at(span, "start_time")
    return {part: spent[part] / spent["video"] for part in PARTS}


def at(span: dict[str, Any], which: str) -> float:
    return datetime.fromisoformat(span[which]).timestamp()


def idle_times(trace_file: Path) -> tuple[list[float], list[float]]:
    """Seconds that each sampler stood idle between two chunks; seconds from a video's turn to its sampling."""
    spans = [json.loads(line) for line in trace_file.read_text().splitlines()]
    samples = sorted((span for span in spans if span["name"] == "sample"), key=lambda span: at(span, "start_time"))
    turns = {span["parent_id"]: at(span, "end_time") for span in spans if span["name"] == "wait"}
    hops = [at(span, "start_time") - turns[span["parent_id"]] for span in samples]
    idle, ended = [], dict[int, float]()
    for span in samples:
        sampler = span["resource"]["attributes"]["process.pid"]
        if sampler in ended:
            idle.append(at(span, "start_time") - ended[sampler])
        ended[sampler] = at(span, "end_time")
    return idle, hops


def pauses(url: str, kill_after: float | None = None) -> list[float]:
    """The longest pause of each of two videos. `kill_after`: so many seconds after both have begun to arrive, their
    Director is killed."""
    begun = [threading.Event() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(stream, url, each.set) for each in begun]
        for each in begun:
            each.wait(60)
        if kill_after is not None:
            time.sleep(kill_after)
            kill_director()
        return [video.result()["pause"] for video in watching]


def kill_director() -> None:
    titles = {process: process.as_dict(["cmdline"])["cmdline"] or [] for process in psutil.Process().children(True)}
    (director,) = [process for process, title in titles.items() if any(part.startswith(DIRECTOR) for part in title)]
    director.kill()


def burst(url: str) -> list[float]:
    """How long those waited for their answer who were refused, of REQUESTS for a video in BURST_S seconds."""

    def refused_after(number: int) -> float | None:
        time.sleep(BURST_S * number / REQUESTS)
        request = urllib.request.Request(f"{url}/v1/videos", json.dumps(BODY).encode(), {"Content-Type": JSON})
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request):
                return None
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            return time.perf_counter() - begin

    with ThreadPoolExecutor(REQUESTS) as pool:
        return [seconds for seconds in pool.map(refused_after, range(REQUESTS)) if seconds is not None]


def wait_until_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if service.poll() is not None:
                raise SystemExit(f"helios serve ended with status {service.returncode}") from None
            time.sleep(0.05)


def stream(url: str, begun: Callable[[], None] = lambda: None, chunks: int = CHUNKS) -> dict[str, Any]:
    """Watches one video live; calls `begun` when its first fragment has begun to arrive. Its id, the seconds to that,
    the frames per second after it, and the longest pause in what arrives after it."""
    body = json.dumps({**BODY, "seconds": 33 * chunks / 24}).encode()
    request = urllib.request.Request(f"{url}/v1/videos/stream", body, {"Content-Type": JSON})
    begin = time.perf_counter()
    first = last = pause = 0.0
    with urllib.request.urlopen(request) as response:
        video_id = response.headers["X-Video-Id"]
        size = 0
        while part := response.read1():
            size += len(part)
            now = time.perf_counter() - begin
            if first:
                pause = max(pause, now - last)
            elif size > 2000:  # more than the head of the file, which comes with the first fragment
                first = now
                begun()
            last = now
    total = time.perf_counter() - begin
    return {"video_id": video_id, "first": first, "rate": 33 * (chunks - 1) / (total - first), "pause": pause}


def report(
    start: float,
    runs: list[dict[str, Any]],
    shares: dict[str, float],
    idle: list[float],
    hops: list[float],
    undisturbed: list[float],
    killed: list[float],
    rejections: list[float],
) -> None:
    figures: dict[str, Any] = {
        "service ready after (s)": round(start, 1),
        "first fragment after the request (s)": spread([run["first"] for run in runs]),
        "frames per second after it": spread([run["rate"] for run in runs]),
        **{f"share of a video's time in which it is busy: {part}": f"{share:.0%}" for part, share in shares.items()},
        "8 videos, 2 samplers: a sampler idle between two chunks of 0.5 s (s)": quantiles(idle),
        "8 videos, 2 samplers: from a turn to its sampling (s)": quantiles(hops),
        "2 videos, a chunk of each 0.5 s: a viewer's longest pause (s)": spread(undisturbed),
        "the same, over a SIGKILL of the Director (s)": spread(killed),
        f"{REQUESTS} requests in {BURST_S:g} s, room for 16: a refusal, of {len(rejections)} (s)": (
            f"{statistics.median(rejections):.3f} (p99 {statistics.quantiles(rejections, n=100)[98]:.3f})"
        ),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    setting = {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}, no GPU used",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "av", "helios-serve")),
        "commit": commit,
        "command": "make figures",
        "video": f"demo model, its size, steps 1,1,1 (first chunk amplified), {33 * CHUNKS} frames, {REPEATS} runs",
    }
    lines = ["| figure | median (min to max) |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in figures.items()]
    lines += ["", *(f"{name}: {value}" for name, value in setting.items())]
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps({**setting, **figures}) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def quantiles(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{tenths[4]:.3f} (p90 {tenths[8]:.3f}, max {max(values):.3f})"


if __name__ == "__main__":
    main()
