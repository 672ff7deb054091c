"""The command in a manifest: what messages print builds the folder again, as it was built, from where one stands."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_in_process

from lab04 import LabError, artefact, console
from lab04.artefact import rebuilding


@pytest.fixture
def built(shared_folder, model_folder, few_headlines, tmp_path):
    """An ONNX artefact of a user's, with names of their own for the classes, beside a copy of its model."""

    def write(folder):
        shutil.copytree(model_folder("bert", 3), folder / "my model")
        (folder / "names.txt").write_text("one\ntwo\nthree\n")
        options = "--model", folder / "my model", "--labels", folder / "names.txt", "--output", folder / "my-onnx"
        assert run_in_process("lab04-optimum.py", *options) == 0

    shutil.copytree(shared_folder("rebuilding", write), tmp_path, dirs_exist_ok=True)
    return tmp_path / "my-onnx"


def refused(folder) -> str:
    """The message that refuses a folder, as the console prints it."""
    with pytest.raises(LabError) as error:
        artefact.load(folder)
    return console.as_run_here(str(error.value))


def test_a_damaged_folder_names_the_command_that_built_it(built, monkeypatch):
    with (built / "model_quantized.onnx").open("ab") as file:
        file.write(b"x")
    monkeypatch.chdir(built.parent)
    command = refused(built).split(": run ")[1]
    words = shlex.split(command)
    assert shutil.which(words[0]) and Path(words[0]).samefile(sys.executable)
    assert words[1] == str(ROOT / "lab04-optimum.py"), "a way to the script from another folder"
    assert words[2:] == ["--model", "my model", "--labels", "names.txt", "--output", "my-onnx"]
    assert run_in_process("lab04-optimum.py", *words[2:]) == 0
    assert artefact.load(built).labels == ["one", "two", "three"]


def test_model_and_folder_may_move_together_and_a_lost_model_is_said(built, tmp_path, monkeypatch):
    (tmp_path / "moved").mkdir()
    for name in ("my model", "names.txt", "my-onnx"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    folder = tmp_path / "moved" / "my-onnx"
    monkeypatch.chdir(ROOT)
    assert f"--model '{tmp_path}/moved/my model'" in rebuilding.rebuild_command(folder)
    assert "present place" not in rebuilding.rebuild_command(folder)
    shutil.rmtree(tmp_path / "moved" / "my model")
    assert f"(with the present place of {tmp_path}/moved/my model)" in rebuilding.rebuild_command(folder)


def test_a_folder_that_tells_nothing_is_not_taken_for_the_news_classifiers(tmp_path):
    (tmp_path / "my-torch").mkdir()
    assert "lab04-torch.py" not in refused(tmp_path / "my-torch"), "the name of a folder says nothing of its model"
    named = tmp_path / "quantised-model-torch"
    assert re.search(rf"lab04-torch.py --output {named}$", refused(named))


@pytest.mark.parametrize("change", [{"script": "rm -rf"}, {"options": {"model; rm": "x"}}, {"options": None}])
def test_a_manifest_cannot_have_another_command_printed(built, change):
    path = built / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["command"] |= change
    path.write_text(json.dumps(manifest))
    assert "rm" not in refused(built).split(": run ")[1]
