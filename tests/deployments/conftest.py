from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deployments.config import AppConfig
from deployments.director import Director
from deployments.ingress import http_app
from deployments.store import Store
from helios_core.checkpoints import Checkpoint
from tests.deployments.local import LocalGraph


@dataclass
class LocalService:
    graph: LocalGraph
    store: Store
    director: Director
    http: httpx.AsyncClient


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[LocalService]:
    """Director, store, replicas and HTTP in this process, on the demo checkpoint."""
    config = AppConfig(store=str(tmp_path / "store"))
    store = Store(config.store)
    graph = LocalGraph(config)
    director = await Director.start(graph, store)
    app = http_app(config, Checkpoint.open(config.model).card, director, store)
    # Errors must become answers: a server that raised would fail the test here.
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://helios") as client:
        yield LocalService(graph, store, director, client)
