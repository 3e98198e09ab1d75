"""How long the parts of a chunk take: measured on some machine, or as PERFORMANCE.md estimates for a GPU.

What is an estimate says so wherever it is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from helios_core.errors import InvalidInput


@dataclass(frozen=True)
class Times:
    """Seconds. Every part but the sampler's is of a chunk of the size and steps that were measured.

    `turn_s`: a chunk holds a sampler, the call's way there and back included; `first_turn_s`: the first one of a video;
    `render_s`: it holds a VAE decoder; `store_s`: from there to its commit; `text_s`: a prompt holds a text encoder;
    `media_s`: an image or video input holds a VAE decoder; `accept_s`: from a request to its acceptance; `deliver_s`:
    from a commit to the viewer; `director_s`, `ingress_s`: processor time of those for each chunk.
    `source`: where they are from; `estimated`: the names of those that nobody measured.
    """

    turn_s: float
    first_turn_s: float
    render_s: float
    store_s: float = 0.0
    text_s: float = 0.0
    media_s: float = 0.0
    accept_s: float = 0.0
    deliver_s: float = 0.0
    director_s: float = 0.0
    ingress_s: float = 0.0
    source: str = ""
    estimated: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """Whether they were measured."""
        if "turn_s" in self.estimated:
            return "NOT MEASURED"
        return f"measured, but NOT {', '.join(self.estimated)}" if self.estimated else "measured"

    @property
    def told(self) -> str:
        """Whether they were measured, and where they are from."""
        return f"{self.mark}: {self.source}"

    @property
    def first_fragment_s(self) -> float:
        """From a request for a video to its first fragment, if nothing has to wait."""
        return self.accept_s + self.text_s + self.first_turn_s + self.render_s + self.store_s + self.deliver_s


@dataclass(frozen=True)
class Gpu:
    """640x384 on one GPU, as the roofline has it: `steps_s`, one transformer step of each stage; `decode_s`, a chunk in
    bf16. `price`: dollars an hour, an example to be replaced by one's own."""

    steps_s: tuple[float, float, float]
    decode_s: float
    price: float


# Estimates, none of them measured: operations and bytes counted, over the rates that such a GPU is known to reach.
# PERFORMANCE.md has this table, with what was measured beside it.
GPUS: Mapping[str, Gpu] = {
    "h100": Gpu((0.114, 0.198, 0.604), 0.30, 3.0),
    "h200": Gpu((0.103, 0.180, 0.554), 0.28, 3.0),
    "h100-fp8": Gpu((0.090, 0.155, 0.474), 0.30, 3.0),
    "h200-fp8": Gpu((0.083, 0.145, 0.446), 0.28, 3.0),
    "a100": Gpu((0.301, 0.522, 1.593), 0.41, 1.5),
    "l40s": Gpu((0.370, 0.642, 1.959), 0.66, 1.0),
    "4090-fp8": Gpu((0.258, 0.447, 1.365), 0.57, 0.5),
}
# What the service adds to a chunk's own work. What it was on a laptop is in docs/capacity.md; on a GPU's machine it was
# not measured, and of `text_s` and `media_s` there, of UMT5-XXL and the VAE's encoder, only a guess is known.
SERVICE = Times(
    turn_s=0.02,
    first_turn_s=0.02,
    render_s=0.02,
    store_s=0.01,
    text_s=0.03,
    media_s=0.1,
    accept_s=0.05,
    deliver_s=0.03,
    director_s=0.04,
    ingress_s=0.03,
)


def estimated(gpu: str, steps: Sequence[int], amplified: bool) -> Times:
    """For a GPU of the table, at 640x384. `steps`: of each stage, three of them; `amplified`: the first chunk takes
    twice as many. Raises InvalidInput."""
    if gpu not in GPUS:
        raise InvalidInput("hardware.gpu", gpu, f"one of {', '.join(GPUS)}; or hardware.times, a file of measured ones")
    known = GPUS[gpu]
    source = f"estimates for {gpu} at 640x384, steps {','.join(map(str, steps))}"
    every = tuple(each.name for each in fields(Times) if each.name.endswith("_s"))
    return _made(0.0, known.steps_s, known.decode_s, steps, amplified, source, every)


def read_times(path: Path, steps: Sequence[int], amplified: bool) -> Times:
    """From the JSON of `helios bench` (`steps` and `amplified` as in `estimated`), or of a load report, whose own steps
    count. Raises InvalidInput."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("hardware.times", str(path), f"a readable JSON file ({error})") from None
    if isinstance(document, dict) and isinstance(document.get("times"), dict):
        return of_report(document["times"], str(path))
    if isinstance(document, dict) and isinstance(document.get("sections"), dict):
        return _of_bench(document, steps, amplified, str(path))
    raise InvalidInput("hardware.times", str(path), "what helios bench --json or a load test wrote")


def of_report(times: Mapping[str, float | None], source: str) -> Times:
    """From a load report's `times`. Raises InvalidInput if one is missing that a plan cannot do without."""

    def given(name: str) -> float:
        value = times.get(name)
        if value is None:
            raise InvalidInput("hardware.times", source, f"a load report with {name}: of a run that committed chunks")
        return value

    measured = {
        "turn_s": given("turn_s"),
        "first_turn_s": given("first_turn_s"),
        "render_s": given("decode_s") + given("encode_s"),
        "store_s": given("store_s") + given("commit_s"),
        "text_s": given("text_s"),
        "accept_s": given("accept_s"),
        "director_s": given("director_s"),
    }
    also = {name: times.get(name) for name in ("media_s", "deliver_s", "ingress_s")}
    estimated = tuple(name for name, value in also.items() if value is None)
    measured |= {name: value for name, value in also.items() if value is not None}
    return replace(SERVICE, **measured, source=source, estimated=estimated)


def _of_bench(document: Mapping[str, Any], steps: Sequence[int], amplified: bool, source: str) -> Times:
    sections = document["sections"]

    def median(section: str, pattern: str) -> float:
        for row in sections.get(section, ()):
            if re.match(pattern, row["what"]) and "median_s" in row:
                return float(row["median_s"])
        raise InvalidInput("hardware.times", source, f"a run of helios bench with its section {section}")

    stages = [median("stages", rf"a step of stage {stage},") for stage in range(1, len(steps) + 1)]
    begin, decode = median("begin", "begin_chunk"), median("vae", "a chunk decoded")
    of = document.get("header", {}).get("hardware", "some machine")
    told = f"{source} ({of}), steps {','.join(map(str, steps))}"
    others = ("store_s", "text_s", "media_s", "accept_s", "deliver_s", "director_s", "ingress_s")
    return _made(begin, stages, decode, steps, amplified, told, others)


def _made(
    begin_s: float,
    steps_s: Sequence[float],
    decode_s: float,
    steps: Sequence[int],
    amplified: bool,
    source: str,
    estimated: tuple[str, ...],
) -> Times:
    if len(steps) != len(steps_s):
        raise InvalidInput("hardware.steps", ",".join(map(str, steps)), f"{len(steps_s)} numbers, one for each stage")
    sampled = sum(count * seconds for count, seconds in zip(steps, steps_s, strict=True))
    return replace(
        SERVICE,
        turn_s=begin_s + sampled + SERVICE.turn_s,
        first_turn_s=begin_s + sampled * (2 if amplified else 1) + SERVICE.turn_s,
        render_s=decode_s + SERVICE.render_s,
        source=source,
        estimated=estimated,
    )
