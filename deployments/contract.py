"""What the HTTP service takes and gives, as OpenAPI 3.1: one table of its routes, bounds from the configuration, shapes
from deployments/schemas.py.

`GET /openapi.json` serves it, `helios openapi` prints it, docs/api.md is it in words. What is not here is no promise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config import AppConfig
from deployments.records import Usage, VideoStatus
from deployments.schemas import (
    ChangePrompt,
    CreateVideo,
    EditVideo,
    ExtendVideo,
    Fields,
    ForkVideo,
    GetContent,
    ListVideos,
    RemixVideo,
    error_object,
    model_object,
    video_object,
)
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import shown
from helios_core.spec import MAX_SEED, TASKS, Limits, ModelCard, VideoRequest

Schema = dict[str, Any]

VERSIONING = (
    "The version is in the path. Within /v1 a route, a field, a status and what a default does stay as they are. "
    "Routes, fields, events, codes and values of an enumeration may be added: a client ignores what it does not know. "
    "What shall go is marked `deprecated` here for at least six months and a minor version before it goes, and its "
    "answers carry the header Deprecation (RFC 9745). What changes otherwise comes as /v2, beside /v1."
)
EXAMPLE_ID = "video_019a0000000000000000000000000000"
EXAMPLE_PROMPT = "a red sun over a blue sea"
JSON, FORM, MP4, EVENTS = "application/json", "multipart/form-data", "video/mp4", "text/event-stream"
PLAYLIST, SEGMENT, JPEG = "application/vnd.apple.mpegurl", "video/iso.segment", "image/jpeg"

# ── shapes ───────────────────────────────────────────────────────────────────

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
ID: Schema = {"type": "string", "pattern": "^video_[0-9a-f]{32}$"}
BINARY: Schema = {"type": "string", "format": "binary"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def null_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def just(value: str) -> Schema:
    return {"type": "string", "const": value}


def thing(**properties: Schema) -> Schema:
    """An object of the service's own: all of its fields are always there, and more may come."""
    return {"type": "object", "required": list(properties), "properties": properties}


