"""TensorRT without a GPU: the FP16 graph, the types of the engine, the runtime on a stand-in, names, errors."""

import ast
import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_in_device
from conftest import ROOT, look_at_few_headlines, run_in_process

from lab04 import LabError, artefact, console
from lab04.artefact import contract, sealing
from lab04.compare import closing_check, consistency
from lab04.quantise import onnx_graph, tensorrt_build
from lab04.read import classifier, headlines
from lab04.read.texts import held_out_headlines
from lab04.run import runtimes, stream, tensorrt_engine
from lab04.run.backend import Unavailable
from lab04.run.scores import softmax

SCRIPT = "lab04-nvidia.py"
SOURCES = list((ROOT / "lab04").glob("*/tensorrt_*.py"))
PROFILE = {"min": (1, 1), "opt": (1, 16), "max": (32, 64)}


@pytest.fixture(scope="module")
def graph_artefact(artefact_folder):
    """What the lab writes without a GPU, of a small model that reads 64 tokens."""
    return artefact.load(artefact_folder("tensorrt"))


@pytest.fixture(scope="module")
def fp32(model_folder):
    return classifier.load(str(model_folder("bert", 9, 0)))


@pytest.fixture(scope="module")
def minilm(artefact_folder, model_folder):
    """Artefact and FP32 of the widest model here, which reads 128 tokens."""
    return artefact.load(artefact_folder("tensorrt", "minilm", 100)), classifier.load(str(model_folder("minilm", 100)))


@pytest.fixture(scope="module")
def engine_folder(model_folder, tmp_path_factory):
    """What the lab writes on the stand-in device."""
    folder = tmp_path_factory.mktemp("engine") / "quantised-model-tensorrt"
    with pytest.MonkeyPatch.context() as monkeypatch:
        look_at_few_headlines(monkeypatch)
        machine = stand_in_device.install(monkeypatch)
        assert run_in_process(SCRIPT, "--model", model_folder("bert", 9, 0), "--output", folder) == 0
        assert machine.everything_freed()
    return folder


@pytest.fixture
def device(monkeypatch):
    """The stand-in device; it must be empty again when the test ends."""
    machine = stand_in_device.install(monkeypatch)
    yield machine
    assert machine.everything_freed()


def long_texts() -> list[str]:
    """Texts of 1 to 128 tokens and beyond."""
    texts = held_out_headlines()
    return [" ".join(texts[start : start + count]) for start in range(0, 60, 5) for count in (1, 2, 4, 20)]


def fp32_logits(fp32, tokens) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return fp32.model(**{name: torch.from_numpy(ids) for name, ids in tokens.items()}).logits.numpy()


def assert_close(reference, logits, share=0.02):
    """Within the lab's own bound, a share of the range of the logits."""
    assert logits.shape == reference.shape
    assert logits.dtype == np.float32
    assert np.abs(logits - reference).max() <= share * np.ptp(reference)


# --- (a) The FP16 graph on ONNX Runtime -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 32])
def test_the_graph_gives_fp32_logits_padded_or_not(minilm, size):
    built, fp32 = minilm
    tokenise, texts = artefact.Tokeniser(built), long_texts()
    longest = 0
    with runtimes.open_fp16_check(built) as backend:
        for start in range(0, len(texts), size):
            tokens = tokenise(texts[start : start + size])
            longest = max(longest, tokens["input_ids"].shape[1])
            # A bound of the whole set's range, not of one batch's: a single row may have a narrow one.
            assert np.abs(backend.logits(tokens) - fp32_logits(fp32, tokens)).max() < 0.05
    assert longest == 128


def test_the_graph_is_fp16_where_it_should_be(minilm):
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(minilm[0].model_file)).graph
    types = {item.name: item.type.tensor_type.elem_type for item in [*graph.value_info, *graph.output]}
    found = {}
    for node in graph.node:
        found.setdefault(node.op_type, set()).add(types[node.output[0]])
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert (found["MatMul"], found["LayerNormalization"], found["Softmax"]) == ({half}, {single}, {half})
    assert {item.type.tensor_type.elem_type for item in graph.input} == {onnx.TensorProto.INT64}


