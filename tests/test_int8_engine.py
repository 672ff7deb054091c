"""The INT8 engine of one C++ file: its kernels against the plain loop, the whole against FP32, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_in_process, training_texts, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.studies import ideas
from lab04 import LabError, artefact
from lab04.quantise import preparation, this_cpu
from lab04.read import classifier
from lab04.run import int8_engine, runtimes
from lab04.run.int8_engine import Engine, Shape

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the engine needs a C++ compiler: sudo apt install g++")
FLAGS = set(int8_engine.processor_flags())
# Options of g++ that choose a kernel, and what the processor must know to run it.
KERNELS = {
    "native": ([], set()),
    "vnni of 256 bits": (["-DVNNI_256"], {"avx512_vnni", "avx512vl"}),
    "avx2": (["-march=x86-64-v3"], {"avx2", "fma"}),
}
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "intermediate": 96, "labels": 5, "embedding": 64, "words": 50}
SMALL |= {"positions": 40, "types": 2, "activation": 1, "head_activation": 3, "epsilon": 1e-12}


@pytest.fixture(scope="session")
def library(shared_folder):
    """`library(*options)`: the engine compiled with further options of g++, once for all tests."""

    def build(*options: str) -> Path:
        def write(folder: Path) -> None:
            folder.mkdir()
            this_cpu.compile_engine(folder / "engine.so", *options)

        return shared_folder("engine" + "".join(options), write) / "engine.so"

    return build


def write_random(file: Path, seed: int = 0, **shape) -> Path:
    """A weights file of a shape, SMALL but for what is given, with random tensors."""
    from safetensors.numpy import save_file

    numbers, random = SMALL | shape, np.random.default_rng(seed)
    tensors = {
        name: random.integers(-64, 65, size).astype(np.int8)
        if dtype == np.int8
        else (random.uniform(0.5, 1.5, size) * (0.02 if name.endswith("scale") else 1)).astype(np.float32)
        for name, (dtype, size) in int8_engine.layout(Shape(**numbers)).items()
    }
    save_file(tensors, file, metadata={"shape": json.dumps(numbers)})
    return file


def random_texts(engine: Engine, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of so many tokens, padded on either side by ids that no model knows."""
    random, shape = np.random.default_rng(seed), (len(lengths), max(lengths))
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    mask[1::2] = mask[1::2, ::-1]
    ids, types = random.integers(0, engine.shape.words, shape), random.integers(0, engine.shape.types, shape)
    ids[~mask], types[~mask] = 10**12, -1
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.astype(np.int64)}


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 5),
    size=st.sampled_from([16, 32, 48, 64]),
    intermediate=st.integers(1, 12),
    embedding=st.sampled_from([None, 16, 48]),
    labels=st.sampled_from([1, 2, 9, 16, 100]),
    activations=st.tuples(st.sampled_from([1, 2]), st.sampled_from([0, 1, 2, 3, 4])),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_kernels_give_the_bits_of_the_plain_loop(
    kernel, library, tmp_path, heads, size, intermediate, embedding, labels, activations, lengths, seed
):
    options, needed = KERNELS[kernel]
    if needed - FLAGS:
        pytest.skip(f"this processor lacks {' '.join(needed - FLAGS)}")
    shape = {"hidden": heads * size, "heads": heads, "intermediate": 16 * intermediate, "labels": labels}
    shape |= {"embedding": embedding or heads * size, "activation": activations[0], "head_activation": activations[1]}
    weights = write_random(tmp_path / "weights", seed, **shape)
    quick, plain = (Engine(library(*options, *more), weights) for more in ([], ["-DPLAIN"]))
    texts = random_texts(quick, lengths, seed)
    logits = quick.logits(texts)
    assert np.isfinite(logits).all() and logits.shape == (len(lengths), labels)
    assert np.array_equal(logits, plain.logits(texts))
    kept = texts["attention_mask"] == 1
    alone = [quick.logits({name: ids[row, kept[row]][None] for name, ids in texts.items()}) for row in range(len(kept))]
    assert np.array_equal(logits, np.concatenate(alone))  # at any place of any batch, without padding
    quick.close()
    plain.close()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_the_engine_gives_the_logits_of_the_network(family, activation, library, tmp_path):
    name = {"distilbert": "activation"}.get(family, "hidden_act")
    fp32 = classifier.load(str(write_model(tmp_path / "model", family, 9, **{name: activation})))
    texts = training_texts()[:40] + [" ".join(training_texts()[:12])]  # the last as long as the model reads
    network = preparation.prepare(fp32, training_texts()[40:104])
    this_cpu.write_weights(network, tmp_path / "weights")
    engine, reference = Engine(library(), tmp_path / "weights"), fp32.logits(texts)
    encoded = [{name: tensor.numpy() for name, tensor in fp32.encode([text]).items()} for text in texts]
    error = np.concatenate([engine.logits(tokens) for tokens in encoded]) - reference
    assert np.sqrt(np.mean(error**2)) < 0.06 * reference.std()
    assert np.sqrt(np.mean(error[-1] ** 2)) < 0.12 * reference.std()
    engine.close()