# What the service answers with, by name. A new field of an answer is a line here.
ANSWERS: dict[str, Schema] = {
    "Error": thing(
        error=thing(
            message={**TEXT, "description": "for people: the field, the value and what is allowed"},
            type={"enum": ["invalid_request_error", "server_error"]},
            param=null_or({**TEXT, "description": "the field, parameter or header at fault"}),
            code={**TEXT, "description": "stable, for programs"},
        )
    ),
    "Video": thing(
        id=ID,
        object=just("video"),
        model=TEXT,
        status={"enum": ["queued", "in_progress", "completed", "failed", "cancelled"]},
        priority={"enum": ["realtime", "batch"]},
        deadline_s=null_or({**NUMBER, "description": "after created_at it ends as failed"}),
        queue_position=null_or({**WHOLE, "description": "how many videos get a sampler before it"}),
        estimated_start_at=null_or({**WHOLE, "description": "Unix time, seconds; null if it began, or nobody knows"}),
        estimated_completion_at=null_or({**WHOLE, "description": "Unix time, seconds; null if nobody knows"}),
        paused=TRUTH,
        progress={**WHOLE, "maximum": 100, "description": "percent; 0 of a video without an end"},
        created_at={**WHOLE, "description": "Unix time, seconds"},
        completed_at=null_or({**WHOLE, "description": "Unix time, seconds"}),
        expires_at={"type": "null"},
        share_url={
            **TEXT,
            "description": "of its content, good for a while without a key; its query is for others too",
        },
        size=TEXT,
        seconds=null_or({**TEXT, "description": "as text, as OpenAI has it; null while it has no end"}),
        prompt=TEXT,
        remixed_from_video_id=null_or(ID),
        error=null_or(thing(code=TEXT, message=TEXT)),
        seed=WHOLE,
        reseeds=list_of(thing(chunk=WHOLE, seed=WHOLE)),
        fps=WHOLE,
        frames=null_or(WHOLE),
        task={"enum": list(TASKS)},
        steps=list_of(WHOLE),
        amplify_first_chunk=TRUTH,
        guidance_scale=NUMBER,
        negative_prompt=TEXT,
        prompts=list_of(ref("PromptChange")),
        note=null_or({**TEXT, "description": "which prompts have no word that the model knows"}),
        origin=null_or(thing(how={"enum": ["extend", "fork", "remix"]}, video_id=ID, chunks=WHOLE)),
        runs=list_of(thing(version=TEXT, device=TEXT, approximations=list_of(TEXT), from_chunk=WHOLE)),
        usage=thing(chunks=WHOLE, steps=WHOLE, sampler_seconds=NUMBER, queue_seconds=NUMBER),
    ),
    "PromptChange": thing(chunk=WHOLE, at_seconds=NUMBER, prompt=TEXT, transition_chunks=WHOLE),
    "PromptChanged": thing(
        id=ID,
        object=just("video.prompt"),
        chunk={**WHOLE, "description": "the first one that follows the new prompt"},
        at_seconds=NUMBER,
        prompt=TEXT,
        transition_chunks=WHOLE,
        note=null_or(TEXT),
    ),
    "VideoList": thing(
        object=just("list"),
        data=list_of(ref("Video")),
        first_id=null_or(ID),
        last_id=null_or(ID),
        has_more=TRUTH,
    ),
    "VideoDeleted": thing(id=ID, object=just("video.deleted"), deleted={"const": True}),
    "Model": thing(
        id=TEXT,
        object=just("model"),
        owned_by=TEXT,
        variant=TEXT,
        tasks=list_of({"enum": list(TASKS)}),
        presets={"type": "object", "additionalProperties": list_of(WHOLE)},
        default_preset=TEXT,
        default_steps=list_of(WHOLE),
        default_guidance_scale=NUMBER,
        default_size=TEXT,
        size_multiple={**WHOLE, "description": "both sides are multiples of it"},
        vocabulary=null_or({"type": "object", "additionalProperties": list_of(TEXT)}),
        frames_per_chunk=WHOLE,
        limits=thing(
            side=WHOLE,
            pixels=WHOLE,
            seconds=NUMBER,
            open_seconds=NUMBER,
            deadline_seconds=NUMBER,
            prompt_bytes=WHOLE,
            prompts=WHOLE,
            transition_chunks=WHOLE,
            steps_per_stage=WHOLE,
            guidance_scale=NUMBER,
            upload_bytes=WHOLE,
            upload_seconds=NUMBER,
        ),
    ),
    "ModelList": thing(object=just("list"), data=list_of(ref("Model"))),
    "Alive": thing(status=just("alive")),
    "Ready": thing(status=just("ready"), models=list_of(TEXT)),
    "Event": thing(
        event={"enum": ["chunk", "prompt", "done", "error"]},
        id={**TEXT, "description": "for Last-Event-ID"},
        data={
            **TEXT,
            "description": "a line of JSON",
            "contentMediaType": JSON,
            "contentSchema": {"anyOf": [ref(f"{name}Event") for name in ("Chunk", "Prompt", "Done", "Error")]},
        },
    ),
    "ChunkEvent": thing(
        index=WHOLE,
        first_frame=WHOLE,
        frames=WHOLE,
        pts_s=NUMBER,
        duration_s=NUMBER,
        bytes=WHOLE,
        offset={**WHOLE, "description": "in the file, of the chunk's first byte"},
        made_s=NUMBER,
        cadence_s=null_or({"type": "number"}),
        prompt=TEXT,
    ),
    "PromptEvent": thing(chunk=WHOLE, prompt=TEXT, transition_chunks=WHOLE),
    "DoneEvent": thing(chunks=WHOLE, frames=WHOLE, bytes=WHOLE, duration_s=NUMBER),
    "ErrorEvent": thing(code=TEXT, message=TEXT, last_chunk=null_or(WHOLE)),
}

# ── headers ──────────────────────────────────────────────────────────────────