def test_a_swapped_input_is_noticed_by_the_logits(graph_artefact, fp32):
    """The original lab bound attention_mask and token_type_ids in each other's place; labels alone may not tell."""
    tokens = artefact.Tokeniser(graph_artefact)(held_out_headlines()[:32])
    swapped = {**tokens, "attention_mask": tokens["token_type_ids"], "token_type_ids": tokens["attention_mask"]}
    check_logits = closing_check.check_fp16_logits
    with runtimes.open_fp16_check(graph_artefact) as backend:
        check_logits(fp32_logits(fp32, tokens), backend.logits(tokens), "as it is")
        with pytest.raises(LabError, match="check failed"):
            check_logits(fp32_logits(fp32, tokens), backend.logits(swapped), "swapped")


# --- (b) NVIDIA's own parser and builder, on the CPU ------------------------------------------------------


def test_tensorrt_rtx_builds_the_graph_as_fp16(minilm, capsys):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: make test installs it")
    built, _ = minilm
    log = tensorrt_engine.make_logger(trt)
    builder = trt.Builder(log)
    network, _parser = tensorrt_build.parse(trt, builder, built.model_file, log)
    names = built.manifest["tokenizer"]["inputs"]
    tensorrt_build.check_network(trt, network, names)
    products = int(capsys.readouterr().out.split()[0])
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    assert {item.name for item in inputs} == set(names)
    assert {(item.dtype, tuple(item.shape)) for item in inputs} == {(trt.DataType.INT64, (-1, -1))}
    assert network.num_outputs == 1
    assert network.get_output(0).dtype == trt.DataType.FLOAT
    assert tuple(network.get_output(0).shape)[1] == len(built.labels)
    assert products == 2 * 8 + 2  # q, k, v, scores, mix, output and two feed-forward ones a layer; pooler and head

    config = tensorrt_build.configure(builder, {**PROFILE, "max": (32, 128)}, names)
    config.num_compute_capabilities = 1  # there is no GPU whose own could be asked
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.progress_monitor = monitor = tensorrt_build.make_monitor(trt)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors
    assert not monitor.interrupted
    assert plan.nbytes > 0.4 * built.model_file.stat().st_size


def test_an_fp32_graph_is_refused_before_the_build(fp32, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: make test installs it")
    log = tensorrt_engine.make_logger(trt)
    network, _parser = tensorrt_build.parse(trt, trt.Builder(log), onnx_graph.export(fp32.model, tmp_path), log)
    with pytest.raises(LabError, match=r"0 of \d+ matrix products in FP16"):
        tensorrt_build.check_network(trt, network, fp32.input_names)


# --- (c) The runtime on the stand-in device ---------------------------------------------------------------


def test_the_lab_builds_checks_and_describes_an_engine(engine_folder, graph_artefact, capsys):
    built = artefact.load(engine_folder)
    assert built.model_file.name == "model_fp16.engine"
    assert built.manifest["engine"] == {
        "gpu": "Stand-in GPU",
        "compute_capability": "8.9",
        "tensorrt": "11.4.0",
        "profile": {"min": [1, 1], "opt": [1, 16], "max": [32, 64]},
    }
    assert built.manifest["files"]["model_fp16.onnx"] == graph_artefact.manifest["files"]["model_fp16.onnx"]
    assert built.manifest["check"]["decided_agreement"] == 1
    assert (engine_folder.parent / "timing.cache").exists()


@pytest.mark.parametrize("version", ["10.0.1", "10.16.1", "11.4.0"])
@pytest.mark.parametrize(
    "order", [(), ("token_type_ids", "attention_mask", "input_ids"), ("logits", "attention_mask", "token_type_ids")]
)
def test_tensors_are_bound_by_name(graph_artefact, fp32, monkeypatch, tmp_path, version, order):
    """Whatever order an engine lists its tensors in; whichever TensorRT counts its flags."""
    machine = stand_in_device.install(monkeypatch, version=version, input_order=order)
    built = build_here(graph_artefact, tmp_path)
    tokens = artefact.Tokeniser(built)(held_out_headlines()[:8])
    with runtimes.open_backend(built) as backend:
        assert_close(fp32_logits(fp32, tokens), backend.logits(tokens))
    assert machine.everything_freed()


def build_here(graph_artefact, folder: Path, profile=PROFILE) -> artefact.Artefact:
    """An artefact with an engine that the device of this moment built."""
    folder = folder / "quantised-model-tensorrt"
    shutil.copytree(graph_artefact.folder, folder)
    names = graph_artefact.manifest["tokenizer"]["inputs"]
    engine_file = folder / "model_fp16.engine"
    engine = tensorrt_build.build(
        folder / "model_fp16.onnx", engine_file, names, profile, folder.parent / "cache", None
    )
    manifest = {**graph_artefact.manifest, "engine": engine, "model_file": engine_file.name}
    manifest["files"] = {**manifest["files"], engine_file.name: contract.describe_file(engine_file)}
    sealing.write_manifest(folder, manifest)
    return artefact.load(folder)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 48])
