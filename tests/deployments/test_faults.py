"""The whole service with many videos and real processes that are killed: every stream ends on the same connection, with
the bytes that the library makes.

`TRIALS=10` runs ten seeded trials of each kill instead of one, and ten times the cancels (`make faults`).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray._private.internal_api import global_gc, node_stats

from deployments.config import AppConfig
from deployments.records import VideoRecord
from deployments.rendering import APP_NAME
from deployments.service import run_service
from helios_core.helios import Helios
from helios_core.media.fragments import encode_fragment
from tests.deployments.boxes import read_boxes, reader

pytestmark = pytest.mark.ray

TRIALS = int(os.environ.get("TRIALS", "1"))
CANCELS = 64 * TRIALS
SAMPLERS = 2
CHUNK_SECONDS = 0.5  # of sampling, paced: so that a kill finds a sampler in the midst of a chunk
REPLICAS = {"Sampler": SAMPLERS, "VaeDecoder": 1, "TextEncoder": 1, "Director": 1, "Ingress": 1}

Body = dict[str, Any]


@dataclass
class Service:
    url: str
    http: httpx.Client
    store: Path
    trace_file: Path

    def stream(self, body: Body, began: threading.Event | None = None) -> tuple[str, bytes]:
        """A video's id and the bytes of its live stream. `began` is set when its first fragment has arrived."""
        with self.http.stream("POST", "/v1/videos/stream", json=body) as response:
            assert response.status_code == 200, response.read()
            parts = response.iter_raw()
            data = b""
            for kind, box in read_boxes(reader(parts)):
                data += box
                if kind == "mdat" and began is not None:
                    began.set()
            return response.headers["x-video-id"], data

    def together(self, bodies: list[Body], disturb: Callable[[], None] = lambda: None) -> list[tuple[str, bytes]]:
        """Streams all at once; `disturb` is called when each has its first fragment."""
        events = [threading.Event() for _ in bodies]
        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = [pool.submit(self.stream, body, event) for body, event in zip(bodies, events, strict=True)]
            for event in events:
                assert event.wait(60)
            disturb()
            return [stream.result() for stream in streams]

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
        return value

    def lost(self, part: str) -> float:
        return self.metric("helios_retries_total", part=part, reason="replica_lost")

    def record(self, video_id: str) -> VideoRecord:
        """The committed record, from the store and not from the service."""
        names = (self.store / "videos" / video_id).glob("record.t*.json")
        newest = max(names, key=lambda path: int(path.name.removeprefix("record.t").removesuffix(".json")))
        return VideoRecord.model_validate_json(newest.read_bytes())

    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, shared_ray: int) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("faults")
    sampler = {"min_replicas": SAMPLERS, "max_replicas": SAMPLERS, "min_chunk_seconds": CHUNK_SECONDS}
    config = AppConfig(
        store=str(folder / "store"),
        port=shared_ray,
        testing=True,
        store_patience_s=2.0,
        torch_threads=1,
        trace_file=str(folder / "spans.jsonl"),
    ).override(models=[{"model": "random", "sampler": sampler}])
    limits = httpx.Limits(max_connections=None)
    with run_service(config) as url, httpx.Client(base_url=url, timeout=120, limits=limits) as http:
        yield Service(url, http, folder / "store", folder / "spans.jsonl")


@pytest.fixture(autouse=True)
def whole(service: Service) -> None:
    """Every test begins with all replicas there and nothing under way."""
    for name in REPLICAS:
        wait_until(partial(running, name))
    assert gauges(service) == {}


def body(seed: int, chunks: int = 6, **settings: Any) -> Body:
    prompt = "a red sun over a blue sea"
    return {"prompt": prompt, "seconds": chunks * 33 / 24, "seed": seed, "steps": [1, 1, 1], **settings}


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
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, "this took more than a minute"
        time.sleep(0.05)


def running(deployment: str) -> bool:
    states = serve.status().applications[APP_NAME].deployments[deployment].replica_states
    return states == {"RUNNING": REPLICAS[deployment]}


def processes(deployment: str) -> list[psutil.Process]:
    """Of this service: there may be others on the machine."""
    title = f"ray::ServeReplica:{APP_NAME}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(part.startswith(title) for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass  # it ended while we looked
    return found


def kill(deployment: str, rng: random.Random, within: float, everyone: bool = False) -> None:
    """SIGKILL at a random moment."""
    victims = processes(deployment)
    time.sleep(rng.uniform(0, within))
    for victim in victims if everyone else [rng.choice(victims)]:
        victim.send_signal(signal.SIGKILL)


def gauges(service: Service) -> dict[str, float]:
    """Of what is under way, all that is not 0."""
    names = ["helios_videos_running", "helios_queue_depth", "helios_sampling", "helios_watchers"]
    return {name: value for name in names if (value := service.metric(name))}


