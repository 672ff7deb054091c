"""The ONNX graph in its fastest form: right, portable, and left so by the session; batches in parts."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import training_texts

from lab04 import artefact
from lab04.quantise import onnx_graph, preparation
from lab04.read import classifier
from lab04.run import runtimes


def test_default_options_leave_the_graph_in_its_fast_form(artefact_folder, tmp_path):
    built = artefact.load(artefact_folder("onnx", "minilm", 100))
    shipped = onnx.load(built.model_file).graph
    assert {node.domain for node in shipped.node} <= {"", "com.microsoft"}, "any language's ONNX Runtime runs it"
    weights_zero_points = [node.input[3:] for node in shipped.node if node.op_type == "MatMulInteger"]
    assert weights_zero_points and not any(map(any, weights_zero_points)), "all 0, and they take time"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as-run.onnx")
    onnxruntime.InferenceSession(str(built.model_file), options, providers=["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "as-run.onnx").graph
    kinds = Counter(node.op_type for node in run.node)
    makers = {name: node.op_type for node in run.node for name in node.output}
    gelus = [[makers.get(name) for name in node.input] for node in run.node if node.op_type == "FastGelu"]
    assert gelus == [["DynamicQuantizeMatMul"]] * 2, "the bias is added in the product before"
    assert kinds["SkipLayerNormalization"] == 0, "four times as slow as its parts"
    assert kinds["LayerNormalization"] == 5 and kinds["QAttention"] == 2 and kinds["FastGelu"] == 2


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_the_fused_fp32_graph_gives_the_models_logits(family, model_folder, tmp_path):
    fp32 = classifier.load(str(model_folder(family, 9)))
    graph = onnx_graph.fuse(onnx_graph.export(fp32.model, tmp_path), fp32.model.config, tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    texts = training_texts()[:12]
    reference = fp32.logits(texts)
    padded = dict(fp32.tokenizer(texts, padding=True, truncation=True, max_length=60, return_tensors="np"))
    inputs = {item.name: padded[item.name].astype(np.int64) for item in session.get_inputs()}
    assert np.abs(session.run(None, inputs)[0] - reference).max() < 1e-4


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attentions_are_fused_and_the_last_trimmed_whichever_inputs_are_scaled(
    family, model_folder, tmp_path, monkeypatch
):
    fp32 = classifier.load(str(model_folder(family, 9)))
    monkeypatch.setattr(preparation, "EVERY", 100)
    monkeypatch.setattr(preparation, "LARGE", 0)  # scale every input, also those that this model leaves small
    prepared = preparation.prepare(fp32)
    graph = onnx_graph.fuse(onnx_graph.export(prepared, tmp_path), fp32.model.config, tmp_path / "fused.onnx")
    nodes = onnx.load(graph).graph.node
    attentions = [node.output[0] for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == 2
    assert any(node.op_type == "Slice" and node.input[0] == attentions[1] for node in nodes), "one token goes on"
    texts, session = training_texts()[:4], onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    reference = dataclasses.replace(fp32, model=prepared).logits(texts)
    for text, expected in zip(texts, reference, strict=True):
        tokens = fp32.encode([text])
        inputs = {item.name: tokens[item.name].numpy() for item in session.get_inputs()}
        assert np.abs(session.run(None, inputs)[0] - expected).max() < 1e-4


def test_a_large_batch_runs_in_parts_that_lose_nothing():
    random = np.random.default_rng(0)
    lengths = random.integers(3, 30, size=50)
    ids = np.zeros((50, 40), dtype=np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = random.integers(1, 1000, size=length)
    tokens = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    shapes = []

    def run(part):
        shapes.append(part["input_ids"].shape)
        return (part["input_ids"] * part["attention_mask"]).sum(axis=1, keepdims=True).astype(np.float32)

    assert np.array_equal(runtimes.in_parts(run, tokens), run(tokens))
    assert sum(rows for rows, _ in shapes[:-1]) == 50 and max(rows for rows, _ in shapes[:-1]) <= runtimes.PART
    assert sum(rows * width for rows, width in shapes[:-1]) < 1.3 * lengths.sum(), "little of it is padding"


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_padded_on_the_left_move_to_where_they_stand_alone(rows):
    tokens = {"input_ids": np.tile(np.array([0, 0, 5, 6]), (rows, 1))}
    tokens["attention_mask"] = (tokens["input_ids"] > 0).astype(np.int64)
    found = runtimes.in_parts(lambda part: part["input_ids"] * part["attention_mask"], tokens)
    assert (found[:, :2] == [5, 6]).all() and not found[:, 2:].any(), "positions count from the first token"


def test_batches_give_each_headline_its_own_label(artefact_folder):
    for backend in ("torch", "onnx"):
        built = artefact.load(artefact_folder(backend))
        tokenise = artefact.Tokeniser(built)
        with runtimes.open_backend(built) as runtime:
            single = np.concatenate([runtime.logits(tokenise([text])) for text in training_texts()[:40]])
            batch = runtime.logits(tokenise(training_texts()[:40]))
        assert np.abs(batch - single).max() < 0.25 * np.ptp(single)
        assert (batch.argmax(1) == single.argmax(1)).mean() > 0.9
