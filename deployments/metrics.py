"""What the Director counts, for Prometheus. `METRICS` is the table of all names; `Metrics` keeps the counts.

Only the Director counts: replicas report their seconds in the ChunkRecord, and the ingress relays this text, with its
own processor time below it.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import prometheus_client as prometheus

from deployments.records import Check, CheckedPart, CheckOutcome, VideoRecord
from helios_core.config import CHUNK_FRAMES, NATIVE_FPS

CHUNK_SECONDS = CHUNK_FRAMES / NATIVE_FPS  # of a chunk's playback
# Steps of 1, 2 and 5 from the parts of a stand-in's chunks, which take 0.05 s in all, past Base's on one GPU, which
# take 60, to what a long queue makes of them. Closer about the length of a chunk, which is an edge itself: the share of
# chunks at or below it is the share that kept up with playback at the native 24 fps.
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1, CHUNK_SECONDS, 2, 3, 5, 10, 20, 50, 100, 200, 500)
# The same range as speeds: 1.375 s of video in 60 s to 0.05 s. From 1 on a viewer need not wait.
FACTORS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 5, 10, 20, 50)
PARTS = ("text_encoder", "sampler", "vae_decoder")


@dataclass(frozen=True)
class Metric:
    """One row of the table. `help` names the unit; `labels`: the values that each label can have; `buckets`: upper
    edges, of a histogram only."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("helios_videos_accepted_total", "counter", "Videos accepted."),
    Metric("helios_videos_resumed_total", "counter", "Videos taken over from an earlier Director."),
    Metric(
        "helios_videos_ended_total",
        "counter",
        "Videos ended, by how.",
        {"status": ("completed", "failed", "cancelled")},
    ),
    Metric("helios_videos_running", "gauge", "Videos accepted and not ended."),
    Metric("helios_videos_queued", "gauge", "Videos accepted that wait until one of those that take turns ends."),
    Metric("helios_queue_depth", "gauge", "Videos that wait for a sampler now."),
    Metric("helios_sampling", "gauge", "Sample calls under way."),
    Metric("helios_replicas", "gauge", "Replicas that can take calls now, by part.", {"part": PARTS}),
    Metric(
        "helios_watchers", "gauge", "Watchers of running videos: each ingress counts once for all its viewers of one."
    ),
    Metric("helios_store_up", "gauge", "Whether videos can be stored: 1, or 0 if the Director's last try failed."),
    Metric(
        "helios_retries_total",
        "counter",
        "Calls repeated, by the part that was called and by what was lost.",
        {"part": PARTS, "reason": ("replica_lost", "input_lost", "result_lost")},
    ),
    Metric("helios_chunks_committed_total", "counter", "Chunks committed."),
    Metric("helios_frames_committed_total", "counter", "Frames of the chunks committed."),
    Metric("helios_sampler_steps_total", "counter", "Transformer steps of the chunks committed."),
    Metric("helios_fragment_bytes_total", "counter", "Bytes of the fragments committed."),
    Metric(
        "helios_time_to_first_fragment_seconds",
        "histogram",
        "Seconds from a video's acceptance to the commit of its first chunk.",
        buckets=SECONDS,
    ),
    Metric(
        "helios_chunk_cadence_seconds",
        "histogram",
        "Seconds between the commits of two successive chunks of one video.",
        buckets=SECONDS,
    ),
    Metric(
        "helios_turn_wait_seconds",
        "histogram",
        "Seconds that a video waited for a sampler, once per turn.",
        buckets=SECONDS,
    ),
    Metric(
        "helios_first_turn_seconds",
        "histogram",
        "Seconds that a video held a sampler for its first chunk, which may take more steps.",
        buckets=SECONDS,
    ),
    Metric(
        "helios_turn_seconds",
        "histogram",
        "Seconds that a video held a sampler for each of its other chunks.",
        buckets=SECONDS,
    ),
    Metric("helios_text_encode_seconds", "histogram", "Seconds of encoding one prompt.", buckets=SECONDS),
    Metric("helios_media_encode_seconds", "histogram", "Seconds of encoding one input.", buckets=SECONDS),
    Metric("helios_sample_seconds", "histogram", "Seconds of sampling one chunk.", buckets=SECONDS),
    Metric("helios_decode_seconds", "histogram", "Seconds of decoding one chunk's latents.", buckets=SECONDS),
    Metric("helios_encode_seconds", "histogram", "Seconds of encoding one chunk's fragment.", buckets=SECONDS),
    Metric("helios_store_seconds", "histogram", "Seconds of storing one chunk's fragment and state.", buckets=SECONDS),
    Metric(
        "helios_commit_seconds", "histogram", "Seconds of storing the record that names one chunk.", buckets=SECONDS
    ),
    Metric(
        "helios_real_time_factor",
        "histogram",
        "Seconds of video per second of making it, from the beginning of its first sampling to its end; "
        "of each completed video of two chunks or more.",
        buckets=FACTORS,
    ),
    Metric(
        "helios_viewer_stalls_total",
        "counter",
        "Stalls of viewers, one per video, who watch it live from its first commit on.",
    ),
    Metric("helios_viewer_stall_seconds_total", "counter", "Seconds that those viewers stalled."),
    Metric(
        "helios_safety_checks_total",
        "counter",
        "Safety checks, by what was checked and by what came of it; refused and let_through: the check failed.",
        {"part": get_args(CheckedPart), "outcome": get_args(CheckOutcome)},
    ),
    Metric(
        "helios_safety_check_seconds",
        "histogram",
        "Seconds of one safety check, by what was checked.",
        {"part": get_args(CheckedPart)},
        buckets=SECONDS,
    ),
    Metric("helios_director_cpu_seconds_total", "counter", "Processor seconds of the Director."),
)
INGRESS_CPU = Metric(
    "helios_ingress_cpu_seconds_total", "counter", "Processor seconds of the ingress that answers, by its process."
)


