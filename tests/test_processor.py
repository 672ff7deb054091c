"""An artefact opened on a processor it was not built on: the right kernels, or a refusal; never other answers."""

import shutil

import pytest

from lab04 import LabError, artefact
from lab04.run import runtimes


@pytest.mark.parametrize(
    "machine, supported, engine",
    [
        ("x86_64", ["qnnpack", "none", "onednn", "x86", "fbgemm"], "x86"),
        ("AMD64", ["onednn", "fbgemm"], "fbgemm"),
        ("aarch64", ["qnnpack", "none", "onednn"], "qnnpack"),
        ("arm64", ["onednn", "qnnpack"], "qnnpack"),
    ],
)
def test_every_processor_gets_its_kernels(machine, supported, engine):
    assert runtimes.quantised_engine(supported, machine) == engine


def test_kernels_that_gave_wrong_labels_are_never_chosen():
    for machine in ("aarch64", "x86_64", "riscv64"):
        with pytest.raises(LabError, match="no quantised kernels"):
            runtimes.quantised_engine(["onednn", "none"], machine)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_engine_that_answers_otherwise_is_refused(backend, artefact_folder, tmp_path, monkeypatch):
    built = artefact.load(shutil.copytree(artefact_folder(backend), tmp_path / "built"))
    assert len(built.manifest["check"]["known_headlines"]) == 5
    runtimes.open_backend(built).close()
    kind = type(runtimes.open_backend(built))
    right = kind.logits
    monkeypatch.setattr(kind, "logits", lambda self, tokens: right(self, tokens)[:, ::-1])
    with pytest.raises(LabError, match="gives wrong answers on this processor"):
        runtimes.open_backend(built)
