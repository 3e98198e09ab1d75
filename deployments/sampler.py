"""The sampler's replica: one GPU, one chunk at a time, from state to state."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from deployments.config import AppConfig, SamplerPool
from deployments.golden import Golden
from deployments.logs import log_with_serve
from deployments.records import Call, Run, SampleReport, StoredObject
from deployments.store import Store
from deployments.tracing import Tracer
from deployments.watchdog import Watchdog
from helios_core.checkpoints import Checkpoint
from helios_core.errors import Cancelled
from helios_core.spec import VideoSpec
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings, blend
from helios_core.weights import golden_latents, load_sampler, placement, use_threads, warm_up_sampler

VERSION = version("helios-serve")


class Sampler:
    """Holds the transformer's weights, and nothing about a video."""

    def __init__(self, config: AppConfig, pool: SamplerPool, source: str) -> None:
        """`pool`: the one that this replica is of; `source`: opens the checkpoint, here as everywhere."""
        log_with_serve()
        use_threads(config.torch_threads)
        device, dtype = placement(pool.device, pool.dtype)
        checkpoint = Checkpoint.open(source)
        self._vae_config = checkpoint.vae
        self._sampler = load_sampler(checkpoint, device, dtype, pool.approximations)
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._approximations = pool.approximations.names
        self._min_chunk_seconds = pool.min_chunk_seconds
        self._store = Store(config.store, config.store_patience_s)
        self._tracer = Tracer("sampler", config.trace_file)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._thread.submit(warm_up_sampler, checkpoint, self._sampler).result()
        golden = partial(golden_latents, checkpoint, self._sampler)
        self._watchdog = Watchdog(pool.max_call_seconds)
        self._golden = self._thread.submit(Golden, "sampler", golden, self._watchdog).result()
        self._free = asyncio.Lock()

    def check_health(self) -> None:
        self._watchdog.check()

    async def sample_chunk(
        self,
        call: Call,
        spec: VideoSpec,
        index: int,
        weights: tuple[float, ...],
        state: StreamState | StoredObject | None,
        *texts: TextEmbeddings | StoredObject,
    ) -> AsyncIterator[Any]:
        """First the StreamState after chunk `index`, then a SampleReport. `state` None: the start of the video.
        `texts`: one for each of the `weights` with which they are blended, then the negative prompt of a guided video.

        Cancelling the call stops the work within one transformer step; the replica is free only after that.
        """
        steps = spec.steps_of_chunk(index)
        stop = threading.Event()
        async with self._free:
            with self._tracer.span(
                "sample", call.traceparent, video_id=call.video_id, chunk=index, attempt=call.attempt
            ) as span:
                started_at, clock = time.time(), time.perf_counter()
                done = 0  # steps

                def on_step(stage: int | None) -> None:
                    """Before each step, with its stage, and after the last."""
                    nonlocal done
                    stop.wait(clock + self._min_chunk_seconds * done / sum(steps) - time.perf_counter())
                    if stop.is_set():
                        raise Cancelled(f"chunk {index} was stopped before step {done} of {sum(steps)}")
                    if stage is not None:
                        span.add_event("step", {"stage": stage, "step": done})
                        done += 1

                def sample() -> StreamState:
                    before = StreamState.start(spec, self._vae_config) if start is None else start
                    if (seed := dict(spec.reseeds).get(index)) is not None:
                        before = before.reseeded(seed)
                    with self._watchdog.watching((spec.width, spec.height, spec.guided, steps)):
                        after = self._sampler.sample(
                            blend(list(zip(embeddings, weights, strict=False))),
                            before,
                            steps,
                            negative=embeddings[-1] if spec.guided else None,
                            guidance_scale=spec.guidance_scale,
                            on_step=on_step,
                        )
                        on_step(None)
                    return after

                embeddings = [await self._fetched(TextEmbeddings, text) for text in texts]
                start = await self._fetched(StreamState, state)
                work = asyncio.get_running_loop().run_in_executor(self._thread, self._golden.guard, sample)
                try:
                    after = await asyncio.shield(work)
                except asyncio.CancelledError:
                    stop.set()  # the thread itself cannot be cancelled
                    await asyncio.wait([work])
                    work.exception()  # Cancelled, as a rule; not to be reported as forgotten
                    raise
                seconds = time.perf_counter() - clock
        yield after
        run = Run(version=VERSION, device=self._device, approximations=self._approximations, from_chunk=index)
        yield SampleReport(steps=done, started_at=started_at, seconds=seconds, run=run)

    async def _fetched(self, kind: Any, value: Any) -> Any:
        """`value`, or what it was stored as."""
        return kind.from_bytes(await self._store.read(value.key)) if isinstance(value, StoredObject) else value