# Of a request: name ▸ (its form, what it does). No form: any text is taken, and ignored if it makes no sense.
REQUEST_HEADERS: dict[str, tuple[Schema, str]] = {
    "X-Request-Id": (
        TEXT,
        "1 to 64 of `A-Za-z0-9._-` come back with the answer, in place of others a fresh one",
    ),
    "traceparent": (TEXT, "W3C: the span of the caller, whose trace the video's becomes"),
    "Idempotency-Key": (
        {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
        "the same request, sent again with it within 24 hours, gets the same video",
    ),
    "Range": (TEXT, "`bytes=N-` or, of a finished file, also `bytes=N-M` and `bytes=-N`"),
    "If-Range": (TEXT, "an ETag: the Range counts only if the file is still that one"),
    "If-None-Match": (TEXT, "an ETag: 304 if the file is still that one"),
    "Last-Event-ID": (
        {"type": "string", "pattern": "^((0|[1-9][0-9]{0,8})(-prompt)?|done)$"},
        "the id of the last event that was seen: what came after it is sent",
    ),
}

# Of an answer. Those named as `always` are required.
RESPONSE_HEADERS: dict[str, str] = {
    "X-Request-Id": "the request's id, in the logs of the service too",
    "traceparent": "W3C: the span of this request",
    "Idempotent-Replayed": "true: an earlier request with this Idempotency-Key made the video",
    "openai-poll-after-ms": "how soon to ask again, in ms",
    "X-Video-Id": "the id of the video that the body is",
    "ETag": "names the bytes of the file",
    "Accept-Ranges": "bytes",
    "Content-Range": "which bytes these are",
    "Cache-Control": "a file that is whole may be kept for ever",
    "Retry-After": "seconds, whole",
    "WWW-Authenticate": "Bearer",
    "Allow": "the methods of this path",
    "x-should-retry": "false: another try helps nothing",
}

# ── answers ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """One that is no error. `content`: media type ▸ schema; `headers`: those that it always has; `may`: may have."""

    description: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


# Refusals: status ▸ (description with the codes, headers that always come along).
REFUSALS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: (
        "The body is broken: `invalid_json`, `invalid_form`, `body_cut_off`; or the file is none: `invalid_input`",
        (),
    ),
    401: ("No key, or none that is known: `unauthorized`", ("WWW-Authenticate",)),
    403: ("The key is of another kind: `forbidden`; or the link is not good: `link_invalid`, `link_expired`", ()),
    404: ("There is none: `not_found`, `model_not_found`", ()),
    405: ("Not a method of this path: `method_not_allowed`", ("Allow",)),
    408: ("The body came too slowly: `body_too_slow`", ()),
    409: (
        "Not now: `not_possible`, `video_failed`, `video_cancelled`, `video_deleted`, `unreadable`, "
        "`idempotency_key_reused`",
        ("x-should-retry",),
    ),
    413: ("More than the limit: `body_too_large`", ()),
    415: ("Neither JSON nor a form: `unsupported_media_type`", ()),
    416: ("The file has none of these bytes: `range_not_satisfiable`", ("Content-Range",)),
    422: (
        "A field is unknown, missing or out of bounds: `invalid_input`; or the service's safety check does not let it "
        "pass: `content_blocked`",
        (),
    ),
    429: ("More than there is room for, or than this key may have: `too_many_requests`", ("Retry-After",)),
    500: ("A bug: `internal_error`", ()),
    503: (
        "Not at this moment: `unavailable`, `store_unavailable`, `superseded`, `safety_unavailable`",
        ("Retry-After",),
    ),
    507: ("The store is full: `store_full`", ("Retry-After",)),
}

VIDEO = Answer("The video", {JSON: ref("Video")}, ("openai-poll-after-ms",))
NEW_VIDEO = Answer(
    "The new video", {JSON: ref("Video")}, ("openai-poll-after-ms", "traceparent"), ("Idempotent-Replayed",)
)
WHOLE_FILE = ("ETag", "Accept-Ranges", "Cache-Control")
NOT_MODIFIED = Answer("The file is still that one", {}, ("ETag",))

# ── routes ───────────────────────────────────────────────────────────────────

Access = Literal["open", "key", "link", "metrics"]
ACCESS: dict[Access, tuple[str, ...]] = {"open": (), "key": ("key",), "link": ("key", "link"), "metrics": ("key",)}


