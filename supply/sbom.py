"""What is installed for running, as a CycloneDX file, and whether its licences are known and allowed (licences.toml).

    cyclonedx-py environment … | python -m supply.sbom > sbom.cdx.json        (`make sbom`)

cyclonedx-py lists a whole environment. What tests and tools need is left out here: what stays is what pyproject.toml's
`dependencies` lead to.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
LICENCES = tomllib.loads((Path(__file__).parent / "licences.toml").read_text())
COPYLEFT = re.compile(r"lib(x26[45]|xvid|rubberband|vidstab|postproc|fdk-aac|smbclient)")  # GPL'd parts of an FFmpeg


def installed() -> dict[str, Distribution]:
    """Name ▸ what is installed of everything that the service needs to run, in this environment."""
    dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    todo = [Requirement(each) for each in dependencies]
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in seen:
            continue
        seen.add(key)
        found[key[0]] = distribution(wanted.name)
        for each in map(Requirement, found[key[0]].requires or ()):
            extras = wanted.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(each)
    return found


def licence(package: Distribution) -> str:
    """As an SPDX expression where the package has one, or what it says in its place is known; else as it says it."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier") or () if "License ::" in each]
    said = classifiers or [(about.get("License") or "nothing").strip().partition("\n")[0]]
    return " AND ".join(LICENCES["meant"].get(each, each) for each in said)


def fault(name: str, expression: str) -> str | None:
    """What is wrong about a package under this licence. Of several that one may choose from, one has to be allowed."""
    if any(fnmatch(name, known) for known in LICENCES["known"]):
        return None
    choices = [choice.split(" AND ") for choice in expression.split(" OR ")]
    if any(set(choice) <= set(LICENCES["allowed"]) for choice in choices):
        return None
    return f"{name} is under {expression}; allowed: those in supply/licences.toml"


def unmentioned(name: str, package: Distribution) -> set[str]:
    """GPL'd libraries in a wheel that licences.toml does not name."""
    files = {found[0] for file in package.files or () if (found := COPYLEFT.match(file.name))}
    return files - set(LICENCES["bundled"].get(name, ()))


def faults() -> list[str]:
    found = []
    for name, package in sorted(installed().items()):
        if (wrong := fault(name, licence(package))) is not None:
            found.append(wrong)
        found += [
            f"{name} holds {library}; allowed: those in supply/licences.toml" for library in unmentioned(name, package)
        ]
    return found


def running(bom: dict[str, Any]) -> dict[str, Any]:
    """Of a CycloneDX document what runs, each with its licence; the libraries that wheels hold stand below them."""
    packages = installed()
    kept = [each for each in bom["components"] if canonicalize_name(each["name"]) in packages]
    for each in kept:
        name = canonicalize_name(each["name"])
        each.setdefault("licenses", [{"expression": licence(packages[name])}])
        if held := LICENCES["bundled"].get(name):
            gpl = [{"license": {"id": "GPL-2.0-or-later"}}]
            each["components"] = [{"type": "library", "name": library, "licenses": gpl} for library in held]
    refs = {each["bom-ref"] for each in kept} | {bom["metadata"]["component"]["bom-ref"]}
    dependencies = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", []) if ref in refs]}
        for each in bom["dependencies"]
        if each["ref"] in refs
    ]
    return {**bom, "components": kept, "dependencies": dependencies}


def main() -> None:
    json.dump(running(json.load(sys.stdin)), sys.stdout, indent=2)
    if wrong := faults():
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
