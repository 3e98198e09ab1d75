"""Hostile uploads against the running service: what is refused is refused by name, and nothing else suffers.

`MUTATIONS=2000` tries so many spoilt files instead of two of each kind, spoilt in each way.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from deployments.rendering import APP_NAME
from tests.core import media_files
from tests.deployments.conftest import MAX_UPLOAD_BYTES, Served
from tests.faults.service import wait_until

pytestmark = pytest.mark.ray

MUTATIONS = int(os.environ.get("MUTATIONS", "48"))
ANSWER_SECONDS = 5.0
MAX_BYTES, MAX_TEXT_BYTES = MAX_UPLOAD_BYTES, 1 << 20  # of an upload, and of a form without it
FORM = {"prompt": "a red sun over a blue sea", "seconds": "1", "size": "64x64", "preset": "realtime"}

Answer = dict[str, Any]


@dataclass
class Service:
    url: str
    http: httpx.Client
    store: Path

    def post(self, data: bytes, name: str = "upload", kind: str = "application/octet-stream") -> httpx.Response:
        """The answer to one upload, which must come within the limit."""
        files = {"input_reference": (name, data, kind)}
        return self.http.post("/v1/videos", data=FORM, files=files, timeout=ANSWER_SECONDS)

    def end_of(self, video_id: str) -> Answer:
        """How the video stands once it has ended."""
        wait_until(lambda: self.status(video_id)["status"] not in ("queued", "in_progress"))
        return self.status(video_id)

    def status(self, video_id: str) -> Answer:
        status: Answer = self.http.get(f"/v1/videos/{video_id}").json()
        return status

    def made(self, data: bytes, name: str = "upload", kind: str = "application/octet-stream") -> bytes:
        """The video of an upload that is accepted."""
        answer = self.post(data, name, kind)
        assert answer.status_code == 200, answer.text
        ended = self.end_of(answer.json()["id"])
        assert ended["status"] == "completed", ended["error"]
        return self.http.get(f"/v1/videos/{ended['id']}/content").content

    def files(self) -> set[Path]:
        return {path for path in self.store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def service(shared_service: Served) -> Iterator[Service]:
    with httpx.Client(base_url=shared_service.url, timeout=60) as http:
        yield Service(shared_service.url, http, shared_service.store)


def replicas() -> set[tuple[int, float]]:
    """Each replica's process: its id, and when it started."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::ServeReplica:{APP_NAME}:"):
                found.add((process.pid, process.create_time()))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            pass  # it ended while we looked
    return found


