"""What deployments/ray_calls.py relies on in Ray, asked of a real Ray Serve with a few tiny deployments."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import ObjectRefStreamEndOfStreamError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.director import NoSuchVideo
from deployments.ray_calls import call, call_by_reference, stream
from helios_core.errors import HeliosError, InvalidInput

pytestmark = pytest.mark.timeout(60)

APP_NAME = "ray-calls"


@dataclass
class Value:
    """A large value that leaves a file, named by the process, in `folder` wherever it is unpickled."""

    folder: Path
    data: bytes = field(default=bytes(1_000_000), repr=False)  # more than Ray sends along with a reply

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / str(os.getpid())).touch()

    def pids(self) -> list[int]:
        """The processes that have unpickled this value."""
        return sorted(int(path.name) for path in self.folder.iterdir())


def say(line: Path, word: str) -> None:
    line.write_text(f"{word}\n")


class Part:
    """A replica with every kind of method that is called through ray_calls."""

    def __init__(self, *others: DeploymentHandle) -> None:
        pass  # it calls nobody; that it is given them deploys them too

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, folder: Path) -> AsyncIterator[Any]:
        yield Value(folder)
        yield {"pid": os.getpid()}

    async def make_more(self, value: Value) -> AsyncIterator[Any]:
        yield Value(value.folder, value.data + b"more")
        yield {"pid": os.getpid(), "taken": len(value.data)}

    async def take(self, value: Value) -> tuple[int, int]:
        return os.getpid(), len(value.data)

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    # What goes wrong: `error` is raised, or the process dies if there is none.

    async def fail(self, error: Exception | None) -> None:
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error

    async def fail_after(self, n: int, error: Exception | None) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        await self.fail(error)

    # Work without an end: the line hears when it begins and when it is cancelled.

    async def work(self, line: Path) -> None:
        say(line, "began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say(line, "cancelled")
            raise

    async def work_after(self, n: int, line: Path) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        await self.work(line)


@dataclass
class Parts:
    """Handles: two ordinary ones, one whose replicas may be killed, one whose replica takes one call at a time."""

    first: DeploymentHandle
    second: DeploymentHandle
    mortal: DeploymentHandle
    single: DeploymentHandle


@pytest.fixture(scope="module")
def parts() -> Iterator[Parts]:
    part = serve.deployment(
        Part, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=1, graceful_shutdown_timeout_s=0
    )
    others = [
        part.options(name="second").bind(),
        part.options(name="mortal", num_replicas=2).bind(),
        part.options(name="single", max_ongoing_requests=1).bind(),
    ]
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**9, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        serve.run(part.options(name="first").bind(*others), name=APP_NAME, route_prefix=None)
        yield Parts(*(serve.get_deployment_handle(name, APP_NAME) for name in ("first", "second", "mortal", "single")))
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass
class Line:
    """A named pipe on which replicas report; `heard` waits for their next word."""

    path: Path
    reader: asyncio.StreamReader

    async def heard(self) -> str:
        return (await self.reader.readline()).decode().strip()


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    path = tmp_path / "line"
    os.mkfifo(path)
    pipe = os.fdopen(os.open(path, os.O_RDWR), "rb", buffering=0)  # read and write: then no writer waits for a reader
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    yield Line(path, reader)
    transport.close()


async def drain(handle: DeploymentHandle, method: str, *args: Any) -> list[Any]:
    async with aclosing(stream(handle, method, *args)) as items:  # type: ignore[type-var]
        return [item async for item in items]


# By reference


async def test_a_value_goes_from_replica_to_replica_and_never_to_the_caller(parts: Parts, tmp_path: Path) -> None:
    value, report = await call_by_reference(parts.first, "make", tmp_path)
    assert report == {"pid": await call(parts.first, "pid")}
    assert Value(tmp_path).pids() == []

    second = await call(parts.second, "pid")
    assert await call(parts.second, "take", value) == (second, 1_000_000)
    assert Value(tmp_path).pids() == [second]

    more, report = await call_by_reference(parts.second, "make_more", value)
    assert report == {"pid": second, "taken": 1_000_000}
    assert await call(parts.second, "take", more) == (second, 1_000_004)
    assert Value(tmp_path).pids() == [second]

    await value  # the proof that a caller who fetches would be noticed
    assert Value(tmp_path).pids() == sorted([second, os.getpid()])


async def test_a_value_outlives_the_replica_that_made_it(parts: Parts, tmp_path: Path) -> None:
    value, report = await call_by_reference(parts.mortal, "make", tmp_path)
    process = psutil.Process(report["pid"])
    process.kill()
    await asyncio.to_thread(process.wait)
    assert await call(parts.second, "take", value) == (await call(parts.second, "pid"), 1_000_000)


async def test_a_stream_gives_its_items_in_order(parts: Parts) -> None:
    assert await drain(parts.first, "count", 50) == list(range(50))
    assert await drain(parts.first, "count", 0) == []


# Errors

# name ▸ a call that fails with the given error, or whose replica dies
FAILING: dict[str, Callable[[DeploymentHandle, Exception | None], Any]] = {
    "call": lambda handle, error: call(handle, "fail", error),
    "call_by_reference, no item": lambda handle, error: call_by_reference(handle, "fail_after", 0, error),
    "call_by_reference, one item": lambda handle, error: call_by_reference(handle, "fail_after", 1, error),
    "stream, no item": lambda handle, error: drain(handle, "fail_after", 0, error),
    "stream, one item": lambda handle, error: drain(handle, "fail_after", 1, error),
}
failing = pytest.mark.parametrize("fails", FAILING.values(), ids=FAILING)


@failing
@pytest.mark.parametrize("error", [InvalidInput("seed", -1, "at least 0"), NoSuchVideo("video_1")])
async def test_our_errors_arrive_as_they_were_raised(parts: Parts, fails: Any, error: HeliosError) -> None:
    with pytest.raises(HeliosError) as caught:
        await fails(parts.first, error)
    assert type(caught.value) is type(error)
    assert (caught.value.args, str(caught.value), vars(caught.value)) == (error.args, str(error), vars(error))


@failing
async def test_foreign_errors_arrive_as_those_of_ray(parts: Parts, fails: Any) -> None:
    with pytest.raises(RayTaskError, match="an inner detail") as caught:
        await fails(parts.first, ValueError("an inner detail"))
    assert isinstance(caught.value.cause, ValueError)


@failing
async def test_a_replica_that_dies_is_an_actor_error(parts: Parts, fails: Any) -> None:
    with pytest.raises(RayActorError):
        await fails(parts.mortal, None)


async def test_an_error_before_the_first_item_takes_its_place_and_ends_the_stream(parts: Parts) -> None:
    """Why call_by_reference looks at the value when there is no report."""
    response = parts.first.options(method_name="fail_after", stream=True, _by_reference=True).remote(0, ValueError())
    value, report = (await response._to_object_ref_gen())._get_next_ref_n(2)
    with pytest.raises(ObjectRefStreamEndOfStreamError):
        await report
    with pytest.raises(RayTaskError):
        await value


async def test_a_replica_without_a_report_is_an_error(parts: Parts) -> None:
    with pytest.raises(ObjectRefStreamEndOfStreamError):
        await call_by_reference(parts.first, "count", 1)


# Cancelling


@pytest.mark.parametrize("begin", ["call", "call_by_reference, no item", "call_by_reference, one item", "stream"])
async def test_cancelling_the_caller_cancels_the_replica(parts: Parts, line: Line, begin: str) -> None:
    calling = asyncio.ensure_future(
        {
            "call": lambda: call(parts.first, "work", line.path),
            "call_by_reference, no item": lambda: call_by_reference(parts.first, "work_after", 0, line.path),
            "call_by_reference, one item": lambda: call_by_reference(parts.first, "work_after", 1, line.path),
            "stream": lambda: drain(parts.first, "work_after", 1, line.path),
        }[begin]()
    )
    assert await line.heard() == "began"
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await line.heard() == "cancelled"


async def test_closing_a_stream_cancels_the_replica(parts: Parts, line: Line) -> None:
    async with aclosing(stream(parts.first, "work_after", 2, line.path)) as items:  # type: ignore[type-var]
        assert [await anext(items), await anext(items)] == [0, 1]
        assert await line.heard() == "began"
    assert await line.heard() == "cancelled"


@pytest.mark.parametrize("method", ["call", "call_by_reference"])
async def test_a_call_cancelled_in_the_queue_never_runs(parts: Parts, line: Line, method: str) -> None:
    first = asyncio.ensure_future(call(parts.single, "work", line.path))
    assert await line.heard() == "began"  # and the replica takes no second call
    work = {
        "call": lambda: call(parts.single, "work", line.path),
        "call_by_reference": lambda: call_by_reference(parts.single, "work_after", 0, line.path),
    }
    queued = asyncio.ensure_future(work[method]())
    await asyncio.sleep(0)  # it asks, and waits
    for calling in (queued, first):
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert await line.heard() == "cancelled"
    assert await call(parts.single, "pid") > 0  # the replica is free
    say(line.path, "nothing else was said")
    assert await line.heard() == "nothing else was said"
