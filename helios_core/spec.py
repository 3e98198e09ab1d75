"""What one video shall be, checked against what the model can do. No torch: the door of the service uses it too."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS, Variant
from helios_core.errors import InvalidInput, shown

MAX_SEED = 2**63 - 1
TEXT_TO_VIDEO, IMAGE_TO_VIDEO, VIDEO_TO_VIDEO = TASKS = ("text-to-video", "image-to-video", "video-to-video")
TRANSITION_CHUNKS = 3  # over which a new prompt takes the place of the old one, unless the request says otherwise


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted. Sides in pixels, lengths in seconds, prompts in UTF-8 bytes."""

    max_side: int = 1920
    max_pixels: int = 1280 * 768
    max_seconds: float = 600.0
    max_open_seconds: float = 3600.0  # of an open-ended video
    max_deadline_seconds: float = 86400.0  # from the acceptance of a video
    max_prompt_bytes: int = 8192
    max_steps_per_stage: int = 50
    max_prompts: int = 64
    max_transition_chunks: int = 64
    max_guidance_scale: float = 20.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:  # also refuses NaN
                raise ValueError(f"{name} is {value}; allowed: more than 0")

    @property
    def longest_s(self) -> float:
        """Of any video."""
        return max(self.max_seconds, self.max_open_seconds)


@dataclass(frozen=True)
class ModelCard:
    """What a client may ask of a model: read from the checkpoint's JSON and, if it is a known one, its row.

    `id`: the name in requests; `size_multiple`: both sides are multiples of it; `default_size`: (width, height);
    `vocabulary`: kind ▸ the words, in lower case, that alone mean something to the model; None if all words may.
    """

    id: str
    variant: Variant
    stages: int
    size_multiple: int
    default_size: tuple[int, int]
    vocabulary: dict[str, tuple[str, ...]] | None = None
    tasks: tuple[str, ...] = TASKS

    def note(self, *prompts: str) -> str | None:
        """What to tell whoever wants a video of these prompts: which of them have no word that the model knows.

        None if each has one. A prompt without makes a video all the same.
        """
        if self.vocabulary is None:
            return None
        known = {word for words in self.vocabulary.values() for word in words}
        strange = [text for text in dict.fromkeys(prompts) if known.isdisjoint(re.findall(r"[a-z]+", text.lower()))]
        if not strange:
            return None
        kinds = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in self.vocabulary.items())
        texts = ", ".join(map(shown, strange))
        return f"the model {self.id} knows no word of {texts} and chooses what it shows; it knows {kinds}"


@dataclass(frozen=True)
class PromptChange:
    """From chunk `chunk` on, `prompt` takes the place of the text so far, over `transition_chunks` chunks."""

    chunk: int
    prompt: str
    transition_chunks: int = TRANSITION_CHUNKS


