"""Looks at the service while users use it: /metrics once a second, and, if it runs on this machine, what its processes
hold. One process of a run does it: the only one, or the master."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import gevent
import psutil
import requests

from load_tests.service_metrics import Look, parse

if TYPE_CHECKING:
    from locust.runners import Runner

EVERY_S, MEMORY_EVERY_S = 1.0, 5.0
# As Ray titles its processes: ray::ServeReplica:helios:Director, ray::ProxyActor, …
TITLE = re.compile(r"ray::(?:ServeReplica:[^:]*:)?(\w+)")
OTHERS = ("raylet", "gcs_server")


class Observer:
    """What was seen so far.

    `looks`: at /metrics; `why_not`: why the last of them was not to be had. `memory`: role and id of a process ▸
    [{at, rss_mb}], what it holds, without what it shares with others, in 10^6 bytes; empty if the service is elsewhere.
    """

    def __init__(self, host: str, key: str | None, runner: Runner) -> None:
        self.looks: list[Look] = []
        self.memory: dict[str, list[dict[str, float]]] = {}
        self.why_not: str | None = None
        self._host, self._runner = host, runner
        self._session = requests.Session()
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._here = urlsplit(host).hostname in ("localhost", "127.0.0.1", "::1")

    def run(self) -> None:
        """Until this greenlet is killed."""
        begin, next_memory = time.perf_counter(), 0.0
        while True:
            at = time.perf_counter() - begin
            self.look(at)
            if self._here and at >= next_memory:
                self.weigh(at)
                next_memory = at + MEMORY_EVERY_S
            gevent.sleep(max(0.0, at + EVERY_S - (time.perf_counter() - begin)))

    def look(self, at: float) -> None:
        try:
            answer = self._session.get(f"{self._host}/metrics", timeout=EVERY_S * 5)
            answer.raise_for_status()
        except requests.RequestException as error:
            self.why_not = str(error)
            return
        self.looks.append(Look(at, self._runner.user_count, parse(answer.text)))

    def weigh(self, at: float) -> None:
        for process in psutil.process_iter(["cmdline", "name", "memory_info"]):
            if (role := role_of(process.info["cmdline"] or [], process.info["name"])) and process.info["memory_info"]:
                memory = process.info["memory_info"]
                points = self.memory.setdefault(f"{role} {process.pid}", [])
                points.append({"at": at, "rss_mb": (memory.rss - memory.shared) / 1e6})


def role_of(command: list[str], name: str) -> str | None:
    """What a process of Ray does; None: it is none, or it waits for work."""
    if name in OTHERS:
        return name
    match = TITLE.match(command[0]) if command else None
    return match[1] if match and match[1] != "IDLE" else None


def version_of(host: str) -> str | None:
    """The service's, as its contract tells it; None: it does not tell."""
    try:
        answer = requests.get(f"{host}/openapi.json", timeout=EVERY_S * 5)
        return str(answer.json()["info"]["version"])
    except (requests.RequestException, KeyError):
        return None
