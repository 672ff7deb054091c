"""Static INT8: a headline's answer is its own, whatever stands beside it in a batch, and however that is padded."""

import itertools

import numpy as np
import pytest
from conftest import copy_model, look_at_few_headlines, run_in_process, training_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lab04 import LabError, artefact
from lab04.compare import closing_check
from lab04.quantise import preparation
from lab04.read import classifier, texts
from lab04.run import runtimes
from lab04.run.backend import Backend
from lab04.run.scores import gaps

TEXTS = [*training_texts()[:40], "word", "", "of " * 200, " ".join(training_texts()[:3])]
POOL = st.integers(0, len(TEXTS) - 1)


@pytest.fixture(scope="module")
def built(shared_folder, model_folder):
    """`built(script, *options)`: the folder of a random MiniLM's artefact."""

    def build(script: str, *options: str):
        def write(folder):
            with pytest.MonkeyPatch.context() as monkeypatch:
                look_at_few_headlines(monkeypatch)
                arguments = "--model", model_folder("minilm", 9), "--output", folder / "built", *options
                assert run_in_process(script, *arguments) == 0

        return shared_folder("-".join(("static", script, *options)), write) / "built"

    return build


@pytest.fixture(scope="module", params=[1, 2], ids=["1 thread", "2 threads"])
def onnx_static(request, built):
    """A static artefact opened with one and two threads, its tokeniser, and the logits of TEXTS alone."""
    item = artefact.load(built("lab04-optimum.py", "--static"))
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item, request.param)
    single = runtimes.open_backend(item, 1)
    return backend, tokenise, np.concatenate([single.logits(tokenise([text])) for text in TEXTS])


@pytest.fixture(scope="module")
def torch_static(built):
    """A static artefact of PyTorch, its tokeniser, and the logits of TEXTS alone."""
    item = artefact.load(built("lab04-torch.py", "--static"))
    backend, tokenise = runtimes.open_backend(item), artefact.Tokeniser(item)
    return backend, tokenise, np.concatenate([backend.logits(tokenise([text])) for text in TEXTS])


def fill_up(tokens: dict, left: bool, more: int) -> dict:
    """A batch with `more` columns of padding, every row of it at one end."""
    width = tokens["input_ids"].shape[1] + more
    filled = {name: np.zeros((len(ids), width), np.int64) for name, ids in tokens.items()}
    for row, length in enumerate(tokens["attention_mask"].sum(axis=1)):
        place = slice(width - length, width) if left else slice(length)
        for name, ids in tokens.items():
            filled[name][row, place] = ids[row, :length]
    return filled


@settings(max_examples=25, deadline=None)
@given(chosen=st.lists(POOL, min_size=1, max_size=64), left=st.booleans(), more=st.integers(0, 5))
def test_a_headline_has_its_logits_in_any_batch_to_the_bit(onnx_static, chosen, left, more):
    backend, tokenise, alone = onnx_static
    tokens = tokenise([TEXTS[index] for index in chosen])
    np.testing.assert_array_equal(backend.logits(fill_up(tokens, left, more)), alone[chosen])


@settings(max_examples=25, deadline=None)
@given(chosen=st.lists(POOL, min_size=1, max_size=24), more=st.integers(0, 5))
def test_the_graph_itself_keeps_them_in_any_language(onnx_static, chosen, more):
    backend, tokenise, alone = onnx_static
    tokens = fill_up(tokenise([TEXTS[index] for index in chosen]), False, more)
    np.testing.assert_array_equal(backend._run(tokens), alone[chosen], "one call, padded to the longest and beyond")


@settings(max_examples=15, deadline=None)
@given(chosen=st.lists(POOL, min_size=1, max_size=64), left=st.booleans(), more=st.integers(0, 5))
def test_torch_keeps_the_label_and_nearly_the_logits(torch_static, chosen, left, more):
    backend, tokenise, alone = torch_static
    moved = backend.logits(fill_up(tokenise([TEXTS[index] for index in chosen]), left, more)) - alone[chosen]
    assert np.abs(moved).max() <= 0.15


def unseen_words(folder, count: int) -> list[str]:
    """Words of a model's vocabulary that are in none of the texts a lab looks at."""
    tokenizer = classifier.load(str(folder)).tokenizer
    texts_seen = [*texts.training_headlines(), *texts.held_out_headlines()]
    seen = {number for row in tokenizer(texts_seen).input_ids for number in row}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return [word for word, number in vocabulary if word.isalpha() and len(word) > 3 and number not in seen][:count]


