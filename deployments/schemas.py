"""The HTTP bodies: names and shapes of the OpenAI Videos API where it has one; what it lacks are extensions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deployments.config import AppConfig
from deployments.records import VideoStatus
from deployments.scheduling import Priority
from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.errors import InvalidInput
from helios_core.spec import TRANSITION_CHUNKS, Limits, ModelCard, PromptAt, PromptChange, VideoRequest, VideoSpec

# What other servers call our fields, so that a client that moves here is told, not ignored.
NO_URLS = "input_reference, as a file in a multipart/form-data body; URLs are not fetched"
RIVAL_NAMES = {
    "input_reference": NO_URLS,
    "input_references": NO_URLS,
    "image": NO_URLS,
    "image_reference": NO_URLS,
    "image_url": NO_URLS,
    "reference_url": NO_URLS,
    "video_reference": NO_URLS,
    "video_url": NO_URLS,
    "width": "size",
    "height": "size",
    "resolution": "size",
    "num_frames": "seconds",
    "duration": "seconds",
    "num_inference_steps": "steps",
    "pyramid_num_inference_steps_list": "steps",
    "is_amplify_first_chunk": "amplify_first_chunk",
    "extra_params": "the fields of this API, at top level",
    "extra_args": "the fields of this API, at top level",
    "quality": "preset",
    "n": "one request per video",
    "num_outputs_per_prompt": "one request per video",
}


def _list_in_text(value: object) -> object:
    """A list as one text: JSON, or `2,2,2`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value if value.lstrip().startswith("[") else f"[{value}]")
    except (ValueError, RecursionError):
        return value


def _object_in_text(value: object) -> object:
    """An object as one text: JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _number_in_text(value: object) -> object:
    """OpenAI's clients send seconds as text."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", value):
        return float(value)
    return None if value == "null" else value


def _whole_number_in_text(value: object) -> object:
    """All of a query is text."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value) else value


def _whole(value: object) -> object:
    """4.0 is a whole number in JSON Schema, and for clients that know one kind of number only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Fields(BaseModel):
    """What a client sends as fields with names. Descriptions are what an error calls allowed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rival_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, fields: Mapping[str, Any], from_text: bool = False) -> Self:
        """`from_text`: numbers and truths are texts, as in a form. Raises InvalidInput for the first field that is
        unknown or of the wrong type."""
        for name in fields:
            if name in cls.model_fields:
                continue
            instead = cls.rival_names.get(name)
            allowed = f"no such field; here it is {instead}" if instead else f"one of {', '.join(cls.model_fields)}"
            # A name may be any text, even what is no valid Unicode; the answer must be.
            raise InvalidInput(name.encode("utf-8", "backslashreplace").decode()[:80], fields[name], allowed)
        try:
            return cls.model_validate(dict(fields), strict=not from_text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            allowed = str(cls.model_fields[name].description)
            if first["type"] == "missing" and len(first["loc"]) == 1:
                raise InvalidInput(name, None, f"{allowed}; the field is required") from None
            raise InvalidInput(name, first["input"], allowed) from None


class ScheduledPrompt(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    at_seconds: float
    prompt: str
    transition_chunks: Whole = TRANSITION_CHUNKS


class VideoReference(BaseModel):
    """A video of this service, instead of a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str


Seconds = Annotated[float, BeforeValidator(_number_in_text)]
SecondsOrNull = Annotated[float | None, BeforeValidator(_number_in_text)]
PROMPT = "text"
SECONDS = "a number"
SEED = "a whole number from 0 to 2^63-1"
TRANSITION = "a whole number: over how many chunks the new prompt takes the old one's place"


class NewVideo(Fields):
    """What every body that asks for a new video may say: how its turns come, and how long it may take to be made."""

    priority: Priority = Field("realtime", description="realtime or batch")
    deadline_s: SecondsOrNull = Field(None, description=SECONDS)


