from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.service import Service, serving


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, shared_ray: int) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("faults"), shared_ray) as service:
        yield service


@pytest.fixture(autouse=True)
def whole(service: Service) -> None:
    """Every test begins with all replicas there and nothing under way."""
    service.wait_until_whole()
