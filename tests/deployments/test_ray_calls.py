"""What deployments/ray_calls.py relies on in Ray, asked of a real Ray Serve with a few tiny deployments."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError, ObjectRefStreamEndOfStreamError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments import ray_calls
from deployments.director import NoSuchVideo
from deployments.making import InputLost, ReplicaLost
from deployments.ray_calls import answers_strangers, call, call_by_reference, call_to_its_end, live_replicas
from helios_core.errors import HeliosError, InvalidInput, OutOfMemory

pytestmark = [pytest.mark.timeout(60), pytest.mark.ray]

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
        yield Value(folder, os.urandom(1_000_000))
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

    async def fail(self, error: BaseException | None) -> None:
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error

    async def fail_after(self, n: int, error: BaseException | None) -> AsyncIterator[int]:
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

    async def work_until(self, line: Path, gate: Path, ended: Path, error: Exception | None) -> None:
        """Work with an end: when somebody writes to the pipe `gate`."""
        say(line, "began")
        await asyncio.to_thread(gate.read_bytes)
        say(ended, "ended")
        if error is not None:
            raise error

    async def lead(self, line: Path, calling: str, *args: Any) -> None:
        """A request with a call that it does not wait for, as the Director's `create` has."""

        async def report() -> None:
            try:
                await getattr(ray_calls, calling)(*args)
            except ReplicaLost as lost:
                say(line, f"lost: {lost}")

        self.led = asyncio.ensure_future(report())
        await asyncio.Event().wait()


PART = serve.deployment(
    Part, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=1, graceful_shutdown_timeout_s=0
)


@dataclass
class Parts:
    """Handles: two ordinary ones, one whose two replicas may be killed, one whose replica takes one call at a time."""

    cluster: Cluster
    first: DeploymentHandle
    second: DeploymentHandle
    mortal: DeploymentHandle
    single: DeploymentHandle


@pytest.fixture(scope="module")
def parts() -> Iterator[Parts]:
    others = [
        PART.options(name="second").bind(),
        PART.options(name="mortal", num_replicas=2).bind(),
        PART.options(name="single", max_ongoing_requests=1).bind(),
    ]
    sooner = {
        "health_check_initial_delay_ms": 200,
        "health_check_period_ms": 200,
    }  # that a node is dead, not after 15 s
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**9, "_system_config": sooner}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        serve.run(PART.options(name="first").bind(*others), name=APP_NAME, route_prefix=None)
        names = ("first", "second", "mortal", "single")
        yield Parts(cluster, *(serve.get_deployment_handle(name, APP_NAME) for name in names))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


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


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "this took more than half a minute"
        time.sleep(0.05)


async def kill(*pids: int) -> None:
    """SIGKILLs them all, and returns when they are gone."""
    processes = [psutil.Process(pid) for pid in pids]
    for process in processes:
        process.kill()
    await asyncio.to_thread(psutil.wait_procs, processes)


async def mortals(parts: Parts) -> set[int]:
    """The processes of both mortal replicas."""
    pids: set[int] = set()
    while len(pids) < 2:
        pids.add(await call(parts.mortal, "pid"))
    return pids


def object_store_bytes() -> int:
    used: int = get_memory_info_reply(get_state_from_address(None)).store_stats.object_store_bytes_used
    return used


# name ▸ how a replica is asked to take a value, and gives its process and the value's size
TAKING: dict[str, Callable[[DeploymentHandle, Any], Any]] = {
    "call": lambda handle, value: call(handle, "take", value),
    "call_to_its_end": lambda handle, value: call_to_its_end(handle, "take", value),
    "call_by_reference": lambda handle, value: call_by_reference(handle, "make_more", value),
}
taking = pytest.mark.parametrize("takes", TAKING.values(), ids=TAKING)


# The door


def test_a_head_wants_its_token(parts: Parts) -> None:
    """Which all Rays of the tests have, by tests/__init__.py: this process shows it, a stranger does not."""
    assert not answers_strangers(parts.cluster.address)


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


async def test_a_value_outlives_every_replica_of_its_deployment(parts: Parts, tmp_path: Path) -> None:
    value, maker = await call_by_reference(parts.mortal, "make", tmp_path)
    more, _ = await call_by_reference(parts.mortal, "make_more", value)
    dead = await mortals(parts)
    assert maker["pid"] in dead
    await kill(*dead)

    again, replacement = await call_by_reference(parts.mortal, "make_more", value)
    assert replacement["pid"] not in dead
    assert (await again).data == (await more).data


