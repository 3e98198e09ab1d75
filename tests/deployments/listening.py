"""A service in this process that listens on a port of its own: the one of conftest's `serving`, behind uvicorn, in a
thread with its event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config import free_port
from tests.deployments.conftest import LocalService, serving


@dataclass
class Listening:
    """`requests`: how many came, by method and path."""

    url: str
    service: LocalService
    requests: Counter[tuple[str, str]]


class _Counted:
    def __init__(self, app: ASGIApp, requests: Counter[tuple[str, str]]) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._requests[scope["method"], scope["path"]] += 1
        await self._app(scope, receive, send)


@contextmanager
def listening(
    folder: Path, *models: str | dict[str, Any], around: Callable[[ASGIApp], ASGIApp] = lambda app: app, **settings: Any
) -> Iterator[Listening]:
    """`around`: what stands before the service, and may answer in its place."""
    port, requests = free_port(), Counter[tuple[str, str]]()
    ready = threading.Event()
    told: list[Listening | BaseException] = []
    server: list[uvicorn.Server] = []

    async def run() -> None:
        try:
            async with serving(folder, *models, **settings) as service:
                app = _Counted(around(service.app), requests)
                options = uvicorn.Config(app, port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
                server.append(uvicorn.Server(options))
                serve = asyncio.create_task(server[0]._serve())  # without its signal handlers, which a thread has not
                while not server[0].started:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                told.append(Listening(f"http://127.0.0.1:{port}", service, requests))
                ready.set()
                await serve
        except BaseException as error:
            told.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    ready.wait()
    if isinstance(told[0], BaseException):
        raise told[0]
    try:
        yield told[0]
    finally:
        server[0].should_exit = True
        thread.join()