def test_the_engine_gives_fp32_logits_and_splits_large_batches(engine_folder, fp32, device, size):
    built = artefact.load(engine_folder)
    tokens = artefact.Tokeniser(built)(long_texts()[:size])
    with runtimes.open_backend(built) as backend:
        assert_close(fp32_logits(fp32, tokens), backend.logits(tokens))
        assert 0 < backend.compute_ms <= backend.end_to_end_ms
    assert [rows for rows, _ in device.launches] == [32] * (size // 32) + [size % 32] * bool(size % 32)


def test_buffers_are_allocated_once(engine_folder, device):
    built = artefact.load(engine_folder)
    tokenise = artefact.Tokeniser(built)
    with runtimes.open_backend(built) as backend:
        before = set(device.memory), set(device.pinned)
        first = backend.logits(tokenise(long_texts()[:1])).copy()
        kept = backend.logits(tokenise(long_texts()[:1]))
        backend.logits(tokenise(long_texts()))
        assert (set(device.memory), set(device.pinned)) == before
        assert np.array_equal(first, kept)  # a result is not overwritten by the next call
        assert not device.current  # between calls the thread keeps its own context
    assert len(before[0]) == len(before[1]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: np.pad(ids, ((0, 0), (0, 200))) for name, ids in t.items()}, "outside the engine's 1x1 to"),
        (lambda t: {name: ids[:0] for name, ids in t.items()}, "outside the engine's"),
        (lambda t: {name: ids for name, ids in t.items() if name != "attention_mask"}, "lacks attention_mask"),
        (lambda t: {**t, "attention_mask": t["attention_mask"][:, :-1]}, "not all of one shape"),
        (lambda t: {name: ids[0] for name, ids in t.items()}, "not all of one shape"),
    ],
)
def test_wrong_requests_are_refused_and_leave_the_engine_usable(engine_folder, device, change, message):
    built = artefact.load(engine_folder)
    tokens = artefact.Tokeniser(built)(held_out_headlines()[:2])
    with runtimes.open_backend(built) as backend:
        expected = backend.logits(tokens)
        with pytest.raises(LabError, match=message):
            backend.logits(change(tokens))
        assert np.array_equal(backend.logits(tokens), expected)


def test_a_failing_launch_leaves_no_context_behind(engine_folder, device):
    built = artefact.load(engine_folder)
    tokens = artefact.Tokeniser(built)(held_out_headlines()[:1])
    outer = stand_in_device.Device(0).retain_primary_context()
    outer.push()  # as a PyTorch in the same thread would
    with runtimes.open_backend(built) as backend:
        with pytest.raises(LabError, match="CUDA failed .*illegal memory access.*--check"):
            backend.logits({**tokens, "input_ids": tokens["input_ids"] + 10**9})
        assert device.current == [outer]
    outer.pop()
    outer.detach()


