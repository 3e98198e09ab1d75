"""A running service as those see it who disturb it: over HTTP, in its store, and by its processes."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray._private.internal_api import node_stats

from deployments.config import AppConfig
from deployments.records import VideoRecord
from deployments.rendering import APP_NAME
from deployments.service import run_service
from helios_core.helios import Helios
from helios_core.media.fragments import encode_fragment
from tests.deployments.boxes import read_boxes, reader
from tests.deployments.line import Line

SAMPLERS = 2
AGAIN_S, PATIENCE_S = 0.5, 60.0  # between two tries of a client whose connection broke, and for all that hears nothing
LONGEST_CHUNK_S = 30.0  # after which a replica that has made none like it is taken to hang
CHUNK_SECONDS = 0.5  # of sampling, paced: so that a fault finds a sampler in the midst of a chunk
REPLICAS = {"Sampler": SAMPLERS, "VaeDecoder": 1, "TextEncoder": 1, "Director": 1, "Ingress": 1}
SERVES_OWN = {"Proxy": "ray::ProxyActor", "Controller": "ray::ServeController", "HAProxy": "haproxy"}

Body = dict[str, Any]


class Streamed(NamedTuple):
    """`arrived`: when it was asked for, and when each fragment came; monotonic seconds. `error`: why nothing came."""

    video_id: str
    data: bytes
    arrived: list[float]
    error: str | None = None


@dataclass
class Service:
    """`line`: a network to it that can be cut."""

    url: str
    http: httpx.Client
    line: Line
    store: Path
    trace_file: Path
    config: AppConfig

    def stream(self, body: Body, began: threading.Event | None = None) -> Streamed:
        """A video's live stream. `began` is set when its first fragment has arrived."""
        asked_at = time.monotonic()
        with self.http.stream("POST", "/v1/videos/stream", json=body) as response:
            assert response.status_code == 200, response.read()
            return _streamed(response.headers["x-video-id"], response.iter_raw(), asked_at, began)

    def watch(self, body: Body, began: threading.Event | None = None) -> Streamed:
        """The same of a viewer behind `line`, whose connection may break: it goes on with `Range`."""
        asked_at = time.monotonic()
        video_id = self.http.post("/v1/videos", json=body).raise_for_status().json()["id"]
        with httpx.Client(base_url=self.line.url, timeout=120) as http:
            return _streamed(video_id, rest(http, video_id), asked_at, began)

    def together(
        self,
        bodies: list[Body],
        disturb: Callable[[], None] = lambda: None,
        from_start: bool = False,
        come_back: bool = False,
    ) -> list[Streamed]:
        """Streams all at once, for viewers that `come_back` if their connection breaks or for others; `disturb` is
        called when each has its first fragment, or at once."""
        events = [threading.Event() for _ in bodies]

        def see(body: Body, began: threading.Event) -> Streamed:
            try:
                return self.watch(body, began) if come_back else self.stream(body, began)
            except (httpx.HTTPError, AssertionError) as error:
                began.set()
                return Streamed("", b"", [], repr(error))

        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = [pool.submit(see, body, event) for body, event in zip(bodies, events, strict=True)]
            for event in () if from_start else events:
                assert event.wait(60)
            disturb()
            return [stream.result() for stream in streams]

    def metrics(self, name: str, **labels: str) -> list[float]:
        """The values of a metric, of all series that have these labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return [sample.value for sample in samples if labels.items() <= sample.labels.items()]

    def metric(self, name: str, **labels: str) -> float:
        (value,) = self.metrics(name, **labels)
        return value

    def lost(self, part: str) -> float:
        return self.metric("helios_retries_total", part=part, reason="replica_lost")

    def retries(self, part: str) -> float:
        """How often something was lost that a part was asked for, whatever it was."""
        return sum(self.metrics("helios_retries_total", part=part))

    def wait_until_whole(self) -> None:
        """Returns when all replicas are there and nothing is under way."""
        for name in REPLICAS:
            wait_until(partial(running, name))
        wait_until(lambda: gauges(self) == {})

    def record(self, video_id: str) -> VideoRecord:
        """The committed record, from the store and not from the service."""
        names = (self.store / "videos" / video_id).glob("record.t*.json")
        newest = max(names, key=lambda path: int(path.name.removeprefix("record.t").removesuffix(".json")))
        return VideoRecord.model_validate_json(newest.read_bytes())

    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()]


def _streamed(video_id: str, parts: Iterable[bytes], asked_at: float, began: threading.Event | None) -> Streamed:
    data, arrived = b"", [asked_at]
    for kind, box in read_boxes(reader(parts)):
        data += box
        if kind == "mdat":
            arrived.append(time.monotonic())
            if began is not None:
                began.set()
    return Streamed(video_id, data, arrived)


def rest(http: httpx.Client, video_id: str, have: int = 0) -> Iterator[bytes]:
    """A video's file from byte `have` on, over as many connections as it takes."""
    heard = time.monotonic()
    while time.monotonic() < heard + PATIENCE_S:
        try:
            with http.stream("GET", f"/v1/videos/{video_id}/content", headers={"Range": f"bytes={have}-"}) as answer:
                if answer.status_code == 416:  # all of it is there
                    return
                if answer.status_code < 400:
                    for part in answer.iter_raw():
                        have, heard = have + len(part), time.monotonic()
                        yield part
                elif answer.status_code < 500 and answer.headers["content-type"] == "application/json":
                    answer.read()  # the service's own; not of a HAProxy that has not heard of the service yet
                    answer.raise_for_status()
        except httpx.TransportError:
            pass
        time.sleep(AGAIN_S)
    raise AssertionError(f"nothing came for {PATIENCE_S:g} s after byte {have}")


