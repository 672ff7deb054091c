"""What the lab is measured against: the FP32 references, and what a user would otherwise pick.

Each peer is built as its own documentation shows and runs behind the lab's one call, `logits(tokens)`. ONNX peers
become artefact folders and run on `runtimes.OnnxRuntimeBackend`, so they get the lab's own session settings.
Everything is built from one FP32 folder, which `export_reference` writes.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab04 import LabError, artefact
from lab04.artefact import Artefact, Tokens, sealing
from lab04.artefact.folder import building
from lab04.console import quiet_logging
from lab04.quantise import onnx_graph, preparation
from lab04.read import classifier
from lab04.read.texts import TRAIN_HEADLINES, held_out_headlines, training_headlines
from lab04.run import runtimes

FUSED = "model_fused.onnx"
CALIBRATION_ROWS = 300  # headlines that NNCF's static quantisation is calibrated on, its own default


@dataclass(frozen=True)
class Peer:
    """One way to run the FP32 folder.

    libraries: what is imported before anything is loaded (timed apart in a cold start)
    build(reference, output): writes the peer's files into the empty folder `output`; None if there are none
    open(folder, reference, threads): the runner, an object with `logits(tokens)`
    """

    name: str
    precision: str
    libraries: tuple[str, ...]
    build: Callable[[Artefact, Path], None] | None
    open: Callable[[Path, Artefact, int], object]


def export_reference(model: str, labels: str | None, folder: Path) -> None:
    """Write the merged FP32 classifier as an artefact folder: two ONNX graphs, and the weights for `transformers`.

    model.onnx is the plain export that peers quantise; FUSED is as fast as FP32 can be made, for a fair comparison.
    """
    fp32 = classifier.load(model, labels)
    with building(folder) as new:
        shutil.move(onnx_graph.export(fp32.model, new / "export"), new / "model.onnx")
        shutil.rmtree(new / "export")
        network = preparation.trimmed(fp32.model, fp32.encode(held_out_headlines()[:8]))
        onnx_graph.fuse(onnx_graph.export(network, new / "export"), fp32.model.config, new / FUSED)
        shutil.rmtree(new / "export")
        fp32.model.save_pretrained(new)
        sealing.seal(new, fp32, "onnxruntime", "FP32", "model.onnx")


# --- FP32 PyTorch and its own ways to be faster -----------------------------------------------------------


class Eager:
    """The `transformers` model as it is, called as its documentation calls it; `change` may replace the network."""

    def __init__(self, reference: Artefact, threads: int, change: Callable):
        import torch
        from transformers import AutoModelForSequenceClassification

        self._torch = torch
        torch.set_num_threads(threads)
        network = AutoModelForSequenceClassification.from_pretrained(reference.folder, dtype="float32").eval()
        self.network = change(network)

    def logits(self, tokens: Tokens) -> np.ndarray:
        with self._torch.inference_mode():
            inputs = {name: self._torch.from_numpy(array) for name, array in tokens.items()}
            return self.network(**inputs).logits.numpy()


def open_eager(change: Callable = lambda network: network) -> Callable[[Path, Artefact, int], Eager]:
    """How to open the reference's own network, changed in some way."""
    return lambda _folder, reference, threads: Eager(reference, threads, change)


def quantise_as_tutorials(network):
    """PyTorch's dynamic quantisation recipe for BERT: every Linear, default settings, still run eagerly."""
    import torch

    with quiet_logging():
        return torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)


def compile_network(network):
    """torch.compile for any batch and length; the first call compiles, so a cold start includes that."""
    import torch

    return torch.compile(network, dynamic=True)


def save_tutorial_weights(reference: Artefact, output: Path) -> None:
    """What the recipe leaves on disk: the state_dict of the quantised network."""
    import torch

    torch.save(Eager(reference, 1, quantise_as_tutorials).network.state_dict(), output / "model.pt")


# --- Quantised ONNX ---------------------------------------------------------------------------------------


def quantise_with_optimum(preset: str) -> Callable[[Artefact, Path], None]:
    """A builder: Optimum's ORTQuantizer with one of its presets, its defaults otherwise."""

    def build(reference: Artefact, output: Path) -> None:
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        quantizer = ORTQuantizer.from_pretrained(reference.folder, file_name="model.onnx")
        quantizer.quantize(
            save_dir=output, quantization_config=getattr(AutoQuantizationConfig, preset)(is_static=False)
        )

    return build


def quantise_with_sentence_transformers(reference: Artefact, output: Path) -> None:
    """sentence-transformers' own export of a CrossEncoder, the `qint8_avx512_vnni` file its models are shared with."""
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    encoder = CrossEncoder(
        str(reference.folder),
        backend="onnx",
        model_kwargs={"file_name": "model.onnx", "provider": "CPUExecutionProvider"},
    )
    export_dynamic_quantized_onnx_model(encoder, "avx512_vnni", str(output))


def open_reference(_folder: Path, reference: Artefact, threads: int):
    """ONNX Runtime, as the lab configures it, on the fused FP32 graph."""
    return runtimes.OnnxRuntimeBackend(reference, threads, reference.folder / FUSED)


