"""`lab04-torch.py --this-cpu`: the prepared network for the INT8 engine, and the engine compiled for this processor.

Knows the classifiers of BERT, DistilBERT, RoBERTa and ELECTRA; what it does not know it refuses by name, and the
portable artefacts serve it.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

from lab04 import LabError
from lab04.quantise import preparation
from lab04.run import int8_engine

COMPILER = "g++"
FLAGS = ["-std=gnu++17", "-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"]
FLAGS += ["-ffinite-math-only", "-fno-signed-zeros", "-fno-math-errno"]  # minima and roots by one instruction each
ACTIVATIONS = {  # by the names of `transformers`, as the engine numbers them
    "gelu": 1,
    "gelu_python": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_python_tanh": 2,
    "gelu_fast": 2,
}
TANH, RELU = 3, 4


def check_here() -> None:
    """Raise LabError unless this machine can compile the engine and tell what processor it has."""
    if not shutil.which(COMPILER):
        raise LabError("--this-cpu needs a C++ compiler: sudo apt install g++")
    if not int8_engine.processor_flags():
        raise LabError("--this-cpu needs Linux, whose /proc/cpuinfo names the processor's flags")


def build(network, folder: Path) -> dict:
    """Write weights file and engine of a prepared network into a folder. Returns what its manifest must say of them."""
    write_weights(network, folder / int8_engine.WEIGHTS_FILE)
    compile_engine(folder / int8_engine.LIBRARY_FILE)
    engine = {"library": int8_engine.LIBRARY_FILE, "interface": int8_engine.INTERFACE}
    return {"compiled_for": engine | {"flags": int8_engine.processor_flags()}}


def compile_engine(library: Path, *options: str, source: Path = int8_engine.SOURCE) -> None:
    """Compile the engine for this processor; `options` are further ones of g++. Raises LabError with its first line."""
    done = subprocess.run([COMPILER, *FLAGS, *options, str(source), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise LabError(f"g++ cannot compile {source.name}: {said}")


def write_weights(network, file: Path) -> None:
    """Write the weights file of a network that `preparation.prepare` gave. Raises LabError for an unknown part."""
    from safetensors.numpy import save_file

    shape, tensors = read_network(network)
    wanted = int8_engine.layout(shape)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise LabError("--this-cpu does not know this network's parts: use the portable artefact")
    numbers = {name: getattr(shape, name) for name, *_ in shape._fields_}
    save_file(tensors, file, metadata={"shape": json.dumps(numbers)})


def read_network(network) -> tuple[int8_engine.Shape, dict[str, np.ndarray]]:
    """Shape and tensors of a prepared network. Raises LabError, saying what, for anything the engine cannot run."""
    config, kind = network.config, type(network).__name__.removesuffix("ForSequenceClassification")
    if kind not in ("Bert", "DistilBert", "Roberta", "Electra"):
        raise unknown(f"a {type(network).__name__}")
    distil = kind == "DistilBert"
    activation = config.activation if distil else config.hidden_act
    if activation not in ACTIVATIONS:
        raise unknown(f"the activation {activation}")
    if (relative := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise unknown(f"{relative} positions")
    body = network.base_model
    embeddings = body.embeddings
    tensors: dict[str, np.ndarray] = {}
    tables = [embeddings.word_embeddings.weight, embeddings.position_embeddings.weight]
    tables.append(tables[0][:1] * 0 if distil else embeddings.token_type_embeddings.weight)
    for name, table in zip(("words", "positions", "types"), tables, strict=True):
        tensors |= byte_rows(name, table)
    tensors |= norm("norm", embeddings.LayerNorm)
    if hasattr(body, "embeddings_project"):
        tensors |= linear("project", body.embeddings_project)
    layers = body.transformer.layer if distil else body.encoder.layer
    for index, layer in enumerate(layers):
        parts = distilbert_layer(layer) if distil else bert_layer(layer)
        for name, part in parts.items():
            make = norm if name.endswith("norm") else linear
            tensors |= make(f"layers.{index}.{name}", *part if isinstance(part, tuple) else (part,))
        query, keys = (tensors[f"layers.{index}.{name}.input_scale"] for name in ("query", "key_value"))
        if not np.array_equal(query, keys):  # the engine rounds their input once for both
            raise unknown("queries whose inputs are scaled otherwise than the keys'")
    head, classifier, head_activation = {
        "Bert": lambda: (network.bert.pooler.dense, network.classifier, TANH),
        "DistilBert": lambda: (network.pre_classifier, network.classifier, RELU),
        "Roberta": lambda: (network.classifier.dense, network.classifier.out_proj, TANH),
        "Electra": lambda: (network.classifier.dense, network.classifier.out_proj, ACTIVATIONS["gelu"]),
    }[kind]()
    tensors |= linear("head", head) | linear("classifier", classifier)

    hidden, heads = tensors["head.weight"].shape[0], config.num_attention_heads
    padding = embeddings.position_embeddings.padding_idx if kind == "Roberta" else None
    shape = int8_engine.Shape(
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        intermediate=tensors["layers.0.up.weight"].shape[0],
        labels=tensors["classifier.weight"].shape[0],
        embedding=tables[0].shape[1],
        words=len(tables[0]),
        positions=len(tables[1]),
        types=len(tables[2]),
        first_position=0 if padding is None else padding + 1,
        activation=ACTIVATIONS[activation],
        head_activation=head_activation,
        epsilon=embeddings.LayerNorm.eps,
    )
    for what, width in (("layers", hidden), ("embeddings", shape.embedding), ("inner layers", shape.intermediate)):
        if width % 16:
            raise unknown(f"{what} {width} wide, no multiple of 16")
    if hidden % heads or hidden // heads % 16:
        raise unknown(f"{heads} heads of {hidden / heads:g}, no multiple of 16")
    return shape, tensors


def unknown(what: str) -> LabError:
    """The refusal of a network with a part that the engine does not know."""
    return LabError(f"--this-cpu does not know {what}: use the portable artefact, without --this-cpu")


def bert_layer(layer) -> dict:
    """The parts of a layer of BERT, RoBERTa or ELECTRA, by the engine's names; of the last one also if trimmed."""
    attention, output = layer.attention.self, getattr(layer.attention.output, "module", layer.attention.output)
    return {
        "query": attention.query,
        "key_value": (attention.key, attention.value),
        "output": output.dense,
        "attention_norm": output.LayerNorm,
        "up": layer.intermediate.dense,
        "down": layer.output.dense,
        "norm": layer.output.LayerNorm,
    }


