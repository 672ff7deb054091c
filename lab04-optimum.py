"""Lab 2 of 3: ONNX export with Optimum, ONNX Runtime dynamic INT8 on the CPU.

    python lab04-optimum.py                      # about 25 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-optimum/: one ONNX file that any language with
ONNX Runtime can serve, on AVX2 and VNNI machines alike. `--keep-fp32` keeps the exported FP32 graph beside it.
"""

import copy
import shutil
import tempfile
from pathlib import Path

from lab04 import artefact, backends, classifier, lab, preparation, recheck

MODEL_FILE = "model_quantized.onnx"  # the name Optimum gives it, and looks for
FP32_FILE = "model.onnx"
SCALES_OF_ATTENTION = tuple(f".{name}.inverse_scale" for name in ("query", "key", "value", "q_lin", "k_lin", "v_lin"))


def main() -> None:
    parser = lab.argument_parser(__doc__, output="quantised-model-optimum")
    parser.add_argument("--keep-fp32", action="store_true", help=f"also keep {FP32_FILE}, the unquantised graph")
    parser.add_argument(
        "--recheck",
        action="store_true",
        help=f"also write {recheck.GRAPH_FILE}, which decides headlines INT8 leaves open",
    )
    arguments = parser.parse_args()

    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model)

    print("2. Prepare: trim the last layer, even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32)

    with artefact.building(arguments.output) as folder, tempfile.TemporaryDirectory() as scratch:
        print("3. Export to ONNX with Optimum")
        exported = lab.export_onnx(prepared, Path(scratch))

        print("4. Fuse BERT's attention, layer norms and GELU")
        fused = fuse(exported, fp32, Path(scratch))

        print("5. Quantise to dynamic INT8")
        quantise(fused, folder / MODEL_FILE)
        if arguments.keep_fp32:
            lab.export_onnx(fp32.model, folder).rename(folder / FP32_FILE)

        if arguments.recheck:
            write_exact(fp32, Path(scratch), folder / recheck.GRAPH_FILE)

        print("6. Check against FP32 on the test headlines")
        artefact.seal(folder, fp32, "onnxruntime", "INT8", MODEL_FILE)
        if arguments.recheck:
            record_threshold(folder, arguments.threads)
        artefact.record_check(folder, lab.check_against_fp32(folder, fp32, arguments.threads))
    lab.report(fp32, arguments.output, "python lab04-nvidia.py")


def write_exact(fp32: classifier.Classifier, scratch: Path, output: Path) -> None:
    """Write the fused graph of the unrounded FP32 weights that decides where INT8 is close to a border."""
    network = copy.deepcopy(fp32.model)
    preparation.trim_last_layer(network)
    folder = scratch / "exact"
    folder.mkdir()
    shutil.move(fuse(lab.export_onnx(network, folder), fp32, folder), output)


def record_threshold(folder: Path, threads: int) -> None:
    """Find the threshold of a sealed folder's recheck and add it to the manifest."""
    built = artefact.load(folder)
    quick = backends.OnnxRuntimeBackend(built, threads)
    exact = backends.OnnxRuntimeBackend(built, threads, folder / recheck.GRAPH_FILE)
    threshold = recheck.find_threshold(quick, exact, artefact.Tokeniser(built))
    print(f"   recheck below a gap of {threshold:.3f} logits, from training headlines")
    artefact.write_manifest(
        folder, {**built.manifest, "recheck": {"graph": recheck.GRAPH_FILE, "threshold": threshold}}
    )


def fuse(exported: Path, fp32: classifier.Classifier, scratch: Path) -> Path:
    """Fuse an exported FP32 graph with ONNX Runtime's BERT optimiser; print how many nodes of each kind it made."""
    import onnx
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # a fused embedding stays FP32; separate Gathers are quantised to 8 bits
    config = fp32.model.config
    exported = onnx.load(exported)
    scales = take_out_scales(exported.graph)
    with lab.quiet_logging():
        model = optimizer.optimize_model(
            exported,
            model_type="bert",  # the family: DistilBERT, RoBERTa and ELECTRA have the same layers
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=options,
            opt_level=0,  # ONNX Runtime's own passes run when the session is opened, for the machine it is on
        )
    fused = {kind: count for kind, count in model.get_fused_operator_statistics().items() if count}
    print("   " + ", ".join(f"{count} {kind}" for kind, count in fused.items()))
    put_back_scales(model.model.graph, scales)
    path = scratch / "fused.onnx"
    model.save_model_to_file(str(path))
    return path


def take_out_scales(graph) -> dict:
    """Remove the scaling of the inputs of query, key and value, which would hide an attention from the optimiser.

    Returns the Mul and its initialiser for each tensor that was scaled, for `put_back_scales`.
    """
    constants = {item.name: item for item in graph.initializer}
    scales = {}
    for mul in [node for node in graph.node if node.op_type == "Mul" and node.input[1].endswith(SCALES_OF_ATTENTION)]:
        if mul.input[1] in constants:  # of the three equal ones the exporter keeps one, and names it from the others
            scales[mul.input[0]] = mul, constants[mul.input[1]]
        graph.node.remove(mul)
        for node in graph.node:
            node.input[:] = [mul.input[0] if name == mul.output[0] else name for name in node.input]
    return scales


def put_back_scales(graph, scales: dict) -> None:
    """Scale the tensors in `scales` again where an attention, or a product that was not fused into one, reads them."""
    for tensor, (mul, constant) in scales.items():
        readers = [node for node in graph.node if node.op_type in ("Attention", "MatMul") and node.input[0] == tensor]
        for node in readers:
            node.input[0] = mul.output[0]
        graph.node.insert(list(graph.node).index(readers[0]), mul)
        graph.initializer.append(constant)


def quantise(fused: Path, output: Path) -> None:
    """Write the dynamic INT8 form of a graph with rounded weights: per channel, in 7 bits; activations in 8 bits."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(fused)
    quantise_embeddings(model.graph)
    with lab.quiet_logging():
        quantize_dynamic(
            model,
            str(output),
            op_types_to_quantize=["Attention", "MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7-bit weights: 8-bit ones overflow the 16-bit sums of CPUs without VNNI, and one file must serve both.
            reduce_range=True,
            # Fused operators carry no type information of their own; all floats in this graph are FP32.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


def quantise_embeddings(graph) -> None:
    """Store every embedding table in INT8 with one scale a row; ONNX Runtime itself would take one for the table.

    `Gather(table, ids)` becomes `Cast(Gather(rows, ids)) * Gather(scales, ids)`, standard ONNX that runs anywhere.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    tables = {item.name: item for item in graph.initializer}
    for gather in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]:
        table = numpy_helper.to_array(tables[gather.input[0]])
        if table.dtype != np.float32 or table.ndim != 2:
            continue
        name, ids = gather.output[0], gather.input[1]
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
        rows = np.rint(table / scales).astype(np.int8)
        graph.initializer.extend(
            [numpy_helper.from_array(rows, f"{name}_rows"), numpy_helper.from_array(scales, f"{name}_scales")]
        )
        place = list(graph.node).index(gather)
        graph.node.remove(gather)
        for offset, node in enumerate(
            (
                helper.make_node("Gather", [f"{name}_rows", ids], [f"{name}_int8"], axis=0),
                helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], to=TensorProto.FLOAT),
                helper.make_node("Gather", [f"{name}_scales", ids], [f"{name}_scale"], axis=0),
                helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]),
            )
        ):
            graph.node.insert(place + offset, node)
        if not any(gather.input[0] in node.input for node in graph.node):
            graph.initializer.remove(tables[gather.input[0]])


if __name__ == "__main__":
    lab.run(main)
