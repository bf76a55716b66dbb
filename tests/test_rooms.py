"""The rooms of the house: imports go one way, in no circle, and every room is packaged."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top: a module imports its own room and those in the lines below its own. "loss" are the
# modules of fusedkd/ that lie in no folder.
LAYERS = (
    ("cli",),
    ("plan",),
    ("benchmarks",),
    ("demo",),
    ("integrations",),
    ("train",),
    ("students", "teachers"),
    ("cache",),
    ("models", "data"),
    ("alignment",),
    ("loss", "algebra", "distributions", "kernels"),
)
# beside the folders, and no part of the loss
MODULES = {"fusedkd.hf": "integrations", "fusedkd.__main__": "cli"}
HEIGHT = {room: -i for i, line in enumerate(LAYERS) for room in line}
ALIASES = {"fusedkd.train.run"}  # of what has moved up; each goes with the next release
FOLDERS = {"fusedkd": "fusedkd", "kernels": "fusedkd.kernels", "benchmarks": "fusedkd.benchmarks"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by the name that it is imported by."""
    files: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fusedkd" and parts[0] in FOLDERS:  # a link to the folder beside it
                continue
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def room(module: str) -> str:
    """Its folder, or "loss"."""
    if module in MODULES:
        return MODULES[module]
    package = module.split(".")[1:2]
    inside = package and any(name.startswith(f"fusedkd.{package[0]}.") for name in modules())
    return package[0] if inside else "loss"


def imports(module: str, deferred: bool = True) -> Iterator[tuple[str, str]]:
    """What a module imports of the product: (module, name in it). ``deferred``: with what waits for
    a function to be called, or is for the type checker alone."""
    path, package = modules()[module], module.split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [(base, alias.name) for alias in node.names]
        for base, name in names:
            if base.split(".")[0] == "fusedkd":
                inner = f"{base}.{name}"
                yield (inner, "") if inner in modules() else (base, name)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if deferred or not later:
            nodes += ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", sorted({room(module) for module in modules()}))
def test_imports_go_down(name: str) -> None:
    assert name in HEIGHT, f"{name} is a new room: give it a line in LAYERS"
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if room(module) == name and module not in ALIASES
        for other, _ in imports(module)
        if room(other) != name and HEIGHT[room(other)] >= HEIGHT[name] != HEIGHT["loss"]
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {other for other, _ in imports(module, deferred=False)} - {module, "fusedkd"}
        for module in modules()
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_backend_imports_another() -> None:
    backends = ("triton", "cpu", "reference")
    for module in modules():
        for name in backends:
            if module.startswith(f"fusedkd.kernels.{name}"):
                others = {f"fusedkd.kernels.{other}" for other in backends if other != name}
                assert not [m for m, _ in imports(module) if m.startswith(tuple(others))], module


def test_private_names_stay_in_their_folder() -> None:
    private = [
        f"{module} imports {other}.{name}"
        for module in modules()
        for other, name in imports(module)
        if re.match(r"_[a-z]", name) and other.rpartition(".")[0] != module.rpartition(".")[0]
    ]
    assert not private


def test_every_room_is_packaged() -> None:
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    files = {"fusedkd.recipes", "fusedkd.configs"}  # no modules
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == packages | files
