"""locust, as people run it, against the service in this process, which listens on a port."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import free_port
from load_tests.wanted import WEIGHTS, draw, rng_of
from tests.deployments.listening import Listening, listening

ROOT = Path(__file__).parents[2]
SMALL = ["--size", "64x64", "--preset", "realtime", "--think", "0.2", "--stop-timeout", "60"]
SLO = "completed: 1\nnot_accepted: 0\nlost: 0\nunfinished: 0\nerrors_5xx: 0\nrange_mismatches: 0\nrefusal_p99_s: 60\n"
SLOW_S = 3.0  # of sampling one chunk, which is 1.375 s of video
FAST_ENOUGH = "realtime_factor_p50: 1\n"


def locust(*options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "load_tests/locustfile.py",
        "--headless",
        "--only-summary",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HELIOS_KEYS": "first second"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate()
    return process.returncode, out


def options(url: str, folder: Path, users: int, seed: int, slo: str = SLO) -> list[str]:
    (folder / "slo.yaml").write_text(slo)
    files = ["--slo", str(folder / "slo.yaml"), "--report", str(folder)]
    return ["--host", url, "--users", str(users), "--spawn-rate", str(users), "--seed", str(seed), *SMALL, *files]


def read(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def seed_of(*kinds: str, workers: int = 1) -> int:
    """One with which the first users begin with these kinds, in any order."""

    def begun(seed: int) -> list[str]:
        users = len(kinds) // workers
        return [draw(rng_of(seed, w, n), 2.75, WEIGHTS).kind for w in range(workers) for n in range(users)]

    return next(seed for seed in itertools.count() if sorted(begun(seed)) == sorted(kinds))


def asked_for(service: Listening) -> int:
    return service.requests["POST", "/v1/videos"] + service.requests["POST", "/v1/videos/stream"]


def test_users_of_every_kind_pass_and_the_report_has_every_video(tmp_path: Path) -> None:
    with listening(tmp_path) as service:
        arguments = options(service.url, tmp_path, len(WEIGHTS), seed_of(*WEIGHTS))
        status, out = ended(locust(*arguments, "--run-time", "4", "--seconds", "2.75"))
        asked = asked_for(service)
    report = read(tmp_path)
    assert status == 0, out
    assert report["passed"] and "FAILED" not in out
    videos = report["videos"]
    assert len(videos) == asked
    assert {video["kind"] for video in videos} == set(WEIGHTS)
    assert {video["status"] for video in videos if video["kind"] != "leave"} == {"completed"}
    assert {video["status"] for video in videos if video["kind"] == "leave"} <= {"completed", "cancelled"}
    for video in videos:
        times = [video["accepted_s"], video["first_fragment_s"], video["ended_s"]]
        there = [at for at in times if at is not None]
        assert there == sorted(there)
        if video["kind"] in ("watch", "prompt", "image"):
            assert len(video["cadence_s"]) == 1 and all(at is not None for at in times)
        assert (video["prompt_changed"] is not None) == (video["kind"] == "prompt")
    returned = [video for video in videos if video["kind"] == "return"]
    assert all(video["left_at_s"] is not None and video["deliver_s"] is not None for video in returned)
    assert report["times"]["sample_s"] > 0 and 0 < report["utilisation"]["vae"] <= 1
    assert len(report["series"]) >= 4
    assert report["setting"]["command"].startswith("locust ") and report["setting"]["samplers"] == 1
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_slowed_service_fails_and_who_is_refused_comes_again(tmp_path: Path) -> None:
    slowed = {"model": "random", "sampler": {"min_chunk_seconds": SLOW_S}}
    room = {"videos_per_sampler": 1, "queued": 0}
    with listening(tmp_path, slowed, testing=True, admission=room) as service:
        service.service.graph.at_once = 1
        arguments = options(service.url, tmp_path, 2, seed_of("watch", "watch"), SLO + FAST_ENOUGH)
        status, out = ended(locust(*arguments, "--run-time", "8", "--seconds", "2.75"))
    report = read(tmp_path)
    assert status == 1, out
    assert [row["name"] for row in report["slo"] if not row["passed"]] == ["realtime_factor_p50"], out
    assert Counter(video["status"] for video in report["videos"])["completed"] >= 1
    refused = [video for video in report["videos"] if video["status"] == "refused"]
    assert refused and all(video["refused_s"] is not None and video["accepted_s"] is None for video in refused)
    assert report["answers"]["429"] == len(refused)
    for video in refused:
        later = [other for other in report["videos"] if other["key"] == video["key"] and other["at"] > video["at"]]
        assert video["again"] == bool(later)
        assert all((other["kind"], other["seconds"]) == (video["kind"], video["seconds"]) for other in later[:1])
    assert any(video["again"] for video in refused)


def test_what_is_still_made_when_the_stop_timeout_is_over_is_unfinished_and_not_lost(tmp_path: Path) -> None:
    slowed = {"model": "random", "sampler": {"min_chunk_seconds": 30.0}}
    with listening(tmp_path, slowed, testing=True) as service:
        arguments = options(service.url, tmp_path, 1, seed_of("poll"))
        status, out = ended(locust(*arguments, "--run-time", "1", "--stop-timeout", "1", "--seconds", "1.375"))
    report = read(tmp_path)
    assert status == 1, out
    assert [video["status"] for video in report["videos"]] == ["unfinished"]
    assert (report["summary"]["unfinished"], report["summary"]["lost"]) == (1, 0)


def test_a_service_that_answers_nothing_has_accepted_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        arguments = options(url, tmp_path, 1, seed_of("watch"), "not_accepted: 0\n")
        status, out = ended(locust(*arguments, "--run-time", "1", "--stop-timeout", "1"))
    report = read(tmp_path)
    assert status == 1, out
    assert [(video["status"], video["accepted_s"]) for video in report["videos"]] == [("unfinished", None)]
    assert "no answer" in report["videos"][0]["why"]
    assert (report["summary"]["not_accepted"], report["summary"]["errors_5xx"]) == (1, 0)


def test_videos_of_a_key_that_is_not_known_are_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    with listening(tmp_path, keys=str(tmp_path / "keys.json")) as service:
        arguments = options(service.url, tmp_path, 1, seed_of("watch"))
        status, out = ended(locust(*arguments, "--run-time", "1"))
    report = read(tmp_path)
    assert status == 1, out
    assert report["summary"]["not_accepted"] == len(report["videos"]) == report["answers"]["401"]
    assert (report["summary"]["lost"], report["summary"]["errors_5xx"]) == (0, 0)


def test_a_change_that_the_service_does_not_know_of_is_a_failure(tmp_path: Path) -> None:
    def without_changes(app: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            changes = scope["type"] == "http" and scope["path"].endswith("/prompt")
            await (Response(status_code=404) if changes else app)(scope, receive, send)

        return answer

    with listening(tmp_path, around=without_changes) as service:
        arguments = options(service.url, tmp_path, 1, seed_of("prompt"))
        status, out = ended(locust(*arguments, "--run-time", "1", "--seconds", "2.75"))
    report = read(tmp_path)
    assert status == 1, out
    changed = [video for video in report["videos"] if video["kind"] == "prompt"]
    assert changed and all(video["status"] == "lost" and "404" in video["why"] for video in changed)


def test_who_has_the_whole_file_when_they_leave_comes_back_for_nothing(tmp_path: Path) -> None:
    def at_once(app: ASGIApp) -> ASGIApp:
        """Bodies come in one piece, at their end."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            body = bytearray()

            async def kept(message: Message) -> None:
                body.extend(message.get("body", b""))
                if message["type"] != "http.response.body":
                    await send(message)
                elif not message.get("more_body"):
                    await send({"type": "http.response.body", "body": bytes(body)})

            await app(scope, receive, kept)

        return answer

    with listening(tmp_path, around=at_once) as service:
        arguments = options(service.url, tmp_path, 1, seed_of("return"))
        status, out = ended(locust(*arguments, "--run-time", "1", "--seconds", "1.4"))
    report = read(tmp_path)
    assert report["answers"]["416"] >= 1
    assert status == 0, out
    assert {video["status"] for video in report["videos"] if video["kind"] == "return"} == {"completed"}


