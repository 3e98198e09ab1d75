from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments import sampler, text_encoder, vae_decoder
from deployments.config import AppConfig
from deployments.director import Director
from deployments.ingress import http_app
from deployments.keys import new_key
from deployments.service import run_service
from deployments.store import ONE, Store
from deployments.tracing import Tracer
from helios_core.checkpoints import KNOWN_MODELS, Checkpoint
from helios_core.sampling.chunk import ChunkSampler
from tests.core.media_files import write_samples
from tests.deployments.s3 import S3Server
from tests.deployments.test_director import GatedGraph

MAX_UPLOAD_BYTES = 2 << 20  # of the shared service


@dataclass(frozen=True)
class Served:
    url: str
    store: Path


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory: pytest.TempPathFactory, shared_ray: int) -> Iterator[Served]:
    """The stand-in with random weights in real processes, of which each start takes 10 s."""
    store = tmp_path_factory.mktemp("store")
    settings = {
        "uploads": {"max_bytes": MAX_UPLOAD_BYTES},
        "safety": {"hook": "tests.deployments.moderation:Moderation"},
    }
    config = AppConfig(store=str(store), port=shared_ray).override(**settings)
    with run_service(config.with_model("random")) as url:
        yield Served(url, store)


@pytest.fixture(scope="session", autouse=True)
def weights_are_read_once() -> Iterator[None]:
    """All services in this process share the weights of a known model, which none of them changes: to read them is half
    of a service's start, and a thousand tests have one."""

    def once(load: Callable[..., Any]) -> Callable[..., Any]:
        loaded: dict[tuple[Any, ...], Any] = {}

        def load_once(checkpoint: Checkpoint, *args: Any) -> Any:
            if checkpoint.source not in KNOWN_MODELS:
                return load(checkpoint, *args)
            key = checkpoint.source, *args
            if key not in loaded:
                loaded[key] = load(checkpoint, *args)
            return loaded[key]

        return load_once

    load = once(sampler.load_sampler)

    def load_sampler(*args: Any) -> ChunkSampler:
        one = load(*args)  # it keeps the prompts of its last videos
        return ChunkSampler(one.model, one.scheduler, one.solver, one.guidance, one.history_refresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "load_sampler", load_sampler)
        patch.setattr(vae_decoder, "load_vae", once(vae_decoder.load_vae))
        patch.setattr(text_encoder, "load_text_encoder", once(text_encoder.load_text_encoder))
        yield


class ReadStore(Store):
    """A Store that keeps in `reads` what was read of it, in order: key, first byte, byte after the last."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[tuple[str, int, int | None]] = []

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads.append((key, start, end))
        return await super().read(key, start, end)


@dataclass
class LocalService:
    graph: GatedGraph
    store: ReadStore
    director: Director
    app: FastAPI
    http: httpx.AsyncClient
    trace_file: Path

    def spans(self) -> list[dict[str, Any]]:
        """The ingress's spans that have ended."""
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[LocalService]:
    """Director, store, replicas and HTTP in this process, on the stand-in with random weights."""
    async with serving(tmp_path) as service:
        yield service


Npm = Callable[[str], Path]


@pytest.fixture(scope="session")
def npm(pytestconfig: pytest.Config) -> Npm:
    """Installs a package, name@version, from npm's registry on first use: the folder in which Node finds it."""

    def npm(package: str) -> Path:
        folder = pytestconfig.rootpath / "build" / package
        options = ["--loglevel=error", "--prefer-offline", "--ignore-scripts", "--prefix", str(folder)]
        subprocess.run(["npm", "install", *options, package], check=True)
        return folder

    return npm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with picture.png and video.mp4 of 40 frames."""
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path, "video.mp4")
    return tmp_path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An API key, as its holder sends it, and the file in which its digest is."""
    token, key = new_key("acme", "videos", None)
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps({"keys": [key.model_dump()]}))
    return token, file


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place on an S3 server, which a Store made in this test finds."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@asynccontextmanager
async def serving(
    folder: Path, *models: str | dict[str, Any], keep_all_states: bool = False, service: str = ONE, **settings: Any
) -> AsyncIterator[LocalService]:
    """A service in this process with these models, names or settings, or with the stand-in alone. `service`: its name,
    among all on this store; `settings`: others of the configuration; the Director has no patience with its store,
    unless `store_patience_s` is among them."""
    config = AppConfig(store=str(folder / "store"))
    pools = [model if isinstance(model, dict) else {"model": model} for model in models or ("random",)]
    config = config.override(models=pools, **settings)
    store = ReadStore(config.store)
    graph = GatedGraph(config)
    patience_s = settings.get("store_patience_s", 0.0)
    tracer = Tracer("director")
    director = await Director.start(
        graph, store, tracer, patience_s, keep_all_states, admission=config.admission, service=service
    )
    trace_file = folder / "spans"
    tracer = Tracer("ingress", str(trace_file))
    app = http_app(config, [Checkpoint.open(each.model).card for each in config.models], director, store, tracer)
    # Errors must become answers: a server that raised would fail the test here.
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://helios") as client:
        yield LocalService(graph, store, director, app, client, trace_file)
    await director.stop()
    tracer.close()