@dataclass(frozen=True)
class Route:
    """A row of the table. `path`: with parameters in braces; `access`: who may, where there are keys; `query`, `body`:
    what the schemas call them; `file`: the field of the one file that the body may have; `refused`: with these besides
    those that every route of its kind has."""

    methods: tuple[str, ...]
    path: str
    summary: str
    answers: Mapping[int, Answer]
    access: Access = "key"
    refused: tuple[int, ...] = ()
    query: type[Fields] | None = None
    body: type[Fields] | None = None
    file: str | None = None
    headers: tuple[str, ...] = ()
    makes: bool = False

    @property
    def statuses(self) -> list[int]:
        """Of its refusals."""
        always = {405, 500, 503} if self.path.startswith("/v1/videos") else {405, 500}
        keys = set() if self.access == "open" else {401, 403, 429}
        body = {400, 408, 413, 415, 422} if self.body else set()
        made = {404, 409, 422, 429, 507} if self.makes else set()
        video = {404, 409} if "{video_id}" in self.path else set()
        return sorted({*always, *keys, *body, *made, *video, *self.refused})


def make(path: str, summary: str, body: type[Fields], file: str | None = None) -> Route:
    """A POST that makes a video."""
    return Route(
        ("POST",),
        path,
        summary,
        {200: NEW_VIDEO},
        body=body,
        file=file,
        headers=("Idempotency-Key", "traceparent"),
        makes=True,
    )


def files(path: str, summary: str, media_type: str) -> Route:
    """A part of a video as HLS has it, which never changes."""
    part = {media_type: BINARY}
    return Route(
        ("GET", "HEAD"),
        path,
        summary,
        {
            200: Answer("The whole", part, WHOLE_FILE),
            206: Answer("A part of it", part, (*WHOLE_FILE, "Content-Range")),
            304: NOT_MODIFIED,
        },
        access="link",
        refused=(416,),
        headers=("Range", "If-Range", "If-None-Match"),
    )


