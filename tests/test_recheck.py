"""Recheck: labels that INT8 would change are decided by the exact graph, and by nothing else."""

import json
import shutil

import numpy as np
import pytest
from conftest import look_at_few_headlines, run_in_process

from lab04 import LabError, artefact
from lab04.compare import consistency
from lab04.quantise import exact_graph
from lab04.read import classifier
from lab04.read.texts import training_headlines
from lab04.run import recheck, runtimes
from lab04.run.backend import Backend


class Table(Backend):
    """A backend whose logits are those of the row that the first token names."""

    def __init__(self, rows):
        self.rows, self.asked = np.array(rows, dtype=np.float32), []

    def logits(self, tokens):
        self.asked.append(tokens["input_ids"][:, 0].tolist())
        return self.rows[tokens["input_ids"][:, 0]]


@pytest.mark.parametrize("labels", [2, 3, 9])
def test_only_undecided_rows_of_a_batch_run_again(labels):
    quick = Table(
        np.pad([[0.0, 1.0], [0.2, 0.1], [2.0, 0.0], [0.3, 0.35]], ((0, 0), (0, labels - 2)), constant_values=-9)
    )
    exact = Table(
        np.pad([[9.0, 0.0], [0.0, 5.0], [0.0, 9.0], [6.0, 0.0]], ((0, 0), (0, labels - 2)), constant_values=-9)
    )
    backend = recheck.RecheckedBackend(quick, exact, 0.2)
    logits = backend.logits({"input_ids": np.array([[0], [1], [2], [3]])})
    assert logits.argmax(1).tolist() == [1, 1, 0, 0]
    assert backend.rechecked.tolist() == [False, True, False, True]
    assert exact.asked == [[1, 3]]
    backend.logits({"input_ids": np.array([[0], [2]])})
    assert len(exact.asked) == 1


def test_threshold_is_the_most_by_which_a_gap_was_overstated_with_its_margin():
    quick = np.array([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25], [1.0, 0.0, 0.0]])
    exact = np.array([[3.0, 1.5, 0.0], [0.0, 0.25, 1.25], [9.0, 0.0, 0.0]])  # by 0.5 and 1.25; the last understated
    assert recheck.threshold_from(quick, exact) == pytest.approx(recheck.MARGIN * 1.25)


def test_closing_check_refuses_a_single_changed_label_of_a_rechecked_artefact():
    reference = np.tile([[0.0, 4.0]], (100, 1))
    reference[0] = [0.0, 0.01]
    logits = reference.copy()
    logits[0] = [0.01, 0.0]
    assert consistency.check(reference, logits)["agreement"] == 0.99
    with pytest.raises(LabError, match="recheck"):
        consistency.check(reference, logits, rechecked=True)


@pytest.fixture(scope="module")
def rechecked(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recheck") / "quantised-model-optimum"
    arguments = "--recheck", "--model", model_folder("bert", 9), "--output", folder
    with pytest.MonkeyPatch.context() as monkeypatch:
        look_at_few_headlines(monkeypatch)
        assert run_in_process("lab04-optimum.py", *arguments) == 0
    return folder


def test_rechecked_artefact_keeps_every_label_of_fp32(rechecked):
    assert artefact.load(rechecked).manifest["check"]["agreement"] == 1


@pytest.mark.parametrize("scale", [1.0, 1e6], ids=["in range", "beyond FP16"])
def test_second_graph_is_stored_in_fp16_only_where_that_keeps_the_labels(scale, model_folder, tmp_path, capsys):
    fp32 = classifier.load(model_folder("bert", 9))
    fp32.model.classifier.weight.data *= scale
    texts = training_headlines()[:20]
    (tmp_path / "scratch").mkdir()
    exact_graph.write(fp32, texts, 1, tmp_path / "scratch", tmp_path)
    weights_bytes = sum(parameter.nbytes for parameter in fp32.model.parameters())
    stored = (tmp_path / recheck.GRAPH_FILE).stat().st_size / weights_bytes
    assert stored < 0.6 if scale == 1 else stored > 0.8
    assert ("weights stored in FP16\n" in capsys.readouterr().out) == (scale == 1)
    labels = fp32.logits(texts).argmax(1).tolist()
    assert exact_graph.find_labels(tmp_path / recheck.GRAPH_FILE, fp32, texts, 1) == labels


def test_size_counts_both_graphs(rechecked):
    graphs = [rechecked / "model_quantized.onnx", rechecked / recheck.GRAPH_FILE]
    assert artefact.load(rechecked).model_mb == pytest.approx(sum(path.stat().st_size for path in graphs) / 1e6)


def test_padded_batch_gets_the_labels_of_single_headlines(rechecked):
    item = artefact.load(rechecked)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    exact = runtimes.OnnxRuntimeBackend(item, 1, rechecked / recheck.GRAPH_FILE)
    texts = ["Shares fall", "Climate report warns UK cities face extreme flooding by 2030", "AI tutor program"] * 3
    logits, expected = backend.logits(tokenise(texts)), exact.logits(tokenise(texts))
    assert logits.argmax(1).tolist() == expected.argmax(1).tolist()
    np.testing.assert_allclose(logits[backend.rechecked], expected[backend.rechecked], atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "edited", "threshold"])
def test_damaged_second_graph_or_threshold_is_refused(rechecked, damage, tmp_path):
    folder = shutil.copytree(rechecked, tmp_path / "my-optimum-recheck")
    if damage == "missing":
        (folder / recheck.GRAPH_FILE).unlink()
    elif damage == "edited":
        data = bytearray((folder / recheck.GRAPH_FILE).read_bytes())
        data[-1] ^= 1
        (folder / recheck.GRAPH_FILE).write_bytes(data)
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"threshold": ', '"threshold": 1'))
    with pytest.raises(LabError, match=f"run python lab04-optimum.py --model .* --recheck --output {folder}$"):
        artefact.load(folder)


def test_predict_says_which_headlines_were_rechecked(rechecked, capsys):
    item = artefact.load(rechecked)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    texts = training_headlines()[:40]
    expected = []
    for text in texts:
        backend.logits(tokenise([text]))
        expected.append(bool(backend.rechecked[0]))
    capsys.readouterr()
    assert run_in_process("predict.py", "--json", "--runs", 1, "--artefacts", rechecked, "--", *texts) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["backends"]["ONNX Rechecked"]["rechecked"] for record in records] == expected
    assert run_in_process("predict.py", "--charts", 0, "--runs", 1, "--artefacts", rechecked, "--", *texts) == 0
    printed = capsys.readouterr().out
    assert printed.count(" sec, rechecked") == sum(expected)
    assert f"{sum(expected) / 40:.1%} of the headlines ran again" in printed