def ingress_text() -> bytes:
    """What an ingress has to tell beside the Director's metrics: INGRESS_CPU, in Prometheus' text format."""
    registry = _Registry()
    counter = prometheus.Counter(INGRESS_CPU.name, INGRESS_CPU.help, ["process"], registry=registry)
    counter.labels(f"{socket.gethostname()}:{os.getpid()}").inc(time.process_time())
    return prometheus.generate_latest(registry)


class _Registry(prometheus.CollectorRegistry):
    """Without the `_created` series, which only a switch of the whole process would turn off."""

    def collect(self) -> Iterable[prometheus.Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


@dataclass
class _Clock:
    """Unix times of a video that has not ended. `shown_until`: when a viewer who watches it live from the first commit
    on has seen all that is committed."""

    accepted_at: float
    committed_at: float | None = None
    shown_until: float = 0.0


class Metrics:
    """The counters of one Director, in a registry of its own. Times are Unix times, in seconds."""

    def __init__(self) -> None:
        self._registry = registry = _Registry()
        self._clocks: dict[str, _Clock] = {}
        self._counters = {
            m.name: prometheus.Counter(m.name, m.help, m.labels, registry=registry)
            for m in METRICS
            if m.kind == "counter"
        }
        self._gauges = {
            m.name: prometheus.Gauge(m.name, m.help, m.labels, registry=registry) for m in METRICS if m.kind == "gauge"
        }
        self._histograms = {
            m.name: prometheus.Histogram(m.name, m.help, m.labels, registry=registry, buckets=m.buckets)
            for m in METRICS
            if m.kind == "histogram"
        }
        self._cpu_seconds: Callable[[], float] = lambda: 0.0
        self._counted_cpu = 0.0
        # rate() does not see the step of a series that begins at 1: each is there from the start, at 0.
        for metric in METRICS:
            if metric.labels:
                for values in itertools.product(*metric.labels.values()):
                    (self._counters | self._gauges | self._histograms)[metric.name].labels(*values)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        before, self._counted_cpu = self._counted_cpu, self._cpu_seconds()
        self._counters["helios_director_cpu_seconds_total"].inc(self._counted_cpu - before)
        return prometheus.generate_latest(self._registry)

    def accepted(self, video_id: str, at: float) -> None:
        """A video was accepted. What is kept of it goes with `ended`."""
        self._counters["helios_videos_accepted_total"].inc()
        self._clocks[video_id] = _Clock(at)

    def resumed(self, record: VideoRecord, at: float) -> None:
        """A video was taken over from an earlier Director, whose viewers do not see what it had committed again."""
        self._counters["helios_videos_resumed_total"].inc()
        committed = at if record.chunks else None
        self._clocks[record.id] = _Clock(record.created_at, committed, shown_until=at)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Observes in the histogram `name` how many seconds the block takes, if it comes to its end."""
        began = time.perf_counter()
        yield
        self._observe(name, time.perf_counter() - began)

    def encoded_text(self, seconds: float) -> None:
        """A prompt was encoded, which took its replica so long."""
        self._observe("helios_text_encode_seconds", seconds)

    def encoded_media(self, seconds: float) -> None:
        """An input was encoded, which took its replica so long."""
        self._observe("helios_media_encode_seconds", seconds)

    def waited(self, seconds: float) -> None:
        """A video got a sampler, this long after it had asked for one."""
        self._observe("helios_turn_wait_seconds", seconds)

    def committed(self, record: VideoRecord, at: float) -> None:
        """The newest chunk of `record` was committed. Raises KeyError if the video was not `accepted`, or has ended."""
        chunk, clock = record.chunks[-1], self._clocks[record.id]
        self._counters["helios_chunks_committed_total"].inc()
        self._counters["helios_frames_committed_total"].inc(chunk.frames)
        self._counters["helios_sampler_steps_total"].inc(chunk.steps)
        self._counters["helios_fragment_bytes_total"].inc(chunk.fragment.bytes)
        self._observe("helios_sample_seconds", chunk.timings.sample_seconds)
        self._observe("helios_decode_seconds", chunk.timings.decode_seconds)
        self._observe("helios_encode_seconds", chunk.timings.encode_seconds)
        self._observe("helios_store_seconds", chunk.timings.store_seconds)
        if clock.committed_at is None:
            self._observe("helios_time_to_first_fragment_seconds", at - clock.accepted_at)
        else:
            self._observe("helios_chunk_cadence_seconds", at - clock.committed_at)
            if at > clock.shown_until:
                self._counters["helios_viewer_stalls_total"].inc()
                self._counters["helios_viewer_stall_seconds_total"].inc(at - clock.shown_until)
        clock.committed_at = at
        clock.shown_until = max(at, clock.shown_until) + chunk.frames / record.spec.fps

    def unpaused(self, video_id: str, at: float) -> None:
        """A video that was paused goes on: its viewers did not stall, they waited for just that."""
        clock = self._clocks[video_id]
        clock.shown_until = max(at, clock.shown_until)

    def retried(self, part: str, reason: str) -> None:
        """A call is repeated. `part` and `reason`: as METRICS lists them."""
        self._counters["helios_retries_total"].labels(part, reason).inc()

    def checked(self, check: Check) -> None:
        """A safety check was made."""
        self._counters["helios_safety_checks_total"].labels(check.part, check.outcome).inc()
        self._histograms["helios_safety_check_seconds"].labels(check.part).observe(check.seconds)

    def ended(self, record: VideoRecord) -> None:
        """A video ended, also one that was never `accepted` here. Nothing is kept of it."""
        self._clocks.pop(record.id, None)
        self._counters["helios_videos_ended_total"].labels(record.status).inc()
        if record.status == "completed" and record.completed_at is not None and len(record.own_chunks) >= 2:
            making = record.completed_at - record.own_chunks[0].timings.sample_started_at
            if making > 0:  # the two clocks are of two machines
                shown = sum(chunk.frames for chunk in record.own_chunks) / record.spec.fps
                self._observe("helios_real_time_factor", shown / making)

    def observe(
        self,
        running: Callable[[], int],
        queued: Callable[[], int],
        waiting: Callable[[], int],
        sampling: Callable[[], int],
        replicas: Callable[[str], int],
        watchers: Callable[[], int],
        store_up: Callable[[], bool],
        cpu_seconds: Callable[[], float],
    ) -> None:
        """Where the gauges are read from, at each `text`. Until then they are 0. `replicas`: of a part; `cpu_seconds`:
        of this process so far."""
        self._cpu_seconds = cpu_seconds
        self._gauges["helios_videos_running"].set_function(running)
        self._gauges["helios_videos_queued"].set_function(queued)
        self._gauges["helios_queue_depth"].set_function(waiting)
        self._gauges["helios_sampling"].set_function(sampling)
        for part in PARTS:
            self._gauges["helios_replicas"].labels(part).set_function(partial(replicas, part))
        self._gauges["helios_watchers"].set_function(watchers)
        self._gauges["helios_store_up"].set_function(store_up)

    def _observe(self, name: str, value: float) -> None:
        # A clock may be set back, and a sum that falls looks like a restart to Prometheus.
        self._histograms[name].observe(max(0.0, value))
