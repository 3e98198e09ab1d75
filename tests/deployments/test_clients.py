"""The programs of docs/clients.md run as they stand, but for the port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import pytest

from tests.deployments.listening import Listening, listening

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
PROGRAMS = dict(re.findall(r"^```([a-z]+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = {
    "bash": ["bash", "-e", "-c"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    with listening(tmp_path_factory.mktemp("service")) as served:
        yield served


def run(served: Listening, folder: Path, language: str, program: str) -> subprocess.CompletedProcess[str]:
    program = program.replace("http://127.0.0.1:8000", served.url)
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [*COMMANDS[language], program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_there_is_one_for_each_language() -> None:
    assert set(PROGRAMS) == set(COMMANDS) and PAGE.count("```") == 2 * len(COMMANDS)


@pytest.mark.parametrize("language", COMMANDS)
def test_program(served: Listening, tmp_path: Path, language: str) -> None:
    ran = run(served, tmp_path, language, PROGRAMS[language])
    assert ran.returncode == 0, ran.stderr
    with av.open(str(tmp_path / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 48
    assert {"bash": "event: done", "python": "'frames': 48", "javascript": "parts"}[language] in ran.stdout

    with httpx.Client(base_url=served.url) as http:
        videos = http.get("/v1/videos").json()["data"]
        run(served, tmp_path, language, PROGRAMS[language])  # with its Idempotency-Key: no other video
        assert http.get("/v1/videos").json()["data"] == videos


def wrong(language: str) -> str:
    """A program that asks for what there is not, with a key of its own."""
    return re.sub("order-[0-9]+", f"refused-{language}", PROGRAMS[language].replace('"realtime"', '"fastest"'))


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_program_tells_why_it_was_refused(served: Listening, tmp_path: Path, language: str) -> None:
    ran = run(served, tmp_path, language, wrong(language))
    assert ran.returncode != 0
    assert re.search(r"invalid_input: preset is 'fastest'; allowed: .* \(request [0-9a-f]{32}\)", ran.stderr)
    assert not (tmp_path / "video.mp4").exists()


def test_curl_tells_why_it_was_refused(served: Listening, tmp_path: Path) -> None:
    ran = run(served, tmp_path, "bash", wrong("bash"))
    assert ran.returncode != 0
    assert json.loads((tmp_path / "video.json").read_text())["error"]["param"] == "preset"
