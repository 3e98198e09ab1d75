"""`helios download` and models by hub id, against a server on this machine that plays the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from helios_core.checkpoints import Checkpoint
from helios_core.demo.stand_in import write_checkpoint
from helios_core.weights import verify

ROOT = Path(__file__).parents[2]
REPO, COMMIT = "someone/Helios-Tiny", "0123456789abcdef0123456789abcdef01234567"
NOT_NEEDED = [
    "README.md",
    ".gitattributes",
    "modular_model_index.json",
    "assets/teaser.mp4",
    "tokenizer/spiece.model",
    "vae/diffusion_pytorch_model.bin",
    "transformer_ode/config.json",
    "transformer_ode/diffusion_pytorch_model-00001-of-00001.safetensors",
    "transformer_init/config.json",
    "transformer_init/diffusion_pytorch_model-00001-of-00001.safetensors",
]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclass
class Hub:
    """The hub's answers for one repository: its commit, its list of files, the files. `fetched`: paths of the GETs."""

    folder: Path
    url: str = ""
    hangs_up: bool = False
    claimed: int | None = None  # bytes that it says each file has
    fetched: list[str] = field(default_factory=list)

    def answer(self, path: str) -> bytes | None:
        tree = f"/api/models/{REPO}/tree/{COMMIT}"
        if path.startswith(tree):
            folder = path.removeprefix(tree).lstrip("/")
            return json.dumps([self.entry(p) for p in self.files if p.startswith(folder)]).encode()
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            return json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": p} for p in self.files]}).encode()
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(prefix) and (name := path.removeprefix(prefix)) in self.files:
            return (self.folder / name).read_bytes()
        return None

    def entry(self, path: str) -> dict[str, object]:
        data = (self.folder / path).read_bytes()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        size = len(data) if self.claimed is None else self.claimed
        entry = {"type": "file", "path": path, "size": size, "oid": path}
        return {**entry, "lfs": lfs} if path.endswith(".safetensors") else entry

    @property
    def files(self) -> list[str]:
        return sorted(files_in(self.folder))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_checkpoint(folder)
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.hangs_up:
                self.close_connection = True
                return
            data = hub.answer(path)
            self.send_response(200 if data is not None else 404)
            if data is None:
                self.send_header("X-Error-Code", "RepoNotFound")
                data = b""
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                hub.fetched.append(path)
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def download(model: str, url: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`helios download` in a process of its own: the library reads the environment as it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", "download", model],
        cwd=ROOT,
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
    )


def error_line(run: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refused download."""
    assert run.returncode == 1
    assert run.stdout == ""
    [line] = run.stderr.strip().splitlines()
    assert line.startswith("helios: model ")
    return line


def test_exactly_the_needed_files_are_fetched_and_work_without_the_hub_later(hub: Hub, tmp_path: Path) -> None:
    needed = set(hub.files) - set(NOT_NEEDED)
    first = download(REPO, hub.url, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    files = [path.partition(f"/resolve/{COMMIT}/")[2] for path in hub.fetched if "/resolve/" in path]
    assert sorted(files) == sorted(needed)  # each once
    assert files_in(folder) == needed
    assert all((folder / name).read_bytes() == (hub.folder / name).read_bytes() for name in needed)
    verify(Checkpoint.open(str(folder)))

    asked = len(hub.fetched)
    again = download(REPO, hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert len(hub.fetched) == asked


def test_digests_are_the_hubs_own_and_no_weights_are_fetched_for_them(hub: Hub, tmp_path: Path) -> None:
    """So that it is known which models share what before anything is downloaded. Later they need no hub either."""
    script = "import sys; from helios_core.checkpoints import Checkpoint as C; c = C.open(sys.argv[1])\n"
    script += "print(c.digest('text_encoder'), c.digest('vae'))"

    def digests(model: str, **environment: str) -> str:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        run = subprocess.run(
            [sys.executable, "-c", script, model],
            cwd=ROOT, env={**os.environ, **settings, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    by_hub = digests(REPO)
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]
    assert by_hub == digests(str(hub.folder))
    assert download(REPO, hub.url, tmp_path / "home").returncode == 0
    assert by_hub == digests(REPO, HF_HUB_OFFLINE="1")


def test_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    line = error_line(download("someone/else", hub.url, tmp_path / "home"))
    assert "'someone/else'" in line
    assert "404" in line


def test_server_that_refuses_connections(tmp_path: Path) -> None:
    with socket.socket() as silent:  # bound but not listening: nobody else gets the port meanwhile
        silent.bind(("127.0.0.1", 0))
        line = error_line(download(REPO, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "home"))
    assert REPO in line
    assert "Connection refused" in line


def test_server_that_hangs_up(hub: Hub, tmp_path: Path) -> None:
    hub.hangs_up = True
    line = error_line(download(REPO, hub.url, tmp_path / "home"))
    assert REPO in line
    assert "disconnected" in line


def test_a_model_that_would_not_fit_on_the_disk(hub: Hub, tmp_path: Path) -> None:
    hub.claimed = 10**15
    run = download(REPO, hub.url, tmp_path / "home")
    *_, line = run.stderr.strip().splitlines()  # after the progress of the configuration's files
    assert run.returncode == 1
    assert re.search(r"needs \d{7}\.\d GB in .*snapshots, where \d+\.\d GB are free: \d{6,7}\.\d GB are missing", line)
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]
