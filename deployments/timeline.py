"""Where the time of one video went: a trace file (deployments/tracing.py), drawn as bars over one axis of time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import AliasPath, AwareDatetime, BaseModel, Field, ValidationError
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from helios_core.errors import HeliosError, InvalidInput

# span ▸ its character and style, in the order in which they are painted: a later one covers an earlier one
MARKS = {
    "chunk": ("─", "bright_black"),
    "encode prompt": ("▒", "blue"),
    "encode input": ("▞", "blue"),
    "wait": ("░", "yellow"),
    "sample": ("█", "cyan"),
    "render": ("▓", "magenta"),
    "commit": ("┃", "green"),
    "lost": ("✗", "bold red"),
}
CHUNK_PARTS = ("wait", "sample", "render", "commit")
RENDER_PARTS = ("decode", "encode", "store")
WIDE = 100  # columns of a terminal that has room for the parts of rendering

logger = logging.getLogger(__name__)


class TraceFileError(HeliosError):
    """A trace file that cannot be read. The message names the file and, where there is one, the line."""

    code = "trace_file_error"


class Span(BaseModel):
    """What the timeline needs of one line of the file."""

    name: str
    trace: str = Field(validation_alias=AliasPath("context", "trace_id"))
    id: str = Field(validation_alias=AliasPath("context", "span_id"))
    parent: str | None = Field(validation_alias="parent_id")
    begin: AwareDatetime = Field(validation_alias="start_time")
    end: AwareDatetime = Field(validation_alias="end_time")
    code: Literal["UNSET", "OK", "ERROR"] = Field(validation_alias=AliasPath("status", "status_code"))
    video_id: str | None = Field(None, validation_alias=AliasPath("attributes", "video_id"))
    status: str | None = Field(None, validation_alias=AliasPath("attributes", "status"))
    chunk: int | None = Field(None, validation_alias=AliasPath("attributes", "chunk"))
    attempt: int = Field(0, validation_alias=AliasPath("attributes", "attempt"))
    cancelled: bool = Field(False, validation_alias=AliasPath("attributes", "cancelled"))

    @property
    def failed(self) -> bool:
        return self.code == "ERROR"

    @property
    def mark(self) -> str:
        """The key of MARKS that it is painted with."""
        if self.name not in MARKS:
            return "chunk"  # a span that only holds others
        return "lost" if self.failed and self.name != "chunk" else self.name


@dataclass(frozen=True)
class Video:
    """One video and its spans, in the order in which they began."""

    id: str
    spans: list[Span]

    def after(self, time: AwareDatetime) -> float:
        """Seconds from the video's beginning to `time`."""
        return (time - self.spans[0].begin).total_seconds()

    @cached_property
    def seconds(self) -> float:
        return max(self.after(span.end) for span in self.spans)


