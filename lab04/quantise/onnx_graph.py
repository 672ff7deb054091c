"""The ONNX graph: export it, fuse it for the CPU, and quantise it.

Only standard and com.microsoft operators come out, so that every language with ONNX Runtime runs the same file under
its default options.
"""

from pathlib import Path

from lab04 import LabError
from lab04.console import quiet_logging

MODEL_FILE = "model_quantized.onnx"  # the name Optimum gives it, and looks for
FP32_FILE = "model.onnx"
# Scales of the products in front of an attention.
SCALES_OF_ATTENTION = tuple(f".{name}.inverse_scale" for name in ("query", "key", "value", "q_lin", "k_lin", "v_lin"))
# The Slices of a trimmed network (preparation.trim_last_layer): of BERT, RoBERTa and ELECTRA, and of DistilBERT.
FIRST_TOKEN = ("/attention/output/Slice", "/sa_layer_norm/Slice")
BY_TOKEN = ("LayerNormalization", "Sum", "Add", "MatMul", "Mul")  # with constants, each token by itself


def export(network, folder: Path) -> Path:
    """Export a classifier network to FP32_FILE in `folder` with Optimum: FP32, dynamic batch and length.

    Raises LabError if Optimum knows no graph for networks of its type.
    """
    from optimum.exporters.onnx import onnx_export_from_model

    kind, task = network.config.model_type, "text-classification"
    if task not in known_tasks(kind):
        raise LabError(f"Optimum exports no {kind!r} classifier to ONNX: try python lab04-torch.py")
    with quiet_logging():
        # No validation here: it only warns. The closing check compares the finished artefact and decides.
        onnx_export_from_model(network, folder, task=task, do_validation=False)
    return folder / FP32_FILE