# (prompt, weight) of each text that drives a chunk; the weights are positive and their sum is 1
Mix = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class VideoSpec:
    """Everything that decides the frames of one video, besides an input image or video.

    Sizes in pixels; `steps`: solver steps per stage; `negative_prompt`: of use only if `guidance_scale` is above 1;
    `prompts`: changes of the prompt, in order; `reseeds`: (chunk, seed) of each chunk from which on another seed gives
    the noise, in order; `open_ended`: it may end after any chunk, and `seconds` is only how long it can become.
    """

    prompt: str
    model: str
    width: int
    height: int
    seconds: float
    seed: int
    steps: tuple[int, ...]
    amplify_first_chunk: bool
    fps: int = NATIVE_FPS
    task: str = TEXT_TO_VIDEO
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    prompts: tuple[PromptChange, ...] = ()
    reseeds: tuple[tuple[int, int], ...] = ()
    open_ended: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt and those that it changes to, in order."""
        return (self.prompt, *(change.prompt for change in self.prompts))

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

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def mix_of_chunk(self, chunk_index: int) -> Mix:
        """The texts that drive a chunk. The j-th of a transition's n chunks has j/n of the new prompt, and for the rest
        what was in force before the change."""
        in_force = {self.prompt: 1.0}
        begun = [change for change in self.prompts if change.chunk <= chunk_index]
        for change, after in itertools.zip_longest(begun, begun[1:]):
            last = chunk_index if after is None else after.chunk - 1  # the chunk whose mix the next change finds
            share = min(1.0, (last - change.chunk + 1) / change.transition_chunks)
            if share == 1 or change.chunk == 0:  # before the first chunk nothing is in force
                in_force = {change.prompt: 1.0}
                continue
            in_force = {text: (1 - share) * weight for text, weight in in_force.items()}
            in_force[change.prompt] = in_force.get(change.prompt, 0.0) + share
        return tuple(in_force.items())

    def ended_after(self, chunks: int) -> VideoSpec:
        """This open-ended video, now that it has ended after so many chunks, at least one: one of just that length."""
        frames = min(chunks * CHUNK_FRAMES, self.frames)
        prompts = tuple(change for change in self.prompts if change.chunk < chunks)
        return dataclasses.replace(self, seconds=frames / self.fps, prompts=prompts, open_ended=False)

    def changed(self, *changes: PromptChange) -> VideoSpec:
        """This video with changes of the prompt, each in place of one at its very chunk."""
        timeline = {change.chunk: change for change in (*self.prompts, *changes)}
        return dataclasses.replace(self, prompts=tuple(timeline[chunk] for chunk in sorted(timeline)))

    def extend(
        self, seconds: float, chunks: int, prompt: str | None, transition_chunks: int, limits: Limits
    ) -> VideoSpec:
        """This video, of which `chunks` are made, longer by `seconds`; from there on with `prompt`, if one is given.

        Raises InvalidInput naming the field, the value and what is allowed.
        """
        check_seconds(seconds, self.fps, limits)
        if self.seconds + seconds > limits.max_seconds:
            most = max(0.0, limits.max_seconds - self.seconds)
            raise InvalidInput("seconds", seconds, f"at most {most:g} more, which makes {limits.max_seconds:g} in all")
        longer = dataclasses.replace(self, seconds=self.seconds + seconds)
        if prompt is not None and longer.chunks <= chunks:
            rest = (chunks * CHUNK_FRAMES - self.frames) / self.fps
            raise InvalidInput("seconds", seconds, f"with a prompt more than {rest:g}, so that a chunk begins with it")
        return longer._turning_to(prompt, chunks, transition_chunks, limits)

    def fork(
        self,
        chunk: int,
        prompt: str | None,
        transition_chunks: int,
        seed: int | None,
        seconds: float | None,
        limits: Limits,
    ) -> VideoSpec:
        """This video up to `chunk`, and from there on another: with `prompt`, with new noise from `seed`, or longer.

        `seconds`: of the new video, in all. Raises InvalidInput naming the field, the value and what is allowed.
        """
        forked = self
        if seconds is not None:
            check_seconds(seconds, self.fps, limits)
            forked = dataclasses.replace(forked, seconds=seconds)
        if not 0 <= chunk < forked.chunks:
            raise InvalidInput("chunk", chunk, f"a chunk of the new video: 0 to {forked.chunks - 1}")
        if seed is not None:
            check_seed(seed)
            earlier = tuple(reseed for reseed in self.reseeds if reseed[0] < chunk)
            changes = {"reseeds": (*earlier, (chunk, seed))} if chunk else {"seed": seed, "reseeds": ()}
            forked = dataclasses.replace(forked, **changes)
        # With another prompt, what was to come after is no longer meant.
        end = forked.chunks if prompt is None else chunk
        forked = dataclasses.replace(forked, prompts=tuple(change for change in self.prompts if change.chunk < end))
        return forked._turning_to(prompt, chunk, transition_chunks, limits)

    def remix(self, prompt: str, limits: Limits) -> VideoSpec:
        """This video's settings and seed with another prompt, from the beginning. Raises InvalidInput."""
        check_prompt("prompt", prompt, limits)
        return dataclasses.replace(self, prompt=prompt, prompts=(), reseeds=())

    def _turning_to(self, prompt: str | None, chunk: int, transition_chunks: int, limits: Limits) -> VideoSpec:
        if prompt is None:
            return self
        check_prompt("prompt", prompt, limits)
        check_transition("transition_chunks", transition_chunks, limits)
        if chunk == 0:
            return dataclasses.replace(self, prompt=prompt, prompts=())
        return self.changed(PromptChange(chunk, prompt, transition_chunks))


