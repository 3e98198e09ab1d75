"""`make soak MINUTES=30`: videos of all kinds over an S3 store, and a kill every 30 s.

No video may be lost: each that is watched has the bytes that the library makes, over as many connections as it takes,
and each that nobody watches is completed. What lives on must not grow: the memory and the descriptors of every process,
but for the files that Ray's log monitor has open, and what somebody holds in the object store. For half of the time
those are killed that answer, for the other half those that compute: each process of the others lives through a half,
and is judged by it. Prints a JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from ray._private.internal_api import global_gc

from deployments.config import free_port
from deployments.watching import KEPT_BYTES
from tests.deployments.s3 import S3Server
from tests.faults.service import (
    AGAIN_S,
    Body,
    Service,
    body,
    by_library,
    object_store_bytes,
    processes,
    rest,
    serving,
    wait_until,
)

KILL_EVERY_S, LOOK_EVERY_S = 30.0, 5.0
USERS = 4
PARTS = (("Director", "Ingress", "Proxy", "Controller"), ("Sampler", "VaeDecoder", "TextEncoder"))
LONGEST_S = 180.0  # that a video may take
MOST_GROWTH = 1.0  # MB a minute, and descriptors a minute
LOG_MONITOR = "log_monitor.py"  # Ray's: it opens the logs of each process that comes, and closes all of them at 200
ENDED = ("completed", "cancelled", "failed")


class User:
    """Somebody who makes one video after the other and does not give up when a connection breaks."""

    def __init__(self, http: httpx.Client, number: int, over: threading.Event) -> None:
        self._http, self._rng, self._over = http, random.Random(number), over
        self.done: Counter[str] = Counter()
        self.lost: list[str] = []

    def run(self) -> None:
        kinds: list[Callable[[Body], bool]] = [self._streamed, self._watched, self._unwatched, self._cancelled]
        while not self._over.is_set():
            kind = self._rng.choice(kinds)
            wanted = body(self._rng.randrange(8), self._rng.randrange(1, 7), size="64x64")
            name = kind.__name__.strip("_")
            self.done[name] += 1
            try:
                if not kind(wanted):
                    self.lost.append(name)
            except (httpx.HTTPStatusError, AssertionError) as error:
                self.lost.append(f"{name}: {error!r}")

    def fill(self) -> None:
        """Watches until the ingress keeps as many fragments as it may."""
        watched = 0
        while watched < KEPT_BYTES:
            watched += sum(map(len, rest(self._http, self._created(body(0, size="640x384")))))

    def _streamed(self, wanted: Body) -> bool:
        """Live; from where it broke off if it did."""
        key, data, video_id = secrets.token_hex(8), b"", None
        deadline = time.monotonic() + LONGEST_S
        while video_id is None:
            assert time.monotonic() < deadline, "it was not accepted"
            try:
                headers = {"Idempotency-Key": key}
                with self._http.stream("POST", "/v1/videos/stream", json=wanted, headers=headers) as answer:
                    if answer.status_code >= 500:  # Serve's proxy says 500 for an ingress that died over it
                        time.sleep(AGAIN_S)
                        continue
                    answer.raise_for_status()
                    video_id = answer.headers["x-video-id"]
                    for part in answer.iter_raw():
                        data += part
            except httpx.TransportError:
                time.sleep(AGAIN_S)
        return data + b"".join(rest(self._http, video_id, len(data))) == by_library(wanted)

    def _watched(self, wanted: Body) -> bool:
        return b"".join(rest(self._http, self._created(wanted))) == by_library(wanted)

    def _unwatched(self, wanted: Body) -> bool:
        return self._ended(self._created(wanted)) == "completed"

    def _cancelled(self, wanted: Body) -> bool:
        video_id = self._created(wanted)
        time.sleep(self._rng.uniform(0, 2))
        self._asked("POST", f"/v1/videos/{video_id}/cancel")
        return self._ended(video_id) in ("completed", "cancelled")

    def _created(self, wanted: Body) -> str:
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        video_id: str = self._asked("POST", "/v1/videos", json=wanted, headers=headers).json()["id"]
        return video_id

    def _ended(self, video_id: str) -> str:
        deadline = time.monotonic() + LONGEST_S
        while (status := self._asked("GET", f"/v1/videos/{video_id}").json()["status"]) not in ENDED:
            assert time.monotonic() < deadline, f"{video_id} is {status}"
            time.sleep(AGAIN_S)
        return str(status)

    def _asked(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer, as soon as there is one that is not of a service that comes back."""
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code < 500:
                    return answer.raise_for_status()
            time.sleep(AGAIN_S)
        raise AssertionError(f"{method} {path} was not answered for {LONGEST_S:g} s")


