"""Spans: what they hold, where they go, and what `helios trace` makes of them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, use_span
from rich.console import Console

from deployments import timeline
from deployments.cli import main
from deployments.timeline import TraceFileError, pick, read
from deployments.tracing import Tracer, trace_id, traceparent
from helios_core.errors import Cancelled, InvalidInput

ROOT = Path(__file__).parents[2]
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
EPOCH = 1_760_000_000  # Unix time at which the videos of these tests begin


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "spans.jsonl"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ── one span ─────────────────────────────────────────────────────────────────


def test_a_span_is_a_line_with_all_that_it_was_given(file: Path) -> None:
    with closing(Tracer("ingress", str(file))) as tracer:
        span = tracer.start("POST", None, start_time=EPOCH * 10**9, kind=SpanKind.SERVER, video_id="a", chunk=3)
        span.add_event("step", {"stage": 1, "step": 2})
        assert file.read_bytes() == b""  # it has not ended
        span.end((EPOCH + 2) * 10**9)
        [line] = lines(file)  # before the tracer is closed
    assert (line["name"], line["kind"], line["parent_id"]) == ("POST", "SpanKind.SERVER", None)
    assert (line["start_time"], line["end_time"]) == ("2025-10-09T08:53:20.000000Z", "2025-10-09T08:53:22.000000Z")
    assert line["attributes"] == {"video_id": "a", "chunk": 3}
    assert [(event["name"], event["attributes"]) for event in line["events"]] == [("step", {"stage": 1, "step": 2})]
    about = line["resource"]["attributes"]
    assert (about["service.name"], about["helios.component"], about["process.pid"]) == (
        "helios",
        "ingress",
        os.getpid(),
    )
    assert traceparent(span) == f"00-{line['context']['trace_id'][2:]}-{line['context']['span_id'][2:]}-03"


def test_parents_cross_tracers_and_a_caller(file: Path) -> None:
    ingress, director = Tracer("ingress", str(file)), Tracer("director", str(file))
    with ingress.span("outer", CALLER) as outer, director.span("inner", traceparent(outer)) as inner:
        with ingress.span("root", None) as root:  # inside the others, and yet none of theirs
            pass
    ingress.close()
    with director.span("later", traceparent(inner)):  # one tracer's end is not another's
        pass
    director.close()
    by_name = {line["name"]: line for line in lines(file)}
    ids = {name: line["context"]["span_id"] for name, line in by_name.items()}
    parents = {name: line["parent_id"] for name, line in by_name.items()}
    assert parents == {"outer": "0x00f067aa0ba902b7", "inner": ids["outer"], "root": None, "later": ids["inner"]}
    assert {trace_id(traceparent(span)) for span in (outer, inner)} == {trace_id(CALLER)}
    assert trace_id(traceparent(root)) != trace_id(CALLER)
    components = {name: line["resource"]["attributes"]["helios.component"] for name, line in by_name.items()}
    assert components == {"outer": "ingress", "inner": "director", "root": "ingress", "later": "director"}


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "a video, please",
        CALLER.upper(),
        CALLER[:-1],
        CALLER + "-more",
        "ff" + CALLER[2:],
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
    ],
)
def test_an_invalid_parent_is_ignored(file: Path, parent: str) -> None:
    with closing(Tracer("ingress", str(file))) as tracer, tracer.span("a", parent) as span:
        pass
    assert [line["parent_id"] for line in lines(file)] == [None]
    assert trace_id(traceparent(span)) != trace_id(CALLER)


def test_a_caller_that_does_not_sample_gets_ids_and_no_spans(file: Path) -> None:
    ingress, director = Tracer("ingress", str(file)), Tracer("director", str(file))
    with ingress.span("outer", CALLER[:-2] + "00") as outer, director.span("inner", traceparent(outer)) as inner:
        inner.add_event("step")
    assert file.read_bytes() == b""
    assert traceparent(inner) == f"00-{trace_id(CALLER)}-{inner.get_span_context().span_id:016x}-00"
    assert len({traceparent(outer), traceparent(inner), CALLER[:-2] + "00"}) == 3


def test_without_a_destination_spans_still_have_ids() -> None:
    with closing(Tracer("director")) as tracer:
        spans = [tracer.start("a", None) for _ in range(2)]
    for span in spans:
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", traceparent(span))
    assert len({trace_id(traceparent(span)) for span in spans} - {"0" * 32}) == 2


def test_an_error_is_told_and_raised(file: Path) -> None:
    with closing(Tracer("sampler", str(file))) as tracer, pytest.raises(ZeroDivisionError):
        with tracer.span("sample", None):
            raise ZeroDivisionError("no such step")
    [line] = lines(file)
    assert line["status"] == {"status_code": "ERROR", "description": "ZeroDivisionError: no such step"}
    [event] = line["events"]
    assert (event["name"], event["attributes"]["exception.message"]) == ("exception", "no such step")
    assert "cancelled" not in line["attributes"]


async def cancelled_task(tracer: Tracer) -> None:
    began = asyncio.Event()

    async def work() -> None:
        with tracer.span("work", None):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def closed_stream(tracer: Tracer) -> None:
    async def stream() -> AsyncIterator[int]:
        with tracer.span("work", None):
            yield 1
            raise AssertionError("not to be asked for more")

    numbers = stream()
    assert await anext(numbers) == 1
    await numbers.aclose()  # type: ignore[attr-defined]


async def stopped_work(tracer: Tracer) -> None:
    with pytest.raises(Cancelled), tracer.span("work", None):
        raise Cancelled("chunk 3 was stopped in stage 1")


@pytest.mark.parametrize("stop", [cancelled_task, closed_stream, stopped_work])
async def test_being_cancelled_is_no_error(file: Path, stop: Callable[[Tracer], Any]) -> None:
    with closing(Tracer("director", str(file))) as tracer:
        await stop(tracer)
    [line] = lines(file)
    assert line["status"] == {"status_code": "UNSET"}
    assert line["attributes"] == {"cancelled": True}
    assert line["events"] == []


# ── where they go ────────────────────────────────────────────────────────────


def append_and_die(file: str, worker: int, barrier: Any) -> None:
    tracer = Tracer(f"worker {worker}", file)
    barrier.wait()
    for number in range(200):
        with tracer.span("sample", None, number=number) as span:
            for step in range(150):
                span.add_event("step", {"stage": step // 50, "step": step % 50})
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_append_at_once_and_are_killed_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    workers = [context.Process(target=append_and_die, args=(str(file), k, barrier)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 4
    spans = lines(file)
    found = {(span["resource"]["attributes"]["helios.component"], span["attributes"]["number"]) for span in spans}
    assert found == {(f"worker {k}", number) for k in range(4) for number in range(200)}
    assert len(spans) == 800
    assert {len(span["events"]) for span in spans} == {150}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """(URL of an OpenTelemetry collector, what it has received: path and request)"""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("variable", "given", "path"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "", "/v1/traces"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "/here", "/here"),
    ],
)
def test_a_collector_receives_what_the_file_does(
    collector: Any, monkeypatch: pytest.MonkeyPatch, file: Path, variable: str, given: str, path: str
) -> None:
    url, received = collector
    monkeypatch.setenv(variable, url + given)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracer = Tracer("sampler", str(file))
    with tracer.span("sample", CALLER, chunk=7) as span:
        span.add_event("step", {"stage": 2})
    tracer.close()
    tracer.close()
    [(at, request)] = received
    [resource] = request.resource_spans
    [exported] = resource.scope_spans[0].spans
    assert at == path
    assert {item.key: item.value.string_value for item in resource.resource.attributes}["helios.component"] == "sampler"
    assert (exported.name, exported.attributes[0].value.int_value) == ("sample", 7)
    assert (exported.trace_id.hex(), exported.parent_span_id.hex()) == (trace_id(CALLER), "00f067aa0ba902b7")
    [line] = lines(file)
    assert line["context"]["span_id"] == "0x" + exported.span_id.hex()


def test_nothing_is_global_and_nothing_heavy_is_imported(file: Path) -> None:
    code = f"""