@pytest.fixture
def built(shared_folder, model_folder, few_headlines):
    """An artefact of the engine, with a recheck, as the lab makes it."""

    def write(folder: Path) -> None:
        arguments = ["--this-cpu", "--recheck", "--model", model_folder("minilm", 9), "--output", folder / "built"]
        assert run_in_process("lab04-torch.py", *arguments) == 0

    return artefact.load(shared_folder("this-cpu", write) / "built")


def test_the_lab_makes_an_artefact_that_answers_the_same_in_every_batch(built, model_folder):
    assert built.options == ("this-cpu", "recheck") and built.title == "This CPU Rechecked"
    fp32, tokenise, texts = classifier.load(str(model_folder("minilm", 9))), artefact.Tokeniser(built), training_texts()
    texts = texts[100:148] + [" ".join(texts[start : start + 20]) for start in range(8)]
    reference, answers = fp32.logits(texts), []
    for threads, batch in ((1, 1), (1, 5), (2, len(texts))):
        with runtimes.open_runtime(built, threads) as backend:
            starts = range(0, len(texts), batch)
            answers.append(np.concatenate([backend.logits(tokenise(texts[start : start + batch])) for start in starts]))
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
    assert np.sqrt(np.mean((answers[0] - reference) ** 2)) < 0.1 * reference.std()
    with runtimes.open_backend(built) as backend:
        rechecked = np.concatenate([backend.logits(tokenise([text])) for text in texts[:48]])
    assert (rechecked.argmax(1) == reference[:48].argmax(1)).all()


@given(
    st.lists(st.integers(0, 24), min_size=1, max_size=200) | st.lists(st.integers(0, 130), min_size=1),
    st.integers(1, 8),
)
def test_a_batch_is_cut_so_that_no_thread_waits_for_long(lengths, threads):
    lengths = np.array(lengths)
    parts = int8_engine.in_parts(lengths, threads)
    assert [place for part in parts for place in range(len(lengths))[part]] == list(range(len(lengths)))
    for texts in (lengths[part] for part in parts):
        assert texts.sum() <= int8_engine.PART or np.count_nonzero(texts) == 1
    if lengths.min() > 0 and lengths.max() <= 24 and lengths.sum() > 2 * int8_engine.PART * threads:
        assert len(parts) % threads == 0, "a thread would wait while others run the last parts"


