"""Static INT8: a headline's answer is its own, whatever stands beside it in a batch, and however that is padded."""


import numpy as np
import pytest
from conftest import check_few_headlines, copy_model, run_in_process, training_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lab04 import artefact
from lab04.quantise import preparation
from lab04.read import classifier, texts
from lab04.run import runtimes

TEXTS = [*training_texts()[:40], "word", "", "of " * 200, " ".join(training_texts()[:3])]
POOL = st.integers(0, len(TEXTS) - 1)


@pytest.fixture(scope="module")
def built(shared_folder, model_folder):
    """`built(script, *options)`: the folder of a random MiniLM's artefact."""

    def build(script: str, *options: str):
        def write(folder):
            with pytest.MonkeyPatch.context() as monkeypatch:
                check_few_headlines(monkeypatch)
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
def test_torch_keeps_the_label_and_nearly_the_logits(built, chosen, left, more):
    item = artefact.load(built("lab04-torch.py", "--static"))
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    alone = np.concatenate([backend.logits(tokenise([TEXTS[index]])) for index in chosen])
    moved = backend.logits(fill_up(tokenise([TEXTS[index] for index in chosen]), left, more)) - alone
    assert np.abs(moved).max() <= 0.15


def unseen_words(folder, count: int) -> list[str]:
    """Words of a model's vocabulary that are in none of the texts a lab looks at."""
    tokenizer = classifier.load(str(folder)).tokenizer
    texts_seen = [*texts.training_headlines()[:: preparation.EVERY], *texts.held_out_headlines()]
    seen = {number for row in tokenizer(texts_seen).input_ids for number in row}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return [word for word, number in vocabulary if word.isalpha() and len(word) > 3 and number not in seen][:count]


def test_crafted_strings_change_each_others_answer_under_dynamic_and_not_under_static(
    model_folder, few_headlines, monkeypatch, tmp_path
):
    """As fastembed-rs#107: each string brings one huge input, and the other's scale then spans that too."""
    monkeypatch.setattr(preparation, "EVERY", 200)
    model = copy_model(model_folder("minilm", 9), tmp_path / "model")
    words = unseen_words(model, 2)
    fp32 = classifier.load(str(model))
    for word, column, sign in zip(words, (7, 11), (1, -1), strict=True):
        row = fp32.model.get_input_embeddings().weight.data[fp32.tokenizer.convert_tokens_to_ids(word)]
        row.zero_()[column] = 9 * sign
    fp32.model.save_pretrained(model)
    changed = {}
    for option in ((), ("--static",)):
        folder = tmp_path / "-".join(("built", *option))
        assert run_in_process("lab04-optimum.py", "--model", model, "--output", folder, *option) == 0
        item = artefact.load(folder)
        tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
        first, second = ([f"{text} {word}" for text in training_texts()[:30]] for word in words)
        alone = [[backend.logits(tokenise([text]))[0].argmax() for text in side] for side in (first, second)]
        together = [[backend.logits(tokenise([a, b])).argmax(axis=1) for b in second] for a in first]
        changed[option] = [
            (a, b) for a in range(30) for b in range(30) if (together[a][b] != (alone[0][a], alone[1][b])).all()
        ]
    assert changed[()], "the attack must be one"
    assert not changed["--static",]
