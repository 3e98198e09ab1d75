"""Ten minutes of video, watched from the start: what the service holds for it does not grow, and its times stay exact.

What a process holds is its resident memory without code and without the object store, which all share; that one is
looked at by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import median

import httpx
import psutil
import pytest

from deployments.cli import free_port
from deployments.config import AppConfig
from deployments.service import run_service
from tests.deployments.boxes import read_boxes, reader
from tests.deployments.test_faults import object_store_bytes
from tests.deployments.test_service import pts_of

pytestmark = pytest.mark.ray

SECONDS, FRAMES, CHUNKS = 600, 14_400, 437
WARM = 20  # chunks after which all that is allocated once has been
WINDOW = 60  # chunks, of which the median counts: a process may be in the midst of a chunk
LATENTS = 9 * 16 * 8 * 8 * 4  # bytes of one chunk's at 64x64, the least that one could forget to let go
SERVED_BY = ("ray::ServeReplica", "ray::ProxyActor", "ray::ServeController")


@dataclass
class Memory:
    """Bytes of each process of the service, and of its object store: a sample per chunk."""

    samples: dict[str, list[int]] = field(default_factory=dict)

    def sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                title, held = process.cmdline()[:1], process.memory_info()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue  # it ended while we looked
            if title and title[0].startswith(SERVED_BY):
                name = title[0].partition(".")[0]  # what follows is what it does at the moment
                self.samples.setdefault(f"{name} {process.pid}", []).append(held.rss - held.shared)
        self.samples.setdefault("object store", []).append(object_store_bytes())


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    config = AppConfig(store=str(tmp_path_factory.mktemp("store")), port=free_port(), torch_threads=1)
    with run_service(config.with_model("random")) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_ten_minutes(http: httpx.Client, tmp_path: Path) -> None:
    body = {"prompt": "a red sun over a blue sea", "seconds": SECONDS, "size": "64x64", "steps": [1, 1, 1]}
    video_id = http.post("/v1/videos", json=body).json()["id"]
    memory, path = Memory(), tmp_path / "video.mp4"
    chunks = 0
    with http.stream("GET", f"/v1/videos/{video_id}/content") as live, path.open("wb") as file:
        for kind, box in read_boxes(reader(live.iter_raw())):
            file.write(box)
            if kind == "mdat":
                chunks += 1
                memory.sample()
    status = http.get(f"/v1/videos/{video_id}").json()
    assert (status["status"], status["usage"]["chunks"], chunks) == ("completed", CHUNKS, CHUNKS)
    assert len(memory.samples) == 8  # five replicas, Serve's two, the object store
    for name, held in memory.samples.items():
        assert len(held) == CHUNKS, f"{name} was not there all the time"
        early, late = median(held[WARM : WARM + WINDOW]), median(held[-WINDOW:])
        assert late < 1.05 * early, f"{name}: {early} to {late} bytes"
        assert late - early < LATENTS / 2 * (CHUNKS - WARM - WINDOW), f"{name}: {early} to {late} bytes"
    assert http.get(f"/v1/videos/{video_id}/content").content == path.read_bytes()
    assert pts_of(path) == [Fraction(i, 24) for i in range(FRAMES)]