@dataclass(frozen=True)
class PromptAt:
    """A change of the prompt as a caller asks for it: at the first chunk that starts `at_seconds` or later."""

    at_seconds: float
    prompt: str
    transition_chunks: int = TRANSITION_CHUNKS


@dataclass(frozen=True)
class VideoRequest:
    """What a caller may say; None means "the model's own choice", and for `seconds` a video that goes on until somebody
    ends it. `check` turns it into a VideoSpec."""

    prompt: str
    size: str | None = None
    seconds: float | None = 5.0
    seed: int = 42
    preset: str | None = None
    steps: tuple[int, ...] | None = None
    amplify_first_chunk: bool | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    prompts: tuple[PromptAt, ...] = ()
    fps: int = NATIVE_FPS
    task: str = TEXT_TO_VIDEO
    limits: Limits = field(default_factory=Limits)

    def check(self, card: ModelCard) -> VideoSpec:
        """The video that `card`'s model shall make.

        Raises InvalidInput naming the field, the value and what is allowed.
        """
        if self.task not in card.tasks:
            raise InvalidInput("task", self.task, f"what the model {card.id} can do: {', '.join(card.tasks)}")
        width, height = _check_size(self.size, card, self.limits)
        check_prompt("prompt", self.prompt, self.limits)
        if not 8 <= self.fps <= 60:
            raise InvalidInput("fps", self.fps, "a whole number from 8 to 60")
        if self.seconds is not None:
            check_seconds(self.seconds, self.fps, self.limits)
        check_seed(self.seed)
        amplify = self.amplify_first_chunk
        if amplify and not card.variant.amplifies_first_chunk:
            raise InvalidInput("amplify_first_chunk", True, f"false for the variant {card.variant.name}")
        guidance_scale = self._check_guidance(card)
        spec = VideoSpec(
            prompt=self.prompt,
            model=card.id,
            width=width,
            height=height,
            seconds=self.limits.max_open_seconds if self.seconds is None else self.seconds,
            seed=self.seed,
            steps=self._check_steps(card),
            amplify_first_chunk=card.variant.amplifies_first_chunk if amplify is None else amplify,
            fps=self.fps,
            task=self.task,
            guidance_scale=guidance_scale,
            negative_prompt=self.negative_prompt or "",
            open_ended=self.seconds is None,
        )
        return spec.changed(*self._check_prompts(spec))

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
            count = "1 whole number" if card.stages == 1 else f"{card.stages} whole numbers"
            raise InvalidInput(
                "steps",
                list(self.steps),
                f"{count} from 1 to {most}, one per stage of the variant {card.variant.name}",
            )
        return self.steps

    def _check_guidance(self, card: ModelCard) -> float:
        variant, most = card.variant, self.limits.max_guidance_scale
        scale = variant.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if variant.is_distilled and scale != 1:
            raise InvalidInput(
                "guidance_scale", scale, f"1: the variant {variant.name} was trained to need no guidance"
            )
        if not 1 <= scale <= most:  # also refuses NaN
            raise InvalidInput("guidance_scale", scale, f"a number from 1 (no guidance) to {most:g}")
        if self.negative_prompt is not None:
            if scale == 1:
                raise InvalidInput("negative_prompt", self.negative_prompt, "none without a guidance_scale above 1")
            check_prompt("negative_prompt", self.negative_prompt, self.limits, may_be_empty=True)
        return scale

    def _check_prompts(self, spec: VideoSpec) -> Iterable[PromptChange]:
        """The schedule in chunks."""
        if len(self.prompts) > self.limits.max_prompts:
            raise InvalidInput("prompts", f"{len(self.prompts)} of them", f"at most {self.limits.max_prompts}")
        last = -1
        for at in self.prompts:
            check_prompt("prompts", at.prompt, self.limits)
            check_transition("prompts", at.transition_chunks, self.limits)
            if not 0 <= at.at_seconds < spec.seconds:  # also refuses NaN
                raise InvalidInput("prompts", at.at_seconds, f"at_seconds from 0 to less than seconds {spec.seconds:g}")
            chunk = math.ceil(at.at_seconds * spec.fps / CHUNK_FRAMES - 1e-9)  # 3.3 s at 30 fps is chunk 3
            if chunk >= spec.chunks:
                start = (spec.chunks - 1) * CHUNK_FRAMES / spec.fps
                raise InvalidInput("prompts", at.at_seconds, f"at_seconds up to {start:g}, where the last chunk starts")
            if chunk <= last:
                raise InvalidInput(
                    "prompts",
                    at.at_seconds,
                    f"at_seconds in rising order, at least a chunk ({CHUNK_FRAMES / spec.fps:g} s) apart",
                )
            last = chunk
            yield PromptChange(chunk, at.prompt, at.transition_chunks)


