"""What goes wrong, to whom, while which videos are made; and what is asked of the service then.

A trial streams a scenario's videos at once. As soon as each has a fragment one fault is done, at a moment that the
trial's seed chooses. Every stream must end with the bytes that it has when nothing happens, and on the connection that
it began on; where the fault is that connections break, its viewer goes on with `Range`. Afterwards nothing may be left:
no replica too many or too few, nothing under way, no descriptor, no bytes in the object store.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import random
import resource
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import global_gc, memory_summary
from safetensors import safe_open

from helios_core.checkpoints import Checkpoint
from tests.deployments.line import Line
from tests.faults.service import (
    CHUNK_SECONDS,
    PATIENCE_S,
    REPLICAS,
    SERVES_OWN,
    Body,
    Service,
    Streamed,
    body,
    by_library,
    object_store_bytes,
    processes,
    running,
    serve_actors,
    wait_until,
)

LARGEST = 4  # weights
SPARE_DESCRIPTORS = 16  # connections to other processes of the cluster, which stay open

NETWORK = "the network"  # between the viewers and the proxy
CUT_S, PAUSED_S = 1.0, 5.0
PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000  # of Linux, see ptrace(2)

Fault = Callable[[Any], None]  # what happens to a process, or to the network


def killed(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def stopped(process: psutil.Process) -> None:
    """Alive and silent, until somebody kills it."""
    process.send_signal(signal.SIGSTOP)


def paused(process: psutil.Process) -> None:
    """The same, for a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(PAUSED_S)
    finally:
        process.send_signal(signal.SIGCONT)


def terminated(process: psutil.Process) -> None:
    """As by a node that is drained."""
    process.send_signal(signal.SIGTERM)


def hung(process: psutil.Process) -> None:
    """A sampler whose thread that computes stands still, as if a kernel of its GPU did not end, and which answers."""

    def computing(_: object) -> tuple[int, list[int]]:
        threads = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("sampler")]
        return os.getpid(), threads

    there = ray.get([actor.__ray_call__.remote(computing) for actor in serve_actors().values()])
    (thread,) = dict(there)[process.pid]
    stands = threading.Event()
    threading.Thread(target=_hold, args=(thread, stands.set), daemon=True).start()
    assert stands.wait(PATIENCE_S), f"thread {thread} of {process} could not be stopped"


