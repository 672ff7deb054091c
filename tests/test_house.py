"""The two rooms: the lab stands on its own, the benchmark above it, and nothing imports in a circle."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

LAB = [*(ROOT / "lab04").glob("*.py"), *ROOT.glob("lab04-*.py"), ROOT / "predict.py"]
BENCHMARK = list((ROOT / "benchmark").glob("*.py"))


def imported(path) -> set[str]:
    """Full names of our own modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()} | {
        name for name in names if name in ("lab04", "benchmark")
    }


def test_the_lab_never_imports_the_benchmark():
    assert len(LAB) > 10 and BENCHMARK
    assert any("lab04" in imported(path) for path in BENCHMARK), "imports are seen at all"
    for path in LAB:
        assert not [name for name in imported(path) if name.startswith("benchmark")], path.name


def test_no_import_runs_in_a_circle():
    files = [path for path in LAB + BENCHMARK if path.name != "__init__.py"]
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in files}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_the_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160 and len(text.encode()) <= 12_000
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 110, "a table fits a terminal"