ROUTES: tuple[Route, ...] = (
    make("/v1/videos", "Makes a video, whether anybody watches or not", CreateVideo, "input_reference"),
    Route(
        ("POST",),
        "/v1/videos/stream",
        "Makes a video, and the answer is the video, from its first fragment on. Who leaves cancels it",
        {
            200: Answer(
                "The video, cut off if it fails",
                {MP4: BINARY},
                ("X-Video-Id", "traceparent", "Cache-Control"),
                ("Idempotent-Replayed",),
            )
        },
        body=CreateVideo,
        file="input_reference",
        headers=("Idempotency-Key", "traceparent"),
        makes=True,
    ),
    make("/v1/videos/edits", "Makes a video that goes on from another, a file or {id}", EditVideo, "video"),
    make("/v1/videos/extensions", "The same: OpenAI's other name for it", EditVideo, "video"),
    make("/v1/videos/{video_id}/extend", "Makes a longer one, which begins with the same bytes", ExtendVideo),
    make("/v1/videos/{video_id}/fork", "Makes one that is another from a chunk on", ForkVideo),
    make("/v1/videos/{video_id}/remix", "Makes one with the same settings and seed, and another prompt", RemixVideo),
    Route(
        ("POST",),
        "/v1/videos/{video_id}/prompt",
        "Changes the prompt of a running video, from the first chunk that has not begun",
        {200: Answer("What changes, and when", {JSON: ref("PromptChanged")})},
        body=ChangePrompt,
        refused=(507,),
    ),
    Route(
        ("GET",),
        "/v1/videos",
        "A page of the videos",
        {200: Answer("The page", {JSON: ref("VideoList")})},
        query=ListVideos,
        refused=(422,),
    ),
    Route(("GET",), "/v1/videos/{video_id}", "How a video stands", {200: VIDEO}),
    Route(
        ("DELETE",),
        "/v1/videos/{video_id}",
        "Stops a video and removes it",
        {200: Answer("It is gone", {JSON: ref("VideoDeleted")})},
    ),
    Route(
        ("POST",), "/v1/videos/{video_id}/pause", "Stops a video before its next chunk", {200: VIDEO}, refused=(507,)
    ),
    Route(("POST",), "/v1/videos/{video_id}/resume", "Goes on with a paused video", {200: VIDEO}, refused=(507,)),
    Route(("POST",), "/v1/videos/{video_id}/cancel", "Stops a video", {200: VIDEO}, refused=(507,)),
    Route(
        ("GET", "HEAD"),
        "/v1/videos/{video_id}/content",
        "The file; while it is made live, from its start or, with `Range: bytes=N-`, from byte N. Or its thumbnail",
        {
            200: Answer("The file", {MP4: BINARY, JPEG: BINARY}, ("Accept-Ranges", "Cache-Control"), ("ETag",)),
            206: Answer(
                "A part of it",
                {MP4: BINARY, JPEG: BINARY},
                ("Accept-Ranges", "Cache-Control", "Content-Range"),
                ("ETag",),
            ),
            304: NOT_MODIFIED,
        },
        access="link",
        refused=(416, 422),
        query=GetContent,
        headers=("Range", "If-Range", "If-None-Match"),
    ),
    Route(
        ("GET",),
        "/v1/videos/{video_id}/events",
        "What happens to a video: `chunk` (ChunkEvent), `prompt` (PromptEvent), at last `done` (DoneEvent) or `error` "
        "(ErrorEvent)",
        {
            200: Answer("Server-sent events", {EVENTS: ref("Event")}, ("Cache-Control",)),
            204: Answer("There is nothing more"),
        },
        access="link",
        refused=(422,),
        headers=("Last-Event-ID",),
    ),
    Route(
        ("GET", "HEAD"),
        "/v1/videos/{video_id}/hls/index.m3u8",
        "The HLS playlist, which grows while the video is made",
        {200: Answer("The playlist", {PLAYLIST: TEXT}, ("Cache-Control",))},
        access="link",
    ),
    files("/v1/videos/{video_id}/hls/init.mp4", "The init segment", MP4),
    files("/v1/videos/{video_id}/hls/{index}.m4s", "The fragment of a chunk", SEGMENT),
    Route(("GET",), "/v1/models", "The models", {200: Answer("All of them", {JSON: ref("ModelList")})}),
    Route(
        ("GET",),
        "/v1/models/{model_id}",
        "A model: what can be asked of it",
        {200: Answer("The model", {JSON: ref("Model")})},
        refused=(404,),
    ),
    Route(
        ("GET",),
        "/metrics",
        "Prometheus",
        {200: Answer("The metrics", {"text/plain": TEXT})},
        access="metrics",
        refused=(503,),
    ),
    Route(("GET",), "/healthz", "Is it alive?", {200: Answer("Yes", {JSON: ref("Alive")})}, access="open"),
    Route(
        ("GET",),
        "/readyz",
        "Can it make videos?",
        {200: Answer("Yes", {JSON: ref("Ready")})},
        access="open",
        refused=(503,),
    ),
    Route(
        ("GET",),
        "/openapi.json",
        "This contract",
        {200: Answer("OpenAPI 3.1", {JSON: {"type": "object"}})},
        access="open",
    ),
    Route(
        ("GET", "HEAD"),
        "/",
        "The page",
        {200: Answer("HTML", {"text/html": TEXT}, ("ETag",)), 304: NOT_MODIFIED},
        access="open",
        headers=("If-None-Match",),
    ),
    Route(
        ("GET", "HEAD"),
        "/player/{path}",
        "A part of the page",
        {200: Answer("The file", {"*/*": BINARY}, ("ETag",)), 304: NOT_MODIFIED},
        access="open",
        refused=(404,),
        headers=("If-None-Match",),
    ),
)

# The ids of models and the names of files may have slashes.
PATTERNS = [
    (
        route,
        re.compile(
            re.sub(
                r"\\{(\w+)\\}",
                lambda name: ".+" if name[1] in ("model_id", "path") else "[^/]+",
                re.escape(route.path),
            )
        ),
    )
    for route in ROUTES
]

