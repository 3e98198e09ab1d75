"""A report as a page for people: one HTML file that needs no other, with plots as SVG, beside the same as JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler

from load_tests.report import MEASURES, number, quantile, told
from load_tests.service_metrics import BUSY, PARTS
from load_tests.watching import CHUNK_S

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Report = Mapping[str, Any]
INK, SOFT, RED = "#1f2933", "#8a94a0", "#c0392b"
COLOURS = ("#2f6fb2", "#d98324", "#3d8f5f", "#8e5ba6", "#b04a5a", "#5f6b76")
SHOWN_ROLES = 6  # those that hold most
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "grid.color": "#e4e8ec",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "svg.hashsalt": "helios",  # the same report, the same file
}
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1180px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; color: white; margin-left: .6rem }
.passed { background: #3d8f5f } .failed { background: #c0392b }
.told { color: #5f6b76; margin: .3rem 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: #5f6b76 }
td, th { padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #e4e8ec; vertical-align: top }
td.n, th.n { text-align: right } td { white-space: nowrap } td:nth-child(2) { white-space: normal }
.plots { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1.4rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } figcaption small { font-weight: 400; color: #5f6b76 }
svg { width: 100%; height: auto }
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem }
code { overflow-wrap: anywhere }
@media (max-width: 800px) { .plots { grid-template-columns: 1fr } }
"""


def write(report: Report, folder: Path) -> Path:
    """Writes report.json and report.html into the folder, which is made if need be, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.html").write_text(html(report))
    return folder


def html(report: Report) -> str:
    setting, passed = report["setting"], report["passed"]
    verdict = "passed" if passed else "failed"
    users, seconds = setting["users"], setting["run_time_s"]
    title = f"Load test: {setting['shape']}, {users} user{'s' * (users != 1)}, {seconds:g} s"
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report["statuses"].items()))
    answers = ", ".join(f"{count} with {status}" for status, count in report["answers"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}: {verdict}</title><style>{CSS}</style>
<h1>{escape(title)}<span class="verdict {verdict}">{verdict}</span></h1>
<p class="told">{escape(setting["host"])} · {escape(setting["date"])} · videos: {escape(statuses or "none")}
· answers: {escape(answers or "none")}</p>
<h2>Verdict</h2>{verdict_table(report)}
<h2>First bottleneck</h2><p>{escape(told(report["bottleneck"]))}</p>
<div class="plots">{"".join(plots(report))}</div>
<div class="tables"><div><h2>A chunk's steps</h2>{times_table(report)}</div>
<div><h2>All measures</h2>{measures_table(report)}</div></div>
<h2>Setting</h2>{setting_table(setting)}
</html>
"""


# Tables


def table(head: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    """Cells are HTML. `numbers`: the columns that are set to the right."""

    def row(cells: list[str], tag: str) -> str:
        kinds = [' class="n"' if column in numbers else "" for column in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)) + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table>{row(head, 'th') if head else ''}{body}</table>"


def verdict_table(report: Report) -> str:
    rows = []
    for line in report["slo"]:
        measure = MEASURES[line["name"]]
        mark = "passed" if line["passed"] else f'<b style="color:{RED}">failed</b>'
        limit = f"{measure.bound} {line['limit']:g} {measure.unit}"
        rows.append([f"<code>{line['name']}</code>", escape(measure.meaning), limit, number(line["value"]), mark])
    return table(["measure", "meaning", "limit", "value", ""], rows, {3})


def measures_table(report: Report) -> str:
    rows = [[f"<code>{name}</code>", number(value), MEASURES[name].unit] for name, value in report["summary"].items()]
    return table(["measure", "value", "unit"], rows, {1})


def times_table(report: Report) -> str:
    rows = [[f"<code>{name}</code>", number(value)] for name, value in report["times"].items()]
    return table(["step", "mean seconds"], rows, {1})


def setting_table(setting: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {version}" for name, version in value.items())
        if isinstance(value, list):
            return ", ".join(f"{item:g}" for item in value)
        return "as the service has it" if value is None else str(value)

    return table([], [[name, f"<code>{escape(text(value))}</code>"] for name, value in setting.items()], set())


# Plots


def plots(report: Report) -> list[str]:
    """Those for which there is something to draw."""
    all_of_them: list[tuple[str, str, Callable[[Report, Axes], bool]]] = [
        ("First fragment", "of each video watched live, by when it was asked for", first_fragments),
        ("Cadence", "share of fragments that came within so long after the one before", cadences),
        ("Users and videos", "those that take turns, and those that wait to come in", crowd),
        ("How busy", f"each part's share of the last 10 s, of one replica; short from {BUSY:.0%} on", busy),
        ("The knee", "how videos fared, by the number of users when they were asked for", knee),
        ("Memory", "of the service's processes here, without what they share", memory),
    ]
    with plt.rc_context(STYLE):
        drawn = (figure(title, told, draw, report) for title, told, draw in all_of_them)
        return [each for each in drawn if each is not None]


def figure(title: str, told: str, draw: Callable[[Report, Axes], bool], report: Report) -> str | None:
    canvas, axes = plt.subplots(figsize=(6.4, 3.1), layout="constrained")
    sink = io.StringIO()
    there = draw(report, axes)
    if there:
        canvas.savefig(sink, format="svg", metadata={"Date": None})
    plt.close(canvas)
    svg = sink.getvalue()
    caption = f"<figcaption>{title} <small>{escape(told)}</small></figcaption>"
    return f"<figure>{caption}{svg[svg.index('<svg') :]}</figure>" if there else None


def legend(axes: Axes, columns: int, **more: Any) -> None:
    """Above the plot, where it hides nothing."""
    options: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.3,
        "columnspacing": 1.2,
    }
    axes.legend(ncols=columns, handlelength=1.2, **options, **more)


