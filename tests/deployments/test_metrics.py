"""The counts of hand-made videos, read back as Prometheus reads them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sized
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import INGRESS_CPU, METRICS, Metric, Metrics, ingress_text
from deployments.records import Check, ChunkRecord, Status, StoredObject, Timings, VideoRecord
from helios_core.spec import VideoSpec

ROOT = Path(__file__).parents[2]
T = 1_700_000_000.0  # Unix time of the acceptance; with it, all times and sums here are exact in binary
BEGUN = T + 0.5  # of the first sampling
# Three whole chunks of 33 frames, 1.375 s each at 24 fps, and one that is cut to 21, 0.875 s: 120 frames, 5 s.
SPEC = VideoSpec(
    prompt="a red fox in snow",
    model="random",
    width=128,
    height=128,
    seconds=5.0,
    seed=42,
    steps=(2, 2, 2),
    amplify_first_chunk=True,
)
CHECKED, OUTCOMES = ("prompt", "input", "frames"), ("allowed", "blocked", "refused", "let_through")
UNITS = {"videos", "calls", "checks", "replicas", "watchers", "chunks", "frames", "steps", "bytes", "seconds", "stalls"}


def chunk(index: int) -> ChunkRecord:
    return ChunkRecord(
        index=index,
        frames=SPEC.frames_of_chunk(index),
        steps=sum(SPEC.steps_of_chunk(index)),
        fragment=StoredObject(key=f"{index}.m4s", bytes=1000 + index, sha256=""),
        state=StoredObject(key=f"{index}.safetensors", bytes=5000, sha256=""),
        timings=Timings(
            sample_started_at=BEGUN + index,
            sample_seconds=1.0,
            decode_seconds=0.25,
            encode_seconds=0.125,
            store_seconds=0.0625,
        ),
    )


def record(
    chunks: int, status: Status = "in_progress", completed_at: float | None = None, video_id: str = "v"
) -> VideoRecord:
    return VideoRecord(
        id=video_id,
        created_at=T,
        spec=SPEC,
        status=status,
        chunks=tuple(chunk(k) for k in range(chunks)),
        completed_at=completed_at,
    )


def make(metrics: Metrics, commits: list[float], status: Status, completed_at: float, video_id: str = "v") -> None:
    """One video from its acceptance to its end, with chunks committed at these times."""
    metrics.accepted(video_id, T)
    for count, at in enumerate(commits, start=1):
        metrics.committed(record(count, video_id=video_id), at)
    metrics.ended(record(len(commits), status, completed_at, video_id))


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample, by its name and label values: {"helios_retries_total sampler replica_lost": 1.0, …}."""
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def moved(metrics: Metrics) -> dict[str, float]:
    """The samples that are not 0, without the buckets."""
    return {name: value for name, value in samples(metrics).items() if value and "_bucket" not in name}


# The table


def test_the_text_has_exactly_the_metrics_of_the_table() -> None:
    metrics = Metrics()
    make(metrics, [T + 2, T + 3], "completed", T + 4)
    said = re.findall(r"^# (?:HELP (\S+) (.+)|TYPE (\S+) (\S+))$", metrics.text().decode(), re.MULTILINE)
    assert sorted((name, text) for name, text, _, _ in said if name) == sorted((m.name, m.help) for m in METRICS)
    assert sorted((name, kind) for _, _, name, kind in said if name) == sorted((m.name, m.kind) for m in METRICS)
    # … and no series beside them, such as _created.
    names = {
        name
        for m in METRICS
        for name in ([m.name + end for end in ("_bucket", "_count", "_sum")] if m.kind == "histogram" else [m.name])
    }
    assert {name.split()[0] for name in samples(metrics)} == names


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_help_text_names_its_unit_and_a_name_follows_the_conventions(metric: Metric) -> None:
    named = UNITS & set(re.findall(r"[a-z]+", metric.help.lower()))
    unit = metric.name.removesuffix("_total").rsplit("_", 1)[-1]
    assert named >= {unit} & {"seconds", "bytes"} and named
    assert re.fullmatch(r"helios(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")


def test_every_series_is_there_from_the_start_at_zero() -> None:
    before = samples(Metrics())
    assert set(before.values()) == {0.0}
    labelled = {name for name in before if " " in name and "_bucket" not in name}
    assert labelled == {
        "helios_videos_ended_total completed",
        "helios_videos_ended_total failed",
        "helios_videos_ended_total cancelled",
        "helios_retries_total text_encoder replica_lost",
        "helios_retries_total text_encoder input_lost",
        "helios_retries_total text_encoder result_lost",
        "helios_retries_total sampler replica_lost",
        "helios_retries_total sampler input_lost",
        "helios_retries_total sampler result_lost",
        "helios_retries_total vae_decoder replica_lost",
        "helios_retries_total vae_decoder input_lost",
        "helios_retries_total vae_decoder result_lost",
        "helios_replicas text_encoder",
        "helios_replicas sampler",
        "helios_replicas vae_decoder",
        *(f"helios_safety_checks_total {outcome} {part}" for part in CHECKED for outcome in OUTCOMES),
        *(f"helios_safety_check_seconds_{end} {part}" for part in CHECKED for end in ("count", "sum")),
    }
    metrics = Metrics()
    make(metrics, [T + 2, T + 3], "completed", T + 4)
    metrics.retried("sampler", "input_lost")
    metrics.checked(Check(part="frames", outcome="blocked", category="violence", seconds=0.5))
    assert set(samples(metrics)) == set(before)


