"""The import rule of ARCHITECTURE.md: who may know whom. Ruff's banned-api holds the coarse half of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ("deployments", "ray", "fastapi", "starlette", "pydantic")

# part of the tree ▸ what it must not import
FORBIDDEN = {
    "helios_core": SERVICE,
    "helios_core/transformer": ("helios_core.vae", "helios_core.sampling"),
    "helios_core/vae": ("helios_core.transformer", "helios_core.sampling"),
    "helios_core/sampling": ("helios_core.transformer", "helios_core.vae"),
    "load_tests": ("helios_core", "deployments", "ray", "torch"),
}


RUNS_WHAT_IT_READS = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "eval",
    "exec",
    "torch.load",
    "allow_pickle=",
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part: str) -> None:
    files = list((ROOT / part).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if any(name == banned or name.startswith(f"{banned}.") for banned in FORBIDDEN[part])
    }
    assert wrong == set()


def test_nothing_that_is_read_can_run_anything() -> None:
    """No file, body or weights: nobody imports or calls what could run them. Ray pickles between its own processes."""

    def used(path: Path) -> set[str]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        words = {word.arg for call in calls for word in call.keywords}
        return imports(path) | {ast.unparse(call.func) for call in calls} | {f"{word}=" for word in words}

    files = [path for part in ("helios_core", "deployments", "load_tests") for path in (ROOT / part).rglob("*.py")]
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := used(path) & RUNS_WHAT_IT_READS)}
    assert files and wrong == {}


@pytest.mark.parametrize("module", ["deployments.app", "deployments.director"])
def test_the_control_plane_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sampler_and_vae_are_loaded_without_transformers_and_torchs_compiler() -> None:
    """Each takes more than a second to import, for which every replica of these would wait."""
    code = """
import sys, torch
from helios_core.checkpoints import Checkpoint
from helios_core.weights import load_sampler, load_vae
demo = Checkpoint.open("demo")
load_sampler(demo, torch.device("cpu"), torch.float32), load_vae(demo, torch.device("cpu"))
raise SystemExit(bool({"transformers", "torch._dynamo"} & sys.modules.keys()))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