def read(path: Path) -> list[Span]:
    """The spans in a trace file. A last line that a kill cut off is left out, and logged.

    Raises TraceFileError naming the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TraceFileError(f"{path}: not readable: {error.strerror}") from None
    spans = []
    for number, line in enumerate(lines, 1):
        try:
            spans.append(Span.model_validate_json(line))
        except ValidationError as error:
            if number < len(lines):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else "not a JSON object"
                raise TraceFileError(f"{path}: line {number} is not a span: {why}") from None
            if line:  # else it is the nothing after the last newline
                logger.warning("%s: line %d is cut off and left out", path, number)
    if not any(span.video_id for span in spans):
        raise TraceFileError(f"{path}: none of its {len(spans)} spans is of a video")
    return spans


def pick(spans: Iterable[Span], video_id: str | None = None) -> Video:
    """The named video, or the last one that began. Raises InvalidInput for an unknown id."""
    spans = sorted(spans, key=lambda span: span.begin)
    parents = {span.id: span.parent for span in spans}
    owners = {span.id: span.video_id for span in spans if span.video_id}
    for span in spans:
        if span.name == "sample" and span.parent and span.video_id:
            owners.setdefault(span.parent, span.video_id)  # the chunk's own span is missing if the Director was killed
    videos: dict[str, list[Span]] = {}
    for span in spans:
        at: str | None = span.id
        while at is not None and at not in owners:
            at = parents.get(at)
        if owner := owners.get(at or ""):
            videos.setdefault(owner, []).append(span)
    known = list(videos)
    video_id = known[-1] if video_id is None else video_id
    if video_id not in videos:
        shown = ", ".join(known if len(known) <= 5 else [*known[:2], "…", *known[-2:]])
        raise InvalidInput("video", video_id, f"the {len(known)} in this file: {shown}")
    return Video(video_id, videos[video_id])


class Bar:
    """Spans of a video as one line of characters, as wide as there is room. The line's length is the video's."""

    def __init__(self, video: Video, spans: Iterable[Span]) -> None:
        order = list(MARKS)
        self.video, self.spans = video, sorted(spans, key=lambda span: order.index(span.mark))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [(" ", "")] * options.max_width
        scale = (len(cells) - 1) / (self.video.seconds or 1)
        for span in self.spans:
            first = round(self.video.after(span.begin) * scale)
            last = max(math.ceil(self.video.after(span.end) * scale), first + 1)  # even the shortest is seen
            cells[first:last] = [MARKS[span.mark]] * (last - first)
        yield Text.assemble(*cells)


def draw(console: Console, video: Video) -> None:
    """Draws the video: what came of it, a line per chunk, the legend, and totals. Every number is in seconds."""
    parents = {span.id: span.parent for span in video.spans}
    chunks: dict[str | None, list[Span]] = {}  # id of a chunk's span, which may be missing ▸ it and all that it holds
    for span in video.spans:
        if span.name == "chunk":
            chunks.setdefault(span.id, []).append(span)
        elif span.name in CHUNK_PARTS:
            chunks.setdefault(span.parent, []).append(span)
        elif span.name in RENDER_PARTS:
            chunks.setdefault(parents.get(span.parent or ""), []).append(span)

    columns = ("wait", "sample", "render", *(RENDER_PARTS if console.width >= WIDE else ()))
    table = Table.grid(padding=(0, 1), expand=True)
    for name in ("", *columns, "done at"):
        table.add_column(justify="right" if name else "left", no_wrap=True)
    table.add_column(ratio=1)
    axis = Table.grid("", "", expand=True)
    axis.columns[0].ratio = 1
    axis.add_row("0", f"{video.seconds:.2f} s")
    table.add_row("", *columns, "done at", axis, style="bold")
    before = ("POST", "encode prompt", "encode input")
    rows = [(name, [span for span in video.spans if span.name.startswith(name)]) for name in before]
    for spans in chunks.values():
        number = next((span.chunk for span in spans if span.chunk is not None), "?")
        rows.append((f"chunk {number}", spans))
    for name, spans in rows:
        lost = sum(span.mark == "lost" for span in spans)
        label = Text.assemble(name, (" " * bool(lost) + "✗" * lost, MARKS["lost"][1]))
        numbers = [f"{total(spans, column):.2f}" if name.startswith("chunk") else "" for column in columns]
        bar = Bar(video, (span for span in spans if span.name not in RENDER_PARTS))
        if spans:
            table.add_row(label, *numbers, outcome(video, spans), bar)

    sums = {name: total(video.spans, name) for name in (*CHUNK_PARTS, *RENDER_PARTS)}
    status = next((span.status for span in video.spans if span.name == "video"), None)
    committed = sum(span.name == "commit" and not span.failed for span in video.spans)
    again = retries(video.spans)
    seen = {span.mark for span in video.spans}
    legend = [name for name in MARKS if name != "chunk" and name in seen]
    for line in (
        f"{video.id}  {status or 'unfinished'}",
        f"trace {video.spans[0].trace.removeprefix('0x')}",
        f"{committed} chunks in {video.seconds:.2f} s, retries: {again}\n",
        table,
        Text("\n") + Text("  ").join(Text.assemble(MARKS[name], " ", name) for name in legend),
        f"sampling {sums['sample']:.2f} s, {sums['sample'] / (video.seconds or 1):.0%} of the time; "
        f"waiting {sums['wait']:.2f} s, committing {sums['commit']:.2f} s",
        f"rendering {sums['render']:.2f} s (decode {sums['decode']:.2f}, encode {sums['encode']:.2f}, "
        f"store {sums['store']:.2f}); retries: {again}",
    ):
        console.print(line, markup=False, highlight=False)


def total(spans: Iterable[Span], name: str) -> float:
    """Seconds of the spans of that name, without those that were lost."""
    return sum((span.end - span.begin).total_seconds() for span in spans if span.name == name and not span.failed)


def outcome(video: Video, spans: list[Span]) -> str:
    """When the work of a row was done, which for a chunk means committed; or what became of it instead."""
    named = {span.name: span for span in spans}
    span = named.get("commit") or named.get("chunk") or spans[-1]
    if span.failed or span.cancelled:
        return "failed" if span.failed else "cancelled"
    return "unfinished" if span.name in ("wait", "sample", "render", *RENDER_PARTS) else f"{video.after(span.end):.2f}"


def retries(spans: Iterable[Span]) -> int:
    """Attempts after the first, and chunks made again. (A lost attempt can have two spans: its own, the Director's.)"""
    attempts = {(span.parent, span.name, span.attempt) for span in spans if span.attempt > 0}
    chunks = [span.chunk for span in spans if span.name == "chunk"]
    return len(attempts) + len(chunks) - len(set(chunks))
