"""Nothing leaves the machine unasked: no telemetry is kept, and what is local opens no connection."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

# Reports every attempt of Python code to reach another machine.
HOOK = """
import os, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(event, arguments[-1], file=file)
sys.addaudithook(hook)
"""
VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


@pytest.fixture
def empty_home(tmp_path):
    """An environment with a home of its own and a record of connections, and none of the variables set."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("XDG_")}
    home = {"HOME": str(tmp_path / "home"), "CONNECTIONS": str(tmp_path / "connections")}
    (tmp_path / "home").mkdir()
    return {**kept, **home, "PYTHONPATH": str(tmp_path / "hook")}


def test_scripts_keep_no_telemetry_and_connect_nowhere(empty_home, model_folder, artefact_folder, tmp_path):
    model, output = model_folder("bert", 9), tmp_path / "built"
    folders = [artefact_folder(name) for name in ("torch", "onnx")]
    for script, arguments in {
        "lab04-torch.py": ("--model", model, "--output", output),
        "lab04-optimum.py": ("--model", model, "--output", output),
        "predict.py": ("--artefacts", *folders, "--output", tmp_path),
        "examples/triton/model_repository.py": ("--artefacts", folders[1], "--output", tmp_path / "models"),
    }.items():
        result = run_script(script, *arguments, env=empty_home)
        assert result.returncode == 0, result.stderr
        written = [str(path) for path in (tmp_path / "home").rglob("*")]
        assert not [path for path in written if "onnxruntime" in path or "DeveloperTools" in path], script
        assert not (tmp_path / "connections").exists(), script


def test_a_users_own_setting_wins():
    program = f"import json, os, lab04; print(json.dumps([os.environ[name] for name in {VARIABLES}]))"
    for given, expected in (({}, ["1"] * 3), (dict.fromkeys(VARIABLES, "0"), ["0"] * 3)):
        environment = {**{k: v for k, v in os.environ.items() if k not in VARIABLES}, **given}
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)
        assert json.loads(result.stdout) == expected


def test_cpp_example_keeps_no_telemetry(empty_home, artefact_folder, tmp_path):
    from test_portability import EXAMPLES, INCLUDE

    if not shutil.which("c++") or not (INCLUDE / "onnxruntime_c_api.h").exists():
        pytest.skip("no C++ compiler or no ONNX Runtime headers")
    folder = shutil.copytree(EXAMPLES / "cpp", tmp_path / "cpp")
    make = ["make", "--always-make", f"INCLUDE={INCLUDE}", f"PYTHON={sys.executable}"]
    subprocess.run(make, cwd=folder, check=True, capture_output=True)
    subprocess.run([folder / "classify", artefact_folder("onnx")], env=empty_home, check=True, capture_output=True)
    assert not list((tmp_path / "home").rglob("*onnxruntime*"))
