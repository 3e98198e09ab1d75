"""The few private calls of Ray that passing by reference and a closed door need, and what its errors mean. Ray is
pinned; tests/deployments/test_ray_calls.py holds what is relied on here.

A replica method called through `call_by_reference` is an async generator of two items: first the large value, which
its caller never fetches, then a small report. Waiting for the report tells that the value exists and brings up what
went wrong; waiting for the value itself would copy it into the caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import ray
from ray import ObjectRef
from ray._common.network_utils import get_localhost_ip
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectRefStreamEndOfStreamError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from deployments.making import InputLost, ReplicaLost
from helios_core.errors import HeliosError, OutOfMemory

logger = logging.getLogger(__name__)

HEAD_ANSWERS_S = 10.0  # so long Ray's head may take to answer
ASKED_EVERY_S = 2.0  # a replica, whether it is well
SILENT = 3  # times without an answer
LOOK_AGAIN_S = 0.1  # at what replicas there are, of which Serve tells by a list in this process
HEARD_WITHIN_S = 0.2  # so long a replica's beginning may take to be heard of
REPLICA_LOST = (
    *(RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, TaskCancelledError),  # Ray's
    *(ReplicaUnavailableError, DeploymentUnavailableError),  # Serve's
)


async def call_by_reference(
    handle: DeploymentHandle, method: str, *args: Any, to_its_end: bool = False
) -> tuple[ObjectRef, Any]:
    """Calls `method` on some replica and returns (reference to the value, report).

    `args` at top level may be references: the replica gets their values. A cancelled caller cancels the call, or, if
    it is `to_its_end`, waits for it as in `call_to_its_end`. Raises as `errors_told_apart` says.
    """
    with errors_told_apart():
        response = handle.options(method_name=method, stream=True, _by_reference=True).remote(*args)
        try:
            items = await response._to_object_ref_gen()  # returns when a replica has accepted the call
            value, report = items._get_next_ref_n(2)  # looks ahead: iterating would fetch the value
            try:
                result = await (_ended(report) if to_its_end else report)
            except ObjectRefStreamEndOfStreamError:
                await value  # the stream ended after one item: that item is the replica's error
                raise
            items._consume_next_ref_n(2)
            return value, result
        except asyncio.CancelledError:
            response.cancel()
            raise


async def call(handle: DeploymentHandle, method: str, *args: Any) -> Any:
    """Calls `method` on some replica and returns its value. Cancels and raises as `call_by_reference` does."""
    with errors_told_apart():
        response = handle.options(method_name=method, _by_reference=True).remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


async def call_to_its_end(handle: DeploymentHandle, method: str, *args: Any) -> Any:
    """`call`, but a replica at work is not interrupted: a cancelled caller is released when it has ended.

    Ray tells at once that a cancelled call is over, while its replica is still at work (measured): a caller that
    must know that nothing is written any more has to let it finish. That a replica has begun is heard of a little
    later, on a busy machine by tens of milliseconds: for HEARD_WITHIN_S a cancelled call that is taken to be waiting is
    left in its queue.
    """
    with errors_told_apart():
        response = handle.options(method_name=method, _by_reference=True).remote(*args)
        accepted = asyncio.ensure_future(response._to_object_ref())  # ends when a replica has accepted the call
        try:
            result = await asyncio.shield(accepted)
        except asyncio.CancelledError:
            await asyncio.wait([accepted], timeout=HEARD_WITHIN_S)
            if not accepted.done():
                response.cancel()
                await asyncio.wait([accepted])
            if not accepted.cancelled() and accepted.exception() is None:
                await asyncio.wait([asyncio.ensure_future(_fetch(accepted.result()))])
            raise
        return await _ended(result)


async def _fetch(result: ObjectRef) -> Any:
    return await result


async def _ended(result: ObjectRef) -> Any:
    """The result of a call that a replica has accepted. A cancelled caller is released when the call has ended."""

    ended = asyncio.ensure_future(_fetch(result))
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        await asyncio.wait([ended])
        _ = ended.cancelled() or ended.exception()  # nobody is left to hear of it
        raise


def start_on_loopback(**options: Any) -> None:
    """Starts a Ray whose ports nobody reaches from elsewhere: who does may run what they like in it. Serve's replicas
    listen on every interface even so, and want Ray's token. Raises what ray.init raises."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    # Else Ray would put this machine's address for others in place of this one.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init("local", _node_ip_address=get_localhost_ip(), **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def answers_strangers(gcs_address: str) -> bool:
    """Whether the head of a cluster (its GCS) answers who shows neither a token (RAY_AUTH_MODE) nor a certificate
    (RAY_USE_TLS): its nodes, and the replicas on them, then do what such a one says."""
    with grpc.insecure_channel(gcs_address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=HEAD_ANSWERS_S)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
    return True


def deploy(config: dict[str, Any]) -> None:
    """Deploys the applications of a ServeDeploySchema, as `serve deploy` does, and returns when they run and answer.
    Other applications stay. Needs a Serve that was started. Raises RuntimeError with what one says of its failure."""
    client = _get_global_client()
    schema = ServeDeploySchema.model_validate(config)
    others = ray.get(client._controller.get_app_configs.remote())
    names = [own.name for own in schema.applications]
    schema.applications += [other for name, other in others.items() if name not in names]
    client.deploy_apps(schema)
    for name in names:
        client._wait_for_application_running(name)
    client.wait_for_proxies_serving(wait_for_applications_running=True)


async def until_live(handles: Sequence[DeploymentHandle]) -> None:
    """Returns when each of these deployments has a replica that can take calls."""
    while not all(map(live_replicas, handles)):  # noqa: ASYNC110 - Serve tells of no change
        await asyncio.sleep(LOOK_AGAIN_S)


def live_replicas(handle: DeploymentHandle) -> int:
    """How many replicas of a deployment can take calls now, as far as this process has heard."""
    return len(_actors(handle))


def _actors(handle: DeploymentHandle) -> list[ActorHandle]:
    if not handle.is_initialized:
        handle._init()  # else it hears of none before its first call
    router = getattr(handle._router, "_asyncio_router", None)
    requests = getattr(router, "_request_router", None)
    return [] if requests is None else [replica._actor_handle for replica in requests.curr_replicas.values()]


async def kill_silent(handles: Sequence[DeploymentHandle]) -> None:
    """Kills replicas that are alive and silent, for as long as this runs: each is asked every ASKED_EVERY_S whether it
    is well, and one that answered nothing SILENT times running is no more. Its calls are lost, and Serve replaces it.

    Any answer will do, so that who is slow is never mistaken for dead; what one says of itself, Serve hears. That it is
    the caller who asks matters: a replica cannot answer while its caller's process is stopped, as Ray waits for that
    one to take the results. Then nobody is asked either.
    """
    silences: Counter[ray.ActorID] = Counter()
    while True:
        actors = {actor._actor_id: actor for handle in handles for actor in _actors(handle)}
        asked = asyncio.gather(*map(_answers, actors.values()))
        answered, _ = await asyncio.gather(asked, asyncio.sleep(ASKED_EVERY_S))
        silences = Counter({own: silences[own] + 1 for own, well in zip(actors, answered, strict=True) if not well})
        for own, times in silences.items():
            if times >= SILENT:
                logger.error("replica %s answered nothing for %g s: killed", own.hex(), SILENT * ASKED_EVERY_S)
                ray.kill(actors[own])


async def _answers(replica: ActorHandle) -> bool:
    try:
        async with asyncio.timeout(ASKED_EVERY_S):
            await replica.check_health.remote()
    except TimeoutError:
        return False
    except RayError:  # it is dead, or says that it is not well
        pass
    return True


def cluster_id() -> str:
    """Of the Ray cluster that this process is a part of; it stays when its head is restarted from Redis."""
    return str(ray._private.worker.global_worker.node.cluster_id.hex())


def log_folder() -> str:
    """Where Serve's replicas of this machine log."""
    return f"{ray._private.worker._global_node.get_logs_dir_path()}/serve"


@contextmanager
def errors_told_apart() -> Iterator[None]:
    """The one place where it is decided what a failed call means, and so whether it may be made again.

    HeliosError: an error of our own, as it was raised in the replica, or OutOfMemory for a MemoryError outside of what
    computes. Never again, but for Spoilt work: once.
    ReplicaLost: the replica died or was taken away; its inputs are sound. Again, with the same.
    InputLost: a reference among the arguments leads nowhere. Again, with inputs from the store.
    asyncio.CancelledError: our own caller was cancelled. Anything else is a bug, and leaves as Ray raised it.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        # Ray reports in the same way that it dropped a call, as when a replica is taken down.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the call was dropped") from error
    except REPLICA_LOST as error:
        raise ReplicaLost(_first_line(error)) from error
    except ObjectLostError as error:
        raise InputLost(_first_line(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, HeliosError):
            raise error.cause from None
        if isinstance(error.cause, MemoryError):
            raise OutOfMemory(_first_line(error) or "no memory is left") from error
        raise
    except RayServeException as error:
        if isinstance(error.__cause__, (RayTaskError, RayActorError, ObjectLostError)):
            # Serve could not resolve an argument: the call that should have made it had failed.
            raise InputLost(_first_line(error)) from error
        raise


def _first_line(error: Exception) -> str:
    if isinstance(error, RayTaskError):
        error = error.cause  # its own text begins with the address of the replica
    return str(error).strip().partition("\n")[0]
