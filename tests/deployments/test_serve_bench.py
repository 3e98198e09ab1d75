"""`helios bench`: who gets its options, and with --serve what is made of a trace. Times are never looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deployments.cli import main
from deployments.serve_bench import Run, covered, outside_the_model
from deployments.timeline import Span, Video

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def span(name: str, begin: float, end: float) -> Span:
    """Times in seconds."""
    times = {"start_time": BEGIN + timedelta(seconds=begin), "end_time": BEGIN + timedelta(seconds=end)}
    context = {"trace_id": "t", "span_id": f"{name} {begin}"}
    status = {"status_code": "OK"}
    return Span.model_validate({"name": name, "context": context, "parent_id": None, "status": status, **times})


@pytest.mark.parametrize(
    "intervals, length",
    [([], 0), ([(1, 2), (3, 5)], 3), ([(3, 5), (1, 4)], 4), ([(1, 5), (2, 3)], 4), ([(1, 2), (2, 3)], 2)],
)
def test_what_intervals_cover_together(intervals: list[tuple[float, float]], length: float) -> None:
    assert covered(intervals) == length


def test_the_share_of_time_outside_the_model() -> None:
    """Of ten seconds: two before the first chunk, one more where only the encoder works."""
    spans = [span("POST", 0, 0.5), span("video", 0.0, 10.0), span("sample", 2, 5), span("decode", 4, 7)]
    spans += [span("encode", 6, 8), span("sample", 8, 10)]
    assert outside_the_model(Video("v", spans)) == pytest.approx(0.3)


def test_rates_of_a_video() -> None:
    assert Run.of(chunks=3, first_s=2.0, total_s=4.0) == Run(whole=99 / 4, after_first_chunk=66 / 2)


@pytest.mark.parametrize("options, who", [(["--steps", "1,1,1", "--size", "64x64"], "core"), (["--serve"], "serve")])
def test_all_options_go_where_they_belong(options: list[str], who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Sequence[str]] = {}
    monkeypatch.setattr("helios_core.bench.main", lambda options: called.update(core=options))
    monkeypatch.setattr("deployments.serve_bench.main", lambda options: called.update(serve=options))
    monkeypatch.setattr(sys, "argv", ["helios", "bench", *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and called == {who: options}


@pytest.mark.parametrize("options, word", [([], "--compare"), (["--serve"], "--chunks")])
def test_help_is_that_of_the_bench(
    options: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["helios", "bench", *options, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and word in capsys.readouterr().out


@pytest.mark.ray
def test_a_service_against_the_bare_loop(tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    options = ["--serve", "--model", "random", "--chunks", "2", "--repeats", "1", "--threads", "1", "--json", str(file)]
    command = [sys.executable, "-m", "deployments.cli", "bench", *options]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    document = json.loads(run.stdout.splitlines()[-1])
    assert document == json.loads(file.read_text())
    figures = document["medians"]
    assert figures["service/bare"] == figures["service, frames/s"] / figures["bare, frames/s"]
    assert 0 < figures["service's time outside the model, share"] < 1
    assert all(figures[f"{part} of a chunk, ms"] > 0 for part in ("sample", "decode", "encode", "store", "commit"))
