"""Every process of the service is killed at once; the next start finishes what was accepted.

`TRIALS=10` runs ten seeded trials instead of one (`make faults`).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from deployments.config import free_port

pytestmark = pytest.mark.ray

TRIALS = int(os.environ.get("TRIALS", "1"))
VIDEOS, CHUNKS = 8, 3
LONGEST_S = 120


class Served:
    """`helios serve` over one folder, in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        sampler = {"min_replicas": 1, "max_replicas": 1, "min_chunk_seconds": 0.3}
        settings = {
            "testing": True,
            "port": self.port,
            "store": str(folder / "store"),
            "torch_threads": 1,
            "models": [{"model": "random", "sampler": sampler}],
        }
        (folder / "helios.yaml").write_text(yaml.safe_dump(settings))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The service, ready; whatever is left of it afterwards is killed, all at once."""
        command = [sys.executable, "-m", "deployments.cli", "serve", "--config", str(self.folder / "helios.yaml")]
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self.process = psutil.Process(process.pid)
        try:
            self.wait_until(lambda: self.answers(process))
            yield
        finally:
            kill_all(self.process)
            process.wait()

    def answers(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, f"status {process.returncode}: {(self.folder / 'log').read_text()}"
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def create(self, seed: int) -> str:
        body = {
            "prompt": "a red sun over a blue sea",
            "seconds": CHUNKS * 33 / 24,
            "size": "64x64",
            "seed": seed,
            "steps": [1, 1, 1],
        }
        answer = self.http.post("/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        video_id: str = answer.json()["id"]
        return video_id

    def videos(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.http.get("/v1/videos", params={"limit": 100}).json()["data"]
        return listed

    def file(self, video_id: str) -> bytes:
        """The finished file, for which this waits."""
        self.wait_until(lambda: self.http.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
        return self.http.get(f"/v1/videos/{video_id}/content").content

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not reached():
            assert time.monotonic() < deadline, f"this took more than {LONGEST_S} s"
            time.sleep(0.05)

    def reached_from_elsewhere(self) -> set[int]:
        """The ports at which not only this machine reaches the service's processes, Ray's and Serve's among them."""
        family = [self.process, *self.process.children(recursive=True)]
        sockets = [socket for one in family for socket in one.net_connections("inet")]
        listening = [socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN]
        assert len(listening) > 10
        return {port for ip, port in listening if ip.removeprefix("::ffff:") != "127.0.0.1"}


def assert_no_stranger_calls(port: int) -> None:
    """Whoever calls a replica of Serve's has what they send unpickled."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def kill_all(process: psutil.Process) -> None:
    """SIGKILL to a process and all that it started, so fast that none sees another one die."""
    family = [process, *process.children(recursive=True)]
    for one in family:
        one.suspend()
    for one in family:
        one.kill()
    psutil.wait_procs(family[1:])


def test_what_was_accepted_is_finished_after_a_restart(tmp_path: Path) -> None:
    """Each service but the first one finishes what the one before it left behind."""
    served = Served(tmp_path)

    def begun(trial: int) -> list[str]:
        """All videos of a trial, as soon as some of their chunks are there."""
        chunks = random.Random(trial).randrange(1, VIDEOS * CHUNKS - VIDEOS)
        ids = [served.create(seed) for seed in range(VIDEOS)]
        served.wait_until(lambda: sum(v["usage"]["chunks"] for v in served.videos() if v["id"] in ids) >= chunks)
        return ids

    with served.running():
        undisturbed = [served.file(video_id) for video_id in [served.create(seed) for seed in range(VIDEOS)]]
        reached = served.reached_from_elsewhere()
        assert len(reached) == 5  # the replicas, whose port Serve opens on every interface
        for port in reached:
            assert_no_stranger_calls(port)
        ids = begun(0)
    for trial in range(TRIALS):
        with served.running():
            assert [served.file(video_id) for video_id in ids] == undisturbed, f"trial {trial}"
            if trial < TRIALS - 1:
                ids = begun(trial + 1)
