"""Where a script is started: any console, closed or full streams, a notebook's settings, a swallowed Ctrl-C."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from lab04 import LabError, artefact, console, in_one_line, options
from lab04.artefact.folder import building, replace_files

TEXTS = ("Rain later", "Tōkyō 株価 🙂")


def predict(folder, *arguments, redirect="", **environment):
    """predict.py under a shell, which redirects its streams."""
    command = [sys.executable, ROOT / "predict.py", "--artefacts", folder, "--runs", 1, *arguments, "--", *TEXTS]
    line = f"{shlex.join(map(str, command))} {redirect}"
    return subprocess.run(
        ["sh", "-c", line], env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_a_console_that_is_not_utf8_loses_no_headline(encoding, artefact_folder):
    result = predict(artefact_folder("onnx"), "--charts", 0, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("Predicting: ") == 2


@pytest.mark.parametrize(
    "redirect, code, lines", [(">&-", 0, 0), ("2>&-", 0, 0), ("2>/dev/full", 0, 0), (">/dev/full", 2, 1)]
)
def test_closed_and_full_streams_end_in_a_line_at_most(redirect, code, lines, artefact_folder):
    result = predict(artefact_folder("onnx"), "--charts", 0, redirect=redirect)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == lines


@pytest.mark.parametrize("script", ["lab04-torch.py", "lab04-optimum.py", "lab04-nvidia.py", "predict.py"])
def test_scripts_find_the_lab_where_python_leaves_their_folder_out(script, tmp_path):
    command = [sys.executable, ROOT / script, "--no-such-option"]
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=safe, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


def test_charts_are_drawn_from_a_notebook(artefact_folder, tmp_path):
    backend = "module://no_such_package.backend_inline"
    result = predict(artefact_folder("onnx"), "--output", tmp_path, MPLBACKEND=backend)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_swallowed_interrupt_still_ends_the_script_and_keeps_the_old_artefact(artefact_folder, tmp_path, capsys):
    output = shutil.copytree(artefact_folder("onnx"), tmp_path / "built")
    before = artefact.load(output).manifest

    def main():
        with building(output), contextlib.suppress(BaseException):  # as copy.deepcopy's bare `except`
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        console.run(main)
    assert stop.value.code == console.INTERRUPTED
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert artefact.load(output).manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


def test_a_dead_builds_folder_goes_and_a_living_ones_stays(tmp_path):
    output = tmp_path / "built"
    dead, foreign = tmp_path / f".built.new-{os.getpid()}", tmp_path / ".built.newest"
    dead.mkdir(), foreign.mkdir()
    with building(output) as living:
        (living / "file").touch()
        with building(output) as other:
            assert living.exists() and other != living and not dead.exists()
    assert foreign.exists() and [path.name for path in output.iterdir()] == ["file"]


def test_a_symbolic_link_stays_one(artefact_folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with building(tmp_path / "link") as folder:
        shutil.copytree(artefact_folder("onnx"), folder, dirs_exist_ok=True)
    assert (tmp_path / "link").is_symlink() and artefact.load(tmp_path / "real").labels


def test_a_mount_point_gets_the_new_files_and_no_others(artefact_folder, tmp_path):
    output, new = tmp_path / "mounted", tmp_path / "new"
    shutil.copytree(artefact_folder("torch"), output)
    shutil.copytree(artefact_folder("onnx"), new)
    replace_files(output, new, "manifest.json")
    assert artefact.load(output).backend == "onnxruntime"
    assert {path.name for path in output.iterdir()} == {path.name for path in new.iterdir()}


def test_what_a_library_raises_while_loading_is_one_line_and_our_own_faults_are_not():
    reported = r"^cannot load it: cut off \(EOFError; please report"
    with pytest.raises(LabError, match=reported), in_one_line("cannot load it"):
        raise EOFError("cut off")
    with pytest.raises(TypeError), in_one_line("cannot load it"):
        options.positive(None)


def test_scripts_run_without_docstrings():
    for script in ("predict.py", "lab04-torch.py"):
        command = [sys.executable, "-OO", ROOT / script, "--help"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
