"""Starts and stops the whole service: Ray, Serve, the graph. What `helios serve` and the tests run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from deployments.app import build_app
from deployments.config import AppConfig, Pool
from deployments.store import Store
from helios_core.errors import HeliosError

logger = logging.getLogger(__name__)

APP_NAME = "helios"
LONGEST_STOP_S = 15.0
# glibc keeps what was freed, some MB for each thread, unless told otherwise: over ten minutes of video a Director then
# grows by 10 %, with these by 2.5 % (measured).
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}
OBJECT_STORE_BYTES = 10**9  # of a Ray that we start ourselves; a 640x384 state is 5 MB


class StartFailed(HeliosError):
    """The service could not be started. The message is Serve's."""

    code = "start_failed"


@contextmanager
def run_service(config: AppConfig) -> Iterator[str]:
    """Deploys the graph, yields the URL of the ready service, and takes it down again.

    Joins the Ray cluster that RAY_ADDRESS names, whose Serve proxies then listen; else starts Ray on this machine.
    Raises CheckpointError, StoreInUse, StoreUnavailable or StartFailed.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    with Store(config.store).lock():
        graph, pools = build_app(config)
        try:
            if address == "local":
                _check_port(config.host, config.port)
                os.environ.update(environment(config))
                _start_ray(
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
                _check_room(pools, ray.cluster_resources())
            else:
                ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(http_options={"host": config.host, "port": config.port})
            logs = LoggingConfig(encoding="JSON", enable_access_log=False)
            serve.run(graph, name=APP_NAME, route_prefix="/", logging_config=logs)
        except (RuntimeError, ConnectionError, ValueError) as error:
            ray.shutdown()
            raise StartFailed(str(error)) from error
        try:
            yield f"http://{config.host}:{config.port}"
        finally:
            try:
                serve.get_deployment_handle("Director", APP_NAME).stop.remote().result(timeout_s=LONGEST_STOP_S)
            except (TimeoutError, RayError, RayServeException) as error:  # the next Director finds its videos active
                logger.warning("the Director did not stop by itself: %s", error)
            finally:
                if address == "local":
                    serve.shutdown()
                else:
                    serve.delete(APP_NAME)  # other applications of the cluster are not ours to stop
                ray.shutdown()


def environment(config: AppConfig) -> dict[str, str]:
    """What Ray is to be started with, as each of Serve's processes reads it."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(config.haproxy)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # a service that goes leaves no time to those who watch
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(config.idle_seconds),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.request_ids.before_serve",
        **{name: os.environ.get(name, value) for name, value in MALLOC.items()},
    }


def _start_ray(**options: Any) -> None:
    try:
        ray.init("local", **options)
    except Exception as error:
        raise RuntimeError(f"Ray did not start: {error}") from error


def _check_room(pools: list[Pool], resources: dict[str, float]) -> None:
    """Raises StartFailed if this machine cannot hold the replicas: Serve would wait for another one for ever."""
    for kind, needed in (
        ("CPU", sum(pool.num_cpus * pool.min_replicas for pool in pools)),
        ("GPU", sum(pool.num_gpus * pool.min_replicas for pool in pools)),
    ):
        if needed > resources.get(kind, 0):
            raise StartFailed(f"the replicas need {needed:g} {kind}s; this machine has {resources.get(kind, 0):g}")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
