"""An artefact opened on a processor it was not built on: the right kernels, or a refusal; never other answers."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import run_in_process, training_texts

from lab04 import LabError, artefact
from lab04.quantise import preparation, this_cpu
from lab04.read import classifier
from lab04.run import runtimes

INT8_HERE = bool(this_cpu.INSTRUCTIONS & set(this_cpu.describe()["flags"]))


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


@pytest.mark.skipif(not INT8_HERE, reason="this processor has neither AVX512-VNNI nor AMX, which --this-cpu needs")
@pytest.mark.skipif(not shutil.which("g++"), reason="--this-cpu needs a C++ compiler: sudo apt install g++")
def test_compiled_code_gives_fp32_labels_for_every_shape_and_number_of_threads(model_folder, few_headlines, tmp_path):
    model = model_folder("minilm", 9)
    assert run_in_process("lab04-torch.py", "--this-cpu", "--model", model, "--output", tmp_path / "torch") == 0
    built = artefact.load(tmp_path / "torch")
    assert built.compiled and built.manifest["compiled_for"] == this_cpu.describe()
    fp32, tokenise, texts = classifier.load(str(model)), artefact.Tokeniser(built), training_texts()[100:164]
    texts += [" ".join(texts[start:]) for start in range(16)]  # far more words than the model reads
    reference = fp32.logits(texts)
    for threads, batch in ((1, 1), (1, 5), (2, 80)):
        with runtimes.open_backend(built, threads) as backend:
            starts = range(0, len(texts), batch)
            logits = np.concatenate([backend.logits(tokenise(texts[start : start + batch])) for start in starts])
        assert np.sqrt(np.mean((logits - reference) ** 2)) < 0.1 * reference.std()
        assert (logits.argmax(1) == reference.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_what_is_compiled_has_the_logits_of_the_network(family, model_folder, few_headlines):
    fp32, texts = classifier.load(str(model_folder(family, 9))), training_texts()[100:140]
    reference = fp32.logits(texts)
    embeddings = [name for name, _ in fp32.model.named_modules() if name.endswith("word_embeddings")]
    rewritten = this_cpu.rewrite(preparation.prepare(fp32), embeddings, preparation.STEPS)
    assert not any(type(module) is torch.nn.Linear for module in rewritten.modules())
    logits = dataclasses.replace(fp32, model=rewritten).logits(texts)
    assert np.sqrt(np.mean((logits - reference) ** 2)) < 0.1 * reference.std()


@pytest.mark.parametrize("change, needs", [({"flags": ["no_cpu_has_it"]}, "no_cpu_has_it"), ({"torch": "0.1"}, "0.1")])
def test_code_compiled_for_another_machine_is_refused_before_it_runs(change, needs, tmp_path):
    manifest = {"backend": "torch", "model_file": "not even there", "compiled_for": this_cpu.describe() | change}
    with pytest.raises(LabError, match=f"needs .*{needs}: run python lab04-torch.py --this-cpu"):
        runtimes.open_backend(artefact.Artefact(tmp_path, manifest, ["a", "b"]))


def test_this_cpu_says_at_once_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(this_cpu, "describe", lambda: {"flags": ["avx2", "fma"]})
    with pytest.raises(LabError, match="AVX512-VNNI or AMX"):
        this_cpu.check_here()
    monkeypatch.setattr(this_cpu, "describe", lambda: {"flags": ["avx2", "avx512_vnni"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="sudo apt install g"):
        this_cpu.check_here()
