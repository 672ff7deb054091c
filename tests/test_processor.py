"""An artefact opened on a processor it was not built on: the right kernels, or a refusal; never other answers."""

import shutil

import numpy as np
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
@pytest.mark.parametrize("kernels", ["turned round", "not a number", "as wrong as SME's", "as other processors'"])
def test_an_engine_that_answers_otherwise_is_refused(backend, kernels, artefact_folder, tmp_path, monkeypatch):
    built = artefact.load(shutil.copytree(artefact_folder(backend), tmp_path / "built"))
    known = built.manifest["check"]["known_headlines"]
    assert len(known) == 24
    runtimes.open_backend(built).close()
    kind = type(runtimes.open_backend(built))
    right, noise = kind.logits, np.random.default_rng(0)
    rounding = np.mean([np.abs(np.subtract(item["logits"], item["fp32_logits"])).max() for item in known])

    def answer(self, tokens):
        logits = right(self, tokens)
        size = logits.shape[1]
        if kernels == "turned round":
            return logits[:, ::-1]
        if kernels == "not a number":
            return logits * np.nan
        # Wrong kernels move every headline, and right ones four of ten (lab04/run/runtimes.py).
        if kernels == "as wrong as SME's":
            return logits + 0.7 * rounding * np.eye(size)[noise.integers(size)]
        return logits + 0.35 * rounding * np.eye(size)[noise.integers(size)] * (noise.random() < 0.4)

    monkeypatch.setattr(kind, "logits", answer)
    if kernels == "as other processors'":
        runtimes.open_backend(built).close()
        return
    with pytest.raises(LabError, match="gives wrong answers on this processor"):
        runtimes.open_backend(built)