def distilbert_layer(layer) -> dict:
    """The parts of a layer of DistilBERT, by the engine's names; of the last one also if trimmed."""
    attention = layer.attention
    return {
        "query": attention.q_lin,
        "key_value": (attention.k_lin, attention.v_lin),
        "output": attention.out_lin,
        "attention_norm": getattr(layer.sa_layer_norm, "module", layer.sa_layer_norm),
        "up": layer.ffn.lin1,
        "down": layer.ffn.lin2,
        "norm": layer.output_layer_norm,
    }


def linear(name: str, *modules) -> dict[str, np.ndarray]:
    """Tensors of a Linear, or of several with the same input one below the other, whose weights are steps of 7 bits."""
    scales = [getattr(module, "inverse_scale", None) for module in modules]
    linears = [getattr(module, "linear", module) for module in modules]
    weight = np.concatenate([module.weight.detach().numpy() for module in linears])
    biases = [np.zeros(len(m.weight), np.float32) if m.bias is None else m.bias.detach().numpy() for m in linears]
    scale = np.maximum(np.abs(weight).max(axis=1), 1e-12) / preparation.STEPS
    input_scale = np.ones(weight.shape[1], np.float32) if scales[0] is None else scales[0].numpy()
    for other in scales[1:]:
        if not np.array_equal(input_scale, np.ones_like(input_scale) if other is None else other.numpy()):
            raise unknown("keys and values whose inputs are scaled apart")
    return {
        f"{name}.weight": np.rint(weight / scale[:, None]).astype(np.int8),
        f"{name}.scale": scale.astype(np.float32),
        f"{name}.bias": np.concatenate(biases),
        f"{name}.input_scale": input_scale,
    }


def norm(name: str, module) -> dict[str, np.ndarray]:
    """Tensors of a LayerNorm."""
    return {f"{name}.weight": module.weight.detach().numpy(), f"{name}.bias": module.bias.detach().numpy()}


def byte_rows(name: str, table) -> dict[str, np.ndarray]:
    """An embedding table with 8 bits and one scale a row, as the ONNX artefact's."""
    table = table.detach().numpy()
    scales = np.maximum(np.abs(table).max(axis=1), 1e-12) / 127
    return {f"{name}.rows": np.rint(table / scales[:, None]).astype(np.int8), f"{name}.scales": scales}
