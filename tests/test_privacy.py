"""Scripts as a user starts them, from any folder: they do their work, keep no telemetry and connect nowhere."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
from conftest import RECORD_CALLS, ROOT, run_script

from lab04 import artefact

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


LABS = {"lab04-torch.py": 0, "lab04-optimum.py": 0, "lab04-nvidia.py": 3}  # and how they end here: without a GPU
SCRIPTS = (*LABS, "predict.py", "examples/triton/model_repository.py")


def empty_home(folder) -> dict[str, str]:
    """An environment with a home of its own and a record of connections, and none of the variables set."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("XDG_")}
    home = {"HOME": str(folder / "home"), "CONNECTIONS": str(folder / "connections")}
    (folder / "home").mkdir()
    return {**kept, **home, "PYTHONPATH": str(folder / "hook")}


@pytest.fixture(scope="module")
def started(model_folder, artefact_folder, tmp_path_factory):
    """`started(script)`: its process, run once, and the folder with the `home` and `work` folders it was given."""

    @cache
    def start(script: str):
        folders = [artefact_folder("torch"), artefact_folder("onnx")]
        arguments = {
            "predict.py": ("--artefacts", *folders),
            "examples/triton/model_repository.py": ("--artefacts", folders[1], "--output", "models"),
        }.get(script, ("--model", model_folder("distilbert", 2), "--output", "built"))
        folder = tmp_path_factory.mktemp("started")
        (folder / "work").mkdir()
        return run_script(script, *arguments, cwd=folder / "work", env=empty_home(folder)), folder

    return start


@pytest.mark.parametrize("script, code", LABS.items())
def test_labs_run_as_commands_from_any_folder(script, code, started):
    result, folder = started(script)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "\nWrote " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Next: ")
    assert artefact.load(folder / "work" / "built").labels == ["topic 0", "topic 1"]
    assert sorted(path.name for path in (folder / "work").iterdir()) == ["built"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_keep_no_telemetry_and_connect_nowhere(script, started):
    result, folder = started(script)
    assert result.returncode == LABS.get(script, 0), result.stderr
    written = [str(path) for path in (folder / "home").rglob("*")]
    assert not [path for path in written if "onnxruntime" in path or "DeveloperTools" in path]
    assert not (folder / "connections").exists()


def test_no_library_connects_anywhere_either(artefact_folder, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("no strace on this machine")
    predict = [sys.executable, ROOT / "predict.py", "--artefacts", artefact_folder("torch"), artefact_folder("onnx")]
    command = [*RECORD_CALLS, tmp_path / "calls", *predict]
    result = subprocess.run(command, cwd=tmp_path, env=empty_home(tmp_path), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    assert "+++ exited with 0 +++" in calls, "it was watched to its end"
    assert "AF_INET" not in calls


def test_a_users_own_setting_wins():
    program = f"import json, os, lab04; print(json.dumps([os.environ[name] for name in {VARIABLES}]))"
    for given, expected in (({}, ["1"] * 3), (dict.fromkeys(VARIABLES, "0"), ["0"] * 3)):
        environment = {**{k: v for k, v in os.environ.items() if k not in VARIABLES}, **given}
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)
        assert json.loads(result.stdout) == expected


def test_cpp_example_keeps_no_telemetry(artefact_folder, tmp_path):
    from test_portability import compiled_cpp

    program = compiled_cpp(tmp_path / "cpp")
    command = [program, artefact_folder("onnx"), "A headline"]
    subprocess.run(command, env=empty_home(tmp_path), check=True, capture_output=True)
    assert not list((tmp_path / "home").rglob("*onnxruntime*"))
