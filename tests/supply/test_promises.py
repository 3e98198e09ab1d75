"""What RELIABILITY.md and SECURITY.md say is shown by tests has those tests, and every row of theirs says it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def shown(name: str, kind: str) -> dict[str, str]:
    """What shows each numbered row of a document's first table, by the row: R1, S3, …"""
    rows = [line.split("|")[1:-1] for line in read(name).splitlines() if re.match(rf"\| {kind}\d", line)]
    # Later tables have such rows, too: of each the first counts.
    return {row: cells[-1] for cells in reversed(rows) for row in re.findall(rf"{kind}\d+", cells[0])}


def test_each_test_that_security_names_is_there() -> None:
    """It names the folder with the first of a row's tests, and again where it changes."""
    rows = shown("SECURITY.md", "S")
    assert rows.keys() == {f"S{n}" for n in range(1, 16)}
    for row, tests in rows.items():
        named = re.findall(r"`(tests/\w+/)?(test_\w+\.py)::(test_\w+)`", tests)
        assert named, row
        folder = ""
        for before, file, test in named:
            folder = before or folder
            assert f"def {test}(" in read(folder + file), f"{folder}{file}::{test}"


def test_each_fault_that_reliability_names_has_its_scenarios_or_tests() -> None:
    rows = shown("RELIABILITY.md", "R")
    assert rows.keys() == {f"R{n}" for n in range(1, 20)}
    assert {row for row, tests in rows.items() if "scenario" in tests} == {each.row for each in SCENARIOS.values()}
    files = {row: set(re.findall(r"`(test_\w+\.py)`", tests)) for row, tests in rows.items()}
    assert set().union(*files.values()) <= {path.name for path in ROOT.glob("tests/*/test_*.py")}
    for row, tests in rows.items():
        assert files[row] or "scenario" in tests or "make soak" in tests, row


def test_each_scenario_has_its_figures() -> None:
    told = re.findall(r"^\| ([^|]+?) \| R\d+ \| \d+ \|", read("RELIABILITY.md"), re.MULTILINE)
    assert sorted(told) == sorted(SCENARIOS)
