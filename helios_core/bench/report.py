"""Rows of figures, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_core.bench.measure import Times

COLUMNS = ("what", "median ms", "p10", "p90", "TFLOP/s", "share", "")
WIDTHS = (46, 10, 10, 10, 8, 6, 0)


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    `flop`: floating-point operations; `floor_s`: seconds that they would take at the machine's own rates;
    `figures`: whatever else there is to say, with its unit in its name.
    """

    what: str
    times: Times | None = None
    flop: int | None = None
    floor_s: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"what": self.what}
        if self.times is not None:
            median = self.times.median
            document |= {"median_s": median, "p10_s": self.times.quantile(0.1), "p90_s": self.times.quantile(0.9)}
            document["repeats"] = len(self.times.seconds)
            if self.flop is not None:
                document |= {"flop": self.flop, "tflop_per_s": self.flop / median / 1e12}
            if self.floor_s is not None:
                document["share_of_roofline"] = self.floor_s / median
        return document | self.figures

    def line(self) -> str:
        cells = [self.what, *[""] * 5, ", ".join(f"{name} {_short(value)}" for name, value in self.figures.items())]
        if self.times is not None:
            milliseconds = (self.times.quantile(q) * 1000 for q in (0.5, 0.1, 0.9))
            cells[1:4] = [f"{each:.2f}" for each in milliseconds]
            if self.flop is not None:
                cells[4] = f"{self.flop / self.times.median / 1e12:.3g}"
            if self.floor_s is not None:
                cells[5] = f"{self.floor_s / self.times.median:.0%}"
        return _aligned(cells)


class Report:
    """Written row by row, so that what ends it early costs one at most: a table to stdout, and all so far to a JSON
    file, if there is one."""

    def __init__(self, header: dict[str, Any], file: Path | None) -> None:
        self.document: dict[str, Any] = {"header": header, "sections": {}}
        self.file = file
        lines = [f"{name}: {value}" for name, value in header.items()]
        _say("\n".join(["helios bench", *lines, "", _aligned(COLUMNS)]))
        self._write()

    def add(self, section: str, rows: Iterable[Row]) -> None:
        written = self.document["sections"][section] = []
        _say(f"-- {section}")
        for row in rows:
            written.append(row.document())
            _say(row.line())
            self._write()

    def failed(self, section: str, reason: str) -> None:
        """What went wrong in a section, in place of the rows that it still owes."""
        self.document.setdefault("failed", {})[section] = reason
        _say(reason)
        self._write()

    def end(self) -> None:
        """The last line of stdout is the whole as JSON."""
        _say(json.dumps(self.document))

    def _write(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps(self.document) + "\n", encoding="utf-8")


def _aligned(cells: Sequence[str]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return "  ".join([first.strip().ljust(WIDTHS[0]), *others]).rstrip()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