PARAMETERS_OF_PATHS: dict[str, tuple[Schema, str]] = {
    "video_id": (ID, "the id of a video"),
    "index": ({"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$"}, "of a chunk, from 0"),
    "model_id": (TEXT, "the id of a model"),
    "path": (TEXT, "the name of a file"),
}


# ── requests ─────────────────────────────────────────────────────────────────


def bounds(limits: Limits, cards: Sequence[ModelCard]) -> dict[str, Schema]:
    """The form of each field of a request, by its name: what deployments/schemas.py and helios_core/spec.py check."""
    presets = sorted({name for card in cards for name in card.variant.presets})
    most = 1.0 if all(card.variant.is_distilled for card in cards) else limits.max_guidance_scale
    text = {
        "type": "string",
        "minLength": 1,
        "maxLength": limits.max_prompt_bytes,
        "pattern": "^[^\\u0000]*[^\\s\\u0000-\\u001f\\u0085][^\\u0000]*$",
    }
    step = {"type": "integer", "minimum": 1, "maximum": limits.max_steps_per_stage}
    stages = [card.stages for card in cards]
    return {
        "prompt": text,
        "model": {"enum": [card.id for card in cards]},
        "seconds": {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": limits.max_seconds},
                {"type": "string", "pattern": "^[0-9]{1,20}(\\.[0-9]{1,20})?$"},
            ]
        },
        "priority": {"enum": ["realtime", "batch"]},
        "deadline_s": {"type": "number", "exclusiveMinimum": 0, "maximum": limits.max_deadline_seconds},
        "lead_seconds": {"type": "number", "minimum": 0, "maximum": limits.max_seconds},
        "size": {"type": "string", "pattern": "^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "fps": {"type": "integer", "minimum": 8, "maximum": 60},
        "preset": {"enum": presets},
        "steps": {"type": "array", "items": step, "minItems": min(stages), "maxItems": max(stages)},
        "amplify_first_chunk": TRUTH,
        "guidance_scale": {"type": "number", "minimum": 1, "maximum": most},
        "negative_prompt": {"type": "string", "maxLength": limits.max_prompt_bytes, "pattern": "^[^\\u0000]*$"},
        "prompts": {"type": "array", "items": ref("ScheduledPrompt"), "maxItems": limits.max_prompts},
        "at_seconds": {"type": "number", "minimum": 0, "exclusiveMaximum": limits.max_open_seconds},
        "transition_chunks": {"type": "integer", "minimum": 1, "maximum": limits.max_transition_chunks},
        "chunk": {"type": "integer", "minimum": 0, "maximum": round(limits.max_seconds * 60) // CHUNK_FRAMES},
        "video": {"type": "object", "required": ["id"], "properties": {"id": ID}, "additionalProperties": False},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "after": ID,
        "order": {"enum": ["asc", "desc"]},
        "variant": {"enum": ["video", "thumbnail"]},
        "partial": {"enum": ["true", "false"]},
    }


def properties(kind: type[Fields], forms: Mapping[str, Schema]) -> dict[str, Schema]:
    """The fields of `kind`, each with its form, meaning and default."""
    told: dict[str, Schema] = {}
    for name, own in kind.model_json_schema()["properties"].items():
        nullable = any(option.get("type") == "null" for option in own.get("anyOf", ()))
        told[name] = {**(null_or(forms[name]) if nullable else forms[name]), "description": own["description"]}
        if own.get("default") is not None:
            told[name]["default"] = own["default"]
    return told


def json_body(kind: type[Fields], forms: Mapping[str, Schema], file: str | None) -> Schema:
    """`file`: the field that may be a file instead, and so has to be there if it is none."""
    told = properties(kind, forms)
    if file in told:
        told[file] = {**forms[file], "description": told[file]["description"]}
    return {
        "type": "object",
        "required": [name for name, own in kind.model_fields.items() if own.is_required() or name == file],
        "properties": told,
        "additionalProperties": False,
    }


def form_body(kind: type[Fields], forms: Mapping[str, Schema], file: str | None) -> Schema:
    """The same as texts: lists and objects are JSON, or lists `2,2,2`; what is null is left out; and the file."""
    body = json_body(kind, forms, file)
    for name, own in body["properties"].items():
        plain = next((option for option in own.get("anyOf", ()) if option.get("type") != "null"), own)
        if plain.get("type") in ("array", "object") or "$ref" in plain:
            plain = {**TEXT, "contentMediaType": JSON}
        if "anyOf" in plain:
            plain = plain["anyOf"][0]
        body["properties"][name] = {**plain, "description": own["description"]}
    if file is not None:
        body["properties"][file] = {**BINARY, "description": "an image or a video, as a file"}
    return body


# ── examples ─────────────────────────────────────────────────────────────────


def example_video(card: ModelCard, limits: Limits) -> Schema:
    spec = VideoRequest(EXAMPLE_PROMPT, seconds=min(4.0, limits.max_seconds), seed=7, limits=limits).check(card)
    usage = Usage(chunks=spec.chunks, steps=24, sampler_seconds=1.5, started_at=1_760_000_001.0)
    status = VideoStatus(
        id=EXAMPLE_ID,
        created_at=1_760_000_000.0,
        spec=spec,
        origin=None,
        status="completed",
        completed_at=1_760_000_004.0,
        error=None,
        usage=usage,
        runs=(),
        owner="",
        priority="realtime",
        deadline_s=None,
        queue_position=None,
        estimated_start_at=None,
        estimated_completion_at=None,
        paused=False,
    )
    return video_object(status, card, f"http://127.0.0.1:8000/v1/videos/{EXAMPLE_ID}/content")


def example_bodies(limits: Limits) -> dict[type[Fields], Schema]:
    seconds = min(4.0, limits.max_seconds)
    return {
        CreateVideo: {"prompt": EXAMPLE_PROMPT, "seconds": seconds, "seed": 7},
        EditVideo: {"prompt": "the moon comes up", "video": {"id": EXAMPLE_ID}, "seconds": seconds},
        ChangePrompt: {"prompt": "a green moon", "transition_chunks": 1},
        ExtendVideo: {"seconds": seconds},
        ForkVideo: {"chunk": 0, "seed": 8},
        RemixVideo: {"prompt": "a yellow sun"},
    }


# ── the document ─────────────────────────────────────────────────────────────


def contract(config: AppConfig, cards: Sequence[ModelCard]) -> Schema:
    """The OpenAPI document of a service with this configuration and these models, the default one first."""
    forms = bounds(config.limits, cards)
    scheduled = {name: forms[name] for name in ("at_seconds", "prompt", "transition_chunks")}
    examples = {
        "Video": example_video(cards[0], config.limits),
        "Model": model_object(cards[0], config),
        "Error": {
            "error": {
                "message": "seed is -1; allowed: a whole number from 0 to 2^63-1",
                "type": "invalid_request_error",
                "param": "seed",
                "code": "invalid_input",
            }
        },
    }
    schemas: dict[str, Schema] = {
        **{
            name: {**own, **({"examples": [examples[name]]} if name in examples else {})}
            for name, own in ANSWERS.items()
        },
        "ScheduledPrompt": {
            "type": "object",
            "required": ["at_seconds", "prompt"],
            "properties": scheduled,
            "additionalProperties": False,
        },
    }
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = operation(route, method, forms, config)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Helios Serve",
            "version": version("helios-serve"),
            "summary": "Videos over HTTP, watched while they are made",
            "description": VERSIONING,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {name: {**response_header(name), "required": True} for name in RESPONSE_HEADERS},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "what `helios keys add` printed"},
                "link": {
                    "type": "apiKey",
                    "in": "query",
                    "name": "signature",
                    "description": "with `key` and `expires`, from the query of a video's `share_url`",
                },
            },
        },
    }