def test_a_file_runs_in_batches_in_a_thread_of_its_own(engine_folder, fp32, device):
    """`predict.py --csv --backends tensorrt` opens the engine in one thread and calls it in another."""
    built, texts = artefact.load(engine_folder), held_out_headlines()[:50]
    rows = [headlines.Row(number, text) for number, text in enumerate(texts, start=1)]
    with runtimes.open_backend(built) as backend:
        found = list(stream.answers(rows, artefact.Tokeniser(built), backend, 20))
        assert not device.current
    assert [answer.row for answer in found] == rows
    assert [rows for rows, _ in device.launches[-3:]] == [20, 20, 10]
    assert np.abs(np.stack([answer.probabilities for answer in found]) - softmax(fp32.logits(texts))).max() < 0.01


def test_closing_twice_or_not_at_all_frees_everything(engine_folder, device):
    built = artefact.load(engine_folder)
    tokens = artefact.Tokeniser(built)(held_out_headlines()[:1])
    backend = runtimes.open_backend(built)
    backend.close()
    backend.close()
    assert device.everything_freed()
    with pytest.raises(LabError, match="closed"):
        backend.logits(tokens)
    runtimes.open_backend(built)  # dropped without close


# The runtime's steps, left out or done wrong one at a time. The stand-in, or the check against FP32, must notice.
MISTAKES = {
    "no synchronise": ("stream.synchronize()\n", "pass\n"),
    "wrong dtype": ("np.dtype(trt.nptype(gpu.engine.get_tensor_dtype(name)))", "np.dtype(np.int32)"),
    "half output": (
        "np.dtype(trt.nptype(gpu.engine.get_tensor_dtype(name)))",
        'np.dtype("e" if name == "logits" else "q")',
    ),
    "address not set": ("gpu.context.set_tensor_address(", "print("),
    "shape not set": ("self._set_shapes(inputs[self._inputs[0]].shape)", "pass"),
    "input not copied": ("gpu.cuda.memcpy_htod_async(", "print("),
    "result not copied": ("gpu.cuda.memcpy_dtoh_async(", "print("),
    "not run": ("not gpu.context.execute_async_v3(stream.handle)", "False"),
    "context not pushed": ("self._primary.push()", "pass"),
    "context not popped": ("                self._primary.pop()", "                pass"),
    "context not detached": ("            self._primary.detach()\n\n\ndef", "            pass\n\n\ndef"),
    "buffers not freed": ("buffer.free()", "pass"),
    "freed too early": (
        "return result.astype(np.float32)",
        "[b.free() for b in gpu.device.values()]\n        return result",
    ),
    "a corner of the buffer": (
        "gpu.host[name][: rows.size].reshape(rows.shape)",
        "gpu.host[name].reshape(self._largest)[: rows.shape[0], : rows.shape[1]]",
    ),
    "bound by position": (
        "gpu.cuda.memcpy_htod_async(gpu.device[name], staged, stream)",
        'order = ["input_ids", "token_type_ids", "attention_mask"]\n'
        "            name = self._inputs[order.index(name)]\n"
        "            gpu.cuda.memcpy_htod_async(gpu.device[name], staged, stream)",
    ),
    "inputs disagree": ("if len(shapes) > 1 or len", "if len"),
}


def run_runtime(source: str, folder: Path, fp32, machine) -> None:
    """Put the runtime of this source to use; raises if something is wrong with it."""
    module = {"__name__": "runtime"}
    exec(compile(source, "runtime", "exec"), module)
    built = artefact.load(folder)
    tokens = artefact.Tokeniser(built)(held_out_headlines()[:8])
    with module["TensorRTBackend"](built) as backend:
        for batch in (tokens, {name: ids[:1] for name, ids in tokens.items()}):
            assert_close(fp32_logits(fp32, batch), backend.logits(batch))
        with pytest.raises(LabError, match="one shape"):
            backend.logits({**tokens, "attention_mask": tokens["attention_mask"][:, :-1]})
    assert machine.everything_freed()


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_mistakes_are_noticed(engine_folder, fp32, monkeypatch, mistake):
    machine = stand_in_device.install(monkeypatch)
    source = (ROOT / "lab04" / "run" / "tensorrt_engine.py").read_text(encoding="utf-8")
    if mistake is None:
        run_runtime(source, engine_folder, fp32, machine)
        return
    right, wrong = MISTAKES[mistake]
    assert right in source, "the runtime has changed: change this mistake with it"
    with pytest.raises((Exception, pytest.fail.Exception)):  # an assertion of ours, or a refusal of the device
        run_runtime(source.replace(right, wrong), engine_folder, fp32, machine)


