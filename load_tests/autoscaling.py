"""`make autoscaling`: how samplers follow the videos that want them, measured on this machine over HTTP alone.

The stand-in model, whose chunks are paced at a second: one video for a while, then three more, then the first alone
again, then none. A service of its own goes from none to the first chunk, which is what an empty pool costs. Draws the
demand, the replicas and the queue into PLOT; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import matplotlib

from load_tests.figures import running_service, stream

matplotlib.use("agg")
import matplotlib.pyplot as plt

PLOT = Path("docs/autoscaling.png")
MOST = 3
SAMPLER = "max_replicas: 3, min_chunk_seconds: 1.0, num_cpus: 0.1, upscale_delay_s: 2, downscale_delay_s: 6"
SCALED = f"testing: true\ntorch_threads: 1\nmodels: [{{model: random, sampler: {{{SAMPLER}}}}}]\n"
EMPTY = "models: [{model: random, sampler: {min_replicas: 0, downscale_delay_s: 2}}]\n"
ALONE_S, LOOK_S = 8.0, 0.25
SHORT, LONG = 24, 72  # chunks
GAUGES = {
    "samplers": 'helios_replicas{part="sampler"}',
    "sampling": "helios_sampling",
    "waiting": "helios_queue_depth",
}

Seen = list[dict[str, float]]


def main() -> None:
    with running_service(SCALED) as (url, _, _):
        stream(url, chunks=1)  # when that is over all parts are there
        seen = watch(url)
    with running_service(EMPTY) as (url, _, _):
        stream(url, chunks=1)
        while look(url)["samplers"]:
            time.sleep(LOOK_S)
        begin = time.perf_counter()
        stream(url, chunks=1)
        cold = time.perf_counter() - begin
        begin = time.perf_counter()
        stream(url, chunks=1)
        warm = time.perf_counter() - begin
    draw(seen)
    demand = next(look["at"] for look in seen if look["sampling"] + look["waiting"] > 2)
    top = next(look["at"] for look in seen if look["samplers"] == MOST)
    fell = next(look["at"] for look in seen if look["at"] > top and look["sampling"] + look["waiting"] < 2)
    back = next(look["at"] for look in seen if look["at"] > fell and look["samplers"] == 1)
    figures = {
        "seconds from the demand to 3 samplers": round(top - demand, 1),
        "seconds from its end to 1 sampler": round(back - fell, 1),
        "seconds to a video of one chunk, with no sampler": round(cold, 1),
        "the same, with one": round(warm, 2),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": version("torch"),
        "ray": version("ray"),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def watch(url: str) -> Seen:
    """What /metrics says, four times a second, from the first video to when all is as before."""
    begin, seen = time.perf_counter(), Seen()
    videos = [threading.Thread(target=stream, args=(url,), kwargs={"chunks": LONG})]
    others = [threading.Thread(target=stream, args=(url,), kwargs={"chunks": SHORT}) for _ in range(MOST)]
    videos[0].start()
    while True:
        seen.append({"at": time.perf_counter() - begin, **look(url)})
        if len(videos) == 1 and seen[-1]["at"] > ALONE_S:
            videos += others
            for other in others:
                other.start()
        if not any(video.is_alive() for video in videos) and seen[-1]["samplers"] == 1:
            return seen
        time.sleep(LOOK_S)


def look(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    return {name: float(lines[series]) for name, series in GAUGES.items()}


def draw(seen: Seen) -> None:
    times = [look["at"] for look in seen]
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    wanting = [look["sampling"] + look["waiting"] for look in seen]
    axes.fill_between(times, wanting, step="post", alpha=0.25, label="videos that want a chunk")
    axes.step(times, [look["waiting"] for look in seen], where="post", lw=1, label="of these, waiting for a sampler")
    axes.step(times, [look["samplers"] for look in seen], where="post", lw=2.5, label="samplers")
    axes.set(xlabel="seconds", ylim=(0, MOST + 1.5), xlim=(0, times[-1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right", frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