# Kills

KILLS: dict[str, tuple[str, bool, Body]] = {
    "the busy sampler": ("sampler", False, {}),
    "all samplers": ("sampler", True, {}),
    "the VAE decoder": ("vae_decoder", True, {"chunks": 4, "size": "192x128"}),  # a size at which rendering takes long
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_replica_costs_no_frame(service: Service, name: str) -> None:
    part, everyone, settings = KILLS[name]
    deployment = {"sampler": "Sampler", "vae_decoder": "VaeDecoder"}[part]
    bodies = [body(seed, **settings) for seed in (1, 2)]
    undisturbed = [by_library(body) for body in bodies]
    hits = 0
    for seed in range(4 * TRIALS):
        before, rng = service.lost(part), random.Random(f"{name} {seed}")
        made = service.together(bodies, partial(kill, deployment, rng, 2 * CHUNK_SECONDS, everyone))
        assert [data for _, data in made] == undisturbed, f"seed {seed}"
        hits += service.lost(part) > before
        wait_until(partial(running, deployment))
        if hits == TRIALS:
            return
    pytest.fail(f"only {hits} of {4 * TRIALS} kills hit a replica at work")


def test_a_killed_text_encoder_costs_no_frame(service: Service) -> None:
    """The longest prompts, four at once, so that the kill finds it at work."""
    bodies = [body(seed, chunks=1, prompt=f"{seed} " + "waves " * 1300) for seed in range(4)]
    undisturbed = [by_library(body) for body in bodies]
    hits = 0
    for seed in range(8 * TRIALS):
        before, rng = service.lost("text_encoder"), random.Random(seed)
        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = [pool.submit(service.stream, one) for one in bodies]
            kill("TextEncoder", rng, 0.1)
            assert [stream.result()[1] for stream in streams] == undisturbed, f"seed {seed}"
        hits += service.lost("text_encoder") > before
        wait_until(partial(running, "TextEncoder"))
        if hits == TRIALS:
            return
    pytest.fail(f"only {hits} of {8 * TRIALS} kills hit the encoder at work")


def test_the_trace_of_a_video_whose_sampler_was_killed(service: Service) -> None:
    """One root, every chunk, each parent known; the lost attempt is there, and so is the one that took its place."""
    bodies = [body(seed) for seed in (1, 2)]
    caller = f"00-{'a' * 32}-{'b' * 16}-01"
    service.http.headers["traceparent"] = caller
    before = service.lost("sampler")
    try:
        while service.lost("sampler") == before:
            made = service.together(bodies, partial(kill, "Sampler", random.Random(0), CHUNK_SECONDS))
            wait_until(partial(running, "Sampler"))
    finally:
        del service.http.headers["traceparent"]
    retried = 0
    for video_id, _ in made:
        retried += check_trace(service.spans(), video_id, caller)
    assert retried >= 1


def check_trace(spans: list[dict[str, Any]], video_id: str, caller: str | None) -> int:
    """Asserts that the spans of a completed video of 6 chunks are a whole tree. The number of lost attempts in it."""
    by_id = {span["context"]["span_id"]: span for span in spans}

    def root_of(span: dict[str, Any]) -> dict[str, Any]:
        while span["parent_id"] in by_id:
            span = by_id[span["parent_id"]]
        return span

    (root,) = [s for s in spans if s["name"].startswith("POST") and s["attributes"].get("video_id") == video_id]
    tree = [span for span in spans if root_of(span) is root]
    _, trace, parent, _ = caller.split("-") if caller else (None, None, None, None)
    assert root["parent_id"] == (f"0x{parent}" if parent else None)
    assert {span["context"]["trace_id"] for span in tree} == {f"0x{trace}" if trace else root["context"]["trace_id"]}
    assert not [s for s in spans if s["attributes"].get("video_id") == video_id and s not in tree], "an orphan"

    def children(parent: dict[str, Any]) -> list[dict[str, Any]]:
        return [span for span in tree if span["parent_id"] == parent["context"]["span_id"]]

    assert Counter(span["name"] for span in children(root)) == {"video": 1, "encode prompt": 1, "chunk": 6}
    chunks = [span for span in children(root) if span["name"] == "chunk"]
    assert sorted(span["attributes"]["chunk"] for span in chunks) == list(range(6))
    lost = 0
    for chunk in chunks:
        samples = [span for span in children(chunk) if span["name"] == "sample"]
        gone = sorted(s["attributes"]["attempt"] for s in samples if component(s) == "director")
        assert gone == list(range(len(gone)))
        assert all(
            s["attributes"]["lost"] and s["status"]["status_code"] == "ERROR"
            for s in samples
            if component(s) == "director"
        )
        # A sampler killed between its last step and its answer has told of an attempt that was lost all the same.
        told = {s["attributes"]["attempt"]: s for s in samples if component(s) == "sampler"}
        assert len(told) + len(gone) == len(samples) and max(told) == len(gone)
        done = told[len(gone)]
        assert done["status"]["status_code"] == "UNSET"
        steps = 6 if chunk["attributes"]["chunk"] == 0 else 3
        stages = [event["attributes"]["stage"] for event in done["events"] if event["name"] == "step"]
        assert stages == sorted(stages) and len(stages) == steps
        assert len([span for span in children(chunk) if span["name"] == "wait"]) == len(gone) + 1
        (render,) = [span for span in children(chunk) if span["name"] == "render"]
        assert component(render) == "vae_decoder"
        assert [span["name"] for span in sorted(children(render), key=lambda s: s["start_time"])] == [
            "decode", "encode", "store",
        ]  # fmt: skip
        assert len([span for span in children(chunk) if span["name"] == "commit"]) == 1
        lost += len(gone)
    return lost


def component(span: dict[str, Any]) -> str:
    return str(span["resource"]["attributes"]["helios.component"])


def test_a_killed_director_costs_no_byte(service: Service) -> None:
    """The next one goes on, and the viewers' connections never hear of it."""
    bodies = [body(seed) for seed in (1, 2)]
    undisturbed = [by_library(body) for body in bodies]
    for seed in range(TRIALS):
        rng = random.Random(f"Director {seed}")
        made = service.together(bodies, partial(kill, "Director", rng, 2 * CHUNK_SECONDS))
        assert [data for _, data in made] == undisturbed, f"seed {seed}"
        assert service.metric("helios_videos_resumed_total") == len(bodies)
        for video_id, data in made:
            assert service.http.get(f"/v1/videos/{video_id}/content").content == data
        wait_until(partial(running, "Director"))


def test_five_hundred_posts_with_fifty_keys_make_fifty_videos(service: Service) -> None:
    """While the Director and then the ingress are killed. What fails is sent again, with its key."""
    keys = [*range(50)] * 10
    rng = random.Random(0)
    rng.shuffle(keys)
    answered, kills = itertools.count(), {rng.randrange(100, 250): "Director", rng.randrange(250, 400): "Ingress"}
    before = service.stream(body(0, chunks=1))[0]

    def post(key: int) -> tuple[int, str]:
        sent = {"json": body(key, chunks=1, size="64x64"), "headers": {"Idempotency-Key": f"key {key}"}}
        while True:
            with suppress(httpx.TransportError):
                answer = service.http.post("/v1/videos", **sent)
                if answer.status_code < 500:
                    break
        assert answer.status_code == 200, answer.text
        if victim := kills.get(next(answered)):
            kill(victim, rng, 0)
        return key, answer.json()["id"]

    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(post, keys))
    made = dict(answers)
    assert len(answers) == len(made), "the answers to a key name several videos"
    ids = sorted(made.values())
    listed = service.http.get("/v1/videos", params={"after": before, "order": "asc", "limit": 100}).json()["data"]
    stored = sorted(path.name for path in (service.store / "videos").iterdir() if path.name > before)
    assert len(set(ids)) == 50 and ids == [video["id"] for video in listed] == stored
    for video_id in ids:
        assert wait_for_end(service, video_id).status == "completed"