class CreateVideo(NewVideo):
    """The body of POST /v1/videos and POST /v1/videos/stream, besides the file `input_reference`."""

    rival_names = RIVAL_NAMES

    prompt: str = Field(description=PROMPT)
    model: str | None = Field(None, description="the id of a model in GET /v1/models")
    seconds: SecondsOrNull = Field(5.0, description=f"{SECONDS}, or null for a video that goes on until it is ended")
    lead_seconds: SecondsOrNull = Field(None, description=SECONDS)
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, as text")
    seed: Whole = Field(42, description=SEED)
    fps: Whole = Field(NATIVE_FPS, description="a whole number from 8 to 60")
    preset: str | None = Field(None, description="the name of a preset in GET /v1/models")
    steps: Annotated[list[Whole] | None, BeforeValidator(_list_in_text)] = Field(
        None, description="a list of whole numbers, one per stage"
    )
    amplify_first_chunk: bool | None = Field(None, description="true or false")
    guidance_scale: float | None = Field(None, description="a number of at least 1; 1 means no guidance")
    negative_prompt: str | None = Field(None, description="text")
    prompts: Annotated[list[ScheduledPrompt], BeforeValidator(_list_in_text)] = Field(
        [], description="a list of {at_seconds, prompt} and, if wanted, transition_chunks"
    )

    def request(self, limits: Limits, task: str) -> VideoRequest:
        return VideoRequest(
            prompt=self.prompt,
            size=self.size,
            seconds=self.seconds,
            seed=self.seed,
            preset=self.preset,
            steps=None if self.steps is None else tuple(self.steps),
            amplify_first_chunk=self.amplify_first_chunk,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            prompts=tuple(PromptAt(at.at_seconds, at.prompt, at.transition_chunks) for at in self.prompts),
            fps=self.fps,
            task=task,
            limits=limits,
        )


class EditVideo(CreateVideo):
    """The body of POST /v1/videos/edits and POST /v1/videos/extensions, besides the file `video`."""

    rival_names = {
        **RIVAL_NAMES,
        **{name: "video, as a file or {id}" for name, own in RIVAL_NAMES.items() if own == NO_URLS},
    }

    video: Annotated[VideoReference | None, BeforeValidator(_object_in_text)] = Field(
        None, description="a file, or the id of a video as {id}"
    )


class ChangePrompt(Fields):
    """The body of POST /v1/videos/{id}/prompt."""

    prompt: str = Field(description=PROMPT)
    transition_chunks: Whole = Field(TRANSITION_CHUNKS, description=TRANSITION)


class ExtendVideo(NewVideo):
    """The body of POST /v1/videos/{id}/extend. `seconds`: how much longer."""

    seconds: Seconds = Field(5.0, description=SECONDS)
    prompt: str | None = Field(None, description=PROMPT)
    transition_chunks: Whole = Field(TRANSITION_CHUNKS, description=TRANSITION)


class ForkVideo(NewVideo):
    """The body of POST /v1/videos/{id}/fork. `seconds`: of the new video, in all."""

    chunk: Whole = Field(description="a whole number: the first chunk that is the new video's own")
    prompt: str | None = Field(None, description=PROMPT)
    transition_chunks: Whole = Field(TRANSITION_CHUNKS, description=TRANSITION)
    seed: Whole | None = Field(None, description=SEED)
    seconds: SecondsOrNull = Field(None, description=SECONDS)


class RemixVideo(NewVideo):
    """The body of POST /v1/videos/{id}/remix."""

    prompt: str = Field(description=PROMPT)


class ListVideos(Fields):
    """The query of GET /v1/videos."""

    limit: Annotated[int, BeforeValidator(_whole_number_in_text)] = Field(
        20, ge=1, le=100, description="a whole number from 1 to 100"
    )
    after: str | None = Field(None, description="the id of a video")
    order: Literal["asc", "desc"] = Field("desc", description="asc or desc, by the time of creation")


class GetContent(Fields):
    """The query of GET /v1/videos/{id}/content."""

    variant: Literal["video", "thumbnail"] = Field("video", description="video or thumbnail")
    partial: Literal["true", "false"] = Field("false", description="true or false")


