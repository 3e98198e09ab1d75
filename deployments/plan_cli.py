"""`helios plan`: how many GPUs given traffic needs, and whether the simulation that says so is right."""

from __future__ import annotations

import copy
import json
import math
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from helios_core.errors import InvalidInput

console = Console(highlight=False, soft_wrap=True)


def plan(
    file: Annotated[Path | None, typer.Argument(help="YAML: traffic, targets, hardware; docs/capacity.md")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SETTING=VALUE over the file, as traffic.viewers=1000")
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(help='another plan to compare with: "hardware.gpu=h200 hardware.preset=quality"'),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the day and of the knee")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="all of it, for programs")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="a load test's report: simulate its very requests, and compare")
    ] = None,
    times: Annotated[
        Path | None, typer.Option(help="with --replay: how long parts take, from another report or helios bench")
    ] = None,
) -> None:
    """Say how many replicas given traffic needs, what they cost, and where the knee is."""
    if replay is not None:
        if file or settings or what_if or plot:
            raise InvalidInput("--replay", str(replay), "no FILE, --set, --what-if or --plot beside it")
        _replay(replay, times or replay, json_file)
        return
    from deployments.plan_config import PlanConfig
    from deployments.planning import plan as planned

    source = str(file or "the command line")
    data = _overridden(_read(file) if file else {}, settings or [])
    named = {"as asked": data} | {each: _overridden(data, shlex.split(each)) for each in what_if or []}
    began = time.perf_counter()
    configs = [PlanConfig.parse(each, source if name == "as asked" else name) for name, each in named.items()]
    with ProcessPoolExecutor() as pool:
        plans = dict(zip(named, pool.map(planned, configs), strict=True))
    first = plans["as asked"]
    _tell(first)
    took = (
        f"one cell's day simulated in {first.simulated_in_s:.0f} s, all planned in {time.perf_counter() - began:.0f} s"
    )
    console.print(took, style="dim")
    if what_if:
        _compare(plans)
    if plot is not None:
        from deployments.plan_plot import draw

        draw(first, plot)
    if json_file is not None:
        _write(json_file, {name: {**asdict(each), "config": each.config.model_dump()} for name, each in plans.items()})


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInput("FILE", str(file), f"readable YAML ({error})") from None


def _overridden(data: Any, settings: list[str]) -> Any:
    """A copy of `data` in which each SETTING=VALUE, whose name is a path with dots and whose value is YAML, holds."""
    data = copy.deepcopy(data)
    for setting in settings:
        name, equals, value = setting.partition("=")
        *path, last = name.split(".")
        if not equals or not last:
            raise InvalidInput("--set", setting, "SETTING=VALUE, as traffic.viewers=1000")
        inner = data
        for part in path:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise InvalidInput("--set", setting, f"a setting inside {'.'.join(path)}")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidInput("--set", setting, f"a VALUE in YAML ({error})") from None
    return data


def _tell(plan: Any) -> None:
    traffic, targets, found = plan.config.traffic, plan.config.targets, plan.peak
    prices = plan.config.hardware.prices()
    console.print(
        f"busiest minutes: {traffic.peak:,.0f} videos an hour of {traffic.mean_seconds:g} s in the mean, "
        f"{traffic.peak / 3600 * traffic.mean_seconds:,.0f} at a time if none waits; {plan.cells} cell(s)",
        markup=False,
    )
    console.print(f"times: {plan.times.told}", style="bold yellow" if plan.times.estimated else "", markup=False)
    if plan.config.hardware.price is None:
        console.print("prices: examples; hardware.price is yours", style="bold yellow")
    replicas = Table("part", "replicas", "of a cell", "dollars an hour")
    for part, count in plan.replicas.items():
        replicas.add_row(part, f"{count:,}", f"{count // plan.cells}", f"{count * prices[part]:,.2f}")
    scaled = f"over a day, {'samplers as wanted' if plan.config.autoscale else 'all samplers'}"
    figures = Table("", "target", "in the busiest minutes", "", scaled, "")
    signs = {
        "first_fragment_p95_s": "at most",
        "stall_free": "at least",
        "refused": "at most",
        "batch_p95_s": "at most",
    }
    for name, sign in signs.items():
        row = [name, f"{sign} {target:g}" if (target := getattr(targets, name)) is not None else ""]
        for each in (found, plan.day):
            row += [_short(value := getattr(each, name)), _met(target, value, name in each.missed(targets))]
        figures.add_row(*row)
    for part in ("sampler", "vae_decoder", "text_encoder"):
        busy = [f"{getattr(each, f'{part}_busy'):.0%}" for each in (found, plan.day)]
        figures.add_row(f"{part}: at work", "", busy[0], "", busy[1], "")
    for part, share in (("director", plan.director_busy), ("ingress", plan.ingress_busy)):
        figures.add_row(f"{part}: of its core", "", f"{share:.0%}", "", "", "")
    console.print(replicas, figures)
    at_least = "at least " if plan.knee == max(plan.loads) else ""
    knee = "none" if plan.knee is None else f"{at_least}{plan.knee:g} times this traffic, where all targets hold"
    console.print(
        f"knee: {knee}\ncost: {plan.cost_per_day:,.2f} dollars a day "
        f"({plan.sampler_hours:,.0f} sampler-hours), {plan.cost_per_minute:.3f} a minute of video",
        markup=False,
    )


def _compare(plans: dict[str, Any]) -> None:
    table = Table(
        "", "samplers", "VAE decoders", "p95 first fragment, s", "stall-free", "knee", "dollars a day", "a minute"
    )
    for name, each in plans.items():
        table.add_row(
            f"{name} ({each.times.mark})",
            f"{each.replicas['sampler']:,}",
            f"{each.replicas['vae_decoder']:,}",
            _short(each.peak.first_fragment_p95_s),
            _short(each.peak.stall_free),
            _short(each.knee),
            f"{each.cost_per_day:,.2f}",
            f"{each.cost_per_minute:.3f}",
        )
    console.print(table)


def _replay(report: Path, times: Path, json_file: Path | None) -> None:
    from deployments.replay import replayed

    compared = replayed(report, times)
    table = Table("", "measured", "simulated", "off by")
    for name, (measured, simulated) in compared.items():
        off = f"{simulated / measured - 1:+.1%}" if measured else ""
        table.add_row(name, _short(measured), _short(simulated), off)
    console.print(table)
    if json_file is not None:
        _write(json_file, {name: {"measured": m, "simulated": s} for name, (m, s) in compared.items()})


def _met(target: float | None, value: float | None, missed: bool) -> str:
    if target is None or value is None:
        return ""
    return "[red]missed[/]" if missed else "[green]met[/]"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finite(content: Any) -> Any:
    """With null for what was longer than all that was simulated: JSON knows no infinity."""
    if isinstance(content, dict):
        return {str(name): _finite(each) for name, each in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(each) for each in content]
    return None if content == math.inf else content


def _write(file: Path, content: Any) -> None:
    try:
        file.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput("--json", str(file), f"a file that can be written ({error.strerror})") from None
