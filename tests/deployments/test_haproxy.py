"""Behind HAProxy, as clusters have it: viewers who stop reading wait alone, what is held for them is bounded, and in
the end they are cut off; those whose HAProxy is killed come back.

The bound: for each viewer the ingress holds the piece of 256 KB that it is sending, and its copies on the way to the
socket: 2 MB at most, whatever the size of fragments; and for all viewers of running videos together, 64 MB of fragments
(deployments/watching.py; those here are small). (Behind Serve's own proxy there is no such bound: it takes all
that the ingress has, as fast as it can.)

`STALL_SECONDS=60` has them wait for a minute instead of 8 s (`make faults`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from deployments.config import free_port
from deployments.records import ChunkRecord, Timings, VideoRecord, VideoRequestRecord
from deployments.store import Store, new_video_id
from helios_core.spec import VideoSpec
from tests.faults.scenarios import Scenario, killed, trial
from tests.faults.service import CHUNK_SECONDS, Service, body, ongoing_requests, processes, serving, wait_until

pytestmark = pytest.mark.ray

VIEWERS = 16
FRAGMENTS, FRAGMENT_BYTES = 48, 2**20
BOUND = 2 * 2**20  # bytes
STALL_SECONDS = float(os.environ.get("STALL_SECONDS", "8"))
IDLE_SECONDS = round(1.5 * STALL_SECONDS) + 5  # for which viewers may stall


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"haproxy": True, "insecure": True, "idle_seconds": IDLE_SECONDS}
    with serving(tmp_path_factory.mktemp("service"), free_port(), **settings) as service:
        yield service


async def store_large_video(url: str) -> VideoRecord:
    """A finished video of 48 MB, as the service stores one. Its fragments need not be playable here."""
    store = Store(url)
    spec = VideoSpec("large", "random", 128, 64, FRAGMENTS * 33 / 24, 1, (1, 1, 1), False)
    request = VideoRequestRecord(id=new_video_id(time.time()), created_at=1.0, spec=spec, traceparent="")
    timings = Timings(
        sample_started_at=1.0, sample_seconds=0.0, decode_seconds=0.0, encode_seconds=0.0, store_seconds=0.0
    )
    await store.accept(request)
    init = await store.put_init(request.id, b"\0" * 1000)
    state = await store.put_state(request.id, FRAGMENTS, 1, b"")
    chunks = [
        ChunkRecord(
            index=k,
            frames=33,
            steps=3,
            fragment=await store.put_fragment(request.id, k, 1, bytes([k]) * FRAGMENT_BYTES),
            state=state,
            timings=timings,
        )
        for k in range(FRAGMENTS)
    ]
    record = VideoRecord(
        id=request.id, created_at=1.0, spec=spec, status="completed", init=init, chunks=tuple(chunks), completed_at=2.0
    )
    await store.put_record(record, 1)
    await store.end(request.id)
    return record


def stalled(url: str, path: str) -> socket.socket:
    """A viewer who asks, reads the head of the answer, and no more."""
    host, port = url.removeprefix("http://").split(":")
    viewer = socket.socket()
    viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    viewer.connect((host, int(port)))
    viewer.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert viewer.recv(15).startswith(b"HTTP/1.1 200 OK")
    return viewer


def ingress_memory() -> int:
    """Bytes of resident memory."""
    (ingress,) = processes("Ingress")
    return int(ingress.memory_info().rss)


def test_viewers_who_stop_reading_harm_nobody(service: Service) -> None:
    record = asyncio.run(store_large_video(service.config.store))
    chunks = round(STALL_SECONDS / CHUNK_SECONDS)
    # The live one: watched by somebody who reads and by somebody who does not, all the while.
    created = service.http.post("/v1/videos", json=body(1, chunks=chunks)).json()
    live = f"/v1/videos/{created['id']}/content"
    assert service.http.get("/healthz").status_code == 200
    before = ingress_memory()
    viewers = [stalled(service.url, f"/v1/videos/{record.id}/content") for _ in range(VIEWERS)]
    viewers.append(stalled(service.url, live))
    peak = before
    stop = threading.Event()

    def watch_memory() -> None:
        nonlocal peak
        while not stop.wait(0.25):
            peak = max(peak, ingress_memory())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch_memory)
        data = service.http.get(live).content  # takes STALL_SECONDS, as its chunks are paced
        stop.set()
        watching.result()

    status = service.http.get(f"/v1/videos/{created['id']}").json()
    assert (status["status"], status["usage"]["chunks"]) == ("completed", chunks)
    starts = [chunk.timings.sample_started_at for chunk in service.record(created["id"]).chunks]
    assert starts == sorted(starts) and data == service.http.get(live).content
    assert peak - before < VIEWERS * BOUND  # they asked for 24 times as much

    # A stalled viewer who reads on gets the rest.
    size = 1000 + FRAGMENTS * FRAGMENT_BYTES
    read = 0
    viewers[0].settimeout(60)
    while read < size:
        part = viewers[0].recv(2**20)
        assert part, f"cut off after {read} bytes"
        read += len(part)
    # The others are cut off, and nothing goes on for them.
    wait_until(lambda: not any(ongoing_requests().values()))
    for viewer in viewers[1:VIEWERS]:
        viewer.settimeout(60)
        read = 0
        with suppress(ConnectionResetError):
            while part := viewer.recv(2**20):
                read += len(part)
        assert read < size / 2
    for viewer in viewers:
        viewer.close()


def test_haproxy_is_killed(service: Service) -> None:
    """Serve starts another one; viewers come back."""
    tried = trial(service, Scenario("R3", "HAProxy", killed, None, cuts=True), seed=0, videos=2)
    assert tried.good, tried.errors or tried.left


def test_headers_without_an_end_are_refused(service: Service) -> None:
    """Serve's own proxy would keep them all."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: helios\r\nX-Long: " + b"a" * 2**15)
        assert client.recv(2**16).split(b" ")[1] in (b"400", b"431")
