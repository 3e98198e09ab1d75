"""The text encoder's replica: prompts in, embeddings by reference out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor

from deployments.config import AppConfig
from deployments.golden import Golden
from deployments.logs import log_with_serve, shown
from deployments.records import Call, Encoded
from deployments.store import Store
from deployments.tracing import Tracer
from deployments.watchdog import Watchdog
from helios_core.checkpoints import Checkpoint
from helios_core.text import TextEmbeddings
from helios_core.weights import load_text_encoder, placement, use_threads


class TextEncoder:
    """Holds UMT5's weights, and nothing about a video."""

    def __init__(self, config: AppConfig, source: str) -> None:
        """`source`: opens the checkpoint, here as everywhere."""
        log_with_serve()
        use_threads(config.torch_threads)
        device, dtype = placement(config.text_encoder.device, config.text_encoder.dtype)
        self._encoder = load_text_encoder(Checkpoint.open(source), device, dtype)
        self._store = Store(config.store, config.store_patience_s)
        self._tracer = Tracer("text_encoder", config.trace_file)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._watchdog = Watchdog(config.text_encoder.max_call_seconds)
        self._golden = self._thread.submit(Golden, "text_encoder", self._golden_rows, self._watchdog).result()
        self._log_prompts = config.log_prompts

    def check_health(self) -> None:
        self._watchdog.check()

    async def encode(self, call: Call, prompt: str) -> AsyncIterator[Any]:
        """First the prompt's TextEmbeddings, then how they were Encoded: they are stored with the video."""
        prompt_shown = shown(prompt, self._log_prompts)
        with self._tracer.span(
            "encode prompt", call.traceparent, video_id=call.video_id, attempt=call.attempt, prompt=prompt_shown
        ):
            work = partial(self._encode, prompt)
            text, seconds = await asyncio.get_running_loop().run_in_executor(self._thread, self._golden.guard, work)
            stored = await self._store.put_text(call.video_id, text.digest, text.to_bytes())
        yield text
        yield Encoded(stored=stored, seconds=seconds)

    def _encode(self, prompt: str) -> tuple[TextEmbeddings, float]:
        begin = time.perf_counter()
        with self._watchdog.watching("encode"):
            return self._encoder.encode(prompt), time.perf_counter() - begin

    def _golden_rows(self) -> Tensor:
        return self._encoder.encode("a").rows