def video_object(status: VideoStatus, card: ModelCard | None, share_url: str) -> dict[str, Any]:
    """The Video object of the OpenAI API, with our extensions. `card`: of its model; None if that is served no more;
    `share_url`: of its content, for those who have no key.

    Its `note` says of which prompts the model knows no word, or is null.
    """
    spec, usage, origin = status.spec, status.usage, status.origin
    # In the queue until the first chunk's sampling began, or to this day.
    begun = usage.started_at or status.completed_at or time.time()
    return {
        "id": status.id,
        "object": "video",
        "model": spec.model,
        "status": status.status,
        "queue_position": status.queue_position,
        "estimated_start_at": _second(status.estimated_start_at),
        "estimated_completion_at": _second(status.estimated_completion_at),
        "paused": status.paused,
        "priority": status.priority,
        "deadline_s": status.deadline_s,
        "progress": 0 if spec.open_ended else 100 * usage.chunks // spec.chunks,
        "created_at": int(status.created_at),
        "completed_at": _second(status.completed_at),
        "expires_at": None,
        "share_url": share_url,
        "size": f"{spec.width}x{spec.height}",
        "seconds": None if spec.open_ended else str(spec.seconds).removesuffix(".0"),
        "prompt": spec.prompt,
        "remixed_from_video_id": origin.video_id if origin and origin.how == "remix" else None,
        "error": None if status.error is None else status.error.model_dump(),
        "seed": spec.seed,
        "reseeds": [{"chunk": chunk, "seed": seed} for chunk, seed in spec.reseeds],
        "fps": spec.fps,
        "frames": None if spec.open_ended else spec.frames,
        "task": spec.task,
        "steps": list(spec.steps),
        "amplify_first_chunk": spec.amplify_first_chunk,
        "guidance_scale": spec.guidance_scale,
        "negative_prompt": spec.negative_prompt,
        "prompts": [prompt_object(change, spec) for change in spec.prompts],
        "note": None if card is None else card.note(*spec.texts),
        "origin": None if origin is None else origin.model_dump(),
        "runs": [run.model_dump() for run in status.runs],
        "usage": {
            "chunks": usage.chunks,
            "steps": usage.steps,
            "sampler_seconds": usage.sampler_seconds,
            "queue_seconds": max(0.0, begun - status.created_at),
        },
    }


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)


def prompt_object(change: PromptChange, spec: VideoSpec) -> dict[str, Any]:
    """A change of the prompt: the chunk that it begins with, and when that is shown."""
    return {
        "chunk": change.chunk,
        "at_seconds": spec.first_frame_of_chunk(change.chunk) / spec.fps,
        "prompt": change.prompt,
        "transition_chunks": change.transition_chunks,
    }


def list_object(videos: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """The answer of GET /v1/videos, of video objects."""
    return {
        "object": "list",
        "data": videos,
        "first_id": videos[0]["id"] if videos else None,
        "last_id": videos[-1]["id"] if videos else None,
        "has_more": has_more,
    }


def model_object(card: ModelCard, config: AppConfig) -> dict[str, Any]:
    """One entry of GET /v1/models."""
    limits = config.limits
    width, height = card.default_size
    variant = card.variant
    return {
        "id": card.id,
        "object": "model",
        "owned_by": "helios",
        "variant": variant.name,
        "tasks": list(card.tasks),
        "presets": {name: list(steps) for name, steps in variant.presets.items()},
        "default_preset": variant.default_preset,
        "default_steps": list(variant.presets[variant.default_preset]),
        "default_guidance_scale": variant.guidance_scale,
        "default_size": f"{width}x{height}",
        "size_multiple": card.size_multiple,
        "vocabulary": card.vocabulary,
        "frames_per_chunk": CHUNK_FRAMES,
        "limits": {
            "side": limits.max_side,
            "pixels": limits.max_pixels,
            "seconds": limits.max_seconds,
            "open_seconds": limits.max_open_seconds,
            "deadline_seconds": limits.max_deadline_seconds,
            "prompt_bytes": limits.max_prompt_bytes,
            "prompts": limits.max_prompts,
            "transition_chunks": limits.max_transition_chunks,
            "steps_per_stage": limits.max_steps_per_stage,
            "guidance_scale": 1 if variant.is_distilled else limits.max_guidance_scale,
            "upload_bytes": config.uploads.max_bytes,
            "upload_seconds": config.uploads.max_seconds,
        },
    }


def error_object(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    """The error envelope."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
