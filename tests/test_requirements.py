"""Each command installs what it imports, and no more: the files of requirements/ against the imports themselves."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires

import pytest
from conftest import ROOT

OURS = {
    path.stem
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.rglob("examples/**/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("lora-news/*.py"),
    ]
}
OURS |= {"lab04", "benchmark"}
# They drive other runtimes, where those happen to be installed, and say what is missing.
GUESTS = {"elsewhere.py", "browser.py", "csharp.py", "answer.py"}
# What imports a package in an `if` or a `try`, or for a command of its own, beside its file of requirements.
ELSEWHERE = {
    "sklearn": "requirements/train.txt",  # the confusion matrix of the training, drawn with the lab's other charts
    "tensorrt": "requirements/gpu.txt",
    "pycuda": "requirements/gpu.txt",
    "pyarrow": "requirements/ray.txt",  # Parquet files, where it is installed
    "ray": "requirements/ray.txt",
    "starlette": "requirements/http.txt",
}
ROOMS = {
    "requirements.txt": ("lab04/**/*.py", "lab04-*.py", "predict.py"),
    "requirements/bench.txt": ("benchmark/**/*.py",),
    "requirements/train.txt": ("lora-news/*.py",),
}
PEERS = ("sentence_transformers", "openvino", "nncf", "ctranslate2")


def listed(name: str) -> dict[str, str]:
    """Distributions of a file of requirements, in their canonical names, and their pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found if match}


def imported(patterns: tuple[str, ...]) -> set[str]:
    """The packages, not Python's nor ours, that files import anywhere, also inside functions."""
    names = set()
    for pattern in patterns:
        for path in [path for path in ROOT.glob(pattern) if path.name not in GUESTS]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.split(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and name not in OURS}


@pytest.mark.parametrize("file", ROOMS)
def test_every_import_is_listed(file):
    available = listed("requirements.txt") | listed(file)
    providers = packages_distributions()
    for package in imported(ROOMS[file]):
        needs = "requirements/peers.txt" if package in PEERS else ELSEWHERE.get(package)
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in providers.get(package, [package])}
        assert names & (available | (listed(needs) if needs else {})).keys(), f"{package} is not in {file}"


def test_a_distribution_has_one_pin_everywhere():
    pins: dict[str, set[str]] = {}
    for path in [ROOT / "requirements.txt", *(ROOT / "requirements").glob("*.txt")]:
        for name, pin in listed(str(path.relative_to(ROOT))).items():
            pins.setdefault(name, set()).add(pin)
    assert not {name: found for name, found in pins.items() if len(found) > 1}


def test_the_reasons_of_the_pins_are_true():
    """What the comments of requirements.txt say of other packages' limits, by those packages' own word."""
    pinned = listed("requirements.txt")

    def limit(package: str, of: str) -> str:
        return next(line for line in requires(package) or [] if re.match(rf"{of}\b", line))

    assert "<4.58" in limit("optimum-onnx", "transformers") and pinned["transformers"].startswith("4.57")
    assert "~=2.1" in limit("optimum-onnx", "optimum") and pinned["optimum"].startswith("2.1")
    assert "<1.0" in limit("transformers", "huggingface.hub") and pinned["huggingface-hub"].startswith("0.")
    assert "<=0.23.0" in limit("transformers", "tokenizers")


def test_make_installs_what_a_command_needs():
    rules = dict(re.findall(r"^([a-z-]+): (.*?)(?:##|$)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert ".venv/installed-tests" in rules["test"] and ".venv/installed-train" in rules["train"]
    for target in ("bench", "bench-bert-base", "bench-steps", "bench-families", "examples", "pictures"):
        assert ".venv/installed-bench" in rules[target]
    assert ".venv/installed-peers" in rules["bench-peers"]


def test_git_ignores_what_the_readme_makes():
    import subprocess

    made = [".venv", "my-torch/x", "my-model/x", "model-repository/x", "quantised-model-torch/x", "confidence_x.png"]
    made += ["results/cpu-quick/results.json"]
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *made]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == made