def open_onnx(folder: Path, reference: Artefact, threads: int):
    """ONNX Runtime, as the lab configures it, on the one ONNX file below `folder`."""
    [path] = Path(folder).rglob("*.onnx")
    return runtimes.OnnxRuntimeBackend(reference, threads, path)


# --- OpenVINO and CTranslate2 -----------------------------------------------------------------------------


class OpenVino:
    """OpenVINO on the CPU, tuned for latency. FP32 stays FP32: its own default may compute in bfloat16."""

    def __init__(self, folder: Path, _reference: Artefact, threads: int):
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._model = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)
        self._names = [port.get_any_name() for port in self._model.inputs]

    def logits(self, tokens: Tokens) -> np.ndarray:
        return self._model({name: tokens[name] for name in self._names})[0]


def convert_to_openvino(reference: Artefact, output: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(reference.model_file), output / "model.xml", compress_to_fp16=False)


def quantise_with_nncf(reference: Artefact, output: Path) -> None:
    """NNCF's static INT8 for transformers, calibrated on training headlines (on test ones if there are none)."""
    import nncf
    import openvino

    texts = training_headlines() if TRAIN_HEADLINES.exists() else held_out_headlines()
    texts = texts[:: -(-len(texts) // CALIBRATION_ROWS)]  # from the whole file, which is sorted by label
    tokenise = artefact.Tokeniser(reference)
    calibration = nncf.Dataset(texts, lambda text: tokenise([text]))
    model = openvino.convert_model(reference.model_file)
    quantised = nncf.quantize(model, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    openvino.save_model(quantised, output / "model.xml", compress_to_fp16=False)


class CTranslate2:
    """CTranslate2's INT8 encoder and pooler; it has no classification head, so that is one product in numpy."""

    def __init__(self, folder: Path, reference: Artefact, threads: int):
        import ctranslate2
        from safetensors.numpy import load_file

        self._ctranslate2 = ctranslate2
        self._encoder = ctranslate2.Encoder(
            str(folder / "model"), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )
        weights = load_file(reference.folder / "model.safetensors")
        self._weight, self._bias = weights["classifier.weight"], weights["classifier.bias"]

    def logits(self, tokens: Tokens) -> np.ndarray:
        def view(array):
            return self._ctranslate2.StorageView.from_array(array.astype(np.int32))

        output = self._encoder.forward_batch(view(tokens["input_ids"]), view(tokens["attention_mask"].sum(axis=1)))
        return np.asarray(output.pooler_output) @ self._weight.T + self._bias


def convert_to_ctranslate2(reference: Artefact, output: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(reference.folder)).convert(str(output / "model"), quantization="int8")


# --- The list ---------------------------------------------------------------------------------------------

TORCH = ("torch", "transformers.models.bert.modeling_bert")
ONNX = ("onnxruntime",)
VNNI = quantise_with_optimum("avx512_vnni")
REFERENCES = {
    "fp32-torch": Peer("PyTorch eager", "FP32", TORCH, None, open_eager()),
    "fp32-onnx": Peer("ONNX Runtime", "FP32", ONNX, None, open_reference),
}
PEERS = {
    "torch-tutorial": Peer(
        "PyTorch quantize_dynamic", "INT8", TORCH, save_tutorial_weights, open_eager(quantise_as_tutorials)
    ),
    "torch-compile": Peer("torch.compile", "FP32", TORCH, None, open_eager(compile_network)),
    "optimum-avx2": Peer("Optimum avx2", "INT8", ONNX, quantise_with_optimum("avx2"), open_onnx),
    "optimum-avx512-vnni": Peer("Optimum avx512_vnni", "INT8", ONNX, VNNI, open_onnx),
    "sentence-transformers": Peer(
        "sentence-transformers", "INT8", ONNX, quantise_with_sentence_transformers, open_onnx
    ),
    "openvino-fp32": Peer("OpenVINO", "FP32", ("openvino",), convert_to_openvino, OpenVino),
    "openvino-int8": Peer("OpenVINO NNCF static", "INT8", ("openvino",), quantise_with_nncf, OpenVino),
    "ctranslate2-int8": Peer("CTranslate2", "INT8", ("ctranslate2",), convert_to_ctranslate2, CTranslate2),
}


def build(peer: str, reference: Path, output: Path) -> None:
    """Build a peer's files in `output`, empty or not there yet."""
    maker = PEERS[peer].build
    if maker:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        with quiet_logging():
            maker(artefact.load(reference), output)


def model_mb(peer: str, folder: Path, reference: Path) -> float:
    """Size in MB (10^6 bytes) of the model files a peer needs at run time."""
    files = {"fp32-torch": ["model.safetensors"], "torch-compile": ["model.safetensors"], "fp32-onnx": [FUSED]}
    if peer in files:
        return sum((reference / name).stat().st_size for name in files[peer]) / 1e6
    models = [path for path in folder.rglob("*") if path.suffix in (".onnx", ".bin", ".xml", ".pt")]
    if not models:
        raise LabError(f"{peer} built no model file")
    return sum(path.stat().st_size for path in models) / 1e6
