"""The load test, for locust: its options, its shape and its report. docs/load-tests.md shows how it is run.

Each process tells of the videos that its users had; in a distributed run the workers' come to the master with locust's
own statistics. The only process, or the master, looks at the service besides, writes the report, and ends with status 1
if the verdict is that it failed.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner

from load_tests import page, report
from load_tests.observing import Observer, version_of
from load_tests.product import Product, video_ended
from load_tests.shapes import SHAPES

__all__ = ["Product", "Shape"]  # locust takes them from here

GRACE_S = 15.0  # so long a user whom the stop timeout ended may take to ask how their video stands


def lengths(text: str) -> list[float]:
    """ "2.75,5.5" as seconds. Raises ArgumentTypeError."""
    try:
        seconds = [float(part) for part in text.split(",")]
    except ValueError:
        seconds = []
    if not seconds or min(seconds) <= 0:
        raise ArgumentTypeError(f"--seconds is {text!r}; allowed: numbers above 0, with commas between them")
    return seconds


@events.init_command_line_parser.add_listener
def options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="steady", help="how many users there are when")
    parser.add_argument("--seed", type=int, default=1, help="of all that users ask for")
    parser.add_argument("--think", type=float, default=4.0, help="mean seconds between two videos of one user")
    parser.add_argument("--seconds", type=lengths, default="2.75,5.5,11", help="lengths of videos, one after the other")
    parser.add_argument("--size", help="WIDTHxHEIGHT; default: the model's")
    parser.add_argument("--model", help="default: the service's")
    parser.add_argument("--preset", help="realtime or quality; default: the model's")
    parser.add_argument("--keys-file", help="a file of API keys, one a line; users take turns on them")
    parser.add_argument(
        "--keys", env_var="HELIOS_KEYS", default="", help="the same, with spaces between them", is_secret=True
    )
    parser.add_argument("--metrics-key", env_var="HELIOS_METRICS_KEY", help="the key for /metrics", is_secret=True)
    parser.add_argument("--slo", default=str(Path(__file__).with_name("slo.yaml")), help="the limits of the verdict")
    parser.add_argument("--report", default="build/load", help="the folder of report.html and report.json")
    parser.set_defaults(run_time=180, stop_timeout=60)


class Shape(LoadTestShape):
    """The shape that the options name, and its end: when the run time is over nobody begins anything, and the run waits
    until everybody is through with what they had begun, for `--stop-timeout` at most."""

    use_common_options = True
    _empty_at = math.inf  # seconds of the run at which nobody was there any more

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        chosen: Any = self.runner.environment.parsed_options
        at = self.get_run_time()
        if at < chosen.run_time:
            return SHAPES[chosen.shape](chosen.num_users, at / chosen.run_time), chosen.spawn_rate
        # All at once: where there are several steps locust waits for one after the other.
        none = 0, float(chosen.num_users)
        # What a worker has comes with its reports: nobody is there, and nothing more to come, when two have said so.
        if self.get_current_user_count():
            self._empty_at = math.inf
        elif self._empty_at == math.inf:
            self._empty_at = at
        settle_s = 2 * WORKER_REPORT_INTERVAL if isinstance(self.runner, MasterRunner) else 0.0
        over = at >= min(self._empty_at + settle_s, chosen.run_time + chosen.stop_timeout + GRACE_S)
        return None if over else none


class Books:
    """What one process knows of the run."""

    def __init__(self) -> None:
        self.videos: list[dict[str, Any]] = []
        self.answers: Counter[int] = Counter()

    def on_video(self, video: dict[str, Any], **_: Any) -> None:
        self.videos.append(video)

    def on_request(self, response: Any, **_: Any) -> None:
        self.answers[response.status_code if response is not None else 0] += 1

    def on_report_to_master(self, data: dict[str, Any], **_: Any) -> None:
        data["videos"], self.videos = self.videos, []
        data["answers"], self.answers = list(self.answers.items()), Counter()

    def on_worker_report(self, data: dict[str, Any], **_: Any) -> None:
        self.videos += data["videos"]
        self.answers.update(dict(data["answers"]))


@events.init.add_listener
def wire(environment: Environment, **_: Any) -> None:
    hooks, books = environment.events, Books()
    video_ended.add_listener(books.on_video)
    hooks.request.add_listener(books.on_request)
    hooks.test_start.add_listener(begin)
    if isinstance(environment.runner, WorkerRunner):
        hooks.report_to_master.add_listener(books.on_report_to_master)
        return
    hooks.worker_report.add_listener(books.on_worker_report)
    chosen: Any = environment.parsed_options
    assert environment.runner is not None
    if not environment.host:
        raise SystemExit("--host is missing; allowed: the URL of a service, as http://127.0.0.1:8000")
    try:
        slo = report.read_slo(Path(chosen.slo))
    except report.SloError as error:
        raise SystemExit(str(error)) from None
    environment.host = environment.host.rstrip("/")
    observer = Observer(environment.host, chosen.metrics_key, environment.runner)
    looking: list[gevent.Greenlet[..., None]] = []
    hooks.test_start.add_listener(lambda **_: looking.append(gevent.spawn(observer.run)))

    def write(**_: Any) -> None:
        gevent.killall(looking)
        setting = setting_of(environment, observer)
        made = report.make(setting, books.videos, books.answers, observer.looks, observer.memory, slo)
        folder = page.write(made, Path(chosen.report))
        if observer.why_not is not None:
            sys.stdout.write(f"/metrics: {observer.why_not}\n")
        sys.stdout.write(f"{report.table(made)}\nbottleneck: {report.told(made['bottleneck'])}\n{folder}/report.html\n")
        environment.process_exit_code = 0 if made["passed"] else 1

    hooks.quitting.add_listener(write)


def begin(**_: Any) -> None:
    Product.began, Product.numbers = time.perf_counter(), itertools.count()


def setting_of(environment: Environment, observer: Observer) -> dict[str, Any]:
    """What a figure is worth nothing without. Numbers of replicas are the largest that were seen."""
    chosen: Any = environment.parsed_options
    assert environment.host is not None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()

    command = " ".join(["locust", *sys.argv[1:]])
    for secret in filter(None, (*chosen.keys.split(), chosen.metrics_key)):
        command = command.replace(secret, "…")

    def most(part: str) -> int | None:
        series = f'helios_replicas{{part="{part}"}}'
        return max((int(look.series[series]) for look in observer.looks if series in look.series), default=None)

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": environment.host,
        "shape": chosen.shape,
        "users": chosen.num_users,
        "run_time_s": chosen.run_time,
        "seed": chosen.seed,
        "think_s": chosen.think,
        "seconds": chosen.seconds,
        "model": chosen.model,
        "size": chosen.size,
        "preset": chosen.preset,
        "samplers": most("sampler"),
        "vae_decoders": most("vae_decoder"),
        "text_encoders": most("text_encoder"),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, of the machine that writes this report",
        "versions": {
            "helios-serve": version_of(environment.host),
            "python": platform.python_version(),
            "locust": version("locust"),
        },
        "commit": commit,
        "command": command,
    }