class Looks:
    """What each process holds, over time; all but `without`, whose business it is to hold more and more."""

    def __init__(self, without: int) -> None:
        self._without = without
        self._seen: dict[int, list[tuple[float, float, int]]] = {}  # pid ▸ (time, MB, descriptors)
        self._names: dict[int, str] = {}

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid == self._without:
                continue
            try:
                with process.oneshot():
                    memory, command = process.memory_info(), process.cmdline()
                    row = time.monotonic(), (memory.rss - memory.shared) / 1e6, process.num_fds()
            except psutil.Error:
                continue
            self._seen.setdefault(process.pid, []).append(row)
            self._names[process.pid] = " ".join(Path(part).name for part in command[:3])  # of Python, what it runs

    def growth(self, seconds: float) -> dict[str, dict[str, float]]:
        """Of each process that is there at the end and was for `seconds`: MB and descriptors a minute, by a straight
        line through the second half of its life."""
        found = {}
        for pid, rows in self._seen.items():
            if rows[-1][0] - rows[0][0] < seconds or not psutil.pid_exists(pid):
                continue
            times, memory, descriptors = map(np.array, zip(*rows[len(rows) // 2 :], strict=True))
            slopes = [float(np.polyfit(times / 60, values, 1)[0]) for values in (memory, descriptors)]
            found[f"{self._names[pid]} {pid}"] = {"MB": round(slopes[0], 2), "descriptors": round(slopes[1], 2)}
        return found


def soak(service: Service, seconds: float, store: S3Server) -> dict[str, Any]:
    over, rng, kills = threading.Event(), random.Random(0), Counter[str]()
    growth: dict[str, dict[str, float]] = {}
    service.wait_until_whole()
    global_gc()
    before = object_store_bytes()
    users = [User(service.http, number, over) for number in range(USERS)]
    with ThreadPoolExecutor(USERS) as pool:
        running = [pool.submit(user.run) for user in users]
        try:
            for killed, living in (PARTS, PARTS[::-1]):
                if "Ingress" in living:
                    users[0].fill()  # else it would grow by that
                looks, began = Looks(store.pid), time.monotonic()
                end, next_kill = began + seconds / 2, began + KILL_EVERY_S
                while time.monotonic() < end and not any(each.done() for each in running):
                    looks.look()
                    if time.monotonic() >= next_kill:
                        next_kill += KILL_EVERY_S
                        role = rng.choice(killed)
                        if victims := processes(role):  # none, while the last one of it is not back yet
                            rng.choice(victims).send_signal(signal.SIGKILL)
                            kills[role] += 1
                    time.sleep(LOOK_EVERY_S)
                lived = looks.growth(seconds / 2 - 3 * LOOK_EVERY_S)
                pids = {int(name.split()[-1]) for name in lived}
                for role in living:
                    assert all(each.pid in pids for each in processes(role)), f"{role} was replaced and met no fault"
                growth |= {f"{name}, {', '.join(killed)} killed": own for name, own in lived.items()}
        finally:
            over.set()
        for each in running:
            each.result()
    service.wait_until_whole()
    global_gc()
    with suppress(AssertionError):  # told below
        wait_until(lambda: object_store_bytes() <= before)
    return {
        "minutes": round(seconds / 60, 1),
        "kills": dict(kills),
        "videos": dict(sum((user.done for user in users), Counter())),
        "lost": [told for user in users for told in user.lost],
        "object store, bytes more": object_store_bytes() - before,
        "grew most, a minute": {
            "MB": max(each["MB"] for each in growth.values()),
            "descriptors": max(each["descriptors"] for name, each in growth.items() if LOG_MONITOR not in name),
        },
        "growth a minute": growth,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    seconds = 60 * parser.parse_args().minutes
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in the tests
    server = S3Server()
    try:
        os.environ.update(server.environment)
        store = server.new_bucket()
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), free_port(), store=store) as service:
            report = soak(service, seconds, server)
    finally:
        server.close()
    print(json.dumps(report, indent=1))  # noqa: T201
    grew = report["object store, bytes more"] > 0 or max(report["grew most, a minute"].values()) >= MOST_GROWTH
    return 1 if report["lost"] or grew else 0


if __name__ == "__main__":
    sys.exit(main())
