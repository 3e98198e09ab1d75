"""What a request asks for: its body, and what it uploads or refers to, become a Draft of a new video.

`Once` sees to it that a request with an Idempotency-Key asks for one video, however often it is sent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Protocol, TypeVar

from fastapi import Request

from deployments.bodies import Body, on_disk
from deployments.config import AppConfig
from deployments.content import file_bytes, objects_of
from deployments.director import NoSuchVideo
from deployments.errors import RequestError, status_of
from deployments.making import NotPossible
from deployments.records import Origin, StoredObject, VideoStatus
from deployments.scheduling import Priority
from deployments.schemas import CreateVideo, EditVideo, ExtendVideo, ForkVideo, NewVideo, RemixVideo
from deployments.store import Claim, Store, is_video_id, new_video_id
from helios_core.errors import HeliosError, InvalidInput, shown
from helios_core.media.read import MediaInfo, probe
from helios_core.spec import (
    IMAGE_TO_VIDEO,
    TEXT_TO_VIDEO,
    VIDEO_TO_VIDEO,
    ModelCard,
    VideoSpec,
    check_deadline,
    check_lead,
)

# Each is a process that may take 150 MB; its wall time is limited, and so must not be spent on waiting for a core.
PROBES_AT_ONCE = 2

KEY = "Idempotency-Key"
KEY_FORM = re.compile(r"[ -~]{1,255}")

N = TypeVar("N", bound=NewVideo)


@dataclass(frozen=True)
class Media:
    """What a video shall begin with: the field that it came by, where it lies for now, and what it is."""

    field: str
    path: Path
    info: MediaInfo


class NewId(Protocol):
    """Gives the new video's id, if it may be made. It is asked for when nothing is wrong with a request, and before
    anything is stored."""

    async def __call__(self, prompts: Mapping[str, str], media: Media | None = None) -> str:
        """`prompts`: each text ▸ the field that it came by. Raises ContentBlocked or SafetyUnavailable."""
        ...


@dataclass(frozen=True)
class Draft:
    """What a new video shall be, and what it begins with."""

    id: str
    spec: VideoSpec
    priority: Priority
    deadline_s: float | None
    input: StoredObject | None = None
    origin: Origin | None = None
    lead_seconds: float | None = None


class Drafts:
    """One method per way to ask for a video. Each takes the body and what gives the new video's id, some another
    video's id.

    All raise InvalidInput or RequestError for what the client did wrong, NoSuchVideo and NotPossible for the other
    video.
    """

    def __init__(
        self,
        config: AppConfig,
        models: Mapping[str, ModelCard],
        status: Callable[[str], Awaitable[VideoStatus]],
        store: Store,
    ) -> None:
        """`models`: by their ids, the default one first; `status`: how a video stands."""
        self._config, self._models, self._status, self._store = config, models, status, store
        self._probing = asyncio.Semaphore(PROBES_AT_ONCE)

    async def new(self, body: Body, new_id: NewId) -> Draft:
        """A text-to-video, or with a file an image- or video-to-video."""
        fields = self._parsed(body, CreateVideo, "input_reference")
        upload = body.file("input_reference")
        if upload is None:
            spec = self._spec(fields, TEXT_TO_VIDEO)
            video_id = await new_id(_prompts(spec))
            return Draft(video_id, spec, fields.priority, fields.deadline_s, lead_seconds=fields.lead_seconds)
        self._spec(fields, IMAGE_TO_VIDEO)  # what is wrong anyway is said before the file is looked at
        async with on_disk(upload) as path:
            return await self._with_input(fields, "input_reference", path, new_id)

    async def edited(self, body: Body, new_id: NewId, check_owner: Callable[[str], Awaitable[None]]) -> Draft:
        """A video-to-video, in OpenAI's forms: of a file, or of a finished video of this service. `check_owner` raises
        NoSuchVideo for one that is not to be seen."""
        fields = self._parsed(body, EditVideo, "video")
        upload = body.file("video")
        if (upload is None) == (fields.video is None):
            raise InvalidInput("video", None if upload is None else "both", "a file, or the id of a video as {id}")
        longest = {} if "seconds" in fields.model_fields_set else {"seconds": self._config.limits.max_seconds}
        self._spec(fields.model_copy(update=longest), VIDEO_TO_VIDEO)
        if upload is not None:
            async with on_disk(upload) as path:
                return await self._with_input(fields, "video", path, new_id)
        assert fields.video is not None
        with NamedTemporaryFile(prefix="helios-upload-") as file:
            await check_owner(known(fields.video.id))
            source = await self._completed(fields.video.id)
            await self._write_finished(source.id, Path(file.name))
            return await self._with_input(fields, "video", Path(file.name), new_id)

    async def extended(self, body: Body, new_id: NewId, source_id: str) -> Draft:
        more = self._parsed(body, ExtendVideo)
        source = self._served(await self._completed(source_id))
        chunks = source.usage.chunks
        spec = source.spec.extend(more.seconds, chunks, more.prompt, more.transition_chunks, self._config.limits)
        origin = Origin(how="extend", video_id=source_id, chunks=chunks)
        return Draft(await new_id(_prompts(spec, more.prompt)), spec, more.priority, more.deadline_s, origin=origin)

    async def forked(self, body: Body, new_id: NewId, source_id: str) -> Draft:
        other = self._parsed(body, ForkVideo)
        source = self._served(await self._completed(source_id))
        spec = source.spec.fork(
            other.chunk, other.prompt, other.transition_chunks, other.seed, other.seconds, self._config.limits
        )
        origin = Origin(how="fork", video_id=source_id, chunks=other.chunk)
        return Draft(await new_id(_prompts(spec, other.prompt)), spec, other.priority, other.deadline_s, origin=origin)

    async def remixed(self, body: Body, new_id: NewId, source_id: str) -> Draft:
        other = self._parsed(body, RemixVideo)
        source = self._served(await self._status(source_id))
        spec = source.spec.remix(other.prompt, self._config.limits)
        origin = Origin(how="remix", video_id=source_id)
        return Draft(await new_id(_prompts(spec)), spec, other.priority, other.deadline_s, origin=origin)

    def _parsed(self, body: Body, kind: type[N], file: str | None = None) -> N:
        """What `body` has of the fields that every new video may have, checked; the rest of it as `parse` leaves it."""
        fields = body.parse(kind, file)
        check_deadline(fields.deadline_s, self._config.limits)
        return fields

    def _spec(self, fields: CreateVideo, task: str) -> VideoSpec:
        model = next(iter(self._models)) if fields.model is None else fields.model
        if model not in self._models:
            raise no_such_model(model, self._models)
        check_lead(fields.lead_seconds, self._config.limits)
        return fields.request(self._config.limits, task).check(self._models[model])

    async def _with_input(self, fields: CreateVideo, name: str, path: Path, new_id: NewId) -> Draft:
        """A video from the file at `path`, which came as the field `name`: probed, and stored with the video."""
        limits = self._config.uploads
        if (await asyncio.to_thread(path.stat)).st_size > limits.max_bytes:
            message = f"{name} is too large; allowed: {limits.max_bytes} bytes"
            raise RequestError(413, "body_too_large", message, name)
        try:
            async with self._probing:
                info = await probe(path, limits.media_limits())
        except InvalidInput as error:
            raise RequestError(400, error.code, str(InvalidInput(name, error.value, error.allowed)), name) from None
        task = IMAGE_TO_VIDEO if info.kind == "image" else VIDEO_TO_VIDEO
        if isinstance(fields, EditVideo):
            if task != VIDEO_TO_VIDEO:
                raise RequestError(400, "invalid_input", f"{name} is an image; allowed: a video", name)
            if "seconds" not in fields.model_fields_set:  # as long as what it comes from
                fields = fields.model_copy(update={"seconds": min(info.seconds, self._config.limits.max_seconds)})
        spec = self._spec(fields, task)
        video_id = await new_id(_prompts(spec), Media(name, path, info))
        await self._store.prepare(video_id)  # an ingress that dies before the video is accepted leaves it to be removed
        media = await self._store.put_input(video_id, path)
        return Draft(video_id, spec, fields.priority, fields.deadline_s, input=media, lead_seconds=fields.lead_seconds)

    async def _completed(self, video_id: str) -> VideoStatus:
        """How a video stands that has to be completed."""
        status = await self._status(video_id)
        if status.status != "completed":
            raise NotPossible(f"video {video_id} is {status.status}; allowed: a completed video")
        return status

    def _served(self, source: VideoStatus) -> VideoStatus:
        """A video that a new one shall come from, if its model is still there to make that."""
        if source.spec.model not in self._models:
            served = ", ".join(self._models)
            raise NotPossible(f"video {source.id} is of the model {source.spec.model}; allowed: one of {served}")
        return source

    async def _write_finished(self, video_id: str, path: Path) -> None:
        """Puts a finished video's file together."""
        record = await self._store.record(video_id)
        if record is None:
            raise NoSuchVideo(video_id)
        objects = objects_of(record.init, record.chunks)
        with path.open("wb") as file:
            async for data in file_bytes(objects, self._store, 0, sum(item.bytes for item in objects)):
                file.write(data)