async def test_values_that_nobody_holds_leave_the_object_store(parts: Parts, tmp_path: Path) -> None:
    """All of them: less than one value is left, which is what Serve keeps there itself."""
    value, _ = await call_by_reference(parts.first, "make", tmp_path)
    for i in range(300):
        value, _ = await call_by_reference((parts.first, parts.second)[i % 2], "make_more", value)
    assert object_store_bytes() > 1_000_000  # the last one
    del value
    await asyncio.to_thread(wait_until, lambda: object_store_bytes() < 1_000_000)


# Errors

# name ▸ a call that fails with the given error, or whose replica dies
FAILING: dict[str, Callable[[DeploymentHandle, BaseException | None], Any]] = {
    "call": lambda handle, error: call(handle, "fail", error),
    "call_to_its_end": lambda handle, error: call_to_its_end(handle, "fail", error),
    "call_by_reference, no item": lambda handle, error: call_by_reference(handle, "fail_after", 0, error),
    "call_by_reference, one item": lambda handle, error: call_by_reference(handle, "fail_after", 1, error),
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
async def test_a_shortage_of_memory_is_an_error_of_ours(parts: Parts, fails: Any) -> None:
    with pytest.raises(OutOfMemory, match="no memory is left"):
        await fails(parts.first, MemoryError())


@failing
async def test_a_replica_that_dies_is_lost(parts: Parts, fails: Any) -> None:
    with pytest.raises(ReplicaLost) as caught:
        await fails(parts.mortal, None)
    assert isinstance(caught.value.__cause__, RayActorError)


@pytest.mark.parametrize(
    ("calling", "method", "args"),
    [("call", "work", ()), ("call_to_its_end", "work", ()), ("call_by_reference", "work_after", (1,))],
)
async def test_a_call_that_ray_cancels_is_lost(
    parts: Parts, line: Line, calling: str, method: str, args: tuple[Any, ...]
) -> None:
    """Ray cancels along with a request every call that was made for it, also by a task that goes on."""
    request = call(parts.first, "lead", line.path, calling, parts.second, method, *args, line.path)
    leading = asyncio.ensure_future(request)
    assert await line.heard() == "began"
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    words = {await line.heard(), await line.heard()}
    assert "cancelled" in words
    assert any(word.startswith("lost: ") for word in words)


async def test_replicas_that_are_taken_down_are_lost(parts: Parts, line: Line) -> None:
    handle = await asyncio.to_thread(serve.run, PART.bind(), name="short-lived", route_prefix=None)
    calls = [
        asyncio.ensure_future(calling)
        for calling in (
            call(handle, "work", line.path),
            call_to_its_end(handle, "work", line.path),
            call_by_reference(handle, "work_after", 1, line.path),
        )
    ]
    for _ in calls:
        assert await line.heard() == "began"
    await asyncio.to_thread(serve.delete, "short-lived")
    for calling in calls:
        with pytest.raises(ReplicaLost) as caught:
            await calling
        assert isinstance(caught.value.__cause__, RayActorError)
    with pytest.raises(ReplicaLost) as caught:
        await call(handle, "pid")
    assert isinstance(caught.value.__cause__, DeploymentUnavailableError)


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


# Lost inputs


async def test_a_lost_node_loses_its_calls_and_its_values(parts: Parts, line: Line, tmp_path: Path) -> None:
    node = parts.cluster.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=10**8)
    options = {"num_cpus": 0.1, "resources": {"far": 1}}
    part = PART.options(ray_actor_options=options).bind()
    far = await asyncio.to_thread(serve.run, part, name="far", route_prefix=None)
    try:
        value, _ = await call_by_reference(far, "make", tmp_path)
        working = asyncio.ensure_future(call(far, "work", line.path))
        assert await line.heard() == "began"
    finally:
        parts.cluster.remove_node(node, allow_graceful=False)
    for takes in TAKING.values():
        with pytest.raises(InputLost) as caught:
            await takes(parts.second, value)
        assert isinstance(caught.value.__cause__, ObjectLostError)
        assert value.hex() in str(caught.value)
    with pytest.raises(ReplicaLost):
        await working
    await asyncio.to_thread(serve.delete, "far")