def test_a_wrong_engine_is_not_accepted(model_folder, few_headlines, monkeypatch, tmp_path, capsys):
    """The engine's logits decide: what the original lab got wrong ends with an error and no artefact."""
    stand_in_device.install(monkeypatch)
    right = stand_in_device.memcpy_htod_async
    copies = []

    def swapped(dest, src, stream):
        copies.append((dest, src))
        if len(copies) == 3:  # the mask to the types and the types to the mask
            (_, first), (mask, mask_ids), (types, types_ids) = copies
            right(copies[0][0], first, stream)
            right(mask, types_ids, stream)
            right(types, mask_ids, stream)
            copies.clear()

    monkeypatch.setattr(sys.modules["pycuda.driver"], "memcpy_htod_async", swapped)
    output = tmp_path / "quantised-model-tensorrt"
    assert run_in_process(SCRIPT, "--model", model_folder("bert", 9), "--output", output) == 2
    assert not output.exists()
    error = capsys.readouterr().err
    assert error.startswith("lab04-nvidia.py: check failed")
    assert error.count("\n") == 1


def test_check_prints_a_line_for_every_assumption(model_folder, few_headlines, device, tmp_path, capsys):
    output = tmp_path / "quantised-model-tensorrt"
    assert run_in_process(SCRIPT, "--check", "--model", model_folder("bert", 2), "--output", output) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("PASS", "FAIL", "SKIP")]
    names = ["TensorRT", "PyCUDA", "driver", "build", "agreement", "labels", "latency", "context clean-up"]
    assert [line.partition(":")[0] for line in lines] == [f"PASS  {name}" for name in names]
    assert not output.exists()


def test_check_says_what_fails_and_what_to_send(model_folder, monkeypatch, tmp_path, capsys):
    stand_in_device.install(monkeypatch, devices=0)
    assert run_in_process(SCRIPT, "--check", "--model", model_folder("bert", 2), "--output", tmp_path / "no") == 2
    out, error = capsys.readouterr()
    assert "FAIL  driver: the NVIDIA driver finds no GPU" in out
    assert "PASS  TensorRT: version 11.4.0" in out
    assert "SKIP  latency" in out
    assert "nvidia-smi" in error


# --- (d) The stand-in and our code against the published bindings -----------------------------------------


@pytest.fixture(scope="module")
def real_names() -> dict:
    """Names with their arguments, read from the published bindings; `name=` is optional, null is no function."""
    listed = json.loads((ROOT / "tests" / "tensorrt_names.json").read_text(encoding="utf-8"))
    return {library: listed[library]["names"] for library in ("tensorrt", "pycuda")}


@pytest.mark.parametrize("library", ["tensorrt", "pycuda"])
def test_the_stand_in_has_nothing_that_the_real_ones_lack(real_names, library):
    for name, arguments in stand_in_names(library).items():
        assert name in real_names[library]
        real = real_names[library][name]
        if arguments is not None and real is not None:
            assert arguments == [argument.rstrip("=") for argument in real][: len(arguments)], name
            assert all(argument.endswith("=") for argument in real[len(arguments) :]), name


