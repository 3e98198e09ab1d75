"""The whole service with many videos and real processes that are killed: what is said of it, and what stays behind.

That every stream ends on the same connection with the bytes that the library makes: test_scenarios.py. `TRIALS=10`
cancels ten times as many.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray._private.internal_api import global_gc

from deployments.ray_calls import deploy
from deployments.rendering import serve_config
from helios_core.checkpoints import Checkpoint
from tests.deployments.boxes import read_boxes, reader
from tests.faults.service import (
    CHUNK_SECONDS,
    REPLICAS,
    SAMPLERS,
    Service,
    body,
    by_library,
    gauges,
    object_store_bytes,
    ongoing_requests,
    processes,
    running,
    states,
    wait_for_end,
    wait_until,
)

pytestmark = pytest.mark.ray

CANCELS = 64 * int(os.environ.get("TRIALS", "1"))


def kill(deployment: str, rng: random.Random, within: float = 0.0) -> None:
    """SIGKILL to one of its replicas, at a random moment."""
    victim = rng.choice(processes(deployment))
    time.sleep(rng.uniform(0, within))
    victim.send_signal(signal.SIGKILL)


# The trace


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
    for video_id, *_ in made:
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


# A video that kills


def test_a_video_that_kills_its_samplers_is_given_up(service: Service) -> None:
    """Whoever takes it dies, three times. (That neighbours on a replica come through: test_director.py.)"""
    video_id = service.http.post("/v1/videos", json=body(1, chunks=40)).raise_for_status().json()["id"]
    killed: set[int] = set()

    def victims() -> list[psutil.Process]:
        """Once there is one that can take a call: who was killed is RUNNING for Serve until it starts another one."""
        there = [process for process in processes("Sampler") if process.pid not in killed]
        return there if there and states("Sampler").get("RUNNING") else []

    def failed() -> bool:
        return bool(service.http.get(f"/v1/videos/{video_id}").json()["status"] == "failed")

    while not failed():  # on a busy machine one is killed over the next chunk, of which it is the first
        wait_until(lambda: failed() or (victims() and service.metric("helios_sampling") == 1))
        time.sleep(CHUNK_SECONDS / 3)  # into the chunk
        for victim in victims():
            killed.add(victim.pid)
            victim.kill()
    assert service.http.get(f"/v1/videos/{video_id}").json()["error"]["code"] == "chunk_lost"
    told = [span["attributes"] for span in service.spans() if span["name"] == "sample"]
    lost = [each["attempt"] for each in told if each["video_id"] == video_id and each.get("lost")]
    assert lost[-3:] == [0, 1, 2] and max(lost) == 2
    assert service.stream(body(2)).data == by_library(body(2))


# Keys, and viewers that nobody speaks for


def test_five_hundred_posts_with_fifty_keys_make_fifty_videos(service: Service) -> None:
    """While the Director and then the ingress are killed. What fails is sent again, with its key."""
    keys = [*range(50)] * 10
    rng = random.Random(0)
    rng.shuffle(keys)
    answered, kills = itertools.count(), {rng.randrange(100, 250): "Director", rng.randrange(250, 400): "Ingress"}
    before = service.stream(body(0, chunks=1)).video_id

    def post(key: int) -> tuple[int, str]:
        sent = {"json": body(key, chunks=1, size="64x64"), "headers": {"Idempotency-Key": f"key {key}"}}
        while True:
            with suppress(httpx.TransportError):
                answer = service.http.post("/v1/videos", **sent)
                if answer.status_code < 500:
                    break
        assert answer.status_code == 200, answer.text
        if victim := kills.get(next(answered)):
            kill(victim, rng)
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
        kill("Ingress", random.Random(0))
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
    (made,) = service.together([good], break_another)
    assert made.data == by_library(good)
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
    twin = service.stream(body(7)).data
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
    assert service.stream(body(7)).data == twin


# Another model


def test_weights_that_are_not_whole_never_take_over(service: Service, tmp_path: Path) -> None:
    """The version that is there goes on as if nobody had asked for another one."""
    broken = Path(shutil.copytree(Checkpoint.open("random").folder, tmp_path / "broken"))
    (file,) = broken.glob("transformer/*-00001-of-*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    before = {name: processes(name) for name in REPLICAS}

    def deploy_it() -> None:
        with pytest.raises(RuntimeError, match=f"{file.name}: not a whole safetensors file"):
            deploy(serve_config(service.config.with_model(str(broken))))

    (made,) = service.together([body(1)], deploy_it)
    assert made.data == by_library(body(1))
    assert service.stream(body(2)).data == by_library(body(2))
    assert {name: processes(name) for name in REPLICAS} == before
    deploy(serve_config(service.config))  # Serve tells nothing of the replicas of what it was asked for in vain
