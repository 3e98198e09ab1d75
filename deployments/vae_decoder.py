"""The VAE's replica: a state in, a stored fragment out; an uploaded image or video in, a state out.

Pixels stay here: they are encoded where they are decoded.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from opentelemetry.trace import Span

from deployments.config import AppConfig
from deployments.golden import Golden
from deployments.logs import log_with_serve
from deployments.records import Call, Check, ChunkRecord, Rendered, SampleReport, StoredObject, Timings
from deployments.safety import Frames, Guard, demand
from deployments.store import Store
from deployments.tracing import Tracer, traceparent
from deployments.watchdog import Watchdog
from helios_core.checkpoints import Checkpoint
from helios_core.conditioning import state_from_image, state_from_video
from helios_core.media.fragments import Fragment, encode_fragment, encode_jpeg
from helios_core.media.read import read_clip, read_image
from helios_core.spec import IMAGE_TO_VIDEO, VideoSpec
from helios_core.state import StreamState
from helios_core.vae.latents import decode_chunk, to_i420
from helios_core.weights import golden_frames, load_vae, placement, use_threads, warm_up_vae

T = TypeVar("T")


class VaeDecoder:
    """Holds the VAE's weights, and nothing about a video."""

    def __init__(self, config: AppConfig, source: str) -> None:
        """`source`: opens the checkpoint, here as everywhere."""
        log_with_serve()
        use_threads(config.torch_threads)
        device, _ = placement(config.vae_decoder.device)
        checkpoint = Checkpoint.open(source)
        self._vae = load_vae(checkpoint, device)
        self._store = Store(config.store, config.store_patience_s)
        self._uploads = config.uploads.media_limits()
        self._tracer = Tracer("vae_decoder", config.trace_file)
        self._guard = None if config.safety is None else Guard(config.safety, self._tracer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vae")
        self._thread.submit(warm_up_vae, checkpoint, self._vae).result()
        golden = partial(golden_frames, checkpoint, self._vae)
        self._watchdog = Watchdog(config.vae_decoder.max_call_seconds)
        self._golden = self._thread.submit(Golden, "vae_decoder", golden, self._watchdog).result()

    def check_health(self) -> None:
        self._watchdog.check()

    async def encode_media(self, call: Call, spec: VideoSpec, media: StoredObject) -> AsyncIterator[Any]:
        """First the StreamState before chunk 0, as the uploaded image or video makes it, then the seconds that this
        took.

        Raises InvalidInput if the file turns out to be broken, or to be something else than it was taken for.
        """
        with (
            self._tracer.span("encode input", call.traceparent, video_id=call.video_id, attempt=call.attempt),
            tempfile.NamedTemporaryFile(prefix="helios-input-") as file,
        ):
            file.write(await self._store.read(media.key))
            file.flush()
            path = Path(file.name)
            encode: Callable[[], StreamState]
            if spec.task == IMAGE_TO_VIDEO:
                image = await read_image(path, spec.width, spec.height, self._uploads)
                encode = partial(state_from_image, self._vae, image, spec.seed)
            else:
                clip = await read_clip(path, spec.width, spec.height, self._uploads)
                encode = partial(state_from_video, self._vae, clip.first_HWC, clip.tail_THWC, clip.frames, spec.seed)
            state, seconds = await self._computed(partial(self._timed, spec, encode))
        yield state
        yield seconds

    def _timed(self, spec: VideoSpec, encode: Callable[[], StreamState]) -> tuple[StreamState, float]:
        begin = time.perf_counter()
        with self._watchdog.watching(("encode", spec.task, spec.width, spec.height)):
            return encode(), time.perf_counter() - begin

    async def _computed(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._golden.guard, work)

    async def render_chunk(
        self, call: Call, spec: VideoSpec, term: int, state: StreamState | StoredObject, sampled: SampleReport
    ) -> Rendered:
        """Decodes the chunk that `state` ends with, encodes it, and stores fragment and state under `term`.

        Repeatable: the same arguments store the same bytes under the same keys. Raises ContentBlocked or
        SafetyUnavailable if the chunk may not be shown; then nothing of it is stored.
        """
        if isinstance(state, StoredObject):
            state = StreamState.from_bytes(await self._store.read(state.key))
        index, video_id = state.chunk_index - 1, call.video_id
        with self._tracer.span(
            "render", call.traceparent, video_id=video_id, chunk=index, attempt=call.attempt
        ) as render:
            loop = asyncio.get_running_loop()

            def begin_check(frames: npt.NDArray[np.uint8]) -> Future[Check] | None:
                """Called by the VAE's thread, which goes on meanwhile."""
                if self._guard is None:
                    return None
                shown = Frames(video_id, index, frames)
                return asyncio.run_coroutine_threadsafe(self._guard.frames(shown, traceparent(render)), loop)

            work = partial(self._render, spec, state, render, begin_check)
            fragment, thumbnail, decode_seconds, encode_seconds, checking = await self._computed(work)
            check: Check | None = None
            if checking is not None:
                check = await asyncio.wrap_future(checking)
                demand(check, f"chunk {index}")
            clock = time.perf_counter()
            with self._tracer.span("store", traceparent(render)):
                # The fragment first: a stored state k then implies fragments 0 to k-1.
                stored_init = await self._store.put_init(video_id, fragment.init)
                stored_thumbnail = None if thumbnail is None else await self._store.put_thumbnail(video_id, thumbnail)
                stored_fragment = await self._store.put_fragment(video_id, index, term, fragment.data)
                stored_state = await self._store.put_state(video_id, state.chunk_index, term, state.to_bytes())
            store_seconds = time.perf_counter() - clock
        chunk = ChunkRecord(
            index=index,
            frames=fragment.frames,
            steps=sampled.steps,
            fragment=stored_fragment,
            state=stored_state,
            timings=Timings(
                sample_started_at=sampled.started_at,
                sample_seconds=sampled.seconds,
                decode_seconds=decode_seconds,
                encode_seconds=encode_seconds,
                store_seconds=store_seconds,
            ),
        )
        return Rendered(init=stored_init, chunk=chunk, thumbnail=stored_thumbnail, check=check)

    def _render(
        self,
        spec: VideoSpec,
        state: StreamState,
        render: Span,
        begin_check: Callable[[npt.NDArray[np.uint8]], Future[Check] | None],
    ) -> tuple[Fragment, bytes | None, float, float, Future[Check] | None]:
        """The chunk as a fragment, of the first one a thumbnail, the seconds that decoding and encoding took, and the
        check of its frames, which began when they were decoded."""
        begin = time.perf_counter()
        index = state.chunk_index - 1
        with self._watchdog.watching(("render", spec.width, spec.height)):
            with self._tracer.span("decode", traceparent(render)):
                (frames,) = decode_chunk(self._vae, state.latents, to_i420)
                frames = frames[: spec.frames_of_chunk(index)]
            decoded = time.perf_counter()
            frames.flags.writeable = False  # a hook that is given them changes nothing
            checking = begin_check(frames)
            with self._tracer.span("encode", traceparent(render)):
                fragment = encode_fragment(
                    frames, chunk_index=index, first_frame=spec.first_frame_of_chunk(index), fps=spec.fps
                )
                thumbnail = encode_jpeg(frames[0]) if index == 0 else None
        return fragment, thumbnail, decoded - begin, time.perf_counter() - decoded, checking
