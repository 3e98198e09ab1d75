"""`helios bench --serve`: what the service adds to the bare model.

One video at a time is streamed over HTTP from a service of its own, and made by `Helios.stream` in this process, with
the same number of torch threads and the sampler's settings, taking turns. Both overlap a chunk's sampling with the
decoding of the one before. The bare loop encodes its fragments in the thread that decodes, and makes RGB frames too,
which the service does not: some milliseconds a chunk.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deployments.config import AppConfig, free_port
from deployments.timeline import Video, pick, read
from helios_core.bench.command import commit, cpu
from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.errors import HeliosError
from helios_core.helios import Helios
from helios_core.media.fragments import encode_fragment
from helios_core.spec import parse_steps

PROMPT = "a red sun over a blue sea, drifting left"
MODEL_SPANS = ("sample", "decode")
PARTS = ("wait", *MODEL_SPANS, "encode", "store", "commit")
FIRST_FRAGMENT = 2000  # bytes: more than the head of the file, which comes with the first fragment


@dataclass(frozen=True)
class Run:
    """Frames per second of one video: all of them over all the time; those after the first chunk over the time after
    it."""

    whole: float
    after_first_chunk: float

    @classmethod
    def of(cls, chunks: int, first_s: float, total_s: float) -> Run:
        frames = chunks * CHUNK_FRAMES
        return cls(frames / total_s, (frames - CHUNK_FRAMES) / (total_s - first_s))


def main(arguments: Sequence[str]) -> None:
    """Measures and writes a table, and as the last line the same as JSON."""
    options = _parser().parse_args(arguments)
    steps = parse_steps(options.steps)
    config = AppConfig() if options.config is None else AppConfig.read(options.config)
    config = config.override(torch_threads=options.threads, port=free_port()).with_model(options.model)
    model, pool = config.models[0].model, config.models[0].sampler
    bare = Helios.load(model, pool.device, pool.dtype, config.torch_threads, pool.approximations)
    served, alone = [], []
    with running_service(config) as (url, trace_file):
        ask = {"prompt": PROMPT, "seconds": options.chunks * CHUNK_FRAMES / NATIVE_FPS, "steps": steps}
        _stream(url, ask)  # warms up
        _make(bare, options.chunks, steps)
        videos = []
        for _ in range(options.repeats):
            video_id, run = _stream(url, ask)
            videos.append(video_id)
            served.append(run)
            alone.append(_make(bare, options.chunks, steps))
        spans = read(trace_file)
        traced = [pick(spans, video_id) for video_id in videos]
    setting = {
        "hardware": f"{cpu()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "av", "helios-serve")),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["helios", "bench", *arguments]),
        "device": str(bare.sampler.model.device),
        "torch threads": torch.get_num_threads(),
        "video": f"{model}, its default size, steps {options.steps}, {options.chunks} chunks, {options.repeats} runs",
    }
    _report(setting, _figures(served, alone, traced, options.chunks), options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helios bench --serve",
        description="Measure what the service adds to the bare model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--serve", action="store_true", required=True)
    parser.add_argument("--config", type=Path, help="of the service, such as one whose samplers have GPUs")
    parser.add_argument("--model", help="a known name, a folder or a hub id; that of --config if not given")
    parser.add_argument("--threads", type=int, help="of torch, in each process; half of the cores if not given")
    parser.add_argument("--steps", default="1,1,1", help="per stage")
    parser.add_argument("--chunks", type=int, default=8, help="of each video, 2 or more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


@contextmanager
def running_service(config: AppConfig) -> Iterator[tuple[str, Path]]:
    """The URL of a `helios serve` with this configuration and an empty store, and its trace file."""
    with tempfile.TemporaryDirectory() as folder:
        trace_file, settings = Path(folder) / "spans.jsonl", Path(folder) / "helios.yaml"
        config = config.override(store=f"{folder}/store", trace_file=str(trace_file))
        settings.write_text(config.model_dump_json(exclude_none=True))  # JSON is YAML
        command = [sys.executable, "-m", "deployments.cli", "serve", "--config", str(settings)]
        said = Path(folder) / "stderr"
        with said.open("w") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as service:
            try:
                url = f"http://{config.host}:{config.port}"
                while not _ready(url):
                    if service.poll() is not None:
                        raise HeliosError(f"helios serve ended with status {service.returncode}: {said.read_text()}")
                    time.sleep(0.1)
                yield url, trace_file
            finally:
                service.terminate()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stream(url: str, ask: dict[str, Any]) -> tuple[str, Run]:
    """Watches one video from its request on; its id."""
    body = json.dumps(ask).encode()
    request = urllib.request.Request(f"{url}/v1/videos/stream", body, {"Content-Type": "application/json"})
    begin, size, first = time.perf_counter(), 0, None
    with urllib.request.urlopen(request) as response:
        video_id = response.headers["X-Video-Id"]
        while part := response.read1():
            size += len(part)
            if first is None and size > FIRST_FRAGMENT:
                first = time.perf_counter() - begin
    if first is None:
        raise HeliosError(f"video {video_id} ended after {size} bytes")
    return video_id, Run.of(round(ask["seconds"] * NATIVE_FPS / CHUNK_FRAMES), first, time.perf_counter() - begin)


def _make(bare: Helios, chunks: int, steps: tuple[int, ...]) -> Run:
    """The same video without a service, each chunk as it would be sent."""
    begin, ends = time.perf_counter(), []
    for chunk in bare.stream(PROMPT, seconds=chunks * CHUNK_FRAMES / NATIVE_FPS, steps=steps):
        encode_fragment(chunk.yuv, chunk_index=chunk.index, first_frame=chunk.index * CHUNK_FRAMES, fps=NATIVE_FPS)
        ends.append(time.perf_counter() - begin)
    return Run.of(chunks, ends[0], ends[-1])


def _figures(served: list[Run], alone: list[Run], videos: list[Video], chunks: int) -> dict[str, list[float]]:
    """Name with unit ▸ one value for each run."""
    return {
        "service, frames/s": [run.whole for run in served],
        "bare, frames/s": [run.whole for run in alone],
        "service/bare": [s.whole / b.whole for s, b in zip(served, alone, strict=True)],
        "service after the first chunk, frames/s": [run.after_first_chunk for run in served],
        "bare after the first chunk, frames/s": [run.after_first_chunk for run in alone],
        "service/bare after the first chunk": [
            s.after_first_chunk / b.after_first_chunk for s, b in zip(served, alone, strict=True)
        ],
        "service's time outside the model, share": [outside_the_model(video) for video in videos],
        **{f"{part} of a chunk, ms": [1000 * _spent(video, part) / chunks for video in videos] for part in PARTS},
    }


def _spent(video: Video, part: str) -> float:
    """Seconds of all spans of this name."""
    return sum(video.after(span.end) - video.after(span.begin) for span in video.spans if span.name == part)


def outside_the_model(video: Video) -> float:
    """The share of a video's time, from its acceptance to its end, in which it is neither sampled nor decoded."""
    (whole,) = (span for span in video.spans if span.name == "video")
    busy = covered((video.after(span.begin), video.after(span.end)) for span in video.spans if span.name in MODEL_SPANS)
    return 1 - busy / (video.after(whole.end) - video.after(whole.begin))


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what the intervals cover together."""
    length, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, until))
        until = max(until, end)
    return length


def _report(setting: dict[str, Any], figures: dict[str, list[float]], file: Path | None) -> None:
    table = Table("figure", "median", "least", "most", title="helios bench --serve")
    for name, values in figures.items():
        table.add_row(name, *(f"{value:.3g}" for value in (statistics.median(values), min(values), max(values))))
    console = Console()
    console.print(table)
    for name, value in setting.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    document = json.dumps({**setting, "medians": medians, "runs": figures}) + "\n"
    sys.stdout.write(document)
    if file is not None:
        file.write_text(document)
