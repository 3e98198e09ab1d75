"""README.md runs as it stands: its commands and programs, against a service with the defaults, the demo model's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import pytest

from deployments.config import AppConfig
from deployments.service import run_service

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```([a-z]*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CURLS = [
    command
    for kind, block in BLOCKS
    if not kind
    for command in re.findall(r"^curl (?:.*\\\n)*.*", block, re.MULTILINE)
    if "/v1/" in command
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, shared_ray: int) -> Iterator[str]:
    """Of a service as `make serve` starts it, but for port and store."""
    with run_service(AppConfig(store=str(tmp_path_factory.mktemp("store")), port=shared_ray)) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.mark.ray
@pytest.mark.parametrize("command", CURLS, ids=lambda command: command.partition("\n")[0][:80])
def test_what_it_does_with_curl(url: str, http: httpx.Client, folder: Path, command: str) -> None:
    """One example per task, as it stands there, but for the port."""
    long = re.search("/(prompt|pause|resume|cancel)", command) is not None  # it wants a video that is being made
    body = {"prompt": "a red sun over a blue sea", "seconds": 600 if long else 2, "preset": "realtime"}
    asked = http.post("/v1/videos", json=body).json()
    if not long:
        assert http.get(f"/v1/videos/{asked['id']}/content").status_code == 200  # to its end
    run = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --fail ", 1)],
        env={"PATH": os.environ["PATH"], "ID": asked["id"]},
        capture_output=True,
        check=True,
    )
    if output := re.search(r"-o (\S+)", command):
        with av.open(output[1]) as video:
            assert sum(1 for _ in video.decode(video=0)) == 24 * int(re.findall(r'seconds"?[=:] ?(\d+)', command)[0])
    else:
        answer = json.loads(run.stdout)
        assert answer["object"] == ("video.prompt" if "/prompt" in command else "video")
        http.delete(f"/v1/videos/{answer['id']}")


@pytest.mark.ray
def test_what_it_does_in_python(url: str, folder: Path) -> None:
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8000", url), "README.md", "exec"), {})
    with av.open("video.mp4") as video:  # what OpenAI's client downloaded
        assert sum(1 for _ in video.decode(video=0)) == 96


def test_what_it_does_without_a_service(folder: Path) -> None:
    (block,) = [block for kind, block in BLOCKS if not kind and "helios generate" in block]
    commands = [shlex.split(line.removeprefix("helios ")) for line in block.splitlines()]
    assert [name for command in commands for name in ("--image", "--video") if name in command] == [
        "--image",
        "--video",
    ]
    for command in commands:
        subprocess.run([sys.executable, "-m", "deployments.cli", *command], check=True, capture_output=True)
        with av.open(command[command.index("-o") + 1]) as video:
            assert sum(1 for _ in video.decode(video=0)) == (192 if "--seconds" in command else 120)