def operation(route: Route, method: str, forms: Mapping[str, Schema], config: AppConfig) -> Schema:
    is_open = route.access == "open"
    told: Schema = {
        "operationId": operation_id(route, method),
        "summary": route.summary,
        "parameters": list(parameters(route, forms)),
        "responses": responses(route, method),
        "security": [{name: []} for name in ACCESS[route.access]] + [{}] * (config.keys is None and not is_open),
    }
    if route.body is not None:
        example = example_bodies(config.limits)[route.body]
        content: Schema = {JSON: {"schema": json_body(route.body, forms, route.file), "example": example}}
        flat = {name: value for name, value in example.items() if not isinstance(value, dict)}
        content[FORM] = {"schema": form_body(route.body, forms, route.file)}
        if route.file != "video":  # which is a file there, and of that there is no example
            content[FORM]["example"] = flat
        told["requestBody"] = {"required": True, "content": content}
    return told


def operation_id(route: Route, method: str) -> str:
    """post_videos_extend, from POST /v1/videos/{video_id}/extend."""
    words = re.sub(r"^/v1/", "", route.path).replace("{video_id}", "id")
    return "_".join([method.lower(), *re.findall(r"[a-z0-9]+", words)])


def parameters(route: Route, forms: Mapping[str, Schema]) -> Iterator[Schema]:
    for name in re.findall(r"\{(\w+)\}", route.path):
        schema, description = PARAMETERS_OF_PATHS[name]
        yield {"name": name, "in": "path", "required": True, "schema": schema, "description": description}
    if route.query is not None:
        for name, own in properties(route.query, forms).items():
            description = own.pop("description")
            schema = next((option for option in own.get("anyOf", ()) if option.get("type") != "null"), own)
            yield {"name": name, "in": "query", "schema": schema, "description": description}
    for name in ("X-Request-Id", *route.headers):
        schema, description = REQUEST_HEADERS[name]
        yield {"name": name, "in": "header", "schema": schema, "description": description}