def test_nothing_heavy_is_loaded_to_run_it(built):
    code = f"""
import sys
from lab04 import artefact
from lab04.run import runtimes
built = artefact.load({str(built.folder)!r})
tokenise = artefact.Tokeniser(built)
with runtimes.open_runtime(built, 1) as backend:
    print(backend.logits(tokenise(["A headline", ""])).shape)
print([name for name in ("torch", "onnxruntime", "transformers") if name in sys.modules])
from benchmark.worker import Worker
Worker().open("artefact", {str(built.folder)!r}, "", 1)  # ONNX Runtime rechecks
print([name for name in ("torch", "onnxruntime", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "(2, 9)\n[]\n['onnxruntime']\n", done.stderr


@pytest.mark.parametrize("changes", [*ideas.WITHOUT.values(), ideas.ONE_SCALE], ids=[*ideas.WITHOUT, "one scale"])
def test_each_idea_can_be_switched_off(changes, tmp_path):
    """The study's changes still fit the C++ file; that answers stay the same it looks at itself."""
    (tmp_path / "changed.cpp").write_text(ideas.changed(changes))
    command = [this_cpu.COMPILER, *this_cpu.FLAGS, "-fsyntax-only", tmp_path / "changed.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_ideas_are_raced_in_turn(library, tmp_path):
    weights = write_random(tmp_path / "weights", positions=40)
    whole, same = Engine(library(), weights), Engine(library(), weights)
    other = Engine(library(), write_random(tmp_path / "other", seed=1))
    random = np.random.default_rng(0)
    tokens = [
        {"input_ids": random.integers(0, 50, (1, n)), "attention_mask": np.ones((1, n), int)} for n in range(2, 26)
    ]
    rows = {row["idea"]: row["without"] for row in ideas.race(whole, {"nothing": same}, tokens)}
    assert rows["nothing"].keys() == {"1", "6"} and rows[ideas.PADDING]["1"] is None
    assert rows[ideas.PADDING]["6"] > 0
    joined = ideas.joined(tokens[:3], padded=False)
    assert np.array_equal(whole.logits(joined), np.concatenate([whole.logits(one) for one in tokens[:3]]))
    assert ideas.joined(tokens[:3], padded=True)["attention_mask"].all()
    with pytest.raises(LabError, match="without 'another' logits move"):
        ideas.check_same(whole, {"another": other}, joined)


def test_sanitisers_find_nothing(library, tmp_path):
    sanitised = library("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    weights = write_random(tmp_path / "weights", positions=514, first_position=2, embedding=32)
    code = f"""
import numpy as np
from pathlib import Path
from lab04 import LabError
from lab04.run.int8_engine import Engine
engine = Engine(Path({str(sanitised)!r}), Path({str(weights)!r}))
random = np.random.default_rng(0)
for lengths in [[n] for n in (*range(1, 50), 512)] + [[1] * 96, [3, 90, 1], [17, 1, 2, 5]]:
    ids = random.integers(0, 50, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    tokens = dict(input_ids=ids, token_type_ids=ids % 2, attention_mask=mask)
    assert engine.logits(tokens).shape == (len(lengths), 5)
    del tokens["token_type_ids"]
    assert engine.logits(tokens).shape == (len(lengths), 5)
for wrong, length in ((50, 9), (-1, 9), (2**40, 9), (1, 513), (1, 600), (1, 0)):
    try:
        engine.logits(dict(input_ids=np.full((1, length), wrong), attention_mask=np.ones((1, length), np.int64)))
    except LabError as error:
        print(error)
engine.close()
print("done")
"""
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    *refused, last = done.stdout.splitlines()
    assert last == "done" and len(refused) == 6, done.stderr


# --- What it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("input_ids", -1), ("input_ids", 10**12), ("token_type_ids", 2)])
def test_ids_that_the_model_does_not_know_are_refused_before_the_call(name, value, built):
    tokens = {name: np.ones((2, 8), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with runtimes.open_runtime(built, 1) as backend:
        assert backend.logits(tokens).shape == (2, 9)
        tokens[name][1, 3] = value
        with pytest.raises(LabError, match="another tokeniser's"):
            backend.logits(tokens)


def test_a_text_longer_than_the_model_reads_is_refused(built):
    tokens = {name: np.ones((1, 513), np.int64) for name in ("input_ids", "attention_mask")}
    with runtimes.open_runtime(built, 1) as backend, pytest.raises(LabError, match="513 tokens, not 1 to 512"):
        backend.logits(tokens)


def test_an_empty_text_beside_others_is_refused(built):
    tokens = {name: np.ones((2, 8), np.int64) for name in ("input_ids", "attention_mask")}
    tokens["attention_mask"][1] = 0
    with runtimes.open_runtime(built, 1) as backend, pytest.raises(LabError, match="has 0 or 8 tokens"):
        backend.logits(tokens)


def test_truncated_and_edited_weights_are_refused(library, built, tmp_path):
    weights = write_random(tmp_path / "weights")
    whole = weights.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no weights file"):
            Engine(library(), weights)
    for before, after in ((b'\\"heads\\": 4', b'\\"heads\\": 3'), (b'\\"layers\\": 2', b'\\"layers\\": 3')):
        assert before in whole
        weights.write_bytes(whole.replace(before, after))
        with pytest.raises(ValueError, match="the engine can run|tensors of its shape"):
            Engine(library(), weights)
    copy = shutil.copytree(built.folder, tmp_path / "copy")
    edited = bytearray((copy / int8_engine.WEIGHTS_FILE).read_bytes())
    edited[-1] ^= 1
    (copy / int8_engine.WEIGHTS_FILE).write_bytes(edited)
    with pytest.raises(LabError, match="was edited"):
        artefact.load(copy)


def test_weights_of_more_than_seven_bits_are_refused(library, tmp_path):
    from safetensors.numpy import load_file, save_file

    weights = write_random(tmp_path / "weights")
    tensors = load_file(weights)
    tensors["layers.1.down.weight"][3, 5] = 65  # two products of such no longer fit 16 bits
    save_file(tensors, weights, metadata={"shape": json.dumps(SMALL)})
    with pytest.raises(ValueError, match="none that the engine can run"):
        Engine(library(), weights)


@pytest.mark.parametrize(
    "compiled_for, said",
    [
        (
            {"library": "nowhere.so", "interface": int8_engine.INTERFACE, "flags": ["no_cpu_has_it"]},
            "needs a processor with no_cpu_has_it",
        ),
        ({"torch": "2.13.0", "flags": []}, "an older lab.* run python lab04-torch.py --this-cpu"),
        ({"library": "nowhere.so", "flags": []}, "an older lab.* run python lab04-torch.py --this-cpu"),
    ],
)
def test_code_for_another_machine_is_refused_before_it_is_opened(compiled_for, said, tmp_path):
    manifest = {"backend": "torch", "model_file": "not even there", "compiled_for": compiled_for}
    with pytest.raises(LabError, match=said):
        runtimes.open_backend(artefact.Artefact(tmp_path, manifest, ["a", "b"]))


@pytest.mark.parametrize(
    "family, shape, said",
    [
        ("albert", {}, "AlbertForSequenceClassification"),
        ("bert", {"hidden_act": "relu"}, "activation relu"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key positions"),
        ("bert", {"intermediate_size": 100}, "inner layers 100 wide"),
        ("bert", {"num_attention_heads": 16}, "16 heads of 8"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(family, shape, said):
    import transformers
    from conftest import small_config

    config = small_config(family, 100)
    for name, value in shape.items():
        setattr(config, name, value)
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(LabError, match=said):
        this_cpu.read_network(network)


def test_queries_whose_inputs_are_scaled_otherwise_are_refused(model_folder):
    fp32 = classifier.load(str(model_folder("minilm", 9)))
    network = preparation.prepare(fp32, training_texts()[:64])
    network.bert.encoder.layer[1].attention.self.query.inverse_scale[3] *= 2
    with pytest.raises(LabError, match="queries whose inputs are scaled otherwise"):
        this_cpu.read_network(network)


def test_a_missing_compiler_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="sudo apt install g"):
        this_cpu.check_here()
