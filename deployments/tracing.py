"""One video is one trace: spans by OpenTelemetry, with parents that travel as W3C traceparent strings.

Every component has a provider of its own and none is global, because FastAPI, Serve and HTTP clients would add spans of
theirs to a global one. Nor is any span ever "the current one": parents are always named.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from helios_core.errors import Cancelled

OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracer:
    """The spans of one component. They go over OTLP to where OTEL_EXPORTER_OTLP_ENDPOINT points, if it is set, and to
    `trace_file` as lines of JSON, if it is given. Without either they go nowhere, but have valid ids all the same.

    A caller that does not sample its trace (flags 00 in its traceparent) gets no span exported. OpenTelemetry's other
    environment variables count too. Raises OSError if `trace_file` cannot be opened.
    """

    def __init__(self, component: str, trace_file: str | None = None) -> None:
        about: dict[str, AttributeValue] = {
            "service.name": "helios",
            "helios.component": component,
            "process.pid": os.getpid(),
        }
        # The SDK keeps 128 events of a span; a chunk may have more steps.
        limits = SpanLimits(max_events=SpanLimits.UNSET)
        self._provider = TracerProvider(resource=Resource.create(about), span_limits=limits)
        if any(os.environ.get(variable) for variable in OTLP_VARIABLES):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        if trace_file is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(FileExporter(trace_file)))
        self._tracer = self._provider.get_tracer("helios")

    def start(
        self,
        name: str,
        parent: str | None,
        *,
        start_time: int | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        **attributes: AttributeValue,
    ) -> Span:
        """A span that the caller ends. `parent`: a W3C traceparent; None or an invalid one makes a root.

        `start_time`: Unix time in nanoseconds, now by default.
        """
        # A context of its own, even without a parent: else OpenTelemetry would look for a current span.
        context = TraceContextTextMapPropagator().extract({"traceparent": parent or ""}, Context())
        return self._tracer.start_span(name, context, kind, attributes, start_time=start_time)

    @contextmanager
    def span(
        self, name: str, parent: str | None, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: AttributeValue
    ) -> Iterator[Span]:
        """A span around a block, which it ends with as `ending` says."""
        with ending(self.start(name, parent, start_time=None, kind=kind, **attributes)) as span:
            yield span

    def close(self) -> None:
        """Sends what has ended and stops. Takes up to 30 s if a collector does not answer. Harmless when repeated."""
        self._provider.shutdown()


@contextmanager
def ending(span: Span, only_on_error: bool = False) -> Iterator[Span]:
    """Ends `span` with the block, or only if an exception leaves it. That exception makes its status ERROR; being
    cancelled is none, and sets the attribute `cancelled`."""
    try:
        yield span
    except BaseException as error:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit, Cancelled)):
            span.set_attribute("cancelled", True)
        else:
            span.record_exception(error)
            span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {error}")
        span.end()
        raise
    if not only_on_error:
        span.end()


class FileExporter(SpanExporter):
    """Appends each span to a file as one line of JSON.

    Many processes append to the same file, and each may be killed at any moment: so a line is one unbuffered write to a
    file opened for appending, which a local file system keeps in one piece.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "ab", buffering=0)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            self._file.write(span.to_json(indent=None).encode() + b"\n")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def traceparent(span: Span) -> str:
    """The span as a W3C traceparent: version, trace, span and flags."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id(traceparent: str) -> str:
    """The trace that a (valid) traceparent belongs to, as 32 hex digits."""
    return traceparent.split("-")[1]