def test_crafted_strings_change_each_others_answer_under_dynamic_and_not_under_static(
    model_folder, few_headlines, tmp_path
):
    """As fastembed-rs#107: each string brings one huge input, and the other's scale then spans that too."""
    model = copy_model(model_folder("minilm", 9), tmp_path / "model")
    words = unseen_words(model, 2)
    fp32 = classifier.load(str(model))
    for word, column, sign in zip(words, (7, 11), (1, -1), strict=True):
        row = fp32.model.get_input_embeddings().weight.data[fp32.tokenizer.convert_tokens_to_ids(word)]
        row.zero_()[column] = 9 * sign
    fp32.model.save_pretrained(model)
    # An attacker tries until a headline stands at a border: here the ten of each word that stand closest to one.
    strings = [[f"{text} {word}" for text in training_texts()] for word in words]
    close = [np.array(side)[gaps(fp32.logits(side)).argsort()[:10]].tolist() for side in strings]
    changed = {}
    for option in ((), ("--static",)):
        folder = tmp_path / "-".join(("built", *option))
        assert run_in_process("lab04-optimum.py", "--model", model, "--output", folder, *option) == 0
        item = artefact.load(folder)
        tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
        alone = {text: backend.logits(tokenise([text]))[0].argmax() for side in close for text in side}
        changed[option] = [
            pair
            for pair in itertools.product(*close)
            if (backend.logits(tokenise(list(pair))).argmax(axis=1) != [alone[text] for text in pair]).all()
        ]
    assert changed[()], "each must change the other's answer, or it is no attack"
    assert not changed["--static",]


def test_a_text_that_neighbours_move_is_refused():
    class Neighbourly(Backend):
        def logits(self, tokens):
            return np.array([[1.0, 0.0]] * len(tokens["input_ids"]), np.float32) + 1e-6 * len(tokens["input_ids"])

    def tokenise(some):
        return {"input_ids": np.zeros((len(some), 1), np.int64)}

    with pytest.raises(LabError, match="without --static"):
        closing_check.check_neighbours(Neighbourly(), tokenise, training_texts()[:8], 0.0)
    closing_check.check_neighbours(Neighbourly(), tokenise, training_texts()[:8], 0.15)


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.0, np.inf), (np.nan, np.nan)])
def test_a_range_that_no_scale_spans_is_refused_in_one_line(low, high):
    with pytest.raises(LabError, match="without --static"):
        preparation.scale_and_zero_point(low, high)


@pytest.mark.parametrize("low, high", [(0.0, 3.0), (-2.0, 0.0), (-1.5, 4.25)])
def test_a_range_becomes_numbers_from_0_to_255_and_0_stays_exact(low, high):
    scale, zero = preparation.scale_and_zero_point(low, high)
    assert 0 <= zero <= 255
    numbers = np.rint(np.array([low, 0.0, high]) / scale) + zero
    assert np.abs(numbers - [0, zero, 255]).max() <= 1
    np.testing.assert_allclose(scale * (numbers - zero), [low, 0.0, high], atol=scale / 2 + 1e-9)


def test_a_model_whose_inputs_are_all_zero_is_refused(model_folder, few_headlines, tmp_path, capsys):
    model = copy_model(model_folder("bert", 9), tmp_path / "model")
    network = classifier.load(str(model)).model
    value = network.bert.encoder.layer[0].attention.self.value
    value.weight.data.zero_(), value.bias.data.zero_()
    network.save_pretrained(model)
    for script in ("lab04-torch.py", "lab04-optimum.py"):
        assert run_in_process(script, "--static", "--model", model, "--output", tmp_path / "built") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "0.0 to 0.0" in line and "without --static" in line
        assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("machine, static, expected", [("x86_64", True, "x86"), ("aarch64", False, "qnnpack")])
def test_static_products_of_pytorch_need_an_x86_kernel(machine, static, expected):
    supported = ["qnnpack", "onednn", "x86", "fbgemm"]
    assert runtimes.quantised_engine(supported, machine, static) == expected
    with pytest.raises(LabError, match="lab04-optimum.py"):
        runtimes.quantised_engine(supported, "aarch64", static=True)


def test_recheck_sits_on_static_too(built):
    item = artefact.load(built("lab04-optimum.py", "--static", "--recheck"))
    assert item.options == ("static", "recheck") and item.title == "ONNX Static Rechecked"
    assert all(low <= 0 <= high for low, high in item.manifest["static"].values())
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    alone = np.concatenate([backend.logits(tokenise([text])) for text in TEXTS])
    assert (backend.logits(tokenise(TEXTS)).argmax(axis=1) == alone.argmax(axis=1)).all()