def _hold(thread: int, holds: Callable[[], None]) -> None:
    """Stops one thread of another process until that one is killed. Linux lets it go when this thread ends."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if ptrace(ctypes.c_long(request), thread, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
    _, status = os.waitpid(thread, WALL)
    holds()
    while os.WIFSTOPPED(status):
        _, status = os.waitpid(thread, WALL)


def cut(line: Line) -> None:
    """All connections end, and there are no new ones for a while."""
    assert line.cut(), "nobody was connected"
    time.sleep(CUT_S)
    line.mend()


def short_of_memory(process: psutil.Process) -> None:
    """From now on it gets no memory that it has not got."""
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))


def spoilt(part: str, names: str, process: psutil.Process) -> None:
    """The first number of some weights becomes NaN, where they lie in the memory of a running process. `names`: how
    theirs begin."""
    weights = _beginnings(part, names)
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    hits = 0
    with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
        for addresses, rights, *_ in map(str.split, maps):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            if rights != "rw-p":
                continue
            try:
                memory.seek(begin)
                data = memory.read(end - begin)
                for place in filter(lambda place: place >= 0, map(data.find, weights)):
                    memory.seek(begin + place)
                    memory.write(struct.pack("<f", math.nan))
                    hits += 1
            except OSError:  # reserved and never touched; or the process has ended itself meanwhile
                continue
    assert hits, f"none of the weights of {part} was found"


@functools.cache
def _beginnings(part: str, names: str) -> list[bytes]:
    """The first bytes of a part's largest weights, in fp32."""
    tensors = []
    for path in sorted(Path(Checkpoint.open("random").part(part)).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors += [file.get_tensor(name).float().flatten() for name in file.keys() if name.startswith(names)]
    largest = sorted(tensors, key=len)[-LARGEST:]
    return [struct.pack("<16f", *tensor[:16].tolist()) for tensor in largest]


@dataclass(frozen=True)
class Scenario:
    """`row`: of the table of faults in RELIABILITY.md; `role`: who meets the `fault`, one replica of a deployment or
    `everyone` of it, one of Serve's own, or the network; `part`: what is lost if it was at work, None: the fault needs
    no work to show; `finishes`: nothing of it is lost; `lives`: who meets the fault is not replaced; `cuts`: the
    viewers' connections, so that they come back; `along`: a deployment that it may cost a replica, too; `from_start`:
    the fault is done `within_s` after the videos were asked for, else after each has a fragment."""

    row: str
    role: str
    fault: Fault
    part: str | None
    everyone: bool = False
    finishes: bool = False
    lives: bool = False
    cuts: bool = False
    along: str | None = None
    videos: int = 8
    chunks: int = 6
    settings: Body = field(default_factory=dict)
    within_s: float = 2 * CHUNK_SECONDS
    from_start: bool = False

    def bodies(self, videos: int) -> list[Body]:
        return [body(seed, self.chunks, **self.settings) for seed in range(min(videos, self.videos))]


LARGE: Body = {"size": "192x128"}  # a size at which rendering takes long
LONG: Body = {"prompt": "waves " * 1300}  # takes the text encoder as long as a prompt can
SCENARIOS: dict[str, Scenario] = {
    "one sampler is killed": Scenario("R1", "Sampler", killed, "sampler"),
    "one sampler is killed, another is idle": Scenario("R1", "Sampler", killed, "sampler", videos=1),
    "all samplers are killed": Scenario("R1", "Sampler", killed, "sampler", everyone=True),
    "the VAE decoder is killed": Scenario("R2", "VaeDecoder", killed, "vae_decoder", chunks=4, settings=LARGE),
    "the text encoder is killed": Scenario(
        "R2", "TextEncoder", killed, "text_encoder", chunks=1, settings=LONG, from_start=True, within_s=0.1
    ),
    "the Director is killed": Scenario("R1", "Director", killed, None),
    "one sampler's weights become NaN": Scenario(
        "R10", "Sampler", partial(spoilt, "transformer", "blocks."), "sampler"
    ),
    "the VAE decoder's weights become NaN": Scenario(
        "R10", "VaeDecoder", partial(spoilt, "vae", "decoder."), "vae_decoder"
    ),
    "one sampler gets no more memory": Scenario("R11", "Sampler", short_of_memory, "sampler"),
    "one sampler is told to end": Scenario("R14", "Sampler", terminated, "sampler", finishes=True),
    "the VAE decoder is told to end": Scenario(
        "R14", "VaeDecoder", terminated, "vae_decoder", finishes=True, chunks=4, settings=LARGE
    ),
    "the text encoder is told to end": Scenario(
        "R14", "TextEncoder", terminated, "text_encoder", finishes=True, chunks=1, settings=LONG, from_start=True
    ),
    "the Director is told to end": Scenario("R14", "Director", terminated, None),
    "the ingress is told to end": Scenario("R14", "Ingress", terminated, None, cuts=True),
    "one sampler stops": Scenario("R18", "Sampler", stopped, "sampler"),
    "one sampler's work hangs": Scenario("R18", "Sampler", hung, "sampler"),
    "the VAE decoder stops": Scenario("R18", "VaeDecoder", stopped, "vae_decoder", chunks=4, settings=LARGE),
    "the text encoder stops": Scenario(
        "R18", "TextEncoder", stopped, "text_encoder", chunks=1, settings=LONG, from_start=True, within_s=0.1
    ),
    "the Director stops": Scenario("R18", "Director", stopped, None),
    "the ingress is killed": Scenario("R3", "Ingress", killed, None, cuts=True),
    # Ray has the Director wait until the ingress takes its answers: it seems silent itself, and is replaced sooner.
    "the ingress stops": Scenario("R18", "Ingress", stopped, None, cuts=True, along="Director"),
    "Serve's proxy is killed": Scenario("R3", "Proxy", killed, None, cuts=True),
    "the network is cut": Scenario("R3", NETWORK, cut, None, lives=True, cuts=True),
    "Serve's proxy stops": Scenario("R18", "Proxy", stopped, None, cuts=True),
    "Serve's controller is killed": Scenario("R3", "Controller", killed, None),
    "Serve's controller stops for a while": Scenario("R18", "Controller", paused, None, lives=True),
}


@dataclass
class Trial:
    """`hit`: the fault met work under way, where only that shows it; `streams`, of which so many were `whole`, and why
    others were not (`errors`); `pauses_s`: the longest of each between two fragments; `recovered_s`: from the fault
    until who met it was gone and another one was there, None if who met it lives; `left`: what was wrong afterwards."""

    hit: bool
    streams: int
    whole: int
    errors: list[str]
    pauses_s: list[float]
    recovered_s: float | None
    left: str | None

    @property
    def good(self) -> bool:
        return self.whole == self.streams and self.left is None


def undisturbed(service: Service, scenario: Scenario, videos: int) -> list[float]:
    """The longest pause of each stream if nothing happens."""
    streams = service.together(scenario.bodies(videos), come_back=scenario.cuts)
    return [_longest_pause(scenario, one) for one in streams]


def trial(service: Service, scenario: Scenario, seed: int, videos: int) -> Trial:
    """One trial of a scenario, of which `seed` chooses victim and moment, with `videos` streams if it has not fewer.
    Raises AssertionError if the service is not whole at its beginning; what is wrong later is told by the Trial."""
    service.wait_until_whole()
    global_gc()
    rng = random.Random(f"{scenario.role} {seed}")
    bodies = scenario.bodies(videos)
    expected = [by_library(one) for one in bodies]
    part = scenario.part or "sampler"
    memory, before = object_store_bytes(), service.retries(part)
    others = [process for name in REPLICAS if name != scenario.along for process in processes(name)]
    descriptors = {process.pid: process.num_fds() for process in others}
    met: list[Any] = []
    began = 0.0

    def disturb() -> None:
        nonlocal began
        victims: list[Any] = [service.line] if scenario.role == NETWORK else processes(scenario.role)
        time.sleep(rng.uniform(0, scenario.within_s))
        met.extend(victims if scenario.everyone else [rng.choice(victims)])
        began = time.monotonic()
        for victim in met:
            scenario.fault(victim)
        if not scenario.lives:
            recovering.append(apart.submit(recovered))

    def recovered() -> float:
        wait_until(lambda: not any(victim.is_running() for victim in met))
        wait_until(lambda: len(processes(scenario.role)) == REPLICAS.get(scenario.role, 1))
        wait_until(lambda: scenario.role in SERVES_OWN or running(scenario.role))
        return time.monotonic() - began

    recovering: list[Future[float]] = []
    with ThreadPoolExecutor(1) as apart:
        streams = service.together(bodies, disturb, scenario.from_start, scenario.cuts)
        needs_work = scenario.part is not None and not scenario.finishes
        hit = not needs_work or service.retries(part) > before
        for victim in met if not hit else ():
            with suppress(psutil.NoSuchProcess):
                victim.kill()  # nothing was asked of it that would show what is wrong with it
    for victim in met if scenario.role in REPLICAS else ():
        del descriptors[victim.pid]
    recovered_s = left = None
    try:
        service.wait_until_whole()
        assert not scenario.finishes or service.retries(part) == before, "it did not finish what it was at"
        recovered_s = recovering[0].result() if recovering else None
        _assert_nothing_is_left(service, memory, descriptors)
    except AssertionError as error:
        left = str(error)
    return Trial(
        hit,
        len(streams),
        sum(one.data == twin for one, twin in zip(streams, expected, strict=True)),
        [one.error for one in streams if one.error],
        [_longest_pause(scenario, one) for one in streams],
        recovered_s,
        left,
    )


def _longest_pause(scenario: Scenario, streamed: Streamed) -> float:
    """Between two fragments; and before the first, if the fault was done then."""
    times = streamed.arrived if scenario.from_start else streamed.arrived[1:]
    return max((b - a for a, b in pairwise(times)), default=math.inf)


def _assert_nothing_is_left(service: Service, memory: int, descriptors: dict[int, int]) -> None:
    """`memory`: bytes in the object store before; `descriptors`: how many each process had then that met no fault. It
    must be there still: a dead replica shall take no healthy one along."""
    service.stream(body(0, chunks=1, size="64x64"))  # Serve may hold the arguments of a lost call until the next one
    global_gc()
    try:
        wait_until(lambda: object_store_bytes() <= memory)
    except AssertionError as left:
        raise AssertionError(f"the object store held {memory} bytes before; now:\n{memory_summary()}") from left
    wait_until(lambda: all(len(processes(name)) == count for name, count in REPLICAS.items()))
    lived_on = {process.pid: process for name in REPLICAS for process in processes(name)}
    assert descriptors.keys() <= lived_on.keys(), "a replica that met no fault was replaced"
    # Connections to lost replicas are closed in Ray's own time.
    wait_until(lambda: all(lived_on[pid].num_fds() <= n + SPARE_DESCRIPTORS for pid, n in descriptors.items()))
