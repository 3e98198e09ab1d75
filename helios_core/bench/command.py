"""The options of `helios bench`, its sections in their order, and the header that says what was measured where."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from helios_core.bench.compare import EAGER, MODES, check, compare
from helios_core.bench.measure import Clock, ask_gpu
from helios_core.bench.report import Report
from helios_core.bench.sections import SECTIONS, Bench, Section
from helios_core.bench.subject import OFFICIAL, WAYS, Model, Subject, shapes, shown
from helios_core.config import VaeConfig
from helios_core.errors import InvalidInput
from helios_core.spec import parse_steps
from helios_core.transformer.fp8 import why_no_fp8
from helios_core.weights import placement, use_threads

PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "diffusers", "helios-serve")


def main(arguments: Sequence[str]) -> None:
    """Measures and writes. Raises InvalidInput, CheckpointError, and SystemExit(1) at the end if a section failed: the
    others are measured all the same, as time on a GPU is dear."""
    options = _parser().parse_args(arguments)
    use_threads(options.threads)
    device, dtype = placement(options.device, options.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)
    if options.model is None:
        sizes = shapes(options.layers, options.heads, options.vae_width)
        model = Model.random(*sizes, device, dtype)
    else:
        model = Model.load(options.model, device, dtype)
    unfit = "this is a CPU" if device.type == "cpu" else why_no_fp8(model.transformer)
    ways = options.ways or [name for name, each in WAYS.items() if unfit is None or not each.fp8]
    subject = Subject.of(model, options.size, step_lists(options.steps or []), ways)
    sections = _chosen(options.sections)
    if options.compare is not None:
        check(model)
        sections |= {f"compare, {mode}": partial(compare, mode=mode) for mode in _modes(options.compare_mode)}
    bench = Bench(subject, Clock(device, options.repeats), options.chunks)
    report = Report(_header(bench, arguments), options.json)
    for name, section in sections.items():
        try:
            report.add(name, section(bench))
        except Exception:  # noqa: BLE001 - it is told, written down and ends in status 1
            report.failed(name, traceback.format_exc())
    report.end()
    if "failed" in report.document:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helios bench",
        description="Measure every part of the model, on random weights of the official shapes unless told otherwise.",
        epilog="`helios bench --serve` measures what the service adds instead; it has options of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--random-weights", action="store_true", help="what is done without --model")
    source.add_argument("--model", help="a folder in the official layout, a known name, or a hub id")
    parser.add_argument("--layers", type=_count, default=OFFICIAL.num_layers, help="of random weights")
    parser.add_argument("--heads", type=_count, default=OFFICIAL.num_attention_heads, help="each 128 channels")
    parser.add_argument("--vae-width", type=_count, default=VaeConfig().base_dim, help="channels of the VAE")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, help="to make chunks; if not given, all that are of use here"
    )
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; the model's own if not given")
    parser.add_argument(
        "--steps", nargs="+", action="extend", help="per stage, as in 1,1,1 2,2,2; the model's presets if not given"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the transformer: auto, float32, bfloat16")
    parser.add_argument("--threads", type=_count, help="of torch on the CPU; half of the cores if not given")
    parser.add_argument("--repeats", type=_count, default=5, help="of everything, after warming up")
    parser.add_argument("--chunks", type=_count, default=12, help="in a row, for the section sustained")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="all if not given; shares need ceilings")
    parser.add_argument("--compare", choices=["diffusers"], help="measure it too, on the same weights")
    parser.add_argument("--compare-mode", default=EAGER, help=f"one or more of {','.join(MODES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written again after each row")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; allowed: 1 or more")
    return number


def step_lists(texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """ "1,1,1 2,2,2", in one text or two, as ((1, 1, 1), (2, 2, 2)). Raises InvalidInput."""
    return tuple(parse_steps(word) for word in " ".join(texts).split())


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= set(MODES):
        raise InvalidInput("compare_mode", text, f"one or more of {','.join(MODES)}")
    return modes


def _chosen(names: Sequence[str] | None) -> dict[str, Section]:
    return {name: section for name, section in SECTIONS.items() if names is None or name in names}


def _header(bench: Bench, arguments: Sequence[str]) -> dict[str, Any]:
    subject = bench.subject
    model, device = subject.model, subject.device
    config = model.transformer.config
    on_gpu = bench.clock.on_gpu
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    if on_gpu:
        versions |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
        versions |= {"driver": next(iter(ask_gpu(device, "driver_version")), None)}
    host = f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    return {
        "hardware": f"{torch.cuda.get_device_name(device)}; {host}" if on_gpu else host,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "helios_core.bench", *arguments]),
        "model": f"{model.card.id}, {config.num_layers} layers, {config.hidden_dim} wide; "
        f"VAE {model.vae.config.base_dim} wide",
        "precision": f"transformer {model.transformer.dtype}, VAE's decoder {model.vae.decoder_dtype}, "
        f"TF32 in products {torch.backends.cuda.matmul.allow_tf32}, in convolutions {torch.backends.cudnn.allow_tf32}",
        "size": f"{subject.width}x{subject.height}",
        "steps": " ".join(map(shown, subject.steps)),
        "repeats": bench.clock.repeats,
        "times": "by CUDA events" if on_gpu else "by the host's clock",
        "share": "of the roofline: what the FLOPs of linears, attention and VAE take at the best rate of each under "
        "ceilings, over the median time",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name, where the kernel tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """Of the working tree that this runs from, marked if files differ from it; None outside of one."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
