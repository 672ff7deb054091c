"""The artefacts outside Python: Node, C++ and Triton Inference Server.

The C++ example needs ONNX Runtime's headers: ONNXRUNTIME_INCLUDE names their folder if it is not the usual one, or
`make elsewhere` has brought them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HEADLINES, RECORD_CALLS, ROOT, run_script

from lab04 import artefact
from lab04.artefact import contract, sealing
from lab04.run import runtimes, scores

EXAMPLES = ROOT / "examples"
BROUGHT = ROOT / ".elsewhere" / "onnxruntime-headers" / "usr" / "include" / "onnxruntime"
INCLUDE = Path(os.environ.get("ONNXRUNTIME_INCLUDE", BROUGHT if BROUGHT.exists() else "/usr/include/onnxruntime"))
ASCII = [*HEADLINES, "NHS-wide 'hack': £0? No - $3m, 40% (so far); \t 2nd [CLS] in week!", "qzxj " * 3, "the " * 200]
# What tokenisers get wrong: accents apart and composed, last sigmas, controls, spaces, Chinese, marks, spelt tokens.
ODD = [
    *("naïve cafe\u0301 ﬁne", "ÀÉÎÕÜ ÇÑ", "Łódź Straße ß", "ΟΔΥΣΣΕΥΣ ὈΔΥΣΣΕΎΣ", "Москва й ё", "ἄνθρωπος", "Việt Nam"),
    *(
        "हिन्दी समाचार",
        "السَّلامُ",
        "עִבְרִית",
        "ไทย",
        "한국어 뉴스",
        "日本語がぎ",
        "a中b文c",
        "豈更 𠀀 \U0002b820\U0002b920",
        "〇・「x」",
    ),
    *(
        "tab\there",
        "line\nbreak\r",
        "nul\x01\x7f\x85",
        "soft\xadhyphen",
        "zero\u200bwidth",
        "no\xa0break\u2003em\u3000wide",
    ),
    *(
        "\ufeffmark\ufffd",
        "private\ue000",
        "👩‍🔬🏳️‍🌈",
        "🙂🙂",
        "1⁄2 ½ x²",
        "“quoted” — ‘so’ …",
        "$+<=>^`|~",
        "€£¥ ©®™ №",
    ),
    *("ETL [SEP] x [CLS]y", "[MASK][MASK", "[mask] [UNKN]", "\u166d\u1734 \u1885\u1886 \ua9bd", "K\u212a Å\u212b"),
    *("x" * 100, "x" * 101, "é" * 100, "é" * 101, "the " * 300, "İstanbul iİI ı"),
]
TEXTS = [*ASCII[:3], ASCII[4], "Zürich café naïve", "数字化转型", "ETL: 🙂!", "İstanbul ǅ", "the " * 200]


def python_results(folder, texts) -> tuple[list[int], np.ndarray]:
    """Token counts and probabilities [texts, labels] of the same artefact in Python."""
    item = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    tokens = [tokenise([text]) for text in texts]
    logits = np.concatenate([backend.logits(row) for row in tokens])
    return [row["input_ids"].shape[1] for row in tokens], scores.softmax(logits)


def check_results(output: str, folder, texts) -> None:
    records = [json.loads(line) for line in output.split("\n") if line]
    counts, probabilities = python_results(folder, texts)
    assert [record["tokens"] for record in records] == counts
    for record, expected in zip(records, probabilities, strict=True):
        assert list(record["probabilities"]) == artefact.load(folder).labels
        np.testing.assert_allclose(list(record["probabilities"].values()), expected, atol=1e-4)
        assert record["label"] == artefact.load(folder).labels[record["id"]]


# --- Node -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """`node(folder, *headlines)`: the Node example, its packages installed in a folder of its own."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node or npm on this machine")
    folder = shutil.copytree(
        EXAMPLES / "node", tmp_path_factory.mktemp("node") / "node", ignore=shutil.ignore_patterns("node_modules")
    )
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr.strip().splitlines()[-1:]}")

    def run(*arguments, under=()):
        command = [*under, "node", folder / "classify.js", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("model", [("bert", 9), ("roberta", 20)], ids="{0[0]}".format)
def test_node_agrees_with_python(model, node, artefact_folder):
    folder = artefact_folder("onnx", *model)
    result = node(folder, *TEXTS)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == TEXTS
    check_results(result.stdout, folder, TEXTS)


def test_node_refuses_what_is_missing_or_edited(node, artefact_folder, tmp_path):
    assert node(tmp_path / "nowhere", "A headline").returncode == 2
    nothing = node(artefact_folder("onnx"))
    assert (nothing.returncode, len(nothing.stderr.splitlines())) == (2, 1)
    broken = shutil.copytree(artefact_folder("onnx"), tmp_path / "broken")
    with (broken / "tokenizer.json").open("a") as file:
        file.write(" ")
    result = node(broken, "A headline")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "classify.js: tokenizer.json was edited: run python lab04-optimum.py\n"


def with_tokeniser(
    source: Path, target: Path, post_processor: dict | None, normalizer: dict | None = None, **settings
) -> Path:
    """A copy of an artefact whose tokenizer.json makes and surrounds words otherwise, its manifest with settings."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    file = {**json.loads(path.read_text()), "post_processor": post_processor}
    if normalizer:
        file["normalizer"].update(normalizer)
    path.write_text(json.dumps(file))
    manifest = artefact.load(source).manifest
    files = {**manifest["files"], "tokenizer.json": contract.describe_file(path)}
    tokenizer = {**manifest["tokenizer"], **settings}
    sealing.write_manifest(target, {**manifest, "files": files, "tokenizer": tokenizer, "check": {}})
    return target


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}  # as GPT-2's
ONLY_AFTER = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
}


@pytest.mark.parametrize("post_processor", [BYTES, ONLY_AFTER, None], ids=["nothing", "after", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_node_cuts_and_surrounds_as_the_artefact_says(side, post_processor, node, artefact_folder, tmp_path):
    source = artefact_folder("onnx")
    folder = with_tokeniser(source, tmp_path / "other", post_processor, truncation_side=side)
    texts = [*TEXTS[:4], " ".join(HEADLINES * 12)]
    result = node(folder, *texts)
    assert result.returncode == 0, result.stderr
    check_results(result.stdout, folder, texts)


def test_node_refuses_an_empty_headline(node, artefact_folder):
    result = node(artefact_folder("onnx"), " \t")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "classify.js: a headline is empty\n")


@pytest.fixture(scope="module")
def rechecked(artefact_folder, tmp_path_factory):
    """An ONNX artefact whose second graph decides about half of TEXTS."""
    folder = shutil.copytree(artefact_folder("onnx"), tmp_path_factory.mktemp("rechecked") / "optimum-recheck")
    manifest = artefact.load(folder).manifest
    item = artefact.load(artefact_folder("tensorrt"))
    shutil.copy(item.folder / item.manifest["graph"], folder / "second.onnx")
    files = manifest["files"] | {"second.onnx": contract.describe_file(folder / "second.onnx")}
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(artefact.load(artefact_folder("onnx")))
    gaps = np.sort([scores.gaps(backend.logits(tokenise([text])))[0] for text in TEXTS])
    middle = len(gaps) // 2
    second = {"graph": "second.onnx", "threshold": float(gaps[middle - 1] + gaps[middle]) / 2}
    sealing.write_manifest(folder, {**manifest, "files": files, "recheck": second, "check": {}})
    return folder


# --- C++ --------------------------------------------------------------------------------------------------


def compiled_cpp(target: Path) -> Path:
    """The C++ example, compiled in a new folder against the ONNX Runtime of the Python wheel."""
    if not (shutil.which("make") and shutil.which("c++")):
        pytest.skip("no make or C++ compiler on this machine")
    for folder, header in (
        (INCLUDE, "onnxruntime_cxx_api.h"),
        (Path("/usr/include"), "unicode/translit.h"),
        (Path("/usr/include"), "nlohmann/json.hpp"),
    ):
        if not (folder / header).exists():
            pytest.skip(f"no {header} in {folder}: see examples/cpp/Makefile")
    shutil.copytree(EXAMPLES / "cpp", target)
    make = ["make", "--always-make", f"INCLUDE={INCLUDE}", f"PYTHON={sys.executable}"]
    made = subprocess.run(make, cwd=target, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "warning" not in made.stderr
    return target / "classify"


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """`cpp(folder, *headlines)`: the C++ example."""
    program = compiled_cpp(tmp_path_factory.mktemp("cpp") / "cpp")

    def run(*arguments, under=()):
        command = [*under, program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


def test_cpp_agrees_with_python(cpp, artefact_folder):
    folder = artefact_folder("onnx")
    texts = [*ASCII, *TEXTS, *ODD]
    assert len(texts) >= 40
    result = cpp(folder, *texts)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["text"] for line in result.stdout.split("\n") if line] == texts
    check_results(result.stdout, folder, texts)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"lowercase": False},
        {"strip_accents": False},
        {"lowercase": False, "strip_accents": True},
        {"clean_text": False},
        {"handle_chinese_chars": False},
    ],
    ids=str,
)
def test_cpp_makes_words_as_the_normaliser_says(normalizer, cpp, artefact_folder, tmp_path):
    folder = with_tokeniser(artefact_folder("onnx"), tmp_path / "other", ONLY_AFTER, normalizer=normalizer)
    texts = [*TEXTS, *ODD]
    result = cpp(folder, *texts)
    assert result.returncode == 0, result.stderr
    check_results(result.stdout, folder, texts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cpp_cuts_and_surrounds_as_the_artefact_says(side, cpp, artefact_folder, tmp_path):
    folder = with_tokeniser(artefact_folder("onnx"), tmp_path / "other", ONLY_AFTER, truncation_side=side)
    texts = [*TEXTS[:4], " ".join(HEADLINES * 12)]
    result = cpp(folder, *texts)
    assert result.returncode == 0, result.stderr
    check_results(result.stdout, folder, texts)


@pytest.mark.parametrize("example", ["node", "cpp"])
def test_examples_recheck_as_python_does(example, request, rechecked):
    result = request.getfixturevalue(example)(rechecked, *TEXTS)
    assert result.returncode == 0, result.stderr
    check_results(result.stdout, rechecked, TEXTS)
    item = artefact.load(rechecked)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    expected = []
    for text in TEXTS:
        backend.logits(tokenise([text]))
        expected.append(bool(backend.rechecked[0]))
    assert 0 < sum(expected) < len(TEXTS)
    assert [json.loads(line)["rechecked"] for line in result.stdout.splitlines()] == expected


@pytest.mark.parametrize("example", ["node", "cpp"])
def test_examples_connect_nowhere(example, request, artefact_folder, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("no strace on this machine")
    run, log = request.getfixturevalue(example), tmp_path / "calls"
    result = run(artefact_folder("onnx"), HEADLINES[0], under=[*RECORD_CALLS, log])
    assert result.returncode == 0, result.stderr
    assert "+++ exited with 0 +++" in log.read_text(), "it was watched to its end"
    assert "AF_INET" not in log.read_text()


def test_cpp_refuses_in_one_line(cpp, artefact_folder, tmp_path):
    whole_words = with_tokeniser(artefact_folder("onnx"), tmp_path / "words", ONLY_AFTER)
    file = json.loads((whole_words / "tokenizer.json").read_text())
    file["added_tokens"][0]["single_word"] = True
    (whole_words / "tokenizer.json").write_text(json.dumps(file))
    for folder, headline, says in (
        (artefact_folder("onnx"), " \t", "a headline is empty"),
        (artefact_folder("onnx"), "\u00a0", "a headline is empty"),
        (
            with_tokeniser(artefact_folder("onnx"), tmp_path / "bytes", BYTES),
            "A headline",
            "post_processor is ByteLevel, not Temp",
        ),
        (artefact_folder("onnx", "roberta", 20), "A headline", "tokenizer.json's normalizer is none, not BertN"),
        (whole_words, "A headline", "tokenizer.json has a single_word token"),
        (tmp_path / "nowhere", "A headline", "manifest.json: run python lab04-optimum.py"),
    ):
        result = cpp(folder, headline)
        assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
        assert says in result.stderr
    assert cpp(artefact_folder("onnx")).stderr == "classify: usage: ./classify FOLDER HEADLINE …\n"


# --- Triton -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_config():
    """Triton's published message type for config.pbtxt, without the client's network libraries."""
    google = pytest.importorskip("google.protobuf.text_format")
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("tritonclient, which carries Triton's config schema, is not installed")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    return lambda path: google.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())


def write_repository(output, *artefacts):
    return run_script("examples/triton/model_repository.py", "--artefacts", *artefacts, "--output", output)


def test_triton_configuration_follows_the_published_schema(model_config, artefact_folder, tmp_path):
    folders = [artefact_folder("onnx"), artefact_folder("tensorrt", "roberta", 20)]
    result = write_repository(tmp_path / "models", *folders)
    assert result.returncode == 0, result.stderr
    for folder, kind, batch_inputs in zip(folders, ("KIND_CPU", "KIND_AUTO"), (3, 2), strict=True):
        model = tmp_path / "models" / folder.name
        config = model_config(model / "config.pbtxt")
        item = artefact.load(folder)
        assert (config.name, config.backend) == (folder.name, "onnxruntime")
        assert (model / "1" / config.default_model_filename).read_bytes() == item.model_file.read_bytes()
        assert (model / config.output[0].label_filename).read_text().splitlines() == item.labels
        assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == kind
        assert len(config.input) == batch_inputs
        check_against_graph(config, item.model_file)


def check_against_graph(config, graph) -> None:
    """Names, types and shapes in the configuration are those of the ONNX file, less the batch dimension."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph)
    triton_types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for mine, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert {tensor.name for tensor in mine} == {tensor.name for tensor in theirs}
        for tensor in mine:
            [true] = [other for other in theirs if other.name == tensor.name]
            assert (
                tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
                == (triton_types[true.type])
            )
            assert list(tensor.dims) == [size if isinstance(size, int) else -1 for size in true.shape[1:]]


def test_triton_gets_an_engine_with_its_own_limits(model_config, artefact_folder, tmp_path):
    """The engine's bytes do not matter here, its manifest does: no GPU builds one on this machine."""
    folder = shutil.copytree(artefact_folder("tensorrt"), tmp_path / "quantised-model-tensorrt")
    (folder / "model.plan").write_bytes(b"engine")
    manifest = artefact.load(folder).manifest
    engine = {"gpu": "any", "tensorrt": "11.1", "profile": {"min": [1, 4], "opt": [8, 32], "max": [16, 64]}}
    files = {**manifest["files"], "model.plan": contract.describe_file(folder / "model.plan")}
    sealing.write_manifest(folder, {**manifest, "model_file": "model.plan", "engine": engine, "files": files})
    result = write_repository(tmp_path / "models", folder)
    assert result.returncode == 0, result.stderr
    config = model_config(tmp_path / "models" / folder.name / "config.pbtxt")
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("tensorrt", 16, "model.plan")
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert (tmp_path / "models" / folder.name / "1" / "model.plan").read_bytes() == b"engine"


def test_triton_gets_both_graphs_of_a_rechecked_artefact(rechecked, tmp_path):
    result = write_repository(tmp_path / "models", rechecked)
    assert result.returncode == 0, result.stderr
    for name, file in (("optimum-recheck", "model_quantized.onnx"), ("optimum-recheck-recheck", "second.onnx")):
        model = tmp_path / "models" / name
        assert (model / "1" / "model.onnx").read_bytes() == (rechecked / file).read_bytes()
        assert f'name: "{name}"' in (model / "config.pbtxt").read_text()
    assert str(artefact.load(rechecked).manifest["recheck"]["threshold"]) in result.stdout


def test_triton_refuses_what_it_cannot_serve(artefact_folder, tmp_path):
    for folder in (artefact_folder("torch"), tmp_path / "nowhere"):
        result = write_repository(tmp_path / "models", folder)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "models").exists()


def test_triton_writes_nothing_where_a_name_would_mean_two_things(artefact_folder, rechecked, tmp_path):
    source = artefact_folder("onnx")
    for names in (("a/model", "b/model"), ("optimum-recheck", "b/optimum-recheck-recheck")):
        folders = [shutil.copytree(rechecked if "recheck" in name else source, tmp_path / name) for name in names]
        result = write_repository(tmp_path / "models", *folders)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert "would both be served as" in result.stderr
    config = json.loads((source / "config.json").read_text())
    broken = shutil.copytree(source, tmp_path / "broken")
    config["id2label"]["3"] = "two\nlines"
    (broken / "config.json").write_text(json.dumps(config))
    manifest = artefact.load(source).manifest
    files = {**manifest["files"], "config.json": contract.describe_file(broken / "config.json")}
    sealing.write_manifest(broken, {**manifest, "files": files})
    result = write_repository(tmp_path / "models", broken)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "one a line" in result.stderr
    assert not (tmp_path / "models").exists()