def stand_in_names(library: str) -> dict[str, list[str] | None]:
    """Public names of the stand-in, with the arguments of what is a function."""
    names = {}
    for item in stand_in_device.TENSORRT if library == "tensorrt" else stand_in_device.PYCUDA:
        names[item.__name__] = None
        members = {} if inspect.isfunction(item) else vars(item)
        if inspect.isfunction(item):
            names[item.__name__] = list(inspect.signature(item).parameters)
        for name, member in members.items():
            if name.startswith("_") or name in ("value", "name") and issubclass(item, stand_in_device.enum.Enum):
                continue
            function = member.__func__ if isinstance(member, staticmethod) else member
            if inspect.isfunction(function):
                parameters = list(inspect.signature(function).parameters)
                names[f"{item.__name__}.{name}"] = [p for p in parameters if p != "self"]
            else:
                names[f"{item.__name__}.{name}"] = None
    return names


# What our variables (`x`), attributes (`.x`), list items (`x[]`) and results (`x()`) hold, for the names used on them.
RECEIVERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "errors[]": "ParserError",
    "config": "IBuilderConfig",
    "optimisation": "IOptimizationProfile",
    "get_timing_cache()": "ITimingCache",
    "layer": "ILayer",
    "get_input()": "ITensor",
    "get_output()": "ITensor",
    ".runtime": "Runtime",
    ".engine": "ICudaEngine",
    ".context": "IExecutionContext",
    "device": "Device",
    "Device()": "Device",
    "._primary": "Context",
    "stream": "Stream",
    ".start": "Event",
    ".end": "Event",
    "buffer": "DeviceAllocation",
}


def used_names() -> dict[str, list[ast.Call | None]]:
    """Names of TensorRT and PyCUDA that our code uses, each with its calls."""
    used: dict[str, list[ast.Call | None]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (name := real_name(node)):
                used.setdefault(name, []).append(calls.get(id(node)))
    return used


def real_name(node: ast.Attribute) -> str | None:
    """`trt.Builder`, `gpu.engine.num_io_tensors` and the like under their library's name; None for what is ours."""
    owner = node.value
    if isinstance(owner, ast.Name):
        return node.attr if owner.id in ("trt", "cuda") else receiver(owner.id, node)
    if isinstance(owner, ast.Attribute):
        if isinstance(owner.value, ast.Name) and owner.value.id == "trt":
            return f"{owner.attr}.{node.attr}"
        return node.attr if owner.attr == "cuda" else receiver(f".{owner.attr}", node)
    if isinstance(owner, ast.Subscript):
        return receiver(f"{getattr(owner.value, 'id', '')}[]", node)
    if isinstance(owner, ast.Call):
        return receiver(f"{getattr(owner.func, 'attr', '')}()", node)
    return None


def receiver(key: str, node: ast.Attribute) -> str | None:
    return f"{RECEIVERS[key]}.{node.attr}" if key in RECEIVERS else None


def test_every_name_we_use_exists_with_those_arguments(real_names):
    names, used = {**real_names["tensorrt"], **real_names["pycuda"]}, used_names()
    assert len(used) > 60
    for name, calls in used.items():
        assert name in names, f"{name} is not in the published bindings"
        for call in filter(None, calls):
            if names[name] is None:
                continue
            given = {keyword.arg for keyword in call.keywords}
            left = [argument for argument in names[name][len(call.args) :] if argument.rstrip("=") not in given]
            assert len(call.args) <= len(names[name]), name
            assert given <= {argument.rstrip("=") for argument in names[name]}, name
            assert all(argument.endswith("=") for argument in left), f"{name} lacks {left}"


def test_what_tensorrt_11_removed_would_be_noticed(real_names):
    gone = ["BuilderFlag.FP16", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "ICudaEngine.num_bindings"]
    assert not any(name in real_names["tensorrt"] for name in gone)


# --- (e) and every foreseeable failure: one line ----------------------------------------------------------


def test_real_pycuda_without_a_driver_is_one_line():
    pytest.importorskip("pycuda", reason="PyCUDA is not installed: it is built from source, with a CUDA toolkit")
    try:
        tensorrt_engine.import_pycuda()
    except Unavailable as error:
        assert "driver" in str(error)
        assert "\n" not in str(error)
    else:
        pytest.skip("this machine has a driver and a GPU")


def broken_module(monkeypatch, name: str, error: Exception) -> None:
    """Make `import name` raise."""

    class Finder:
        def find_spec(self, wanted, path=None, target=None):
            if wanted == name:
                raise error

    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


MISSING = [
    ("tensorrt", ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt"), "TensorRT is not installed"),
    (
        "tensorrt",
        ImportError("libnvinfer.so.11: cannot open\nshared object file"),
        "TensorRT does not load (libnvinfer",
    ),
    ("pycuda.driver", ModuleNotFoundError("No module named 'pycuda'", name="pycuda"), "PyCUDA is not installed"),
    ("pycuda.driver", ImportError("libcuda.so.1: cannot open shared object file"), "no NVIDIA driver"),
    ("pycuda.driver", ImportError("undefined symbol: cuCtxCreate_v4"), "PyCUDA does not load (undefined symbol"),
]


@pytest.mark.parametrize(("module", "error", "message"), MISSING)
def test_a_missing_library_is_one_line(engine_folder, device, monkeypatch, module, error, message):
    broken_module(monkeypatch, module, error)
    refuses_to_open(engine_folder, message)


def refuses_to_open(folder: Path, message: str) -> None:
    with pytest.raises(Unavailable) as raised:
        runtimes.open_backend(artefact.load(folder))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "finds no GPU"),
        ({"devices": -1}, "no CUDA-capable device"),
        ({"driver_too_old": True}, "the NVIDIA driver is older than TensorRT's CUDA"),
        ({"gpu": "Other GPU"}, "the engine is for Stand-in GPU and TensorRT 11.4.0, this is Other GPU"),
        ({"version": "10.16.1"}, "and TensorRT 10.16.1: run python lab04-nvidia.py"),
        ({"capability": (7, 5)}, "run python lab04-nvidia.py"),
        ({"memory_bytes": 1000, "scratch_bytes": 0}, "out of GPU memory"),
        ({"memory_bytes": 1000}, "TensorRT cannot run the engine: out of GPU memory"),
    ],
)
def test_what_the_machine_lacks_is_one_line(engine_folder, monkeypatch, settings, message):
    machine = stand_in_device.install(monkeypatch, **settings)
    refuses_to_open(engine_folder, message)
    assert machine.everything_freed()