def known_tasks(kind: str) -> list[str]:
    """The tasks for which Optimum exports networks of a type to ONNX."""
    from optimum.exporters.tasks import TasksManager

    try:
        return list(TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers"))
    except KeyError:
        return []


def fuse(exported: Path, config, output: Path, tanh_gelu: bool = False) -> Path:
    """Fuse an exported FP32 graph with ONNX Runtime's BERT optimiser, in the form that runs fastest on a CPU.

    `config` is the model's `transformers` configuration. `tanh_gelu` computes GELU by its tanh form (Hendrycks and
    Gimpel, arXiv:1606.08415), within 0.001 of the exact one and faster. Prints how many nodes of each kind were fused;
    returns `output`, still FP32.
    """
    import onnx
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # a fused embedding stays FP32; separate Gathers are quantised to 8 bits
    options.enable_gelu_approximation = tanh_gelu
    exported = onnx.load(exported)
    scales = take_out_scales(exported.graph)
    with quiet_logging():
        model = optimizer.optimize_model(
            exported,
            model_type="bert",  # the family: DistilBERT, RoBERTa and ELECTRA have the same layers
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=options,
            opt_level=0,  # ONNX Runtime's own passes run when the session is opened, for the machine it is on
        )
    fused = model.get_fused_operator_statistics()
    del fused["SkipLayerNormalization"]  # taken apart again below
    print("   " + ", ".join(f"{count} {kind}" for kind, count in fused.items() if count))
    put_back_scales(model.model.graph, scales)
    take_layer_norms_apart(model.model.graph)
    take_biases_out_of_gelu(model.model.graph)
    choose_token_earlier(model.model.graph)
    model.save_model_to_file(str(output))
    return output


def take_out_scales(graph) -> dict:
    """Remove the scaling of the inputs of attentions, which would hide them from the optimiser.

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
        if not readers:
            raise ValueError(f"nothing reads {tensor}, whose scaling was taken out")
        for node in readers:
            node.input[0] = mul.output[0]
        graph.node.insert(list(graph.node).index(readers[0]), mul)
        graph.initializer.append(constant)


def take_layer_norms_apart(graph) -> None:
    """Put an addition and a LayerNormalization in the place of every SkipLayerNormalization.

    ONNX Runtime's CPU kernel of the fused operator takes up to four times as long as the two. `Sum` adds the residual,
    as the session would fuse `Add` again under its default options; the bias joins the product before it.
    """
    from onnx import helper

    for node in [node for node in graph.node if node.op_type == "SkipLayerNormalization"]:
        product, residual, weight, offset, bias = [*node.input, "", ""][:5]
        output, _, _, total = [*node.output, "", "", ""][:4]
        total = total or f"{output}_sum"  # a network that normalises before its layers reads the sum too
        parts = []
        if bias:
            parts.append(helper.make_node("Add", [product, bias], [f"{output}_biased"]))
            product = f"{output}_biased"
        [epsilon] = [item.f for item in node.attribute if item.name == "epsilon"]
        inputs = [total, weight] + [offset] * bool(offset)
        parts.append(helper.make_node("Sum", [product, residual], [total]))
        parts.append(helper.make_node("LayerNormalization", inputs, [output], axis=-1, epsilon=epsilon))
        replace(graph, node, parts)


def take_biases_out_of_gelu(graph) -> None:
    """Add the bias of every FastGelu before it: the session lets it join the INT8 product, where it costs nothing."""
    from onnx import helper

    for node in [node for node in graph.node if node.op_type == "FastGelu" and len(node.input) == 2]:
        product, bias = node.input
        biased = f"{node.output[0]}_biased"
        parts = [
            helper.make_node("Add", [product, bias], [biased]),
            helper.make_node("FastGelu", [biased], list(node.output), domain="com.microsoft"),
        ]
        replace(graph, node, parts)


def choose_token_earlier(graph) -> None:
    """Let a trimmed last layer go on with the first token from its attention's sums on, not only after their norm.

    The optimiser finds an attention by all that follows it, so that the network itself is sliced behind.
    """
    from onnx import helper

    constants = {item.name for item in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    makers = {name: node for node in graph.node for name in node.output}

    def choose(tensor: str, like) -> str:
        """The name of a tensor's first token. What makes it gets first tokens alone, if nothing else reads it."""
        maker = makers[tensor]
        if maker.op_type in BY_TOKEN and sum(tensor in node.input for node in graph.node) == 1:
            maker.input[:] = [name if name in constants else choose(name, like) for name in maker.input]
            return tensor
        chosen = helper.make_node("Slice", [tensor, *like.input[1:]], [f"{tensor}_first"])
        graph.node.insert(list(graph.node).index(maker) + 1, chosen)
        return chosen.output[0]

    for node in [node for node in graph.node if node.op_type == "Slice" and node.name.endswith(FIRST_TOKEN)]:
        tensor, output = choose(node.input[0], node), node.output[0]
        graph.node.remove(node)
        for reader in graph.node:
            reader.input[:] = [tensor if name == output else name for name in reader.input]


def replace(graph, node, parts: list) -> None:
    """Put nodes in the place of another; a graph's nodes must stay in the order in which they run."""
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, part in enumerate(parts):
        graph.node.insert(place + offset, part)


def quantise(fused: Path, output: Path) -> None:
    """Write the dynamic INT8 form of a graph with rounded weights: per channel, in 7 bits; activations in 8 bits."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(fused)
    quantise_embeddings(model.graph)
    with quiet_logging():
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
    quantised = onnx.load(output)
    drop_zero_points(quantised.graph)
    onnx.save(quantised, output)


def drop_zero_points(graph) -> None:
    """Leave out the weights' zero points, all of them 0: given one a column, every product would correct for them."""
    import numpy as np
    from onnx import numpy_helper

    constants = {item.name: item for item in graph.initializer}
    dropped = set()
    for node in graph.node:
        place = {"MatMulInteger": 3, "QAttention": 7}.get(node.op_type, len(node.input))
        for name in node.input[place : place + 1]:
            if name and not np.any(numpy_helper.to_array(constants[name])):
                node.input[place] = ""
                dropped.add(name)
    for name in dropped - {name for node in graph.node for name in node.input}:
        graph.initializer.remove(constants[name])


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
        parts = [
            helper.make_node("Gather", [f"{name}_rows", ids], [f"{name}_int8"], axis=0),
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}_scales", ids], [f"{name}_scale"], axis=0),
            helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]),
        ]
        replace(graph, gather, parts)
        if not any(gather.input[0] in node.input for node in graph.node):
            graph.initializer.remove(tables[gather.input[0]])


def store_in_fp16(graph_file: Path, output: Path) -> Path:
    """Write an FP32 graph with its matrices stored in FP16: half the file, the same FP32 arithmetic. Returns `output`.

    ONNX Runtime casts them back once, when it opens the file.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(graph_file)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and len(item.dims) == 2:
            name, half = item.name, f"{item.name}_fp16"
            with np.errstate(over="ignore"):  # beyond 65,504 it becomes infinite, and the labels show that
                weights = numpy_helper.to_array(item).astype(np.float16)
            item.CopyFrom(numpy_helper.from_array(weights, half))
            model.graph.node.insert(0, helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    onnx.save(model, output)
    return output
