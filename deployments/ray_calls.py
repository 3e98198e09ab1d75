"""The few private calls of Ray that passing by reference needs. Ray is pinned; tests/deployments/test_ray_calls.py
holds what is relied on here.

A replica method called through `call_by_reference` is an async generator of two items: first the large value, which
its caller never fetches, then a small report. Waiting for the report tells that the value exists and brings up what
went wrong; waiting for the value itself would copy it into the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from ray import ObjectRef
from ray.exceptions import ObjectRefStreamEndOfStreamError, RayTaskError
from ray.serve.handle import DeploymentHandle

from helios_core.errors import HeliosError


async def call_by_reference(handle: DeploymentHandle, method: str, *args: Any) -> tuple[ObjectRef, Any]:
    """Calls `method` on some replica and returns (reference to the value, report).

    `args` at top level may be references: the replica gets their values. A cancelled caller cancels the call.
    Raises our own errors (HeliosError) as they were raised in the replica, Ray's for a replica that died.
    """
    response = handle.options(method_name=method, stream=True, _by_reference=True).remote(*args)
    try:
        items = await response._to_object_ref_gen()  # returns when a replica has accepted the call
        value, report = items._get_next_ref_n(2)  # looks ahead: iterating would fetch the value
        try:
            result = await report
        except ObjectRefStreamEndOfStreamError:
            await value  # the stream ended after one item: that item is the replica's error
            raise
        items._consume_next_ref_n(2)
        return value, result
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        raise_own(error)


async def call(handle: DeploymentHandle, method: str, *args: Any) -> Any:
    """Calls `method` on some replica and returns its value. Cancels and raises as `call_by_reference` does."""
    response = handle.options(method_name=method, _by_reference=True).remote(*args)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        raise_own(error)


async def stream(handle: DeploymentHandle, method: str, *args: Any) -> AsyncGenerator[Any, None]:
    """The items of a streaming `method`, as they come. Closing the iterator cancels the call; raises as `call` does."""
    response = handle.options(method_name=method, stream=True, _by_reference=True).remote(*args)
    try:
        async for item in response:
            yield item
    except RayTaskError as error:
        raise_own(error)
    finally:
        response.cancel()  # without effect once it has ended


def raise_own(error: RayTaskError) -> NoReturn:
    """Raises the error of ours that `error` wraps, or `error` itself if the replica failed in another way."""
    if isinstance(error.cause, HeliosError):
        raise error.cause from None
    raise error