def test_an_artefact_without_an_engine_says_how_to_get_one(graph_artefact, device):
    refuses_to_open(graph_artefact.folder, "on a machine with an NVIDIA GPU run python lab04-nvidia.py")


def reseal(folder: Path, tmp_path: Path, engine: bytes | None = None, labels: int | None = None) -> Path:
    """A copy of an artefact with another engine or number of labels, whose manifest has been made to agree."""
    copy = tmp_path / "quantised-model-tensorrt"
    shutil.copytree(folder, copy)
    manifest = artefact.load(copy).manifest
    if engine is not None:
        (copy / manifest["model_file"]).write_bytes(engine)
    if labels:
        config = json.loads((copy / "config.json").read_text())
        config["id2label"] = {str(index): f"label {index}" for index in range(labels)}
        (copy / "config.json").write_text(json.dumps(config))
    manifest["files"] = {name: contract.describe_file(copy / name) for name in manifest["files"]}
    sealing.write_manifest(copy, manifest)
    return copy


def test_a_truncated_engine_is_one_line(engine_folder, device, tmp_path):
    whole = artefact.load(engine_folder).model_file.read_bytes()
    refuses_to_open(
        reseal(engine_folder, tmp_path, engine=whole[:-100]), "TensorRT refuses the engine (deserialisation"
    )
    truncated = tmp_path / "again"
    shutil.copytree(engine_folder, truncated)
    (truncated / "model_fp16.engine").write_bytes(whole[:-100])
    with pytest.raises(LabError, match="corrupt artefact .* bytes, not"):
        artefact.load(truncated)