def readers() -> list[str]:
    """The processes that read uploads at this moment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended while we looked
        if "helios_core.media" in command:
            found.append(command)
    return found


# What is used

JPEG = media_files.image("JPEG")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "image/png"), ("a.jpg", "image/gif"), ("a.mp4", "video/mp4"), ("../../a", "text/html")]
)
def test_neither_name_nor_type_is_believed(service: Service, name: str, kind: str) -> None:
    assert service.made(JPEG, name, kind) == service.made(JPEG, "a.jpg", "image/jpeg")


PICTURE = media_files.quarters(64, 48)
USED: dict[str, bytes] = {
    "CMYK": media_files.image("JPEG", PICTURE.convert("CMYK")),
    "grey": media_files.image("PNG", PICTURE.convert("L")),
    "16 bits of grey": media_files.image("PNG", Image.fromarray(np.full((48, 64), 30_000, np.uint16))),
    "16 bits a colour": media_files.png(16, 16, bits=16, colour=2),
    "alpha": media_files.image("PNG", PICTURE.convert("RGBA")),
    "a palette": media_files.image("PNG", PICTURE.convert("P")),
    "WebP": media_files.image("WEBP"),
    "WebP without loss, with alpha": media_files.image("WEBP", PICTURE.convert("RGBA"), lossless=True),
    "turned": media_files.oriented(6),
    "MP4": media_files.video(36),
    "MOV": media_files.video(36, format="mov"),
    "WebM": media_files.video(36, format="webm", codec="libvpx"),
    "with sound": media_files.video(36, audio=True),
    "60 fps": media_files.video(120, fps=60),
    "exactly a chunk": media_files.video(33),
}


@pytest.mark.parametrize("name", USED)
def test_used(service: Service, name: str) -> None:
    service.made(USED[name])


# What is refused

VIDEO = media_files.header_first(media_files.video(36))
REFUSED: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "nothing": (lambda: b"", ["an empty file", "PNG, JPEG or WebP image, or an MP4, MOV or WebM video"]),
    "text": (lambda: b"a red sun over a blue sea", ["a file that begins with", "PNG, JPEG or WebP"]),
    "a truncated PNG": (lambda: media_files.image("PNG")[:-60], ["an image (png)", "whole, undamaged"]),
    "a truncated JPEG": (lambda: JPEG[: len(JPEG) // 2], ["an image (jpeg)", "whole, undamaged"]),
    "a truncated WebP": (lambda: media_files.image("WEBP")[:-40], ["truncated WebP", "whole, undamaged"]),
    "an animated PNG": (lambda: media_files.animation("PNG"), ["animated image (png)", "one picture"]),
    "an animated WebP": (lambda: media_files.animation("WEBP"), ["animated image (webp)", "one picture"]),
    "a GIF": (lambda: media_files.animation("GIF"), ["a GIF image", "PNG, JPEG or WebP"]),
    "a PNG of no size": (lambda: media_files.png(0, 5), ["whole, undamaged"]),
    "a PNG bomb": (lambda: media_files.png(30_000, 30_000), ["30000x30000", "sides from 1 to 16384", "40000000"]),
    "an SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["an SVG image"]),
    "sound only": (media_files.sound_only, ["without a video stream", "allowed: a video"]),
    "32 frames": (lambda: media_files.video(32), ["a video of 32 frames at 24 fps", "at least 33 frames"]),
    "a truncated MP4": (lambda: VIDEO[: len(VIDEO) - 2000], ["whole, undamaged"]),
    "an MP4 of ten hours": (
        lambda: media_files.with_times(VIDEO, delta=12288 * 1000), ["or more", "at most 60 s"],
    ),
    "a WebM of ten hours": (
        lambda: media_files.webm_of_hours(media_files.video(36, format="webm", codec="libvpx"), 10),
        ["a video of 36000.0 s or more", "at most 60 s"],
    ),
    "a size that changes midway": (media_files.changing_size, ["changes from 96x64 to 64x96", "a video of one size"]),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n", ["a playlist", "MP4, MOV or WebM"]),
    "a list of files": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", ["a playlist"]),
    "a video of MPEG-4": (lambda: media_files.video(36, codec="mpeg4"), ["codec", "H.264, HEVC, AV1, VP8 or VP9"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(service: Service, name: str) -> None:
    make, words = REFUSED[name]
    before = service.files()
    answer = service.post(make(), "upload.mp4", "video/mp4")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_input", "input_reference")
    assert error["message"].startswith("input_reference is ")
    assert all(word in error["message"] for word in words), error["message"]
    assert service.files() == before


def test_two_files(service: Service) -> None:
    for names in (["input_reference", "input_reference"], ["input_reference[]", "input_reference[]"]):
        files = [(name, ("a.jpg", JPEG, "image/jpeg")) for name in names]
        answer = service.http.post("/v1/videos", data=FORM, files=files)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, "input_reference")
        assert "2 files" in error["message"] and "allowed: one file" in error["message"]


def test_a_file_in_another_field(service: Service) -> None:
    answer = service.http.post("/v1/videos", data=FORM, files={"image": ("a.jpg", JPEG, "image/jpeg")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "image")
    assert "a file in the field input_reference" in answer.json()["error"]["message"]


URLS = [
    "http://127.0.0.1:{port}/a.png",
    "http://169.254.169.254/latest",
    "file:///etc/passwd",
    "data:image/png;base64,AA",
]


@pytest.mark.parametrize("url", URLS)
def test_urls_are_not_fetched(service: Service, url: str) -> None:
    """Nobody comes to where the first one leads, neither before the answer nor after it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert_refused(service, url.format(port=server.getsockname()[1]))
        assert service.http.get("/v1/videos").status_code == 200  # as time for what might go on behind an answer
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def assert_refused(service: Service, url: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"json": {**FORM, "input_reference": url}},
        {"json": {**FORM, "input_reference": {"image_url": url}}},
        {"json": {**FORM, "image_url": url}},
        {"files": [(name, (None, value)) for name, value in {**FORM, "input_reference": url}.items()]},
        {"files": [(name, (None, value)) for name, value in {**FORM, "input_reference[image_url]": url}.items()]},
    ]
    for body in bodies:
        answer = service.http.post("/v1/videos", **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"] in ("input_reference", "image_url")) == (422, True), error
        assert url in error["message"] and "URLs are not fetched" in error["message"]


# What is too large

LIMIT = f"allowed: {MAX_BYTES + MAX_TEXT_BYTES} bytes"


def connected(service: Service, head: str) -> socket.socket:
    """A connection over which a form was announced, and nothing of it sent."""
    host, port = service.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS)
    lines = ["POST /v1/videos HTTP/1.1", f"Host: {host}", "Content-Type: multipart/form-data; boundary=x", head]
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    return client


