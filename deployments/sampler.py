"""The sampler's replica: one GPU, one chunk at a time, from state to state."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments.config import AppConfig
from deployments.records import SampleReport
from helios_core.checkpoints import Checkpoint, placement, use_threads
from helios_core.errors import Cancelled
from helios_core.spec import VideoSpec
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings


class Sampler:
    """Holds the transformer's weights, and nothing about a video."""

    def __init__(self, config: AppConfig) -> None:
        use_threads(config.torch_threads)
        device, dtype = placement(config.sampler.device, config.sampler.dtype)
        checkpoint = Checkpoint.open(config.model)
        self._vae_config = checkpoint.vae
        self._sampler = checkpoint.load_sampler(device, dtype)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._free = asyncio.Lock()

    async def sample_chunk(
        self, spec: VideoSpec, index: int, text: TextEmbeddings, state: StreamState | None
    ) -> AsyncIterator[Any]:
        """First the StreamState after chunk `index`, then a SampleReport. `state` None: the start of the video.

        Cancelling the call stops the work within one transformer step; the replica is free only after that.
        """
        stop = threading.Event()

        def on_step(stage: int) -> None:
            if stop.is_set():
                raise Cancelled(f"chunk {index} was stopped in stage {stage}")

        async with self._free:
            started_at, clock = time.time(), time.perf_counter()
            before = StreamState.start(spec, self._vae_config) if state is None else state
            steps = spec.steps_of_chunk(index)
            work = asyncio.get_running_loop().run_in_executor(
                self._thread, self._sampler.sample, text, before, steps, on_step
            )
            try:
                after = await asyncio.shield(work)  # the thread cannot be cancelled, so its result must not be lost
            finally:
                stop.set()
                await asyncio.wait([work])
        yield after
        yield SampleReport(steps=sum(steps), started_at=started_at, seconds=time.perf_counter() - clock)