def _prompts(spec: VideoSpec, turning_to: str | None = None) -> dict[str, str]:
    """Every text that a video would have ▸ the field that it came by, now or when the video was asked for that it goes
    on from. `turning_to`: the `prompt` of a request that changes another video's."""
    named = {change.prompt: "prompts" for change in spec.prompts}
    named |= {spec.negative_prompt: "negative_prompt", spec.prompt: "prompt"}
    named |= {} if turning_to is None else {turning_to: "prompt"}
    return {text: field for text, field in named.items() if text}


class Once:
    """What one request makes: with the header Idempotency-Key one video, however often it is sent.

    The first of these requests claims the key for its video, as soon as nothing is wrong with what it asks for. The
    others get that video as it then stands, be it failed or cancelled, and `headers` that say so. If the first one died
    before its video was accepted, the next one has it accepted, under the same id. Another request with the same key is
    refused, and so is one whose video was deleted since: what somebody took the trouble to remove does not come back
    because an answer was lost on its way. A key can be used again after 24 h, and at once if it was refused.
    """

    def __init__(self, request: Request, owner: str, store: Store, now: float) -> None:
        """`owner`: whose key it is; `now`: Unix time in seconds. Raises InvalidInput for what is no key."""
        self._route, self._owner, self._store, self._now = request.url.path, owner, store, now
        sent = request.headers.getlist(KEY)
        self._key = ", ".join(sent) if sent else None
        if self._key is not None and not KEY_FORM.fullmatch(self._key):
            raise InvalidInput(KEY, self._key, "1 to 255 printable ASCII characters")
        self._digest = ""
        self._claim: Claim | None = None
        self.headers: dict[str, str] = {}

    async def claimed(self) -> bool:
        """Whether a request with its key was sent before."""
        return self._key is not None and await self._store.claimed(self._owner, self._key, self._now) is not None

    async def earlier(self, body: Body, status: Callable[[str], Awaitable[VideoStatus]]) -> VideoStatus | None:
        """The video that this very request asked for when it was sent before; None if it did not, or if nothing came of
        it. Raises RequestError 409 for another request, or if the video was deleted."""
        if self._key is None:
            return None
        self._digest = await body.digest(self._route)
        claim = await self._store.claimed(self._owner, self._key, self._now)
        if claim is None:
            return None
        self._take(claim)
        try:
            video = await status(claim.video_id)
        except NoSuchVideo:
            if claim.outcome != "accepted":
                return None
            message = f"{KEY} {shown(self._key)} made video {claim.video_id}, which was deleted; allowed: a new key"
            raise RequestError(409, "video_deleted", message, KEY) from None
        if claim.outcome != "accepted":
            await self._store.settle(self._owner, self._key, claim, "accepted")
        return video

    async def new_id(self) -> str:
        """The id of the video to make. Raises RequestError 409 for another request than the key is claimed for."""
        if self._claim is not None:
            return self._claim.video_id
        video_id = new_video_id(self._now)
        if self._key is None:
            return video_id
        claim = await self._store.claim(self._owner, self._key, self._digest, video_id, self._now)
        self._take(claim, own=claim.video_id == video_id)
        return claim.video_id

    async def create(self, create: Callable[[bool], Awaitable[VideoStatus]]) -> VideoStatus:
        """What the Director's `create` answers, who is told whether it may have been asked before. It is noted with the
        claim."""
        if self._key is None or self._claim is None:
            return await create(False)
        try:
            status = await create(True)
        except HeliosError as error:
            if status_of(error) < 500:
                await self._store.settle(self._owner, self._key, self._claim, "refused")
            raise
        await self._store.settle(self._owner, self._key, self._claim, "accepted")
        return status

    def _take(self, claim: Claim, own: bool = False) -> None:
        if claim.digest != self._digest:
            message = f"{KEY} {shown(self._key)} was used for another request; allowed: the same one, or a new key"
            raise RequestError(409, "idempotency_key_reused", message, KEY)
        self._claim = claim
        if not own:
            self.headers["Idempotent-Replayed"] = "true"


def no_such_model(model: str, served: Iterable[str]) -> RequestError:
    return RequestError(404, "model_not_found", f"model is {model!r:.80}; served: {', '.join(served)}", "model")


def known(video_id: str) -> str:
    """The id, if it has the form of one. No other text from a client gets near the store."""
    if not is_video_id(video_id):
        raise NoSuchVideo(video_id)
    return video_id
