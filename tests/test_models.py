"""Every supported family, through every lab and predict.py, against its own FP32 logits.

How far INT8 may be from FP32 is not a number taken from a run: the same `transformers` model with its Linear weights
rounded to 7 bits and their inputs to 8 is a second, independent reading of what INT8 costs this model.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    HEADLINES,
    POSITIONS,
    copy_model,
    run_in_process,
    training_texts,
    write_model,
)

from lab04 import LabError, artefact, labs, options
from lab04.compare import closing_check, consistency
from lab04.quantise import preparation
from lab04.read import classifier
from lab04.read import texts as read_texts
from lab04.run import runtimes

MODELS = [("bert", 9), ("distilbert", 2), ("roberta", 20), ("minilm", 100), ("electra", 9), ("adapter", 9)]
# What has no step of its own in the lab: any other classifier may try, and the closing check decides.
MODELS += [("mpnet", 9), ("albert", 9), ("deberta-v2", 9), ("modernbert", 9)]
INT8 = ["torch", "onnx"]
TEXTS = slice(0, 96)
# Rounding is different in every implementation; twice the root mean square of one says "of this size, not larger".
TIMES_ROUNDING = 2


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "{}-{}".format(*model))
def model(request):
    return request.param


@pytest.fixture(scope="module")
def fp32(model, model_folder):
    return classifier.load(str(model_folder(*model)))


@pytest.fixture(scope="module")
def texts():
    return training_texts()[TEXTS]


@pytest.fixture(scope="module")
def reference(fp32, texts):
    return fp32.logits(texts)


@pytest.fixture(scope="module")
def rounding(fp32, texts, reference):
    """Root mean square error of the FP32 model's logits when its weights and activations are rounded."""
    rounded = dataclasses.replace(fp32, model=rounded_copy(fp32.model))
    return rms(rounded.logits(texts) - reference)


def rounded_copy(network):
    """The network with 7-bit Linear weights, one scale a row, and 8-bit Linear inputs, one scale a tensor."""
    import torch

    def round_input(_, inputs):
        step = (inputs[0].amax().clamp(min=0) - inputs[0].amin().clamp(max=0)) / 255
        return (torch.round(inputs[0] / step) * step,)

    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.detach().abs().amax(1, keepdim=True) / 63
            module.weight.data = torch.round(module.weight.data / step) * step
            module.register_forward_pre_hook(round_input)
    return network


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def run_padded(backend, tokenise, texts, batch: int = 16) -> np.ndarray:
    return np.concatenate([backend.logits(tokenise(texts[i : i + batch])) for i in range(0, len(texts), batch)])


# --- The artefact is the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", INT8)
def test_int8_logits_differ_from_fp32_by_rounding_only(backend, model, artefact_folder, texts, reference, rounding):
    built = artefact.load(artefact_folder(backend, *model))
    runtime, tokenise = runtimes.open_backend(built), artefact.Tokeniser(built)
    single = np.concatenate([runtime.logits(tokenise([text])) for text in texts])
    padded = run_padded(runtime, tokenise, texts)
    assert len({tokenise([text])["input_ids"].shape[1] for text in texts[:16]}) > 1, "the batches must need padding"
    assert rms(single - reference) < TIMES_ROUNDING * rounding
    assert rms(padded - reference) < TIMES_ROUNDING * rounding
    # The bound must be able to fail: it is far below what another headline's logits would give.
    assert rms(np.roll(reference, 1, axis=0) - reference) > 5 * TIMES_ROUNDING * rounding
    for logits in (single, padded):
        assert consistency.compare(reference, logits)["decided_agreement"] >= consistency.MIN_DECIDED_AGREEMENT