def limit_of(report: Report, name: str) -> float | None:
    return next((row["limit"] for row in report["slo"] if row["name"] == name), None)


def first_fragments(report: Report, axes: Axes) -> bool:
    seen = [video for video in report["videos"] if video["first_fragment_s"] is not None]
    for stalled, colour, label in ((False, COLOURS[0], "no stall"), (True, RED, "stalled")):
        these = [video for video in seen if bool(video["stalls"]) == stalled]
        if these:
            at, after = [video["at"] for video in these], [video["first_fragment_s"] for video in these]
            axes.scatter(at, after, s=14, color=colour, alpha=0.7, lw=0, label=label)
    if seen and (limit := limit_of(report, "first_fragment_p95_s")) is not None:
        axes.axhline(limit, color=INK, lw=1, ls="--", label="limit of the 95th percentile")
    if seen:
        legend(axes, 3)
    axes.set(xlabel="seconds of the run", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    return bool(seen)


def cadences(report: Report, axes: Axes) -> bool:
    gaps = sorted(gap for video in report["videos"] for gap in video["cadence_s"])
    if not gaps:
        return False
    axes.step([0.0, *gaps], [k / len(gaps) for k in range(len(gaps) + 1)], where="post")
    axes.axvline(CHUNK_S, color=INK, lw=1, ls="--")
    axes.annotate(" a fragment plays 1.375 s", (CHUNK_S, 0.03), color=INK)
    right = max(2 * CHUNK_S, quantile(gaps, 0.99) or 0.0)
    axes.set(xlabel="seconds", ylabel="share of fragments", xlim=(0, right), ylim=(0, 1.02))
    return True


def line(report: Report, axes: Axes, name: str, label: str, **style: Any) -> bool:
    points = [(row["at"], row[name]) for row in report["series"] if row[name] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
    return bool(points)


def crowd(report: Report, axes: Axes) -> bool:
    drawn = line(report, axes, "users", "users", color=SOFT, drawstyle="steps-post")
    line(report, axes, "running", "videos running", drawstyle="steps-post")
    line(report, axes, "waiting_for_sampler", "of these, waiting for a sampler", drawstyle="steps-post")
    line(report, axes, "queued", "queued", drawstyle="steps-post", lw=1.2)
    legend(axes, 4)
    axes.set(xlabel="seconds of the run", ylabel="number", xlim=(0, None), ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return drawn


def busy(report: Report, axes: Axes) -> bool:
    drawn = [line(report, axes, f"{part}_busy", part, color=COLOURS[k], lw=1.4) for k, part in enumerate(PARTS)]
    axes.axhline(BUSY, color=INK, lw=1, ls="--")
    legend(axes, 6)
    axes.set(xlabel="seconds of the run", ylabel="share of the time", xlim=(0, None), ylim=(0, None))
    return any(drawn)


def knee(report: Report, axes: Axes) -> bool:
    levels = (report["knee"] or {}).get("levels", [])
    if len(levels) < 2:
        return False
    users = [level["users"] for level in levels]
    # At a level at which nobody saw a fragment there is none.
    first, free = (
        [math.nan if level[name] is None else level[name] for level in levels]
        for name in ("first_fragment_p95_s", "stall_free_share")
    )
    axes.plot(users, first, "o-", label="first fragment, 95th percentile (s)")
    if (limit := limit_of(report, "first_fragment_p95_s")) is not None:
        axes.axhline(limit, color=COLOURS[0], lw=1, ls="--")
    axes.set(xlabel="users", ylabel="seconds", ylim=(0, None))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    right.plot(users, free, "s-", color=COLOURS[1], label="without a stall")
    if (limit := limit_of(report, "stall_free_share")) is not None:
        right.axhline(limit, color=COLOURS[1], lw=1, ls="--")
    right.set(ylabel="share of videos", ylim=(0, 1.05))
    if report["knee"]["users"] is not None:
        axes.axvline(report["knee"]["users"], color=INK, lw=1)
        axes.annotate(f" knee: {report['knee']['users']} users", (report["knee"]["users"], 0), color=INK, va="bottom")
    axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [handle for each in (axes, right) for handle in each.get_legend_handles_labels()[0]]
    legend(axes, 2, handles=handles)
    return True


def memory(report: Report, axes: Axes) -> bool:
    roles = sorted(report["memory"].items(), key=lambda role: -role[1][-1]["rss_mb"])[:SHOWN_ROLES]
    for role, points in roles:
        axes.plot([point["at"] for point in points], [point["rss_mb"] for point in points], label=role)
    if roles:
        legend(axes, 3)
    axes.set(xlabel="seconds of the run", ylabel="MB", xlim=(0, None), ylim=(0, None))
    return bool(roles)
