"""What travels between the deployments and what is stored: metadata only, no tensors, no torch.

One video has one `VideoRequestRecord`, written before its creator hears of it, and one `VideoRecord`, whose stored
form is the commit: a chunk exists for viewers once the record that names it is in the store.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deployments.scheduling import Priority
from helios_core.spec import VideoSpec

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
CheckedPart = Literal["prompt", "input", "frames"]
CheckOutcome = Literal["allowed", "blocked", "refused", "let_through"]


class Record(BaseModel):
    # What could not be validated may hold a prompt, which has no place in a log.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class StoredObject(Record):
    """A stored object by its key, with what is needed to check it. `bytes`: its length."""

    key: str
    bytes: int
    sha256: str


class Call(Record):
    """One call to a replica, for spans and logs. `traceparent`: the span that it is a part of; `attempt`: from 0."""

    video_id: str
    traceparent: str | None
    attempt: int = 0


class Timings(Record):
    """Seconds of one chunk's life, as the replicas measured them, and when its sampling began (Unix time)."""

    sample_started_at: float
    sample_seconds: float
    decode_seconds: float
    encode_seconds: float
    store_seconds: float


class Run(Record):
    """Under what the chunks of a video were made, from one on. `version`: of this package; `device`: the sampler's;
    `approximations`: what it computed less exactly, by Approximations.names."""

    version: str
    device: str
    approximations: tuple[str, ...] = ()
    from_chunk: int


class Encoded(Record):
    """What a text encoder says of a prompt: where its embeddings are stored, and the seconds that they took."""

    stored: StoredObject
    seconds: float


class SampleReport(Record):
    """What a sampler says of the chunk that it made: transformer steps run, seconds, when it began (Unix time), and on
    what it runs."""

    steps: int
    started_at: float
    seconds: float
    run: Run | None = None  # None: no sampler made it


class ChunkRecord(Record):
    """One committed chunk: its fragment, the state after it, and how it came about."""

    index: int
    frames: int
    steps: int  # transformer steps that were run
    fragment: StoredObject
    state: StoredObject
    timings: Timings


class Check(Record):
    """What came of one safety check. `outcome`: what the hook said or, if it failed, what follows from that;
    `category`: why it is blocked."""

    part: CheckedPart
    outcome: CheckOutcome
    category: str | None
    seconds: float


class Rendered(Record):
    """What a VAE decoder says of the chunk that it decoded, encoded and stored."""

    init: StoredObject
    chunk: ChunkRecord
    thumbnail: StoredObject | None = None  # with chunk 0
    check: Check | None = None  # None: there is no hook


class VideoError(Record):
    """Why a video failed: `code` is stable, `message` is for people."""

    code: str
    message: str


class Origin(Record):
    """The video that another one comes from. `chunks`: how many of its chunks the new one begins with."""

    how: Literal["extend", "fork", "remix"]
    video_id: str
    chunks: int = 0


class VideoRequestRecord(Record):
    """What was asked for: videos/{id}/request.json.

    `input`: the image or video of an image- or video-to-video.
    `traceparent`: the W3C context of the request that asked, on which every span of the video hangs.
    `while_watched`: the video is made only as long as somebody watches it.
    `lead_seconds`: so far ahead of its playback it may be made; None: as far as it goes.
    `fingerprint`: of the model that was to make it, as the Graph tells it.
    `owner`: whose it is, as the file of keys has it, nobody's where there are no keys; between owners turns are taken
    first.
    `deadline_s`: so many seconds after `created_at` it ends as failed, if it has not ended by then; None: it may take
    as long as it takes.
    """

    id: str
    created_at: float  # Unix time
    spec: VideoSpec
    input: StoredObject | None = None
    origin: Origin | None = None
    traceparent: str | None = None
    while_watched: bool = False
    lead_seconds: float | None = None
    fingerprint: str | None = None
    owner: str = ""
    priority: Priority = "realtime"
    deadline_s: float | None = None


class Start(Record):
    """Where a video goes on from: `copied` chunks are another one's, and `state` has seen `seen` of them.

    `seen` is one more than `copied` if the other video's last fragment was cut: it is then rendered again, uncut.
    """

    copied: int
    seen: int
    state: StoredObject