def body(seed: int, chunks: int = 6, **settings: Any) -> Body:
    prompt = "a red sun over a blue sea"
    return {"prompt": prompt, "seconds": chunks * 33 / 24, "seed": seed, "steps": [1, 1, 1], **settings}


@contextmanager
def serving(folder: Path, port: int, **settings: Any) -> Iterator[Service]:
    """A service on the stand-in with random weights, whose chunks are paced. It joins the Ray that there is."""
    sampler = {
        "min_replicas": SAMPLERS,
        "max_replicas": SAMPLERS,
        "min_chunk_seconds": CHUNK_SECONDS,
        "max_call_seconds": LONGEST_CHUNK_S,
    }
    common = {"store": str(folder / "store"), "testing": True, "store_patience_s": 2.0, "torch_threads": 1}
    config = AppConfig(port=port, trace_file=str(folder / "spans.jsonl")).override(
        models=[{"model": "random", "sampler": sampler}], **{**common, **settings}
    )
    limits = httpx.Limits(max_connections=None)
    with run_service(config) as url, httpx.Client(base_url=url, timeout=120, limits=limits) as http:
        with closing(Line(port)) as line:
            yield Service(url, http, line, folder / "store", folder / "spans.jsonl", config)


@functools.cache
def library() -> Helios:
    return Helios.load("random", threads=1)


def by_library(wanted: Body) -> bytes:
    """The video as it is when nothing happens and nothing else is made."""
    return _made(json.dumps(wanted))


@functools.cache
def _made(wanted: str) -> bytes:
    data, settings = b"", json.loads(wanted)
    for chunk in library().stream(**{**settings, "steps": tuple(settings["steps"])}):
        fragment = encode_fragment(chunk.yuv, chunk_index=chunk.index, first_frame=33 * chunk.index, fps=24)
        data += fragment.data if chunk.index else fragment.init + fragment.data
    return data


def wait_until(reached: Callable[[], bool]) -> None:
    """Serve tells of no change: it has to be asked."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"this took more than {PATIENCE_S:g} s"
        time.sleep(0.05)


def states(deployment: str) -> dict[str, int]:
    """How many of its replicas are RUNNING, STARTING and so on, for Serve."""
    return dict(serve.status().applications[APP_NAME].deployments[deployment].replica_states)


def running(deployment: str) -> bool:
    return states(deployment) == {"RUNNING": REPLICAS[deployment]}


def processes(role: str) -> list[psutil.Process]:
    """A deployment's replicas, or Serve's own, of this service: there may be others on the machine."""
    title = SERVES_OWN.get(role, f"ray::ServeReplica:{APP_NAME}:{role}")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(Path(part).name.startswith(title) for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass  # it ended while we looked
    return found


def gauges(service: Service) -> dict[str, float]:
    """Of what is under way, all that is not 0."""
    names = ["helios_videos_running", "helios_queue_depth", "helios_sampling", "helios_watchers"]
    return {name: value for name in names if (value := service.metric(name))}


def wait_for_end(service: Service, video_id: str) -> VideoRecord:
    wait_until(lambda: not (service.store / "active" / video_id).exists())
    return service.record(video_id)


def ongoing_requests() -> dict[str, int]:
    """What each replica is at, as it says itself."""
    replicas = {name: actor for name, actor in serve_actors().items() if name.startswith(f"SERVE_REPLICA::{APP_NAME}#")}
    calls = {name: replica.get_num_ongoing_requests.remote() for name, replica in replicas.items()}
    return {name: ray.get(answer) for name, answer in calls.items()}


def serve_actors() -> dict[str, Any]:
    """Every replica, and what Serve has besides, by name."""
    names = [item["name"] for item in ray.util.list_named_actors(all_namespaces=True)]
    return {name: ray.get_actor(name, namespace="serve") for name in names}


def object_store_bytes() -> int:
    """Bytes in the node's object store that somebody holds. (Others stay there until Ray needs the room: what a replica
    gave whose caller had died.)"""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return int(stats.store_stats.object_store_bytes_primary_copy)
