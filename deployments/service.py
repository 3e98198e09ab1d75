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

from deployments.app import build_app
from deployments.config import AppConfig, ConfigError, Pool
from deployments.ray_calls import answers_strangers, deploy, start_on_loopback
from deployments.rendering import APP_NAME, MALLOC, environment, serve_config
from deployments.store import Store
from helios_core import weights
from helios_core.checkpoints import Checkpoint
from helios_core.errors import HeliosError

logger = logging.getLogger(__name__)

LONGEST_STOP_S = 15.0
OBJECT_STORE_BYTES = 10**9  # of a Ray that we start ourselves; a 640x384 state is 5 MB


class StartFailed(HeliosError):
    """The service could not be started. The message is Serve's."""

    code = "start_failed"


@contextmanager
def run_service(config: AppConfig) -> Iterator[str]:
    """Deploys the graph, yields the URL of the ready service, and takes it down again.

    Joins the Ray cluster that RAY_ADDRESS names, whose Serve proxies then listen; else starts Ray on this machine, for
    this machine alone. Raises CheckpointError, ConfigError, StoreInUse, StoreUnavailable or StartFailed.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    schema = serve_config(config)
    with Store(config.store).lock():
        verify(config)
        _, pools = build_app(config)  # here too: what is wrong with it is told before Ray is started
        try:
            if address == "local":
                _check_port(config.host, config.port)
                mine = {name: os.environ[name] for name in MALLOC if name in os.environ}
                os.environ.update(environment(config) | mine)
                _start_ray(
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
                _check_room(pools, ray.cluster_resources())
            else:
                ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
            check_ray(config, ray.get_runtime_context().gcs_address)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(http_options=schema["http_options"])
        except ConfigError:
            ray.shutdown()
            raise
        except (RuntimeError, ConnectionError, ValueError) as error:
            ray.shutdown()
            raise StartFailed(str(error)) from error
        try:
            try:
                deploy(schema)
            except RuntimeError as error:
                raise StartFailed(str(error)) from error
            try:
                yield f"http://{config.host}:{config.port}"
            finally:
                _stop_director()
        finally:
            try:
                if address == "local":
                    serve.shutdown()
                else:
                    serve.delete(APP_NAME)  # other applications of the cluster are not ours to stop
            except TimeoutError as error:
                logger.warning("the service is still stopping: %s", error)
            finally:
                ray.shutdown()


def verify(config: AppConfig) -> None:
    """Reads the headers of all weights that lie in folders: a broken file is then one clear message, and not several
    replicas that fail. Raises CheckpointError."""
    for settings in config.models:
        checkpoint = Checkpoint.open(settings.model)
        if checkpoint.hub_id is None:
            weights.verify(checkpoint)


def check_ray(config: AppConfig, gcs_address: str) -> None:
    """Raises ConfigError if strangers could do as they please with Ray. Where its own ports are on one machine's
    loopback, those of Serve's replicas are not, and what comes there is unpickled. `gcs_address`: its head."""
    if not config.insecure and answers_strangers(gcs_address):
        raise ConfigError(
            f"the Ray at {gcs_address} wants no token: whoever reaches this machine can run programs in it; allowed: "
            "RAY_AUTH_MODE=token, here and where Ray is started, or insecure: true"
        )


def _stop_director() -> None:
    """Without ending any video: the next Director finds them active."""
    director = serve.get_deployment_handle("Director", APP_NAME)
    try:
        director.stop.remote().result(timeout_s=LONGEST_STOP_S)
    except (TimeoutError, RayError, RayServeException) as error:
        logger.warning("the Director did not stop by itself: %s", error)
    finally:
        director.shutdown()  # of one that scales it would go on telling a controller, and start a Ray for that


def _start_ray(**options: Any) -> None:
    try:
        start_on_loopback(**options)
    except Exception as error:
        raise RuntimeError(f"Ray did not start: {error}") from error


def _check_room(pools: list[Pool], resources: dict[str, float]) -> None:
    """Raises StartFailed if this machine cannot hold the replicas: Serve would wait for another one for ever."""
    for kind, needed in (
        ("CPU", sum(pool.num_cpus * max(1, pool.min_replicas) for pool in pools)),
        ("GPU", sum(pool.num_gpus * max(1, pool.min_replicas) for pool in pools)),
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
