"""The rendered `serveConfigV2` on a cluster: two raylets, and a GCS with Redis, on this machine.

One service for all of it: samplers come and go with the demand, a node dies, the GCS dies, a new version takes over.
Every video ends with the bytes that the library makes of it, and on the connection that it began on.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from deployments.config import AppConfig, free_port
from deployments.ray_calls import deploy
from deployments.rendering import APP_NAME, environment, serve_config_text
from deployments.sampler import VERSION
from deployments.service import OBJECT_STORE_BYTES
from tests.deployments.line import Line
from tests.deployments.prometheus import assert_all_queries_answer
from tests.faults.service import Service, body, by_library, wait_until

pytestmark = pytest.mark.ray

MOST = 3  # samplers
CHUNK_SECONDS = 1.0  # of sampling, paced
ROOT = Path(__file__).parents[2]


@dataclass
class Nodes:
    """The cluster, and the service on it. The head has room for one replica of each deployment; where there are to be
    more, they go to other nodes."""

    cluster: Cluster
    service: Service
    schema: dict[str, Any]

    def worker(self) -> Any:
        """The one node beside the head, a new one if there is none."""
        for node in self.cluster.worker_nodes:
            return node
        return self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES // 4)

    def samplers(self) -> int:
        return int(self.service.metric("helios_replicas", part="sampler"))

    def where(self) -> set[str]:
        """The nodes on which samplers run."""
        details = serve.context._get_global_client().get_serve_details()
        replicas = details["applications"][APP_NAME]["deployments"]["Sampler"]["replicas"]
        return {replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"}

    @contextmanager
    def videos(self, count: int) -> Iterator[list[str]]:
        """Endless videos, each watched over one connection, until they are cancelled: at the end of the block, if not
        before. Then each is complete, and as it is when nothing happens and nothing else is made."""
        wanted = [{**body(seed, size="64x64"), "seconds": None} for seed in range(count)]
        ids = [self.service.http.post("/v1/videos", json=one).raise_for_status().json()["id"] for one in wanted]
        with ThreadPoolExecutor(count) as pool:
            files = [pool.submit(self.service.http.get, f"/v1/videos/{video_id}/content") for video_id in ids]
            try:
                yield ids
            finally:
                self.end(ids)
        for seed, (video_id, file) in enumerate(zip(ids, files, strict=True)):
            record = self.service.record(video_id)
            assert record.status == "completed"
            assert file.result().content == by_library(body(seed, len(record.chunks), size="64x64")), (
                f"{video_id} is another video"
            )

    def end(self, ids: list[str]) -> None:
        for video_id in ids:
            self.service.http.post(f"/v1/videos/{video_id}/cancel").raise_for_status()

    def committed(self, chunks: int) -> None:
        """Returns when so many more chunks are there."""
        before = self.service.metric("helios_chunks_committed_total")
        wait_until(lambda: self.service.metric("helios_chunks_committed_total") >= before + chunks)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(["redis-server", *options], stdout=log) as server:
        wait_until(lambda: "Ready to accept connections" in (folder / "log").read_text())
        yield f"127.0.0.1:{port}"
        server.kill()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, redis: str) -> Iterator[Nodes]:
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    sampler = {
        "max_replicas": MOST,
        "num_cpus": 0.5,
        "min_chunk_seconds": CHUNK_SECONDS,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 3.0,
    }
    config = AppConfig(
        store=str(folder / "store"),
        port=port,
        testing=True,
        store_patience_s=2.0,
        torch_threads=1,
        drain_s=120.0,
        trace_file=str(folder / "spans.jsonl"),
    ).override(models=[{"model": "random", "sampler": sampler}])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(config), "RAY_REDIS_ADDRESS": redis}.items():
            patch.setenv(name, value)
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES // 2}
        patch.chdir(folder)  # else replicas would find our packages here, whatever version is to run
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(cluster.address, log_to_driver=False)
        schema = yaml.safe_load(serve_config_text(config))
        # The nodes share one address here: a connection would go to either's proxy, and end when its node does.
        serve.start(proxy_location="HeadOnly", http_options=schema["http_options"])
        deploy(schema)
        limits = httpx.Limits(max_connections=None)
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits)
        with http, closing(Line(port)) as line:
            service = Service(str(http.base_url), http, line, folder / "store", folder / "spans.jsonl", config)
            yield Nodes(cluster, service, schema)
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def test_samplers_come_and_go_with_the_videos_that_want_them(nodes: Nodes) -> None:
    """A video goes on all the while, also on the samplers that are taken away: those finish their chunk."""
    nodes.worker()
    wait_until(lambda: nodes.samplers() == 1)
    with nodes.videos(4) as ids:
        wait_until(lambda: nodes.samplers() == MOST)
        assert len(nodes.where()) == 2
        nodes.end(ids[1:])
        wait_until(lambda: nodes.samplers() == 1)
        nodes.committed(2)
    assert nodes.service.lost("sampler") == 0


def test_running_videos_do_not_notice_that_the_gcs_dies(nodes: Nodes) -> None:
    """It comes back with what Redis has, and the service grows again."""
    nodes.worker()
    head, lost = nodes.cluster.head_node, nodes.service.lost("sampler")
    with nodes.videos(4):
        head.kill_gcs_server()
        nodes.committed(4)
        head.start_gcs_server()
        wait_until(lambda: nodes.samplers() == MOST)
    assert nodes.service.lost("sampler") == lost


def test_a_node_that_dies_costs_no_frame(nodes: Nodes) -> None:
    before = nodes.service.lost("sampler")
    with nodes.videos(4):
        node = nodes.worker()
        wait_until(lambda: len(nodes.where()) == 2 and nodes.samplers() == MOST)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: nodes.service.lost("sampler") > before)
        nodes.committed(8)
    nodes.cluster.remove_node(node, allow_graceful=False)


def test_a_new_version_takes_over_under_load(nodes: Nodes, tmp_path: Path) -> None:
    """As `serve deploy` or KubeRay rolls it: every replica is replaced, and each video's `runs` say by when."""
    version = f"{VERSION}+next"
    for package in ("deployments", "helios_core"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    about = tmp_path / f"helios_serve-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: helios-serve\nVersion: {version}\n")
    (application,) = nodes.schema["applications"]
    following = {**application, "runtime_env": {"env_vars": {"PYTHONPATH": str(tmp_path)}}}

    def versions(video_id: str) -> list[str]:
        return [run.version for run in nodes.service.record(video_id).runs]

    nodes.worker()
    with ThreadPoolExecutor(1) as pool:
        with nodes.videos(2) as ids:
            wait_until(lambda: nodes.samplers() == 2)
            # It returns when the old ingress has served its viewers to the end.
            upgrade = pool.submit(deploy, {**nodes.schema, "applications": [following]})
            wait_until(lambda: all(versions(video_id)[-1:] == [version] for video_id in ids))
        upgrade.result()
    for video_id in ids:
        assert sorted(set(versions(video_id))) == [VERSION, version]


@contextmanager
def all_the_while(service: Service) -> Iterator[None]:
    """Videos are made one after the other until the block ends."""
    over = threading.Event()

    def make() -> None:
        while not over.is_set():
            service.stream(body(0, chunks=2, size="64x64"))

    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make)
        try:
            yield
        finally:
            over.set()
        making.result()


def test_every_query_of_dashboards_and_alerts_answers_of_this_service(nodes: Nodes) -> None:
    with all_the_while(nodes.service):
        assert_all_queries_answer(f"{nodes.service.url}/metrics", None, ROOT / "k8s/monitoring")
