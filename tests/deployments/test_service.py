"""The whole service with real processes: Ray, Serve, HTTP, the stand-in with random weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import httpx
import imageio_ffmpeg
import pytest
from av.video.reformatter import Colorspace
from ray import serve

from deployments.cli import save_stream
from deployments.ray_calls import log_folder
from deployments.records import VideoRecord
from deployments.rendering import APP_NAME
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError
from helios_core.helios import Helios
from helios_core.media.fragments import encode_fragment
from tests.deployments.boxes import read_boxes, reader
from tests.deployments.conftest import Served
from tests.deployments.moderation import BLOCKED_CHUNK, BLOCKED_SIZE

pytestmark = pytest.mark.ray

PROMPT = "a red sun over a blue sea"
GENERATE = [sys.executable, "-m", "deployments.cli", "generate", PROMPT, "--model", "random"]


@pytest.fixture(scope="module")
def http(shared_service: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_service.url, timeout=120) as client:
        yield client


def record_of(video_id: str, store: Path) -> VideoRecord:
    """The committed record, from the store and not from the service."""
    names = sorted((store / "videos" / video_id).glob("record.t*.json"))
    return VideoRecord.model_validate_json(names[-1].read_bytes())


def test_a_stream_arrives_while_it_is_made(shared_service: Served, http: httpx.Client, tmp_path: Path) -> None:
    """Six chunks, the last one cut, at a size at which a chunk takes a while."""
    seconds, frames = 7.5, 180
    body = {"prompt": PROMPT, "seconds": seconds, "size": "192x128", "seed": 3}
    with http.stream("POST", "/v1/videos/stream", json=body) as live:
        assert (live.status_code, live.headers["content-type"]) == (200, "video/mp4")
        video_id = live.headers["x-video-id"]
        parts = live.iter_raw()
        first = reader(parts)
        boxes = read_boxes(first)
        kinds = [next(boxes) for _ in range(5)]
        arrived = time.time()  # the head and the whole first fragment
        # A second viewer, late by a fragment, while the video is being made.
        with http.stream("GET", f"/v1/videos/{video_id}/content") as late:
            assert "content-length" not in late.headers
            late_bytes = b"".join(late.iter_raw())
        live_bytes = b"".join(box for _, box in kinds) + b"".join(box for _, box in boxes)

    record = record_of(video_id, shared_service.store)
    assert [kind for kind, _ in kinds] == ["ftyp", "moov", "uuid", "moof", "mdat"]
    assert [chunk.frames for chunk in record.chunks] == [33, 33, 33, 33, 33, 15]
    assert arrived < record.chunks[3].timings.sample_started_at, "the first fragment came after the fourth chunk began"

    download = http.get(f"/v1/videos/{video_id}/content")
    assert live_bytes == download.content == late_bytes
    assert int(download.headers["content-length"]) == len(live_bytes)

    path = tmp_path / "video.mp4"
    path.write_bytes(live_bytes)
    assert pts_of(path) == [Fraction(i, 24) for i in range(frames)]
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace, codec.width, codec.height) == (
            "h264", "yuv420p", Colorspace.ITU709, 192, 128,
        )  # fmt: skip
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "warning", "-xerror", "-i", str(path), "-f", "null", "-"]
    judged = subprocess.run(ffmpeg, capture_output=True, text=True, check=True)
    assert judged.stderr == ""

    status = http.get(f"/v1/videos/{video_id}").json()
    assert (status["status"], status["progress"], status["error"]) == ("completed", 100, None)
    assert status["usage"]["chunks"] == 6
    assert status["usage"]["steps"] == 12 + 5 * 6  # 2,2,2 with the first chunk amplified


def test_the_director_never_held_a_latent(http: httpx.Client) -> None:
    """To unpickle one it would have had to import torch."""
    finish(http, {"prompt": PROMPT, "seconds": 2})
    director = serve.get_deployment_handle("Director", APP_NAME)
    assert director.imported_torch.remote().result() is False


def test_service_command_line_and_library_make_the_same_video(http: httpx.Client, tmp_path: Path) -> None:
    by_service = finish(http, {"prompt": PROMPT, "seconds": 2.5, "seed": 11, "preset": "realtime"})
    path = tmp_path / "cli.mp4"
    options = ["-o", str(path), "--seconds", "2.5", "--seed", "11", "--steps", "1,1,1"]
    subprocess.run([*GENERATE, *options], check=True, capture_output=True)
    assert path.read_bytes() == by_service

    # H.264 is lossy, so frames of the library are compared by what they are encoded to.
    by_library = b""
    for chunk in Helios.load("random").stream(PROMPT, seconds=2.5, seed=11, preset="realtime"):
        first_frame = chunk.index * CHUNK_FRAMES
        fragment = encode_fragment(chunk.yuv, chunk_index=chunk.index, first_frame=first_frame, fps=24)
        by_library += fragment.data if chunk.index else fragment.init + fragment.data
    assert by_library == by_service


@pytest.mark.parametrize("kind", ["image", "video"])
def test_service_and_command_line_make_the_same_video_of_an_upload(http: httpx.Client, folder: Path, kind: str) -> None:
    file = {"image": "picture.png", "video": "video.mp4"}[kind]
    fields = {"prompt": PROMPT, "seconds": "2.5", "seed": "11", "preset": "realtime"}
    upload = {"input_reference": Path(file).read_bytes()}
    by_service = http.post("/v1/videos/stream", data=fields, files=upload).content
    options = ["-o", "cli.mp4", "--seconds", "2.5", "--seed", "11", "--preset", "realtime", f"--{kind}", file]
    subprocess.run([*GENERATE, *options], check=True, capture_output=True)
    assert Path("cli.mp4").read_bytes() == by_service


def test_what_the_safety_hook_blocks_is_not_made_or_not_shown(http: httpx.Client) -> None:
    refused = http.post("/v1/videos", json={"prompt": "blood on the snow"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "content_blocked")
    body = {"prompt": PROMPT, "seconds": 3 * CHUNK_FRAMES / 24, "size": BLOCKED_SIZE}
    seen = b""
    with http.stream("POST", "/v1/videos/stream", json=body) as live, pytest.raises(httpx.RemoteProtocolError):
        for part in live.iter_raw():
            seen += part
    video_id = live.headers["x-video-id"]
    assert http.get(f"/v1/videos/{video_id}").json()["error"]["code"] == "content_blocked"
    assert [kind for kind, _ in read_boxes(reader([seen]))].count("mdat") == BLOCKED_CHUNK
    assert http.get(f"/v1/videos/{video_id}/content?partial=true").content == seen


def test_created_videos_are_made_unwatched(http: httpx.Client) -> None:
    created = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": "2", "seed": 5, "steps": [1, 1, 1]}).json()
    assert (created["object"], created["status"], created["model"]) == ("video", "queued", "random")
    assert (created["seconds"], created["size"], created["frames"]) == ("2", "128x64", 48)
    content = http.get(f"/v1/videos/{created['id']}/content").content
    assert http.get(f"/v1/videos/{created['id']}").json()["status"] == "completed"
    assert content == http.get(f"/v1/videos/{created['id']}/content").content


def test_leaving_a_stream_cancels_its_video(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/videos/stream", json={"prompt": PROMPT, "seconds": 600}) as live:
        video_id = live.headers["x-video-id"]
        parts = live.iter_raw()  # held, because httpx hangs up when it is dropped
        next(read_boxes(reader(parts)))
        other = http.send(http.build_request("GET", f"/v1/videos/{video_id}/content"), stream=True)
    assert other.status_code == 200
    with pytest.raises(httpx.RemoteProtocolError):  # cut off, so that no viewer takes the part for the whole
        for _ in other.iter_raw():
            pass
    assert http.get(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    gone = http.get(f"/v1/videos/{video_id}/content")
    assert (gone.status_code, gone.json()["error"]["code"]) == (409, "video_cancelled")
    finish(http, {"prompt": PROMPT, "seconds": 1})  # the sampler is free again


def test_the_demo_command_writes_while_later_chunks_are_made(
    shared_service: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "video.mp4"
    save_stream(shared_service.url, PROMPT, 6.0, path)
    lines = capsys.readouterr().err.splitlines()
    assert "of 5 chunks made" in lines[0] and not lines[0].strip().endswith(" 0 bytes on disk")
    assert lines[0].split()[2] in ("1", "2"), lines[0]  # sampling may be one chunk ahead of the first fragment
    assert "144 frames, 6 s of video" in lines[-1]
    assert len(pts_of(path)) == 144
    with pytest.raises(HeliosError, match="prompt is ''"):
        save_stream(shared_service.url, "", 6.0, path)


def test_log_lines_name_video_and_trace_and_hide_the_prompt(http: httpx.Client) -> None:
    secret = "a prompt that nobody else shall read"
    caller = f"00-{'c' * 32}-{'d' * 16}-01"
    answer = http.post("/v1/videos/stream", json={"prompt": secret, "seconds": 2}, headers={"traceparent": caller})
    video_id = answer.headers["x-video-id"]
    assert answer.headers["traceparent"].split("-")[1] == "c" * 32
    lines = [line for path in Path(log_folder()).glob("*.log") for line in path.read_text().splitlines()]
    events = [json.loads(line) for line in lines if video_id in line]
    assert [event["message"] for event in events] == ["accepted", "started", "committed", "committed", "ended"]
    assert {(event["video_id"], event["trace_id"]) for event in events} == {(video_id, "c" * 32)}
    assert events[0]["prompt"] == "sha256:" + hashlib.sha256(secret.encode()).hexdigest()[:16]
    assert not [line for line in lines if secret in line]


@pytest.mark.parametrize("sent", ["mine-7", "not one of ours"])
def test_a_request_has_one_id_in_answer_and_log(http: httpx.Client, sent: str) -> None:
    """Although Serve's proxy has a header of this name of its own."""
    answer = http.post("/v1/videos", json={"prompt": ""}, headers={"X-Request-Id": sent})
    (told,) = answer.headers.get_list("X-Request-Id")
    assert (told == sent) == (sent == "mine-7")
    lines = [line for path in Path(log_folder()).glob("*.log") for line in path.read_text().splitlines()]
    (refused,) = [json.loads(line) for line in lines if told in line and "refused" in line]
    assert (refused["message"], refused["request_id"]) == ("refused", told)


@pytest.mark.parametrize("name", ["x-session-id", "x-request-disconnect-disabled", "serve_multiplexed_model_id"])
def test_serve_takes_no_orders_from_a_client(http: httpx.Client, name: str) -> None:
    """At what is not UTF-8 it would fail."""
    sent = [(name.encode(), b"\xff"), (b"x-request-timeout-seconds", b"0.001")]
    assert http.get("/healthz", headers=sent).status_code == 200


def test_models_and_health(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["variant"], model["size_multiple"]) == ("random", "distilled", 64)
    assert model["presets"] == {"realtime": [1, 1, 1], "quality": [2, 2, 2]}
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json()["status"] == "ready"


def finish(http: httpx.Client, body: dict[str, object]) -> bytes:
    """The whole video of a request."""
    answer = http.post("/v1/videos/stream", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


def pts_of(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]  # type: ignore[operator]