async def failed(handle: DeploymentHandle, error: BaseException | None) -> ray.ObjectRef:
    """A reference to what a call with `error` should have given."""
    return await handle.options(method_name="fail", _by_reference=True).remote(error)._to_object_ref()


@taking
async def test_an_input_whose_replica_died_is_lost_and_who_was_to_take_it_stays(parts: Parts, takes: Any) -> None:
    """The death that an input brings along is not taken for the taker's own (ray-project/ray#61758)."""
    taker = await call(parts.second, "pid")
    with pytest.raises(InputLost) as caught:
        await takes(parts.second, await failed(parts.mortal, None))
    assert isinstance(caught.value.__cause__, RayServeException)
    assert live_replicas(parts.second) == 1
    assert await call(parts.second, "pid") == taker


@taking
async def test_an_input_that_is_an_error_of_ours_arrives_as_it_was_raised(parts: Parts, takes: Any) -> None:
    with pytest.raises(InvalidInput, match="seed is -1"):
        await takes(parts.second, await failed(parts.first, InvalidInput("seed", -1, "at least 0")))


# Live replicas


async def test_live_replicas_are_known_from_the_first_call_on(parts: Parts) -> None:
    handle = DeploymentHandle("first", APP_NAME)
    assert live_replicas(handle) == 0
    await call(handle, "pid")
    assert live_replicas(handle) == 1


async def test_a_dead_replica_is_not_live_and_its_replacement_is(parts: Parts) -> None:
    pids = await mortals(parts)
    assert live_replicas(parts.mortal) == 2
    await kill(pids.pop())  # idle, so that it does not show in a call
    await asyncio.to_thread(wait_until, lambda: live_replicas(parts.mortal) == 1)
    await asyncio.to_thread(wait_until, lambda: live_replicas(parts.mortal) == 2)
    assert len(pids & await mortals(parts)) == 1


# Cancelling


@pytest.mark.parametrize("begin", ["call", "call_by_reference, no item", "call_by_reference, one item"])
async def test_cancelling_the_caller_cancels_the_replica(parts: Parts, line: Line, begin: str) -> None:
    calling = asyncio.ensure_future(
        {
            "call": lambda: call(parts.first, "work", line.path),
            "call_by_reference, no item": lambda: call_by_reference(parts.first, "work_after", 0, line.path),
            "call_by_reference, one item": lambda: call_by_reference(parts.first, "work_after", 1, line.path),
        }[begin]()
    )
    assert await line.heard() == "began"
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await line.heard() == "cancelled"


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("error", [None, InvalidInput("seed", -1, "at least 0")])
async def test_call_to_its_end_lets_the_replica_end_before_the_cancelled_caller_leaves(
    parts: Parts, line: Line, tmp_path: Path, error: HeliosError | None, heard: bool
) -> None:
    gate, ended = tmp_path / "gate", tmp_path / "ended"
    os.mkfifo(gate)
    calling = asyncio.ensure_future(call_to_its_end(parts.first, "work_until", line.path, gate, ended, error))
    assert await line.heard() == "began"
    if heard:
        await call(parts.first, "pid")  # there and back: by now the caller, too, knows that it began
    calling.cancel()
    await call(parts.first, "pid")  # who leaves at once has left by now
    assert not calling.done()
    await asyncio.to_thread(gate.write_bytes, b"open")
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended.exists()


async def test_call_to_its_end_gives_the_value(parts: Parts) -> None:
    assert await call_to_its_end(parts.first, "pid") == await call(parts.first, "pid")


@pytest.mark.parametrize("method", ["call", "call_to_its_end", "call_by_reference"])
async def test_a_call_cancelled_in_the_queue_never_runs(parts: Parts, line: Line, method: str) -> None:
    first = asyncio.ensure_future(call(parts.single, "work", line.path))
    assert await line.heard() == "began"  # and the replica takes no second call
    work = {
        "call": lambda: call(parts.single, "work", line.path),
        "call_to_its_end": lambda: call_to_its_end(parts.single, "work", line.path),
        "call_by_reference": lambda: call_by_reference(parts.single, "work_after", 0, line.path),
    }
    queued = asyncio.ensure_future(work[method]())
    await call(parts.first, "pid")  # it asks meanwhile, and waits
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert not first.done()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await line.heard() == "cancelled"
    assert await call(parts.single, "pid") > 0  # the replica is free
    say(line.path, "nothing else was said")
    assert await line.heard() == "nothing else was said"
