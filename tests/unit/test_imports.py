"""Imports go one way, the master never loads torch, pure files stay pure."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import xllm

ROOT = Path(xllm.__file__).parent

LAYERS = ("leaf", "cache", "engine", "roles", "main")
"""A module imports from its own layer and from those before it."""

PURE = (
    "xllm.cache.block_hash",
    "xllm.cache.block_pool",
    "xllm.cache.kv_cache",
    "xllm.engine.request",
    "xllm.engine.scheduler",
    "xllm.roles.global_scheduler",
)
"""Property tests live on them."""

IMPURE_PACKAGES = {"aiohttp", "asyncio", "grpc", "socket", "threading", "torch", "uvloop"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_start: bool
    """It runs when the importing module is imported: not in a function, not for types only."""


@cache
def module_paths() -> dict[str, Path]:
    paths = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("xllm", *path.relative_to(ROOT).with_suffix("").parts)
        paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    tree = ast.parse(module_paths()[module].read_text())
    return tuple(_walk(tree, at_start=True))


def _walk(node: ast.AST, *, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_start)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                is_module = submodule in module_paths()
                yield Import(submodule if is_module else child.module, child.lineno, at_start)
        elif isinstance(child, ast.If) and _is_for_types(child.test):
            yield from _walk(child, at_start=False)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, at_start=at_start and not is_function)


def _is_for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def layer_of(module: str) -> str:
    """xllm.main and xllm.__main__ are last, a package is the layer of its name, the rest leaves."""
    name = module.partition(".")[2].partition(".")[0].strip("_")
    return name if name in LAYERS else "leaf"


def closure(module: str) -> dict[str, str]:
    """Every module that importing `module` imports, with who imports it; not below others' own."""
    importers: dict[str, str] = {}
    waiting = [module]
    while waiting:
        importer = waiting.pop()
        for found in imports_of(importer):
            if not found.at_start:
                continue
            # Importing a module first imports the packages that it is in.
            parts = found.module.split(".")
            for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if name not in importers:
                    importers[name] = importer
                    if name in module_paths():
                        waiting.append(name)
    return importers


def test_the_walk_sees_the_project() -> None:
    assert {"xllm", "xllm.main", "xllm.cache.block_pool"} <= set(module_paths())
    assert "xllm.errors" in closure("xllm.flags")
    assert "absl" in closure("xllm.flags")


@pytest.mark.parametrize("module", sorted(module_paths()))
def test_imports_go_one_way(module: str) -> None:
    own = LAYERS.index(layer_of(module))
    wrong = [
        f"line {found.line}: {found.module}"
        for found in imports_of(module)
        if found.module.split(".")[0] == "xllm" and LAYERS.index(layer_of(found.module)) > own
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module: {
            found.module
            for found in imports_of(module)
            if found.at_start and found.module in module_paths() and found.module != module
        }
        for module in module_paths()
    }
    while free := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in free:
            del graph[module]
    assert graph == {}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_io(module: str) -> None:
    found = closure(module)
    assert {name: found[name] for name in found if name in IMPURE_PACKAGES} == {}


@pytest.mark.parametrize("module", ["xllm.main", "xllm.roles.master"])
def test_the_master_does_not_import_torch(module: str) -> None:
    found = closure(module)
    assert "torch" not in found, f"by {found['torch']}"


@pytest.mark.parametrize("module", ["xllm.roles.master", "xllm.roles.worker", "xllm.roles.loading"])
def test_nobody_imports_opentelemetry_unless_traces_are_on(module: str) -> None:
    assert [name for name in closure(module) if name.startswith("opentelemetry")] == []
    assert "xllm.otlp" not in closure(module)


def test_the_command_starts_with_next_to_nothing() -> None:
    """Signal handlers are installed before anything slow is imported."""
    assert {name for name in closure("xllm.main") if name.startswith("xllm")} == set()
    foreign = {name.split(".")[0] for name in closure("xllm.main")}
    assert foreign <= sys.stdlib_module_names | {"__future__"}
