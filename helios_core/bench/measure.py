"""Time, work, and what the GPU says of itself. Knows nothing about the model."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], object]
# Kind of operation ▸ how many, or how many a second. A multiply-add is two operations.
Work = Counter[str]
Rates = dict[str, float]

SETTLE_S = 0.5  # a GPU's clocks have come down by then
ATTENTION = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}  # what it comes to on the meta device, where it has no kernel


@dataclass(frozen=True)
class Times:
    """Seconds that each repeat took."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


class Clock:
    """Times calls on one device: by its events on a GPU, which the host runs ahead of, by the host's clock on a CPU."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.on_gpu = device.type == "cuda"

    def time(self, call: Call, in_a_row: int = 1) -> Times:
        """Of one call. `in_a_row`: so many are one repeat, for calls that are too short to be timed alone."""

        def calls() -> None:
            for _ in range(in_a_row):
                call()

        (times,) = self.interleave(calls)
        return Times(tuple(seconds / in_a_row for seconds in times.seconds))

    def interleave(self, *calls: Call) -> list[Times]:
        """Of each call, taking turns: what else the machine does, it does to all of them."""
        self._warm_up(calls)
        rounds = [[self.once(call) for call in calls] for _ in range(self.repeats)]
        return [Times(column) for column in zip(*rounds, strict=True)]

    def once(self, call: Call) -> float:
        """Seconds of one call, with all that it started on the device."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _warm_up(self, calls: tuple[Call, ...]) -> None:
        """Kernels are chosen, compiled and loaded, memory is taken; on a GPU also for long enough to get warm."""
        rounds, least = (2, SETTLE_S) if self.on_gpu else (1, 0.0)
        begin = time.perf_counter()
        while rounds > 0 or time.perf_counter() - begin < least:
            for call in calls:
                self.once(call)
            rounds -= 1


@torch.inference_mode()
def count(kind: str, call: Call) -> Work:
    """The operations of `call` on the meta device: those of attention as "attention", all others as `kind`.

    What the mathematics needs, whichever kernel a real device takes.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    work: Work = Counter()
    for operator, operations in counter.get_flop_counts()["Global"].items():
        work["attention" if operator in ATTENTION else kind] += operations
    return work


@dataclass(frozen=True)
class GpuState:
    """SM clock in MHz, power in W, temperature in °C."""

    clock: float
    power: float
    temperature: float


@contextmanager
def gpu_states(device: torch.device) -> Iterator[list[GpuState]]:
    """What nvidia-smi tells while the block runs, a few times a second; nothing where there is none."""
    states: list[GpuState] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            try:
                states.append(GpuState(*map(float, ask_gpu(device, "clocks.sm,power.draw,temperature.gpu"))))
            except (TypeError, ValueError):  # fewer answers than questions, or one that it does not know: [N/A]
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield states
    finally:
        over.set()
        watcher.join()


def ask_gpu(device: torch.device, fields: str) -> list[str]:
    """nvidia-smi's answers about a GPU, without units; none where there is no such program or no such GPU."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return []
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return [] if answer.returncode else [field.strip() for field in answer.stdout.split(",")]