import sys
from opentelemetry import trace
from deployments.tracing import Tracer
tracer = Tracer("director", {str(file)!r})
with tracer.span("ours", None):
    assert trace.get_current_span() is trace.INVALID_SPAN
    with trace.get_tracer("theirs").start_as_current_span("theirs") as theirs:
        assert not theirs.is_recording()
assert trace._TRACER_PROVIDER is None
assert not {{"ray", "torch", "fastapi"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert [line["name"] for line in lines(file)] == ["ours"]


def test_a_span_of_others_is_no_parent(file: Path) -> None:
    with closing(Tracer("others")) as others, closing(Tracer("director", str(file))) as tracer:
        with use_span(others.start("theirs", None)):
            assert get_current_span().is_recording()
            tracer.start("ours", None).end()
    assert [line["parent_id"] for line in lines(file)] == [None]


# ── the timeline ─────────────────────────────────────────────────────────────


class Film:
    """Writes the spans of videos as the service does. Times are seconds after EPOCH."""

    def __init__(self, file: Path) -> None:
        names = ("ingress", "director", "text_encoder", "sampler", "vae_decoder")
        self.tracers = {name: Tracer(name, str(file)) for name in names}

    def add(
        self, component: str, name: str, parent: str | None, begin: float, end: float | None, **attributes: Any
    ) -> str:
        """Its traceparent. `end` None: it never ended, as with a process that was killed."""
        span = self.tracers[component].start(name, parent, start_time=round((EPOCH + begin) * 1e9), **attributes)
        if attributes.get("lost"):
            span.set_status(StatusCode.ERROR, "ActorDiedError")
        if end is not None:
            span.end(round((EPOCH + end) * 1e9))
        return traceparent(span)

    def post(self, video_id: str, at: float, parent: str | None = None) -> str:
        root = self.add("ingress", "POST /v1/videos", parent, at, at + 0.1, video_id=video_id)
        self.add("text_encoder", "encode prompt", root, at + 0.1, at + 1, video_id=video_id, attempt=0)
        return root

    def made(self, parent: str, video_id: str, k: int, at: float, attempt: int = 0) -> None:
        """A chunk's way from a wait at `at` to its commit 4 s later, without the span of the chunk itself."""
        self.add("director", "wait", parent, at, at + 0.5)
        self.add("sampler", "sample", parent, at + 0.5, at + 2.5, video_id=video_id, chunk=k, attempt=attempt)
        render = self.add("vae_decoder", "render", parent, at + 2.5, at + 3.75, attempt=0)
        for name, begin, end in (("decode", 2.5, 3.25), ("encode", 3.25, 3.5), ("store", 3.5, 3.75)):
            self.add("vae_decoder", name, render, at + begin, at + end)
        self.add("director", "commit", parent, at + 3.75, at + 4)

    def chunk(self, root: str, video_id: str, k: int, at: float) -> None:
        self.made(self.add("director", "chunk", root, at, at + 4, video_id=video_id, chunk=k), video_id, k, at)

    def video(self, video_id: str, chunks: int, at: float = 0, parent: str | None = None) -> None:
        root = self.post(video_id, at, parent)
        for k in range(chunks):
            self.chunk(root, video_id, k, at + 1 + 4 * k)
        end = at + 1 + 4 * chunks
        self.add("director", "video", root, at + 0.05, end, video_id=video_id, status="completed", chunks=chunks)


@pytest.fixture
def film(file: Path) -> Film:
    return Film(file)


def drawn(file: Path, video_id: str | None = None, width: int = 80) -> list[str]:
    output = StringIO()
    timeline.draw(Console(file=output, width=width), pick(read(file), video_id))
    text = [line.rstrip() for line in output.getvalue().splitlines()]
    assert max(map(len, text)) <= width
    return text


def lost_sampler(film: Film) -> None:
    """A video of four chunks; the replica that sampled the second was killed after two seconds. At 80 columns a cell of
    its bars is half a second."""
    root = film.post("video_a", 0, CALLER)
    film.chunk(root, "video_a", 0, 1)
    chunk = film.add("director", "chunk", root, 5, 11, video_id="video_a", chunk=1)
    film.add("director", "sample", chunk, 5, 7, video_id="video_a", chunk=1, attempt=0, lost=True)
    film.made(chunk, "video_a", 1, 7, attempt=1)
    film.chunk(root, "video_a", 2, 11)
    film.chunk(root, "video_a", 3, 15)
    film.add("director", "video", root, 0.05, 19, video_id="video_a", status="completed", chunks=4)


def test_a_video_with_a_retry_at_80_columns(film: Film, file: Path) -> None:
    lost_sampler(film)
    assert drawn(file) == [
        "video_a  completed",
        f"trace {trace_id(CALLER)}",
        "4 chunks in 19.00 s, retries: 1",
        "",
        "              wait sample render done at 0                               19.00 s",
        "POST                                0.10 ─",
        "encode prompt                       1.00 ▒▒",
        "chunk 0       0.50   2.00   1.25    5.00   ░████▓▓▓┃",
        "chunk 1 ✗     0.50   2.00   1.25   11.00           ✗✗✗✗░████▓▓▓┃",
        "chunk 2       0.50   2.00   1.25   15.00                       ░████▓▓▓┃",
        "chunk 3       0.50   2.00   1.25   19.00                               ░████▓▓▓┃",
        "",
        "▒ encode prompt  ░ wait  █ sample  ▓ render  ┃ commit  ✗ lost",
        "sampling 8.00 s, 42% of the time; waiting 2.00 s, committing 1.00 s",
        "rendering 5.00 s (decode 3.00, encode 1.00, store 1.00); retries: 1",
    ]


def test_a_wide_terminal_has_the_parts_of_rendering(film: Film, file: Path) -> None:
    lost_sampler(film)
    text = drawn(file, width=120)
    assert text[4].split() == ["wait", "sample", "render", "decode", "encode", "store", "done", "at", "0", "19.00", "s"]
    [row] = [line.split() for line in text if line.startswith("chunk 1")]
    assert row[:10] == ["chunk", "1", "✗", "0.50", "2.00", "1.25", "0.75", "0.25", "0.25", "11.00"]
    assert re.fullmatch("✗+░+█+▓+┃+", row[10])


def test_colour_is_only_for_terminals_that_want_it(film: Film, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost_sampler(film)
    plain, coloured = StringIO(), StringIO()
    video = pick(read(file))
    timeline.draw(Console(file=coloured, width=80, force_terminal=True, color_system="standard", no_color=False), video)
    timeline.draw(Console(file=plain, width=80, force_terminal=True, color_system="standard", no_color=True), video)
    assert "\x1b[1;31m✗" in coloured.getvalue()
    assert "\x1b[1;31m" not in plain.getvalue()
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured.getvalue()) == re.sub("\x1b\\[[0-9;]*m", "", plain.getvalue())


def test_the_last_video_that_began_unless_one_is_named(film: Film, file: Path) -> None:
    film.video("video_b", 1, at=100, parent=CALLER)
    film.video("video_a", 2, at=0, parent=CALLER)  # written later, begun earlier; in the same trace
    assert drawn(file)[:3] == ["video_b  completed", f"trace {trace_id(CALLER)}", "1 chunks in 5.00 s, retries: 0"]
    assert drawn(file, "video_a")[:3:2] == ["video_a  completed", "2 chunks in 9.00 s, retries: 0"]


def test_a_chunk_whose_input_was_lost_is_drawn_twice(film: Film, file: Path) -> None:
    root = film.post("video_a", 0)
    lost = film.add("director", "chunk", root, 1, 3, video_id="video_a", chunk=0, lost=True)
    film.add("director", "wait", lost, 1, 2)
    film.chunk(root, "video_a", 0, 3)
    text = drawn(file)
    assert [line.split()[:6] for line in text if line.startswith("chunk")] == [
        ["chunk", "0", "1.00", "0.00", "0.00", "failed"],
        ["chunk", "0", "0.50", "2.00", "1.25", "7.00"],
    ]
    assert text[2] == "1 chunks in 7.00 s, retries: 1"


def test_a_video_whose_director_was_killed(film: Film, file: Path) -> None:
    root = film.post("video_a", 0)
    film.video("video_b", 1, at=-50)
    film.chunk(root, "video_a", 0, 1)
    chunk = film.add("director", "chunk", root, 5, None, video_id="video_a", chunk=1)
    film.add("sampler", "sample", chunk, 5, 7, video_id="video_a", chunk=1, attempt=0)
    render = film.add("vae_decoder", "render", chunk, 7, 9, attempt=0)
    film.add("vae_decoder", "decode", render, 7, 8)
    text = drawn(file, width=120)
    assert text[0] == "video_a  unfinished"
    assert text[2] == "1 chunks in 9.00 s, retries: 0"
    [row] = [line.split() for line in text if line.startswith("chunk 1")]
    assert row[:9] == ["chunk", "1", "0.00", "2.00", "2.00", "1.00", "0.00", "0.00", "unfinished"]


def test_a_cancelled_chunk(film: Film, file: Path) -> None:
    root = film.post("video_a", 0)
    chunk = film.add("director", "chunk", root, 1, 3, video_id="video_a", chunk=0, cancelled=True)
    film.add("director", "wait", chunk, 1, 2)
    film.add("director", "video", root, 0, 3, video_id="video_a", status="cancelled", chunks=0)
    text = drawn(file)
    assert text[0] == "video_a  cancelled"
    [row] = [line.split() for line in text if line.startswith("chunk 0")]
    assert row[:6] == ["chunk", "0", "1.00", "0.00", "0.00", "cancelled"]


def test_a_long_video_has_a_line_per_chunk(film: Film, file: Path) -> None:
    film.video("video_a", 437)
    rows = [line for line in drawn(file) if re.match("chunk [0-9]", line)]
    assert [int(row.split()[1]) for row in rows] == list(range(437))
    ends = [len(row) for row in rows]
    assert ends == sorted(ends)  # a staircase
    assert ends[-1] == 80


# ── files that are not as they should be ─────────────────────────────────────


@pytest.mark.parametrize("cut", [1, 200])
def test_a_cut_off_last_line_is_left_out_and_told(
    film: Film, file: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    film.video("video_a", 1)
    whole = file.read_bytes()
    spans = len(whole.splitlines())
    file.write_bytes(whole + whole.splitlines()[0][:-cut])
    assert len(read(file)) == spans
    assert caplog.messages == [f"{file}: line {spans + 1} is cut off and left out"]
    caplog.clear()
    file.write_bytes(whole[:-1])  # the newline alone is missing
    assert len(read(file)) == spans
    assert caplog.messages == []


BAD_LINES = {
    "text": (b"hello", "line 2 is not a span: not a JSON object"),
    "bytes": (b"\xff\x00", "line 2 is not a span: not a JSON object"),
    "nothing": (b"", "line 2 is not a span: not a JSON object"),
    "another shape": (b"[1]", "line 2 is not a span: not a JSON object"),
    "another object": (b"{}", "line 2 is not a span: name: Field required"),
    "a broken time": (None, "line 2 is not a span: start_time: "),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_span_is_named(film: Film, file: Path, name: str) -> None:
    film.video("video_a", 1)
    first, *rest = file.read_bytes().splitlines(keepends=True)
    bad, words = BAD_LINES[name]
    bad = first.replace(b'"start_time": "2025', b'"start_time": "soon').strip() if bad is None else bad
    file.write_bytes(first + bad + b"\n" + b"".join(rest))
    with pytest.raises(TraceFileError, match=re.escape(f"{file}: {words}")):
        read(file)


def test_files_without_a_video_are_refused(file: Path) -> None:
    with pytest.raises(TraceFileError, match=f"{file}: not readable: No such file"):
        read(file)
    with pytest.raises(TraceFileError, match=f"{file.parent}: not readable: Is a directory"):
        read(file.parent)
    with closing(Tracer("director", str(file))) as tracer:
        with pytest.raises(TraceFileError, match=f"{file}: none of its 0 spans is of a video"):
            read(file)
        tracer.start("startup", None).end()
    with pytest.raises(TraceFileError, match=f"{file}: none of its 1 spans is of a video"):
        read(file)


def test_an_unknown_video_is_refused_with_those_that_are_there(film: Film, file: Path) -> None:
    for number in range(3):
        film.video(f"video_{number}", 1, at=10 * number)
    with pytest.raises(InvalidInput, match=r"video is 'none'; allowed: the 3 in this file: video_0, video_1, video_2$"):
        pick(read(file), "none")
    for number in range(3, 100):
        film.video(f"video_{number}", 1, at=10 * number)
    with pytest.raises(InvalidInput, match=r"the 100 in this file: video_0, video_1, …, video_98, video_99$"):
        pick(read(file), "none")


# ── the command line ─────────────────────────────────────────────────────────


def helios(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["helios", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_trace_draws(film: Film, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    film.video("video_a", 2)
    film.video("video_b", 1, at=100)
    monkeypatch.setenv("COLUMNS", "80")
    assert helios(monkeypatch, "trace", file, "--video", "video_a") == 0
    assert capsys.readouterr().out.split("\n")[2] == "2 chunks in 9.00 s, retries: 0"
    assert helios(monkeypatch, "trace", file, "--video", "video_c") == 2
    assert capsys.readouterr().err == "helios: video is 'video_c'; allowed: the 2 in this file: video_a, video_b\n"
    assert helios(monkeypatch, "trace", file.with_name("none")) == 1
    assert capsys.readouterr().err == f"helios: {file.with_name('none')}: not readable: No such file or directory\n"


def test_serve_refuses_a_trace_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert helios(monkeypatch, "serve", "--trace-file", "none/spans.jsonl") == 2
    assert "trace_file is 'none/spans.jsonl'; allowed: a file that can be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