def test_a_killed_ingress_leaves_no_stream_behind(service: Service) -> None:
    """Nobody is left to say that the viewer is gone: the Director finds that nobody asks any more."""
    with (
        pytest.raises(httpx.TransportError),
        service.http.stream("POST", "/v1/videos/stream", json=body(1, chunks=400)) as response,
    ):
        video_id = response.headers["x-video-id"]
        boxes = read_boxes(reader(response.iter_raw()))
        assert "mdat" in (kind for kind, _ in boxes)
        kill("Ingress", random.Random(0), 0)
        for _ in boxes:
            pass
    wait_until(partial(running, "Ingress"))
    wait_until(lambda: service.http.get(f"/v1/videos/{video_id}").json()["status"] == "cancelled")


# Errors of our own


def test_an_error_of_our_own_ends_its_video_alone(service: Service) -> None:
    """The VAE decoder of one video finds a file where its folder of fragments should be."""
    good = body(1)
    broken: list[str] = []

    def break_another() -> None:
        created = service.http.post("/v1/videos", json=body(2)).json()
        (service.store / "videos" / created["id"] / "chunks").write_bytes(b"")
        broken.append(created["id"])

    before = service.http.get("/metrics").text
    (_, data), = service.together([good], break_another)  # fmt: skip
    assert data == by_library(good)
    (video_id,) = broken
    wait_until(lambda: service.http.get(f"/v1/videos/{video_id}").json()["status"] == "failed")
    answer = service.http.get(f"/v1/videos/{video_id}")
    assert answer.status_code == 200
    error = answer.json()["error"]
    assert error["code"] == "store_unavailable" and "chunks" not in error["message"]  # the key is of the inside
    content = service.http.get(f"/v1/videos/{video_id}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (409, "video_failed")
    assert retries(before) == retries(service.http.get("/metrics").text)


def retries(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("helios_retries_total")]


# Sharing


def test_eight_videos_take_turns_on_two_samplers(service: Service) -> None:
    ids = [service.http.post("/v1/videos", json=body(seed, chunks=8)).json()["id"] for seed in range(8)]
    places = [video["queue_position"] for video in service.http.get("/v1/videos?limit=8").json()["data"]]
    waiting = sorted(place for place in places if place is not None)
    assert waiting == list(range(len(waiting)))
    for video_id in ids:
        assert service.http.get(f"/v1/videos/{video_id}/content").status_code == 200
        assert len(service.record(video_id).chunks) == 8

    # By span: the video of each chunk of these. Others' may have gone with a killed Director.
    chunks = {
        span["context"]["span_id"]: span["attributes"]["video_id"]
        for span in service.spans()
        if span["name"] == "chunk" and span["attributes"]["video_id"] in ids
    }
    waits = [
        (span["start_time"], span["end_time"], chunks[span["parent_id"]])
        for span in service.spans()
        if span["name"] == "wait" and span["parent_id"] in chunks
    ]
    assert len(waits) == 8 * 8
    admitted = max(min(asked for asked, _, video in waits if video == one) for one in ids)
    turns = Counter({video_id: 0 for video_id in ids})
    for _, got, video in sorted(waits, key=lambda wait: wait[1]):
        if got < admitted:
            continue
        turns[video] += 1
        ready = {other for begin, end, other in waits if begin <= got < end} | {video}
        differ = max(turns[one] for one in ready) - min(turns[one] for one in ready)
        assert differ <= 1, f"{turns} when {ready} were ready"
    assert sum(turns.values()) > 40

    samples = [
        (span["start_time"], span["end_time"], span["resource"]["attributes"]["process.pid"])
        for span in service.spans()
        if span["name"] == "sample" and span["attributes"]["video_id"] in ids
    ]
    assert len({pid for _, _, pid in samples}) == SAMPLERS
    for begin, _, _ in samples:
        assert len([1 for other, end, _ in samples if other <= begin < end]) <= SAMPLERS


# Leaving


def test_cancels_leave_nothing_behind(service: Service) -> None:
    twin = service.stream(body(7))[1]
    wait_until(lambda: gauges(service) == {})
    global_gc()  # of references in cycles that Python had no reason to look for yet
    baseline, memory = ongoing_requests(), object_store_bytes()
    before = {path for path in service.store.rglob("*") if path.is_file()}

    def cancel(seed: int) -> None:
        rng = random.Random(seed)
        how, delay = rng.choice(["cancel", "delete", "leave"]), rng.uniform(0, 4 * CHUNK_SECONDS)
        if how == "leave":
            with service.http.stream("POST", "/v1/videos/stream", json=body(seed)) as response:
                time.sleep(delay)
            video_id = response.headers["x-video-id"]
        else:
            video_id = service.http.post("/v1/videos", json=body(seed)).json()["id"]
            time.sleep(delay)
        if how == "cancel":
            assert service.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] in ("cancelled", "completed")
        if how == "leave":
            wait_until(lambda: service.http.get(f"/v1/videos/{video_id}").json()["status"] != "in_progress")
        if how != "delete":
            record = wait_for_end(service, video_id)
            kept = {chunk.fragment.key for chunk in record.chunks} | {c.state.key for c in record.chunks[-1:]}
            folder = service.store / "videos" / video_id
            there = [path for kind in ("chunks", "states") for path in (folder / kind).glob("*")]
            assert {str(path.relative_to(service.store)) for path in there} == kept
        assert service.http.delete(f"/v1/videos/{video_id}").json()["deleted"]
        assert service.http.get(f"/v1/videos/{video_id}").status_code == 404

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cancel, range(CANCELS)))

    wait_until(lambda: gauges(service) == {})
    wait_until(lambda: ongoing_requests() == baseline)
    global_gc()
    wait_until(lambda: object_store_bytes() <= memory)
    assert {path for path in service.store.rglob("*") if path.is_file()} == before
    assert service.stream(body(7))[1] == twin


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
    """Bytes in the node's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return int(stats.store_stats.object_store_bytes_used)
