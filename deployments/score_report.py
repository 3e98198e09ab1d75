"""What `helios score` says about a video file: one table, one plot, one JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from helios_core.coherence import Coherence, coherence, whole_seconds
from helios_core.demo.score import Score, fit, judge
from helios_core.demo.words import read_prompt, vocabulary
from helios_core.demo.world import WIDTH
from helios_core.errors import InvalidInput

ENDS = 5  # seconds at the beginning and at the end whose scores are compared


@dataclass(frozen=True)
class PromptScore:
    """A video against a prompt of the demo model's world: as a whole, and each of its whole seconds by itself."""

    prompt: str
    whole: Score
    seconds: tuple[Score, ...]

    @property
    def percents(self) -> list[float]:
        return [second.percent for second in self.seconds]


@dataclass(frozen=True)
class Report:
    """`score`: None without a prompt."""

    video: Path
    coherence: Coherence
    score: PromptScore | None


def measure(video: Path, prompt: str | None) -> Report:
    """Decodes a file and measures it, frame by frame, so that it need not fit into memory.

    Raises InvalidInput if it is no video, if it is too short, or, with a prompt, if it is not twice as wide as high or
    the prompt has no word of the demo model's world.
    """
    if prompt is not None and not read_prompt(prompt).named:
        words = ", ".join(word for kind, each in vocabulary().items() if kind != "colour" for word in each)
        raise InvalidInput("prompt", prompt, f"a prompt that names something of the demo model's world: {words}")
    with _decoded(video) as (fps, frames):
        figures = coherence(frames, fps)
    if prompt is None:
        return Report(video, figures, None)
    with _decoded(video) as (_, frames):
        shown = fit(frames)
    windows = [shown.window(start, stop) for start, stop in whole_seconds(figures.frames, fps)]
    seconds = tuple(judge(window, prompt) for window in windows)
    return Report(video, figures, PromptScore(prompt, judge(shown, prompt), seconds))


@contextmanager
def _decoded(video: Path) -> Iterator[tuple[float, Iterator[npt.NDArray[np.uint8]]]]:
    """Frames per second, and the frames of the first video stream, RGB [H, W, 3]."""
    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise InvalidInput("video", str(video), "a file with a video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            yield fps, (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
    except av.FFmpegError as error:
        raise InvalidInput("video", str(video), f"a video file that can be decoded ({error.strerror})") from None


def document(report: Report) -> dict[str, Any]:
    """The report as JSON; units as in helios_core.coherence and helios_core.demo.score."""
    video = report.coherence
    figures = asdict(video)
    del figures["changes"]  # one number a frame; those that matter are the seams
    figures = {"video": str(report.video), **figures, "seams": video.seams, "seam_strength": video.seam_strength}
    if report.score is None:
        return figures
    whole = report.score.whole
    return figures | {
        "prompt": report.score.prompt,
        "found": asdict(whole.found),
        "right": whole.right,
        "percent": whole.percent,
        "percent_per_second": report.score.percents,
        "fit": {"world": whole.world, "thing": whole.thing},
        "track": {name.removesuffix("_N"): values.tolist() for name, values in vars(whole.track).items()},
    }


def table(report: Report) -> Table:
    """A row for each figure: its name, its value, how to read it."""
    video = report.coherence
    rows = Table(title=f"{report.video.name}: {video.frames} frames, {video.frames / video.fps:.2f} s")
    for column in ("figure", "value", "reading"):
        rows.add_column(column)
    seam = "-" if video.seam_strength is None else f"{video.seam_strength:.2f}"
    sharpness = f"{video.sharpness[0]:.0f} to {video.sharpness[-1]:.0f}"
    rows.add_row("similarity", f"{video.similarity:.3f}", "first and last second; 1 is the same")
    rows.add_row("sharpness", sharpness, "first to last second")
    rows.add_row("colour drift", f"{video.drift[-1]:.1f}", f"last second; at most {max(video.drift):.1f}")
    rows.add_row("seam strength", seam, "1 is no seam", end_section=True)
    if report.score is not None:
        _add_score(rows, report.score)
    return rows


def _add_score(rows: Table, score: PromptScore) -> None:
    asked = read_prompt(score.prompt).named
    for name, found in asdict(score.whole.found).items():
        verdict = "not asked for"
        if name in asked:
            verdict = "as asked" if score.whole.right[name] else f"asked for: {asked[name]}"
        style = "red" if score.whole.right.get(name) is False else None
        rows.add_row(name.replace("_", " "), found or "-", verdict, style=style)
    rows.add_row("explained by the world", f"{score.whole.world:.2f}", "share of the picture's variance")
    rows.add_row("explained by the thing", f"{score.whole.thing:.2f}", "of what ground and sky leave")
    for which, percents in (("first", score.percents[:ENDS]), ("last", score.percents[-ENDS:])):
        rows.add_row(f"right in the {which} {len(percents)} seconds", f"{np.mean(percents):.0f} %", "of what is named")


# ---- The plot -------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#2455a4", "#d96c1e", "#c8c8c8"
INCHES = (10.0, 1.6)  # of one panel


def plot(report: Report, file: Path) -> None:
    """Writes a PNG: one panel above the other, over the seconds of the video; faint lines where chunks begin."""
    video = report.coherence
    panels = 3 if report.score is None else 6
    figure = Figure(figsize=(INCHES[0], INCHES[1] * panels), layout="constrained")
    figure.suptitle(report.video.name if report.score is None else f"{report.video.name}: {report.score.prompt}")
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True))
    sharpness, drift, changes, *others = axes
    _per_second(sharpness, video.sharpness, "sharpness\n(grey levels²)")
    _per_second(drift, video.drift, "colour drift\n(Delta E)")
    times = np.arange(1, video.frames) / video.fps
    changes.plot(times, video.changes, color=BLUE, linewidth=1, label="within a chunk")
    changes.plot(
        times[video.chunk_frames - 1 :: video.chunk_frames], video.seams, "o", color=ORANGE, label="between two"
    )
    changes.set_ylabel("change of frame\n(grey levels)")
    if report.score is not None:
        right, place, radius = others
        _per_second(right, report.score.percents, "right\n(%)")
        right.set_yticks([0, 50, 100])
        track = report.score.whole.track
        times = track.frame_N / video.fps
        place.plot(times, track.x_N % WIDTH, ".", color=BLUE, label="x, from the left")
        place.plot(times, track.y_N % 1, ".", color=ORANGE, label="y, from the top")
        place.set_ylabel("place of the thing\n(heights)")
        radius.plot(times, track.radius_N, ".", color=BLUE)
        radius.set_ylabel("radius\n(heights)")
    for axis in axes:
        for first in range(video.chunk_frames, video.frames, video.chunk_frames):
            axis.axvline(first / video.fps, color=GREY, linewidth=0.6, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.05)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1].set_xlim(0, video.frames / video.fps)
    axes[-1].set_xlabel("seconds")
    figure.align_ylabels(axes)
    figure.savefig(file, format="png", dpi=120)


def _per_second(axis: Axes, values: list[float] | tuple[float, ...], label: str) -> None:
    """A mark in the middle of each second."""
    axis.plot(np.arange(len(values)) + 0.5, values, ".-", color=BLUE, linewidth=1)
    axis.set_ylabel(label)
