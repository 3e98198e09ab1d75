"""What one video shall be, checked against what the model can do. No torch: the door of the service uses it too."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS, Variant
from helios_core.errors import InvalidInput

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted. Sides in pixels, lengths in seconds, prompts in UTF-8 bytes."""

    max_side: int = 1920
    max_pixels: int = 1280 * 768
    max_seconds: float = 600.0
    max_prompt_bytes: int = 8192
    max_steps_per_stage: int = 50

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:  # also refuses NaN
                raise ValueError(f"{name} is {value}; allowed: more than 0")


@dataclass(frozen=True)
class ModelCard:
    """What a client may ask of a model: read from the checkpoint's JSON alone.

    `id`: the name in requests; `size_multiple`: both sides are multiples of it; `default_size`: (width, height).
    """

    id: str
    variant: Variant
    stages: int
    size_multiple: int
    default_size: tuple[int, int]


@dataclass(frozen=True)
class VideoSpec:
    """Everything that decides the frames of one video. Sizes in pixels; `steps`: transformer steps per stage."""

    prompt: str
    model: str
    width: int
    height: int
    seconds: float
    seed: int
    steps: tuple[int, ...]
    amplify_first_chunk: bool
    fps: int = NATIVE_FPS

    @property
    def frames(self) -> int:
        return round(self.seconds * self.fps)

    @property
    def chunks(self) -> int:
        return math.ceil(self.frames / CHUNK_FRAMES)

    def steps_of_chunk(self, chunk_index: int) -> tuple[int, ...]:
        """Transformer steps per stage of one chunk: the first one gets twice as many when it is amplified."""
        factor = 2 if self.amplify_first_chunk and chunk_index == 0 else 1
        return tuple(factor * n for n in self.steps)

    def first_frame_of_chunk(self, chunk_index: int) -> int:
        return chunk_index * CHUNK_FRAMES

    def frames_of_chunk(self, chunk_index: int) -> int:
        """Frames of the chunk that belong to the video: 33, fewer for the last one, which is cut."""
        return min(CHUNK_FRAMES, self.frames - self.first_frame_of_chunk(chunk_index))


@dataclass(frozen=True)
class VideoRequest:
    """What a caller may say; None means "the model's own choice". `check` turns it into a VideoSpec."""

    prompt: str
    size: str | None = None
    seconds: float = 5.0
    seed: int = 42
    preset: str | None = None
    steps: tuple[int, ...] | None = None
    amplify_first_chunk: bool | None = None
    fps: int = NATIVE_FPS
    limits: Limits = field(default_factory=Limits)

    def check(self, card: ModelCard) -> VideoSpec:
        """The video that `card`'s model shall make.

        Raises InvalidInput naming the field, the value and what is allowed.
        """
        width, height = _check_size(self.size, card, self.limits)
        _check_prompt(self.prompt, self.limits)
        if not 8 <= self.fps <= 60:
            raise InvalidInput("fps", self.fps, "a whole number from 8 to 60")
        shortest = 1 / self.fps
        if not shortest <= self.seconds <= self.limits.max_seconds:  # also refuses NaN
            raise InvalidInput(
                "seconds",
                self.seconds,
                f"a number from 1/{self.fps} (one frame) to {self.limits.max_seconds:g}",
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidInput("seed", self.seed, "a whole number from 0 to 2^63-1")
        amplify = self.amplify_first_chunk
        if amplify and not card.variant.amplifies_first_chunk:
            raise InvalidInput("amplify_first_chunk", True, f"false for the variant {card.variant.name}")
        return VideoSpec(
            prompt=self.prompt,
            model=card.id,
            width=width,
            height=height,
            seconds=self.seconds,
            seed=self.seed,
            steps=self._check_steps(card),
            amplify_first_chunk=card.variant.amplifies_first_chunk if amplify is None else amplify,
            fps=self.fps,
        )

    def _check_steps(self, card: ModelCard) -> tuple[int, ...]:
        presets = card.variant.presets
        if self.steps is None:
            preset = card.variant.default_preset if self.preset is None else self.preset
            if preset not in presets:
                raise InvalidInput("preset", preset, f"one of {', '.join(presets)}")
            return presets[preset]
        if self.preset is not None:
            raise InvalidInput("preset", self.preset, "preset or steps, not both")
        most = self.limits.max_steps_per_stage
        if len(self.steps) != card.stages or not all(1 <= n <= most for n in self.steps):
            raise InvalidInput(
                "steps", list(self.steps), f"{card.stages} whole numbers from 1 to {most}, one per stage"
            )
        return self.steps


def _check_prompt(prompt: str, limits: Limits) -> None:
    if not prompt.strip():
        raise InvalidInput("prompt", prompt, "text that is not empty")
    if "\0" in prompt:
        raise InvalidInput("prompt", prompt, "text without NUL characters")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidInput("prompt", prompt.encode("ascii", "replace").decode(), "valid Unicode text") from None
    if size > limits.max_prompt_bytes:
        raise InvalidInput(
            "prompt", f"{prompt[:20]}… ({size} bytes)", f"at most {limits.max_prompt_bytes} bytes of UTF-8"
        )


def _check_size(size: str | None, card: ModelCard, limits: Limits) -> tuple[int, int]:
    """(width, height) from "WIDTHxHEIGHT". The model's own size is checked too: the limits may be below it."""
    size = _shown(*card.default_size) if size is None else size
    parts = size.split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) <= 6 for p in parts):
        raise InvalidInput("size", size, f"WIDTHxHEIGHT in pixels, for example {_shown(*card.default_size)}")
    width, height = int(parts[0]), int(parts[1])
    m = card.size_multiple
    sides = range(m, limits.max_side + 1, m)
    if width not in sides or height not in sides or width * height > limits.max_pixels:
        fitting = [(w, h) for w in sides for h in sides if w * h <= limits.max_pixels]
        near = heapq.nsmallest(2, fitting, key=lambda wh: abs(wh[0] - width) + abs(wh[1] - height))
        raise InvalidInput(
            "size",
            size,
            f"width and height multiples of {m} from {m} to {limits.max_side}, "
            f"at most {limits.max_pixels} pixels in all; nearest: {', '.join(_shown(*wh) for wh in near)}",
        )
    return width, height


def _shown(width: int, height: int) -> str:
    return f"{width}x{height}"
