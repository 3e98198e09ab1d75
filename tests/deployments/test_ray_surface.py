"""Who reaches Ray runs programs in it: one that is open to strangers is not used. That a Ray of our own listens on this
machine alone, and its replicas want a token, is in test_restart.py; that a real head does, in test_ray_calls.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from deployments.config import AppConfig, ConfigError
from deployments.service import check_ray


@contextmanager
def head(wants_token: bool) -> Iterator[str]:
    """The address of what answers as the head of a Ray cluster does."""

    class Head(NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: CheckAliveRequest, context: grpc.ServicerContext) -> CheckAliveReply:
            if wants_token and "authorization" not in dict(context.invocation_metadata()):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return CheckAliveReply()

    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(("wants_token", "settings"), [(True, {}), (False, {"insecure": True})])
def test_a_ray_that_is_used(wants_token: bool, settings: dict[str, bool]) -> None:
    with head(wants_token) as address:
        check_ray(AppConfig().override(**settings), address)


def test_a_ray_that_is_open_to_strangers_is_refused() -> None:
    with head(wants_token=False) as address, pytest.raises(ConfigError) as error:
        check_ray(AppConfig(), address)
    assert all(words in str(error.value) for words in (address, "RAY_AUTH_MODE=token", "insecure: true"))
