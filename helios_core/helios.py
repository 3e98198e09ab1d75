"""The offline face: a loaded model whose `stream` yields chunks. The service runs the same loop over replicas."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from helios_core.checkpoints import Checkpoint
from helios_core.conditioning import state_from_image, state_from_video
from helios_core.config import CHUNK_FRAMES, EXACT, NATIVE_FPS, Approximations
from helios_core.errors import InvalidInput
from helios_core.media.read import TAIL_CHUNKS, Clip, read_clip, read_image
from helios_core.sampling.chunk import ChunkSampler, OnStep
from helios_core.spec import (
    IMAGE_TO_VIDEO,
    TEXT_TO_VIDEO,
    VIDEO_TO_VIDEO,
    ModelCard,
    PromptAt,
    VideoRequest,
    VideoSpec,
)
from helios_core.state import StreamState
from helios_core.text import TextEncoder, blend
from helios_core.vae.latents import decode_chunk, to_i420, to_uint8
from helios_core.vae.model import WanVae
from helios_core.weights import (
    load_sampler,
    load_text_encoder,
    load_vae,
    placement,
    use_threads,
    warm_up_sampler,
    warm_up_vae,
)

T = TypeVar("T")
Input = str | PathLike[str] | NDArray[np.uint8]  # a file, or pixels


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk of T frames, 33 or less for a cut last one.

    `frames`: RGB, uint8 [T, H, W, 3]; `yuv`: the same as I420, for `encode_fragment`; `state`: after it.
    """

    index: int
    frames: NDArray[np.uint8]
    yuv: NDArray[np.uint8]
    state: StreamState