def test_too_large_by_its_length(service: Service) -> None:
    """Refused before any of it is sent."""
    with connected(service, f"Content-Length: {MAX_BYTES + MAX_TEXT_BYTES + 1}") as client:
        status, text = answered(client)
    assert status == 413 and LIMIT in text


def test_too_large_by_count(service: Service) -> None:
    """Without a length: refused once too much has come, and the sender is not heard to the end."""
    part = b"a" * 2**16
    with connected(service, "Transfer-Encoding: chunked") as client:
        client.sendall(chunked(b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'))
        for _ in range((MAX_BYTES + MAX_TEXT_BYTES) // len(part) + 1):
            client.sendall(chunked(part))
        status, text = answered(client)
    assert status == 413 and LIMIT in text


def answered(client: socket.socket) -> tuple[int, str]:
    response = HTTPResponse(client)
    response.begin()
    return response.status, response.read().decode()


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_a_file_that_is_too_large(service: Service) -> None:
    """It fits into what a form may have, but not into what a file may."""
    answer = service.post(JPEG + bytes(MAX_BYTES))
    assert answer.status_code == 413
    assert f"allowed: {MAX_BYTES} bytes" in answer.json()["error"]["message"]


# What is spoilt

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))  # whose files are mostly data
WHOLE = {
    "PNG": media_files.image("PNG", NOISE),
    "JPEG": media_files.image("JPEG", NOISE),
    "WebP": media_files.image("WEBP", NOISE),
    "MP4": VIDEO,
    "MOV": media_files.header_first(media_files.video(36, format="mov")),
    "WebM": media_files.video(36, format="webm", codec="libvpx"),
}


WAYS = ["flip", "cut out", "cut off", "double"]
SPOILT = list(itertools.product(WHOLE, WAYS))


def spoilt(data: bytes, way: str, rng: random.Random) -> bytes:
    """The file with some bytes flipped, a part cut out, its end cut off, or a part doubled; at its head or anywhere."""
    reach = rng.choice([128, len(data), len(data)])
    first, last = sorted(rng.sample(range(reach + 1), 2))
    match way:
        case "cut out":
            return data[:first] + data[last:]
        case "cut off":
            return data[: rng.randrange(len(data))]
        case "double":
            return data[:last] + data[first:]
    mutable = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        mutable[rng.randrange(reach)] ^= rng.randrange(1, 256)
    return bytes(mutable)


def test_spoilt_files_harm_nobody(service: Service) -> None:
    normal = service.made(JPEG)
    before, held = replicas(), service.files()
    assert len(before) == 5

    def upload(seed: int) -> str | None:
        """What is wrong about the service's answer to a spoilt file."""
        kind, way = SPOILT[seed % len(SPOILT)]
        try:
            answer = service.post(spoilt(WHOLE[kind], way, random.Random(seed)))
        except httpx.TransportError as error:
            return f"{kind}, seed {seed}: {error!r}"
        if answer.status_code == 400 and answer.json()["error"]["param"] == "input_reference":
            return None
        if answer.status_code != 200:
            return f"{kind}, seed {seed}: {answer.text}"
        ended = service.end_of(answer.json()["id"])
        service.http.delete(f"/v1/videos/{ended['id']}")
        fine = ended["status"] == "completed" or (ended["error"] or {}).get("code") == "invalid_input"
        return None if fine else f"{kind}, seed {seed}: {ended}"

    with ThreadPoolExecutor(2) as pool:
        wrong = [line for line in pool.map(upload, range(MUTATIONS)) if line is not None]
    assert not wrong, "\n".join(wrong)
    assert replicas() == before, "a replica was restarted"
    assert readers() == []
    assert service.files() == held
    assert service.made(JPEG) == normal
