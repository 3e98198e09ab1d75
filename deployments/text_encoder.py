"""The text encoder's replica: prompts in, embeddings by reference out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from deployments.config import AppConfig
from deployments.store import Store
from helios_core.checkpoints import Checkpoint, placement, use_threads


class TextEncoder:
    """Holds UMT5's weights, and nothing about a video."""

    def __init__(self, config: AppConfig) -> None:
        use_threads(config.torch_threads)
        device, dtype = placement(config.text_encoder.device, config.text_encoder.dtype)
        self._encoder = Checkpoint.open(config.model).load_text_encoder(device, dtype)
        self._store = Store(config.store)

    async def encode(self, video_id: str, prompt: str) -> AsyncIterator[Any]:
        """First the prompt's TextEmbeddings, then their digest. They are stored with the video."""
        text = await asyncio.to_thread(self._encoder.encode, prompt)
        await self._store.put_text(video_id, text.digest, text.to_bytes())
        yield text
        yield text.digest