def check_seconds(seconds: float, fps: int, limits: Limits) -> None:
    """Raises InvalidInput unless a video may be this long."""
    if not 1 / fps <= seconds <= limits.max_seconds:  # also refuses NaN
        raise InvalidInput("seconds", seconds, f"a number from 1/{fps} (one frame) to {limits.max_seconds:g}")


def check_lead(lead_seconds: float | None, limits: Limits) -> None:
    """Raises InvalidInput unless a video may be made so far ahead of its playback."""
    if lead_seconds is not None and not 0 <= lead_seconds <= limits.max_seconds:  # also refuses NaN
        raise InvalidInput("lead_seconds", lead_seconds, f"a number from 0 to {limits.max_seconds:g}")


def check_deadline(deadline_s: float | None, limits: Limits) -> None:
    """Raises InvalidInput unless a video may have so long to be made."""
    if deadline_s is not None and not 0 < deadline_s <= limits.max_deadline_seconds:  # also refuses NaN
        raise InvalidInput("deadline_s", deadline_s, f"a number above 0, at most {limits.max_deadline_seconds:g}")


def check_seed(seed: int) -> None:
    """Raises InvalidInput unless noise can be drawn from it."""
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput("seed", seed, "a whole number from 0 to 2^63-1")


def check_transition(name: str, transition_chunks: int, limits: Limits) -> None:
    """Raises InvalidInput unless a prompt may be blended in over so many chunks."""
    if not 1 <= transition_chunks <= limits.max_transition_chunks:
        allowed = f"transition_chunks from 1 to {limits.max_transition_chunks}"
        raise InvalidInput(name, transition_chunks, allowed)


def check_prompt(name: str, prompt: str, limits: Limits, may_be_empty: bool = False) -> None:
    """Raises InvalidInput, for the field `name`, unless the text may be a prompt."""
    if not prompt.strip() and not may_be_empty:
        raise InvalidInput(name, prompt, "text that is not empty")
    if "\0" in prompt:
        raise InvalidInput(name, prompt, "text without NUL characters")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidInput(name, prompt.encode("ascii", "replace").decode(), "valid Unicode text") from None
    if size > limits.max_prompt_bytes:
        allowed = f"at most {limits.max_prompt_bytes} bytes of UTF-8"
        raise InvalidInput(name, f"{prompt[:20]}… ({size} bytes)", allowed)


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


def parse_steps(text: str) -> tuple[int, ...]:
    """ "2,2,2" as (2, 2, 2). Raises InvalidInput."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput("steps", text, "whole numbers with commas between, for example 2,2,2") from None


def _shown(width: int, height: int) -> str:
    return f"{width}x{height}"
