"""For all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from deployments.config import AppConfig, free_port
from deployments.rendering import environment
from deployments.service import OBJECT_STORE_BYTES

# Triton reads it when it is imported, which torch may do at any time: kernels are tested without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray's workers yield to everything else on the machine, by a niceness of 15: beside other work they hardly start.
os.environ.setdefault("RAY_worker_niceness", "0")

# The modules that share a service, the one that measures memory first.
SHARING = ["test_ten_minutes", "test_service", "test_uploads"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the tests that start a Ray of their own or none, then those on the shared one: there is one at a time."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        module = item.path.stem
        on_shared_ray = "shared_ray" in getattr(item, "fixturenames", ())
        return on_shared_ray, SHARING.index(module) if module in SHARING else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[int]:
    """A Ray that every `run_service` from here on joins, and the port of its Serve. A start of Ray and Serve and a stop
    take as long as that of all replicas."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(AppConfig()).items():
            patch.setenv(name, value)
        head = {"num_cpus": os.cpu_count(), "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield free_port()
        cluster.shutdown()
