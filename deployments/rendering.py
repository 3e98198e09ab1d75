"""The configuration as Ray Serve's own: what the laptop deploys, and what stands in a RayService as `serveConfigV2`.

There is one: `helios serve` hands it to the Ray that it has started, KubeRay to the cluster's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from deployments.config import AppConfig
from deployments.store import Store

APP_NAME = "helios"
RAY_SERVICE = "helios"  # the RayService of k8s/base
# glibc keeps what was freed, some MB for each thread, unless told otherwise: over ten minutes of video a Director then
# grows by 10 %, with these by 2.5 % (measured).
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}


def serve_config(config: AppConfig) -> dict[str, Any]:
    """A ServeDeploySchema: HTTP and one application, which deployments.app.application builds from `args`.

    Relative paths are made absolute: replicas have working directories of their own. Raises ConfigError if strangers
    could come in.
    """
    config.check_door()
    trace_file = None if config.trace_file is None else str(Path(config.trace_file).absolute())
    keys = None if config.keys is None else str(Path(config.keys).absolute())
    config = config.override(store=Store(config.store).url, trace_file=trace_file, keys=keys)
    policy = {"autoscaling_policy": {"policy_function": "deployments.autoscaling:replicas"}} if config.scales else {}
    return {
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "deployments.app:application",
                "args": config.model_dump(mode="json", exclude_defaults=True),
                **policy,
                "logging_config": {"encoding": "JSON", "enable_access_log": False},
            }
        ],
    }


def environment(config: AppConfig) -> dict[str, str]:
    """What each of Ray's nodes is to be started with, as Serve's processes read it."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(config.haproxy)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # how long those who watch have is drain_s
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(config.idle_seconds),
        # HAProxy is loaded anew whenever an ingress comes or goes, and the old one ends after 120 s unless told.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(config.limits.longest_s)),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.request_ids.before_serve",
        # A replica that fails its health check hangs in a call: it is not waited for until that ends.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # A proxy that fails three checks in a row is given up: 5 s after it died, or 12 s after it fell silent, and not
        # after half a minute. It does nothing but relay: no load keeps it from answering for so long.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
        # So long a process that is to be killed may end by itself: one that was stopped does not, for Ray's 5 s.
        "RAY_kill_worker_timeout_milliseconds": "500",
        **MALLOC,
    }


def serve_config_text(config: AppConfig) -> str:
    return yaml.safe_dump(serve_config(config), sort_keys=False)


def overlay(config: AppConfig, source: str) -> dict[str, str]:
    """File name ▸ text of what an overlay in k8s/ has of a configuration: a patch of the RayService, and the
    environment of its pods. `source`: the configuration's file, for those who read it there."""
    note = f"# Made by `helios config render --kustomize {source}`; change that file instead.\n"
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": RAY_SERVICE},
        "spec": {"serveConfigV2": serve_config_text(config)},
    }
    variables = "".join(f"{name}={value}\n" for name, value in environment(config).items())
    return {"serve-config.yaml": note + yaml.dump(patch, Dumper=_Blocks, sort_keys=False), "ray.env": note + variables}


class _Blocks(yaml.SafeDumper):
    """Texts of several lines as blocks, which people can read."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)
