"""The rendered `serveConfigV2` on a cluster: two raylets and a GCS with Redis on this machine.

One service for all of it: samplers come and go with the demand, a node dies, the GCS dies, a new version takes over.
Every video ends with the bytes of the undisturbed run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from deployments.cli import free_port
from deployments.config import AppConfig
from deployments.ray_calls import deploy
from deployments.rendering import APP_NAME, environment, serve_config_text
from deployments.service import OBJECT_STORE_BYTES
from tests.deployments.test_faults import Service, body, wait_until

pytestmark = pytest.mark.ray

MOST = 3  # samplers
CHUNK_SECONDS = 1.0  # of sampling, paced


@dataclass
class Nodes:
    """The cluster, and the service on it. The head has room for one replica of each; what is more goes elsewhere."""

    cluster: Cluster
    service: Service
    config: AppConfig

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES // 4)

    def samplers(self) -> dict[str, int]:
        """Node ▸ how many samplers run there."""
        nodes = [replica["node_id"] for replica in replicas("Sampler")]
        return {node: nodes.count(node) for node in nodes}


def replicas(deployment: str) -> list[dict[str, Any]]:
    details = serve.context._get_global_client().get_serve_details()
    own = details["applications"][APP_NAME]["deployments"][deployment]["replicas"]
    return [replica for replica in own if replica["state"] == "RUNNING"]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["redis-server", *options], stdout=log)
    wait_until(lambda: "Ready to accept connections" in (folder / "log").read_text())
    yield f"127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, redis: str) -> Iterator[Nodes]:
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    sampler = {
        "max_replicas": MOST,
        "num_cpus": 0.5,
        "min_chunk_seconds": CHUNK_SECONDS,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2.0,
    }
    config = AppConfig(
        store=str(folder / "store"),
        port=port,
        testing=True,
        store_patience_s=2.0,
        torch_threads=1,
        trace_file=str(folder / "spans.jsonl"),
    ).override(models=[{"model": "random", "sampler": sampler}])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(config), "RAY_REDIS_ADDRESS": redis}.items():
            patch.setenv(name, value)
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES // 2}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(cluster.address, log_to_driver=False)
        schema = yaml.safe_load(serve_config_text(config))
        serve.start(http_options=schema["http_options"])
        deploy(schema)
        limits = httpx.Limits(max_connections=None)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=120, limits=limits) as http:
            yield Nodes(cluster, Service(url, http, folder / "store", folder / "spans.jsonl"), config)
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


BODIES = [body(seed, chunks=12) for seed in range(4)]


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes) -> list[bytes]:
    """Of BODIES, made one after the other's chunk on one sampler."""
    return [data for _, data in nodes.service.together([{**one, "seconds": 12 * 33 / 24} for one in BODIES])]


@dataclass
class Watched:
    """What /metrics said while something went on."""

    replicas: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)


def test_samplers_follow_the_demand(nodes: Nodes) -> None:
    nodes.add()
    seen: list[float] = []

    def look() -> None:
        wait_until(lambda: seen.append(nodes.service.metric("helios_replicas", part="sampler")) or seen[-1] == MOST)
        pass

    made = nodes.service.together(BODIES, look)
    wait_until(lambda: seen.append(nodes.service.metric("helios_replicas", part="sampler")) or seen[-1] == 1)
    assert all(len(data) > 1000 for _, data in made)