class Helios:
    """A model in memory: text encoder, sampler, VAE.

    helios = Helios.load("demo")
    for chunk in helios.stream("a red sun over a blue sea", seconds=4):
        show(chunk.frames)
    """

    def __init__(self, card: ModelCard, text_encoder: TextEncoder, sampler: ChunkSampler, vae: WanVae) -> None:
        self.card = card
        self.text_encoder, self.sampler, self.vae = text_encoder, sampler, vae
        # The sampler serves one stream at a time, in one thread: cuDNN keeps its plans for each.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        # On a GPU decoding needs a stream of its own to overlap; None is the current one.
        self._decoding = torch.cuda.Stream(vae.device) if vae.device.type == "cuda" else None

    @classmethod
    def load(
        cls,
        model: str = "demo",
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        approximations: Approximations = EXACT,
    ) -> Helios:
        """Loads a known name, a folder in the official layout, or a hub id. Sets the process's torch threads.

        Raises CheckpointError for a model that cannot be loaded, InvalidInput for an unknown device or dtype.
        """
        use_threads(threads)
        place, precision = placement(device, dtype)
        checkpoint = Checkpoint.open(model)
        helios = cls(
            checkpoint.card,
            load_text_encoder(checkpoint, place, precision),
            load_sampler(checkpoint, place, precision, approximations),
            load_vae(checkpoint, place),
        )
        helios._thread.submit(warm_up_sampler, checkpoint, helios.sampler).result()
        with torch.cuda.stream(helios._decoding):
            warm_up_vae(checkpoint, helios.vae)
        return helios

    def stream(
        self,
        prompt: str,
        *,
        image: Input | None = None,
        video: Input | None = None,
        size: str | None = None,
        seconds: float | None = 5.0,
        seed: int = 42,
        preset: str | None = None,
        steps: tuple[int, ...] | None = None,
        amplify_first_chunk: bool | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        prompts: Sequence[PromptAt] = (),
        fps: int = NATIVE_FPS,
        on_step: OnStep | None = None,
    ) -> Iterator[Chunk]:
        """Yields the chunks of one video as they are made; together exactly round(seconds * fps) frames.

        While a chunk is decoded and looked at, a thread samples the next one. There `on_step` is called; what it raises
        comes out of the iterator. Closing the iterator ends the thread at the next step.

        `image` or `video`: what it begins with, as a file or as uint8 RGB of the video's size, [H, W, 3] or
        [T, H, W, 3] at 24 fps; `size`: "WIDTHxHEIGHT" in pixels; `seconds`: with None it goes on until nobody asks for
        more, an hour at most; `steps`: solver steps per stage, or `preset` by name; `prompts`: changes of the prompt on
        the way. None everywhere else means the model's own choice. Raises InvalidInput at the call, before anything is
        computed; NotFinite with the chunk of which the model makes no numbers.
        """
        if image is not None and video is not None:
            raise InvalidInput("video", "given together with image", "an image or a video, not both")
        task = IMAGE_TO_VIDEO if image is not None else VIDEO_TO_VIDEO if video is not None else TEXT_TO_VIDEO
        request = VideoRequest(
            prompt=prompt,
            size=size,
            seconds=seconds,
            seed=seed,
            preset=preset,
            steps=steps,
            amplify_first_chunk=amplify_first_chunk,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            prompts=tuple(prompts),
            fps=fps,
            task=task,
        )
        spec = request.check(self.card)
        start: Callable[[], StreamState] = partial(StreamState.start, spec, self.vae.config)
        if image is not None:
            start = partial(state_from_image, self.vae, _image(image, spec), spec.seed)
        if video is not None:
            clip = _clip(video, spec)
            start = partial(state_from_video, self.vae, clip.first_HWC, clip.tail_THWC, clip.frames, spec.seed)
        return self._stream(spec, start, on_step)

    def _stream(self, spec: VideoSpec, start: Callable[[], StreamState], on_step: OnStep | None) -> Iterator[Chunk]:
        encode = functools.cache(self.text_encoder.encode)
        negative = encode(spec.negative_prompt) if spec.guided else None
        closed = threading.Event()

        def step(stage: int) -> None:
            if closed.is_set():
                raise CancelledError
            if on_step is not None:
                on_step(stage)

        def sample(k: int, state: StreamState) -> StreamState:
            text = blend([(encode(prompt), weight) for prompt, weight in spec.mix_of_chunk(k)])
            return self.sampler.sample(
                text,
                state,
                spec.steps_of_chunk(k),
                negative=negative,
                guidance_scale=spec.guidance_scale,
                on_step=step,
            )

        sampling = self._thread.submit(sample, 0, start())
        try:
            for k in range(spec.chunks):
                state = sampling.result()
                if k + 1 < spec.chunks:
                    sampling = self._thread.submit(sample, k + 1, state)
                with torch.cuda.stream(self._decoding):
                    frames, yuv = decode_chunk(self.vae, state.latents, to_uint8, to_i420)
                shown = spec.frames_of_chunk(k)
                yield Chunk(k, frames[:shown], yuv[:shown], state)
        finally:
            closed.set()  # of a chunk that nobody wants no further step is made
            if not sampling.cancel():
                wait([sampling])


def _image(image: Input, spec: VideoSpec) -> NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        return _pixels("image", image, (spec.height, spec.width, 3))
    with _field("image"):
        return _waited(read_image(Path(image), spec.width, spec.height))


def _clip(video: Input, spec: VideoSpec) -> Clip:
    if isinstance(video, np.ndarray):
        frames_THWC = _pixels("video", video, (len(video), spec.height, spec.width, 3))
        if len(video) < CHUNK_FRAMES:
            raise InvalidInput("video", f"{len(video)} frames", f"at least {CHUNK_FRAMES} frames")
        tail = TAIL_CHUNKS * CHUNK_FRAMES
        whole = len(frames_THWC) // CHUNK_FRAMES * CHUNK_FRAMES
        return Clip(frames_THWC[0], frames_THWC[-min(whole, tail) :], len(frames_THWC))
    with _field("video"):
        return _waited(read_clip(Path(video), spec.width, spec.height))


def _pixels(name: str, pixels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8 or pixels.shape != shape:
        raise InvalidInput(name, f"{pixels.dtype} {list(pixels.shape)}", f"a file, or uint8 {list(shape)}")
    return pixels


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Readers call a file what it is called over HTTP."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(name, error.value, error.allowed) from None


def _waited(reading: Coroutine[Any, Any, T]) -> T:
    """The result of `reading`, also for a caller who is inside an event loop, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, reading).result()
