"""The rooms: imports run down only, nothing imports in a circle, and no file has grown into two."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

FLOORS = [  # from the ground up; rooms that share a floor do not import each other
    {"lab04", "lab04.labs"},
    {"lab04.console"},
    {"lab04.read", "lab04.artefact"},
    {"lab04.run"},
    {"lab04.quantise", "lab04.compare"},
    {"lab04.options"},
    {"lab04-torch", "lab04-optimum", "lab04-nvidia", "predict"},
    {"benchmark"},
    {"benchmark.charts"},
    {"benchmark.studies"},
]
FILES = [*ROOT.glob("lab04/**/*.py"), *ROOT.glob("lab04-*.py"), ROOT / "predict.py", *ROOT.glob("benchmark/**/*.py")]


def name(path) -> str:
    """A file's module name; a package has its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(path) for path in FILES}


def imported(path) -> set[str]:
    """Our own modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & MODULES or {node.module}
    return names & MODULES - {name(path)}


def room(module: str) -> str:
    """The room a module is in: its package, or itself where it stands alone."""
    alone = {each for floor in FLOORS for each in floor}
    return module if module in alone else module.rpartition(".")[0]


def floor(module: str) -> int:
    [number] = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    return number


def test_imports_run_down_only():
    assert len(FILES) > 40 and imported(ROOT / "lab04-torch.py") >= {"lab04.quantise.preparation", "lab04.options"}
    for path in FILES:
        for other in imported(path):
            # The benchmark's own command hands `--profile` on to a study.
            if room(name(path)) != room(other) and name(path) != "benchmark.__main__":
                assert floor(other) < floor(name(path)), f"{name(path)} imports {other}"


def test_no_import_runs_in_a_circle():
    list(TopologicalSorter({name(path): imported(path) for path in FILES}).static_order())  # CycleError names it


def test_files_keep_to_one_job():
    for path in ROOT.glob("lab04/**/*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 330, f"{path.relative_to(ROOT)} has {lines} lines: more than one job, perhaps"