@pytest.fixture(scope="module")
def large_columns(texts, tmp_path_factory):
    """A model with large input columns, its logits, and their root mean square error when all is plainly rounded.

    Trained encoders have a few columns many times as large as the rest; a random one must be given some. It is as wide
    as MiniLM: among fewer columns, one large one matters less.
    """
    folder = tmp_path_factory.mktemp("large-columns")
    write_model(folder, "minilm", 9, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    fp32 = classifier.load(str(folder))
    for name, parameter in fp32.model.named_parameters():
        if name.endswith("attention.output.LayerNorm.weight"):
            parameter.data[7] = 20
    fp32.model.save_pretrained(folder)
    reference = fp32.logits(texts)
    plain = dataclasses.replace(fp32, model=rounded_copy(fp32.model)).logits(texts) - reference
    return folder, reference, rms(plain)


@pytest.mark.parametrize("script", ["lab04-torch.py", "lab04-optimum.py"])
def test_large_input_columns_cost_little(script, large_columns, few_headlines, texts, tmp_path):
    model, reference, plain = large_columns
    assert run_in_process(script, "--model", model, "--output", tmp_path / "built") == 0
    built = artefact.load(tmp_path / "built")
    runtime, tokenise = runtimes.open_backend(built), artefact.Tokeniser(built)
    logits = np.concatenate([runtime.logits(tokenise([text])) for text in texts])
    assert rms(logits - reference) < 0.6 * plain


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_preparation_changes_nothing_but_the_rounding(family, model_folder, texts, monkeypatch, few_headlines):
    fp32 = classifier.load(str(model_folder(family, 9)))
    monkeypatch.setattr(preparation, "round_matrix", lambda weight, moment: weight)
    monkeypatch.setattr(preparation, "LARGE", 0)  # scale every input
    for name, parameter in fp32.model.named_parameters():
        if "value" in name or "v_lin" in name:
            parameter.data.add_(0.02).mul_(40)  # columns of an attention's output that need a scale, and biases
    prepared = preparation.prepare(fp32)
    scaled = [name for name, _ in prepared.named_buffers() if name.endswith("inverse_scale")]
    assert scaled and not any("attention.output" in name or "out_lin" in name for name in scaled), "these are free"
    np.testing.assert_allclose(dataclasses.replace(fp32, model=prepared).logits(texts), fp32.logits(texts), atol=1e-4)


@pytest.mark.parametrize("rotated", [False, True])
def test_values_that_an_attention_mixes_are_scaled_in_front_of_its_output(rotated):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.RoFormerConfig(vocab_size=50, rotary_value=rotated, initializer_range=0.3, **shape)
    network = transformers.RoFormerForSequenceClassification(config).eval()
    for layer in network.roformer.encoder.layer:
        layer.attention.self.value.weight.data *= 10
    batch = {"input_ids": torch.randint(1, 50, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    before = network(**batch).logits
    preparation.scale_inputs(network, [batch])
    torch.testing.assert_close(network(**batch).logits, before, atol=1e-3, rtol=1e-3)
    outputs = [name for name, _ in network.named_buffers() if name.endswith("attention.output.dense.inverse_scale")]
    assert len(outputs) == (2 if rotated else 0)


def test_fp16_logits_are_fp32_ones(model, artefact_folder, texts, reference):
    built = artefact.load(artefact_folder("tensorrt", *model))
    check, tokenise = runtimes.open_fp16_check(built), artefact.Tokeniser(built)
    for logits in (
        np.concatenate([check.logits(tokenise([text])) for text in texts]),
        run_padded(check, tokenise, texts),
    ):
        # FP16 keeps 11 bits: 2^-11 relative for each weight, which sums over a layer leave where it is.
        np.testing.assert_allclose(logits, reference, atol=2**-11 * 16 * np.abs(reference).max())


@pytest.mark.parametrize("backend", [*INT8, "tensorrt"])
def test_artefact_keeps_labels_and_token_ids(backend, model, artefact_folder, fp32, texts):
    built = artefact.load(artefact_folder(backend, *model))
    assert built.labels == [f"topic {index}" for index in range(model[1])]
    tokenise = artefact.Tokeniser(built)
    for text in [*texts, "word " * 500, "数字 🙂 naïve"]:
        expected = fp32.tokenizer(text, truncation=True, max_length=fp32.max_length)
        tokens = tokenise([text])
        assert set(tokens) == set(fp32.input_names)
        for name, ids in tokens.items():
            assert ids.tolist() == [expected[name]], (name, text)


def test_models_own_length_limit_counts(artefact_folder):
    built = artefact.load(artefact_folder("onnx", "roberta", 20))
    tokenise, runtime = artefact.Tokeniser(built), runtimes.open_backend(built)
    tokens = tokenise(["word " * 500])
    assert tokens["input_ids"].shape == (1, POSITIONS)
    assert tokenise.dropped("word " * 500, tokens) > 0
    assert np.isfinite(runtime.logits(tokens)).all()


# --- The scripts, as a user starts them -------------------------------------------------------------------


def test_predict_takes_every_model(model, artefact_folder, capfd):
    folders = [artefact_folder(backend, *model) for backend in INT8]
    capfd.readouterr()  # what the labs printed, if this test was the first to need them
    assert run_in_process("predict.py", "--json", "--artefacts", *folders, "--", *HEADLINES) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == HEADLINES
    for record in records:
        assert len(record["backends"]) == len(INT8)
        for result in record["backends"].values():
            probabilities = list(result["probabilities"].values())
            assert len(probabilities) == model[1]
            assert sum(probabilities) == pytest.approx(1)
            assert probabilities[result["id"]] == max(probabilities)
            assert list(result["probabilities"])[result["id"]] == result["label"]


# --- A user's own texts ------------------------------------------------------------------------------------


def test_users_texts_prepare_and_check_in_place_of_ours(model_folder, few_headlines, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(training_texts()[:101]), encoding="utf-8")
    arguments = "--model", model_folder("bert", 9), "--texts", tmp_path / "texts.txt", "--output", tmp_path / "built"
    assert run_in_process("lab04-torch.py", *arguments) == 0
    manifest = artefact.load(tmp_path / "built").manifest
    assert manifest["texts"]["file"] == "texts.txt"
    assert (manifest["texts"]["prepared"], manifest["texts"]["checked"]) == (51, 50)
    assert manifest["check"]["headlines"] == 50


def test_too_few_texts_are_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("The same\n" * 100)
    parser = options.int8_argument_parser("", labs.LABS[0])
    with pytest.raises(LabError, match="1 different"):
        read_texts.choose(parser.parse_args(["--texts", str(tmp_path / "texts.txt")]))
    with pytest.raises(LabError, match="cannot read"):
        read_texts.choose(parser.parse_args(["--texts", str(tmp_path / "none.txt")]))


def test_texts_are_read_as_any_headlines_are(tmp_path):
    texts = training_texts()[:40]
    (tmp_path / "texts").write_text("\n".join(["Subject;id", *(f'"{text}";1' for text in texts)]), encoding="utf-16")
    given = ["--texts", str(tmp_path / "texts"), "--format", "csv", "--text-column", "subject"]
    chosen = read_texts.choose(options.int8_argument_parser("", labs.LABS[0]).parse_args(given))
    assert (chosen.prepare, chosen.check) == (texts[::2], texts[1::2])


def test_texts_the_tokeniser_does_not_know_are_counted(model_folder):
    fp32 = classifier.load(str(model_folder("bert", 9)))
    assert closing_check.unknown_share(fp32, ["数字 数字", "学校"]) > closing_check.MAX_UNKNOWN
    assert closing_check.unknown_share(fp32, HEADLINES) == 0


# --- Models that are refused ------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(folder)`: the one line with which a lab refuses a model."""

    def run(folder) -> str:
        assert run_in_process("lab04-torch.py", "--model", folder, "--output", tmp_path / "built") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "built").exists()
        return line

    return run


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "unnamed labels"),
        ({"problem_type": "multi_label_classification"}, "multi-label"),
        ({"problem_type": "regression"}, "regression"),
        ({"id2label": {"0": "only"}}, "at least 2"),
        ({"model_type": "gpt2", "architectures": None}, "continue texts"),
        ({"model_type": "bert", "architectures": None}, "does not know"),  # the settings of DistilBERT
        ({"model_type": "vit", "architectures": None}, "no sequence classifier"),
        ({"model_type": "no such type"}, "cannot load"),
        ({"id2label": {str(i): f"topic {i}" for i in range(3)}}, "cannot load"),  # the head has two rows
    ],
)
def test_unsupported_model_is_refused_in_one_line(config, reason, refused, model_folder, tmp_path):
    assert reason in refused(copy_model(model_folder("distilbert", 2), tmp_path / "model", **config))


def test_missing_model_is_refused_in_one_line(refused, tmp_path):
    assert "no model at" in refused(tmp_path / "nowhere")
    assert "cannot load the model" in refused("nobody/no-such-model")
    assert "cannot load the model" in refused(tmp_path)  # an empty folder
