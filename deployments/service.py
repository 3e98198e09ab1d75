"""Starts and stops the whole service: Ray, Serve, the graph. What `helios serve` and the tests run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from deployments.app import build_app
from deployments.config import AppConfig
from deployments.store import Store
from helios_core.errors import HeliosError

APP_NAME = "helios"
OBJECT_STORE_BYTES = 10**9  # of a Ray that we start ourselves; a 640x384 state is 5 MB


class StartFailed(HeliosError):
    """The service could not be started. The message is Serve's."""

    code = "start_failed"


@contextmanager
def run_service(config: AppConfig) -> Iterator[str]:
    """Deploys the graph, yields the URL of the ready service, and takes it down again.

    Joins the Ray cluster that RAY_ADDRESS names, else starts Ray on this machine.
    Raises CheckpointError, StoreInUse, StoreUnavailable or StartFailed.
    """
    with Store(config.store).lock():
        graph = build_app(config)
        _check_port(config.host, config.port)
        joins = "RAY_ADDRESS" in os.environ
        ray.init(
            include_dashboard=None if joins else False,
            object_store_memory=None if joins else OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(http_options={"host": config.host, "port": config.port})
            try:
                serve.run(graph, name=APP_NAME, route_prefix="/")
            except RuntimeError as error:
                raise StartFailed(str(error)) from error
            yield f"http://{config.host}:{config.port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