# One video


def test_a_completed_video_with_one_late_chunk() -> None:
    metrics = Metrics()
    # Playback starts at 2. Chunk 1 is due at 3.375 and early; chunk 2 is due at 4.75 and 1.25 late; so chunk 3 is due
    # at 2 + 3 * 1.375 + 1.25 = 7.375, and just in time.
    make(metrics, [T + 2, T + 3, T + 6, T + 7.375], "completed", T + 10.5)
    assert moved(metrics) == {
        "helios_videos_accepted_total": 1,
        "helios_videos_ended_total completed": 1,
        "helios_chunks_committed_total": 4,
        "helios_frames_committed_total": 33 + 33 + 33 + 21,
        "helios_sampler_steps_total": 12 + 6 + 6 + 6,
        "helios_fragment_bytes_total": 1000 + 1001 + 1002 + 1003,
        "helios_time_to_first_fragment_seconds_count": 1,
        "helios_time_to_first_fragment_seconds_sum": 2,
        "helios_chunk_cadence_seconds_count": 3,
        "helios_chunk_cadence_seconds_sum": 1 + 3 + 1.375,
        "helios_sample_seconds_count": 4,
        "helios_sample_seconds_sum": 4,
        "helios_decode_seconds_count": 4,
        "helios_decode_seconds_sum": 1,
        "helios_encode_seconds_count": 4,
        "helios_encode_seconds_sum": 0.5,
        "helios_store_seconds_count": 4,
        "helios_store_seconds_sum": 0.25,
        "helios_real_time_factor_count": 1,
        "helios_real_time_factor_sum": 5 / 10,  # 120 frames at 24 fps, begun at 0.5
        "helios_viewer_stalls_total": 1,
        "helios_viewer_stall_seconds_total": 1.25,
    }


def test_after_a_stall_the_next_chunk_is_due_later() -> None:
    metrics = Metrics()
    # Due at 3.375, then, as playback went on at 4, at 4 + 1.375, then at 6 + 1.375.
    make(metrics, [T + 2, T + 4, T + 6, T + 8], "completed", T + 10)
    assert samples(metrics)["helios_viewer_stalls_total"] == 3
    assert samples(metrics)["helios_viewer_stall_seconds_total"] == 0.625 + 0.625 + 0.625


def test_the_playout_of_a_chunk_is_that_of_its_own_frames() -> None:
    metrics = Metrics()
    video = record(4)
    metrics.accepted("v", T)
    cut = video.model_copy(update={"chunks": video.chunks[3:]})  # 21 frames: 0.875 s
    metrics.committed(cut, T)
    metrics.committed(video, T + 1)
    assert samples(metrics)["helios_viewer_stall_seconds_total"] == 0.125


def test_a_cadence_of_exactly_a_chunks_length_counts_as_real_time() -> None:
    metrics = Metrics()
    make(metrics, [T, T + 1.375, T + 3], "completed", T + 4)
    counts = samples(metrics)
    assert counts["helios_chunk_cadence_seconds_bucket 1.375"] == 1
    assert counts["helios_chunk_cadence_seconds_bucket 2.0"] == 2


@pytest.mark.parametrize(
    ("chunks", "status"), [(3, "failed"), (3, "cancelled"), (1, "completed"), (0, "failed"), (0, "cancelled")]
)
def test_only_a_completed_video_of_two_chunks_has_a_real_time_factor(chunks: int, status: Status) -> None:
    metrics = Metrics()
    make(metrics, [T + 1 + k for k in range(chunks)], status, T + 10.5)
    counts = samples(metrics)
    assert counts[f"helios_videos_ended_total {status}"] == 1
    assert counts["helios_real_time_factor_count"] == 0
    assert counts["helios_chunks_committed_total"] == chunks


def test_a_clock_that_is_set_back_breaks_nothing() -> None:
    metrics = Metrics()
    make(metrics, [T - 3, T - 4], "completed", BEGUN - 1)
    counts = samples(metrics)
    assert counts["helios_time_to_first_fragment_seconds_count"] == counts["helios_chunk_cadence_seconds_count"] == 1
    assert counts["helios_time_to_first_fragment_seconds_sum"] == counts["helios_chunk_cadence_seconds_sum"] == 0
    assert counts["helios_viewer_stalls_total"] == counts["helios_real_time_factor_count"] == 0


