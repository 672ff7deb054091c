"""The ONNX artefact where benchmark/studies/elsewhere.py sets it up: C#, the browser, old and emulated ONNX Runtimes.

`make elsewhere` sets all up; what is not set up is skipped by name, for some of it is hundreds of megabytes.
"""

import shutil
import subprocess

import numpy as np
import pytest
from conftest import HEADLINES, ROOT
from test_portability import BYTES, ONLY_AFTER, TEXTS, rechecked, with_tokeniser  # noqa: F401

from benchmark.studies import elsewhere, targets
from benchmark.studies.fetching import Missing
from lab04 import artefact

DIFFICULT = [*HEADLINES, *TEXTS, "ETL [SEP] 🙂👩‍🔬 [CLS]x", "naïve cafe\u0301 ﬁne", "the " * 300, "x" * 101]
TELLS_TOKENS = ("csharp", "cpp", "browser", "oldest", "arm", "arm-sme")
ROUNDING = 0.06  # of a probability: what other kernels' rounding moved one by, at most 0.046 (docs/int8.md)


@pytest.fixture(scope="module")
def target():
    """`target(name)`: how a target is asked; skips the test where it is not set up."""

    def find(name: str) -> targets.Target:
        try:
            return targets.TARGETS[name][1](False)
        except Missing as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="module")
def served(artefact_folder):
    """A copy of the artefact below the project's folder, which is all that a page of its server can read."""
    folder = ROOT / ".elsewhere" / "tested"
    shutil.rmtree(folder, ignore_errors=True)
    yield shutil.copytree(artefact_folder("onnx"), folder / "quantised-model-optimum")
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_difficult_headlines_get_the_same_answers(name, target, served):
    found = target(name)
    # transformers.js and Optimum know no length beyond the model's own, which tokenizer_config.json does not say.
    texts = DIFFICULT if name in TELLS_TOKENS else DIFFICULT[:8]
    counts, expected = elsewhere.reference(served, texts)
    answers = elsewhere.ask(found, served, texts)
    row = elsewhere.compare(answers, artefact.load(served).labels, expected)
    assert row["difference"] < ROUNDING
    if name in TELLS_TOKENS:
        assert [answer["tokens"] for answer in answers] == counts
    clear = np.sort(expected, axis=1)[:, -1] - np.sort(expected, axis=1)[:, -2] > 2 * ROUNDING
    assert row["same"] >= clear.sum() > len(texts) / 2


@pytest.mark.parametrize(
    "post_processor", [ONLY_AFTER, {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_csharp_cuts_and_surrounds_as_the_artefact_says(side, post_processor, target, artefact_folder, tmp_path):
    found = target("csharp")
    folder = with_tokeniser(artefact_folder("onnx"), tmp_path / "other", post_processor, truncation_side=side)
    texts = [*DIFFICULT[:4], " ".join(HEADLINES * 12)]
    counts, expected = elsewhere.reference(folder, texts)
    answers = elsewhere.ask(found, folder, texts)
    assert [answer["tokens"] for answer in answers] == counts
    assert elsewhere.compare(answers, artefact.load(folder).labels, expected)["difference"] < 1e-4


def test_csharp_rechecks_as_python_does(target, rechecked):  # noqa: F811
    found = target("csharp")
    _, expected = elsewhere.reference(rechecked, TEXTS)
    answers = elsewhere.ask(found, rechecked, TEXTS)
    assert elsewhere.compare(answers, artefact.load(rechecked).labels, expected)["difference"] < 1e-4
    assert 0 < sum(answer["rechecked"] for answer in answers) < len(TEXTS)


def test_csharp_refuses_in_one_line(target, artefact_folder, tmp_path):
    command, variables, _ = target("csharp")
    edited = shutil.copytree(artefact_folder("onnx"), tmp_path / "edited")
    (edited / "tokenizer.json").write_text((edited / "tokenizer.json").read_text() + " ")
    other = with_tokeniser(artefact_folder("onnx"), tmp_path / "other", BYTES)
    for folder, headline, says in (
        (artefact_folder("onnx"), " ", "a headline is empty"),
        (edited, "A headline", "tokenizer.json was edited"),
        (other, "A headline", "tokenizer.json is not BERT's WordPiece"),
        (artefact_folder("onnx", "roberta", 20), "A headline", "tokenizer.json is not BERT's WordPiece"),
        (tmp_path / "nowhere", "A headline", "manifest.json"),
    ):
        result = subprocess.run(
            [*map(str, command), folder, headline],
            env={**elsewhere.os.environ, **variables},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
        assert says in result.stderr


def test_known_headlines_notice_the_kernels_for_sme(target):
    """As ONNX Runtime comes, on a processor with SME, the shipped network's artefact must be refused."""
    folder = ROOT / "quantised-model-optimum"
    if not folder.exists():
        pytest.skip("no quantised-model-optimum: make lab")
    command, variables, versions = target("arm-sme")
    code = (
        "import sys; from lab04.run import runtimes; from benchmark.studies import answer; import onnxruntime as ort\n"
        "def as_it_comes(threads):\n"
        "    options = ort.SessionOptions(); options.intra_op_num_threads = threads; return options\n"
        "runtimes.session_options = as_it_comes; answer.main()"
    )
    place = command.index("-m")
    with pytest.raises(elsewhere.LabError, match="gives wrong answers on this processor"):
        elsewhere.ask(([*command[:place], "-c", code], variables, versions), folder, HEADLINES[:1])
    assert len(elsewhere.ask((command, variables, versions), folder, HEADLINES[:1])) == 1