def test_the_report_of_two_workers_has_the_videos_of_both(tmp_path: Path) -> None:
    port = str(free_port())
    with listening(tmp_path) as service:
        arguments = options(service.url, tmp_path, 2, seed_of("watch", "poll", workers=2), "completed: 2\nlost: 0\n")
        workers = [locust("--worker", "--master-port", port) for _ in range(2)]
        master = locust(
            "--master", "--master-bind-port", port, "--expect-workers", "2", *arguments, "--run-time", "5",
            "--seconds", "1.375",
        )  # fmt: skip
        status, out = ended(master)
        for worker in workers:
            assert ended(worker)[0] == 0
        asked = asked_for(service)
    report = read(tmp_path)
    assert status == 0, out
    assert len(report["videos"]) == asked
    assert {video["key"] for video in report["videos"]} == {0, 1}  # each worker's user has a key of its own
    assert {video["kind"] for video in report["videos"]} >= {"watch", "poll"}
    assert sum(report["answers"].values()) > asked


def test_limits_that_cannot_be_meant_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text("lots: 0\n")
    status, out = ended(locust("--host", "http://127.0.0.1:1", "--slo", str(tmp_path / "slo.yaml")))
    assert status != 0
    assert "lots" in out and "allowed" in out and "lost" in out
    assert not (tmp_path / "report.json").exists()
