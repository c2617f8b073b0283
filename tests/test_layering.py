"""Imports run one way, and the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ask_dist"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ONLY_IN = {"deepspeed": "train.engine", "faiss": "bank.index", "torch_geometric": "refine.gnn"}
NO_RAY = {
    "": ["config", "errors", "files", "processor", "losses", "models", "data", "evaluate", "export", "plan"],
    "bank.": [
        *(
            "messages",
            "memory",
            "rows",
            "index",
            "inverted",
            "prototypes",
            "snapshot",
            "store",
            "journal",
            "durable",
            "external",
        ),
        *("shard", "local"),
    ],
    "refine.": ["graph", "gnn", "strategies", "refiner"],
    "train.": ["embeddings", "engine", "mixing", "checkpoint", "tracking", "trackers", "profiling", "progress"],
    "ablation.": ["space", "inputs", "knowledge", "trial", "probes", "statistics", "analysis", "plots", "report"],
}
NEVER_IMPORT = {
    "plan": "ablation train tune cli cluster evaluate bank refine losses models data bench",
    "losses": "ablation train tune cli cluster evaluate bank refine data models",
    "models": "ablation train tune cli cluster evaluate bank refine data losses",
    "data": "ablation train tune cli cluster evaluate bank refine losses models",
    "bank": "ablation train tune cli cluster evaluate refine losses models data",
    "refine": "ablation train tune cli cluster losses models data",
    "evaluate": "ablation train tune cli cluster refine losses export",
    "export": "ablation train tune cli cluster bank refine losses data evaluate",
    "train": "ablation tune cli",
    "tune": "ablation cli",
    "cluster": "ablation train tune cli evaluate",
    "ablation": "tune cli",
}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def test_the_package_was_found():
    assert {"ask_dist", "ask_dist.config", "ask_dist.losses.objective"} <= set(MODULES)


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items())
def test_a_heavy_library_has_one_home(library, home):
    users = [name for name, path in MODULES.items() if any(inside(used, library) for used in imports(path))]
    assert users == [f"ask_dist.{home}"]


@pytest.mark.parametrize("part", [prefix + name for prefix, names in NO_RAY.items() for name in names])
def test_algorithms_know_no_ray(part):
    modules = [name for name in MODULES if inside(name, f"ask_dist.{part}")]
    assert modules
    assert not [name for name in modules if any(inside(used, "ray") for used in imports(MODULES[name]))]


def test_the_configuration_stands_alone():
    modules = [path for name, path in MODULES.items() if inside(name, "ask_dist.config")]
    own = {used for path in modules for used in imports(path) if inside(used, "ask_dist")}
    assert all(any(inside(used, f"ask_dist.{part}") for part in ("config", "errors", "files")) for used in own)


@pytest.mark.parametrize(("part", "above"), NEVER_IMPORT.items())
def test_imports_run_one_way(part, above):
    wrong = [
        f"{name} imports {used}"
        for name, path in MODULES.items()
        if inside(name, f"ask_dist.{part}")
        for used in imports(path)
        if any(inside(used, f"ask_dist.{upper}") for upper in above.split())
    ]
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_longer_than_400_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["ask_dist.config", "ask_dist.cli"])
def test_a_configuration_error_needs_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {{'torch', 'ray', 'faiss', 'deepspeed', 'numpy'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