def test_another_number_of_labels_is_one_line(engine_folder, device, tmp_path):
    with pytest.raises(LabError, match="the engine gives 9 scores for 7 labels: run python lab04-nvidia.py"):
        runtimes.open_backend(artefact.load(reseal(engine_folder, tmp_path, labels=7)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"build_error": "Requested amount of GPU memory could not be allocated: out of memory"}, "out of GPU memory"),
        ({"build_error": "Internal error"}, "TensorRT built no engine: Internal error"),
        ({"newest_opset": 12}, "TensorRT 11.4.0 cannot read the graph (opset 18 is not supported)"),
    ],
)
def test_a_failed_build_is_one_line(graph_artefact, monkeypatch, tmp_path, capsys, settings, message):
    stand_in_device.install(monkeypatch, **settings)
    with pytest.raises(LabError) as raised:
        build_here(graph_artefact, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    if "newest_opset" in settings:  # the parser's own words, all of them
        assert capsys.readouterr().err.count("In node 3 (importModel)") == 2


def test_a_driver_too_old_to_build_is_a_skip(graph_artefact, monkeypatch, tmp_path):
    stand_in_device.install(monkeypatch, driver_too_old=True)
    with pytest.raises(Unavailable, match="update the driver"):
        build_here(graph_artefact, tmp_path)


def test_without_a_gpu_the_graph_is_written_and_the_code_is_3(
    model_folder, few_headlines, device, monkeypatch, tmp_path, capsys
):
    broken_module(monkeypatch, "pycuda.driver", ImportError("libcuda.so.1: cannot open shared object file"))
    output = tmp_path / "quantised-model-tensorrt"
    assert run_in_process(SCRIPT, "--model", model_folder("bert", 2), "--output", output) == 3
    out, error = capsys.readouterr()
    assert error.startswith("lab04-nvidia.py: no engine here, which is no failure: no NVIDIA driver")
    assert "python lab04-nvidia.py" in error
    assert error.count("\n") == 1
    assert out.splitlines()[-2:] == [f"Wrote {output}", console.as_run_here("Next: python predict.py")]
    built = artefact.load(output)
    assert built.model_file.name == "model_fp16.onnx"
    assert built.manifest["engine"] is None
    assert "no NVIDIA driver" in built.manifest["engine_absent"]
    assert consistency.DECIDED_MARGIN and built.manifest["check"]["decided_agreement"] == 1


# --- The build's options ----------------------------------------------------------------------------------


def test_the_timing_cache_serves_the_next_build_and_no_other_gpu(graph_artefact, monkeypatch, tmp_path):
    for run, (settings, hits) in enumerate([({}, 0), ({}, 1), ({"gpu": "Other GPU"}, 0)]):
        machine = stand_in_device.install(monkeypatch, **settings)
        (tmp_path / str(run)).mkdir()
        if run:
            shutil.copy(tmp_path / str(run - 1) / "cache", tmp_path / str(run))
        build_here(graph_artefact, tmp_path / str(run))
        assert machine.cache_hits == hits


def test_ctrl_c_stops_the_build(graph_artefact, device, monkeypatch, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        build_here(graph_artefact, tmp_path)


def test_the_profile_is_what_was_asked_for(model_folder, few_headlines, device, tmp_path):
    output = tmp_path / "quantised-model-tensorrt"
    options = ("--min", "1x2", "--opt", "2x8", "--max", "4x64", "--workspace-mb", "512")
    assert run_in_process(SCRIPT, "--model", model_folder("distilbert", 2), "--output", output, *options) == 0
    assert artefact.load(output).manifest["engine"]["profile"] == {"min": [1, 2], "opt": [2, 8], "max": [4, 64]}
    assert max(rows for rows, _ in device.launches) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max", "32x512"), "--max of 512 tokens: the lab gives this model at most 64"),
        (("--min", "2x8", "--opt", "1x16"), "must not fall"),
        (("--opt", "1x16", "--max", "32x8"), "must not fall"),
        (("--max", "32"), "argument --max"),
        (("--max", "0x16"), "argument --max"),
    ],
)
def test_a_wrong_profile_is_refused(model_folder, device, tmp_path, capsys, options, message):
    output = tmp_path / "quantised-model-tensorrt"
    assert run_in_process(SCRIPT, "--model", model_folder("bert", 2), "--output", output, *options) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