class VideoRecord(Record):
    """Where a video stands: videos/{id}/record.t{term}.json. The highest term counts.

    `spec`: the one that was asked for, with the changes of the prompt since; that of an open-ended video has its length
    once it is completed. `paused`: its next chunk waits until somebody wants it. `owner`, `priority`, `deadline_s`: the
    request's.
    """

    id: str
    created_at: float  # Unix time
    spec: VideoSpec
    origin: Origin | None = None
    start: Start | None = None
    status: Status = "queued"
    init: StoredObject | None = None  # with the first chunk
    thumbnail: StoredObject | None = None  # with chunk 0
    chunks: tuple[ChunkRecord, ...] = ()
    runs: tuple[Run, ...] = ()
    completed_at: float | None = None
    error: VideoError | None = None
    paused: bool = False
    owner: str = ""
    priority: Priority = "realtime"
    deadline_s: float | None = None

    def with_chunk(self, rendered: Rendered, run: Run | None) -> VideoRecord:
        """This record with its next chunk, which was made under `run`."""
        same = self.runs[-1].model_copy(update={"from_chunk": rendered.chunk.index}) if self.runs else None
        return self.model_copy(
            update={
                "init": rendered.init,
                "thumbnail": rendered.thumbnail or self.thumbnail,
                "chunks": (*self.chunks, rendered.chunk),
                "runs": self.runs if run in (None, same) else (*self.runs, run),
            }
        )

    @property
    def ended(self) -> bool:
        return has_ended(self.status)

    @property
    def own_chunks(self) -> tuple[ChunkRecord, ...]:
        """Those that were made for this video, and not copied."""
        return self.chunks[self.start.copied if self.start else 0 :]


class Usage(Record):
    """What a video took so far. `chunks`: those that are there; the rest is of those that were made for this video.
    `started_at`: when the sampling of the first one began (Unix time)."""

    chunks: int
    steps: int
    sampler_seconds: float
    started_at: float | None


class VideoStatus(Record):
    """Where a video stands at this moment: its record with the chunks, which may be hundreds, summed up.

    `queue_position`: how many videos get a sampler before it, or a place among those that take turns; None if it waits
    for neither. `estimated_start_at`: when its first chunk may be begun (Unix time), None if it was, or if nobody
    knows; `estimated_completion_at`: when it may be completed.
    """

    id: str
    created_at: float  # Unix time
    spec: VideoSpec
    origin: Origin | None
    status: Status
    completed_at: float | None
    error: VideoError | None
    usage: Usage
    runs: tuple[Run, ...]
    queue_position: int | None
    estimated_start_at: float | None
    estimated_completion_at: float | None
    paused: bool
    owner: str
    priority: Priority
    deadline_s: float | None

    @classmethod
    def of(
        cls,
        record: VideoRecord,
        queue_position: int | None = None,
        estimated_start_at: float | None = None,
        estimated_completion_at: float | None = None,
    ) -> VideoStatus:
        own = record.own_chunks
        return cls(
            id=record.id,
            created_at=record.created_at,
            spec=record.spec,
            origin=record.origin,
            status=record.status,
            completed_at=record.completed_at,
            error=record.error,
            usage=Usage(
                chunks=len(record.chunks),
                steps=sum(chunk.steps for chunk in own),
                sampler_seconds=sum(chunk.timings.sample_seconds for chunk in own),
                started_at=own[0].timings.sample_started_at if own else None,
            ),
            runs=record.runs,
            queue_position=queue_position,
            estimated_start_at=estimated_start_at,
            estimated_completion_at=estimated_completion_at,
            paused=record.paused,
            owner=record.owner,
            priority=record.priority,
            deadline_s=record.deadline_s,
        )

    @property
    def ended(self) -> bool:
        return has_ended(self.status)


class News(Record):
    """What a watcher has not seen yet: the chunks after those that it knows, and how the video stands. `spec`: as a
    VideoRecord's."""

    status: Status
    spec: VideoSpec
    init: StoredObject | None
    chunks: tuple[ChunkRecord, ...]
    error: VideoError | None

    @classmethod
    def of(cls, record: VideoRecord, seen: int) -> News:
        """Of a video, for who knows its first `seen` chunks."""
        chunks = record.chunks[seen:]
        return cls(status=record.status, spec=record.spec, init=record.init, chunks=chunks, error=record.error)

    @property
    def ended(self) -> bool:
        return has_ended(self.status)


class Page(Record):
    """Some of the videos, in order, and whether there are more after them."""

    videos: tuple[VideoStatus, ...]
    has_more: bool


def has_ended(status: Status) -> bool:
    return status in ("completed", "failed", "cancelled")