def responses(route: Route, method: str) -> Schema:
    """By status."""
    told: Schema = {}
    for status, answer in route.answers.items():
        if method == "HEAD" and status == 206:  # a Range counts for a GET only
            continue
        told[str(status)] = {
            "description": answer.description,
            "headers": headers_of(("X-Request-Id", *answer.headers), answer.may),
        }
        if answer.content and method != "HEAD":
            told[str(status)]["content"] = {kind: {"schema": schema} for kind, schema in answer.content.items()}
    for status in route.statuses:
        if method == "HEAD" and status == 416:
            continue
        description, always = REFUSALS[status]
        told[str(status)] = {"description": description, "headers": headers_of(("X-Request-Id", *always), ())}
        if method != "HEAD":
            told[str(status)]["content"] = {JSON: {"schema": ref("Error")}}
    return told


def headers_of(always: Iterable[str], may: Iterable[str]) -> Schema:
    required = {name: {"$ref": f"#/components/headers/{name}"} for name in always}
    return {**required, **{name: response_header(name) for name in may}}


def response_header(name: str) -> Schema:
    schema = {"type": "string", "pattern": "^[0-9]+$"} if name in ("Retry-After", "openai-poll-after-ms") else TEXT
    return {"description": RESPONSE_HEADERS[name], "schema": schema}


class DocumentedMethods:
    """Answers with 405 to a method that a path of the table has not, and names all that it has.

    A router names those of the first of its routes that fits, and takes what is POST alone, such as /v1/videos/stream,
    for a video's id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = methods_of(scope["path"]) if scope["type"] == "http" else []
        if not allowed or scope["method"] in allowed:
            return await self._app(scope, receive, send)
        names = ", ".join(allowed)
        message = f"the method is {shown(scope['method'])}; allowed: {names}"
        body = error_object(message, 405, None, "method_not_allowed")
        await JSONResponse(body, 405, {"Allow": names})(scope, receive, send)


def methods_of(path: str) -> list[str]:
    """Of the routes that a path belongs to; those without parameters come before others."""
    routes = [route for route, pattern in PATTERNS if pattern.fullmatch(path)]
    plain = [route for route in routes if "{" not in route.path]
    return [method for route in plain or routes for method in route.methods]


def install_contract(app: FastAPI, config: AppConfig, cards: Sequence[ModelCard]) -> None:
    """`GET /openapi.json`; and what is not in the table is refused."""
    document = cache(partial(contract, config, cards))  # when it is first asked for: no start has to wait for it
    app.add_middleware(DocumentedMethods)

    @app.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(document())