# Beside the videos


def test_waits_and_retries() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.25, 4.0):
        metrics.waited(seconds)
    metrics.retried("sampler", "replica_lost")
    metrics.retried("sampler", "replica_lost")
    metrics.retried("vae_decoder", "input_lost")
    assert moved(metrics) == {
        "helios_turn_wait_seconds_count": 3,
        "helios_turn_wait_seconds_sum": 4.25,
        "helios_retries_total sampler replica_lost": 2,
        "helios_retries_total vae_decoder input_lost": 1,
    }


def test_what_replicas_say_of_prompts_and_inputs() -> None:
    metrics = Metrics()
    metrics.encoded_text(0.25)
    metrics.encoded_media(0.5)
    assert moved(metrics) == {
        "helios_text_encode_seconds_count": 1,
        "helios_text_encode_seconds_sum": 0.25,
        "helios_media_encode_seconds_count": 1,
        "helios_media_encode_seconds_sum": 0.5,
    }


def test_safety_checks_are_counted_and_timed_by_what_was_checked() -> None:
    metrics = Metrics()
    for outcome, category in (("allowed", None), ("allowed", None), ("blocked", "violence")):
        metrics.checked(Check(part="frames", outcome=outcome, category=category, seconds=0.25))
    metrics.checked(Check(part="prompt", outcome="let_through", category=None, seconds=4))
    assert moved(metrics) == {
        "helios_safety_checks_total allowed frames": 2,
        "helios_safety_checks_total blocked frames": 1,
        "helios_safety_checks_total let_through prompt": 1,
        "helios_safety_check_seconds_count frames": 3,
        "helios_safety_check_seconds_sum frames": 0.75,
        "helios_safety_check_seconds_count prompt": 1,
        "helios_safety_check_seconds_sum prompt": 4,
    }


def test_a_block_is_timed_if_it_comes_to_its_end() -> None:
    metrics = Metrics()
    with metrics.timed("helios_turn_seconds"):
        pass
    with suppress(OSError), metrics.timed("helios_turn_seconds"):
        raise OSError
    assert moved(metrics)["helios_turn_seconds_count"] == 1
    with pytest.raises(KeyError), metrics.timed("helios_turns_seconds"):
        pass


def test_an_ingress_tells_its_processor_time_below_the_directors_metrics() -> None:
    text = Metrics().text() + ingress_text()
    (sample,) = re.findall(r'^helios_ingress_cpu_seconds_total\{process="[^"]+:(\d+)"\} (\S+)$', text.decode(), re.M)
    assert int(sample[0]) == os.getpid() and float(sample[1]) > 0
    assert text.count(INGRESS_CPU.name.encode()) == 3  # HELP, TYPE and one series


def test_gauges_are_read_with_each_text() -> None:
    metrics, running = Metrics(), ["a"]
    replicas = {"text_encoder": 0, "sampler": 4, "vae_decoder": 1}
    metrics.observe(
        lambda: len(running),
        lambda: 6,
        lambda: 2,
        lambda: 3,
        replicas.__getitem__,
        lambda: 5,
        lambda: True,
        lambda: 0.5,
    )
    expected = {
        "helios_videos_queued": 6,
        "helios_queue_depth": 2,
        "helios_sampling": 3,
        "helios_replicas sampler": 4,
        "helios_replicas vae_decoder": 1,
        "helios_watchers": 5,
        "helios_store_up": 1,
        "helios_director_cpu_seconds_total": 0.5,
    }
    assert moved(metrics) == {"helios_videos_running": 1, **expected}
    running.clear()
    assert moved(metrics) == expected


def test_two_are_independent() -> None:
    metrics, other = Metrics(), Metrics()
    make(metrics, [T + 2], "failed", T + 3)
    metrics.observe(*[lambda: 7] * 4, lambda part: 7, lambda: 7, lambda: True, lambda: 7.0)
    assert moved(other) == {}


def test_ended_videos_leave_nothing_behind() -> None:
    def held(metrics: Metrics) -> int:
        return sum(len(value) for value in vars(metrics).values() if isinstance(value, Sized))

    metrics = Metrics()
    empty, series = held(metrics), set(samples(metrics))
    metrics.accepted("running", T)
    assert held(metrics) == empty + 1
    metrics.ended(record(0, "cancelled", T + 1, "running"))
    ends: tuple[Status, ...] = ("completed", "failed", "cancelled")
    for k in range(1000):
        make(metrics, [T + 2, T + 3][: k % 3], ends[k % 3], T + 4, f"video_{k}")
    metrics.ended(record(0, "failed", T + 1, "interrupted"))  # accepted by an earlier Director
    assert held(metrics) == empty
    assert set(samples(metrics)) == series
    assert samples(metrics)["helios_videos_accepted_total"] == 1001


def test_needs_neither_torch_nor_ray() -> None:
    code = "import sys, deployments.metrics; raise SystemExit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
