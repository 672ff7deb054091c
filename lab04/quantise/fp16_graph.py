"""The FP16 graph that TensorRT builds its engine from."""

from graphlib import TopologicalSorter
from pathlib import Path

from lab04.console import quiet_logging

GRAPH_FILE = "model_fp16.onnx"


def convert(exported: Path, output: Path) -> None:
    """Write the FP16 form of an FP32 graph: half weights and arithmetic, LayerNorm and inputs and outputs as before.

    The precision is in the file, because TensorRT 11 has no FP16 switch and builds what the types of a graph say.
    """
    import onnx
    from onnxruntime.transformers import float16

    model = onnx.load(exported)
    with quiet_logging():
        half = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            node_block_list=behind_integers(model.graph),
            # LayerNorm squares its input, and 65,504 is the largest half: from 256 on it would overflow.
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "LayerNormalization"],
            # The attention mask's constant: large enough to vanish in softmax, and a score added to it stays finite.
            max_finite_val=1e4,
        )
    sort_nodes(half.graph)  # the converter puts its Casts at the end
    onnx.checker.check_model(half, full_check=True)
    onnx.save(half, output)


def behind_integers(graph) -> list[str]:
    """Names of the nodes whose result becomes a whole number, as MPNet's distances between tokens by their logarithm.

    They stay in FP32: half an FP16 step before the next whole number is another distance, and another answer.
    """
    from onnx import TensorProto

    makers = {name: node for node in graph.node for name in node.output}
    whole = (TensorProto.INT32, TensorProto.INT64)
    waiting = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i in whole]
    found = set()
    while waiting:
        node = waiting.pop()
        if node.name not in found and node.op_type != "Shape":  # a shape is the same in every precision
            found.add(node.name)
            waiting += [makers[name] for name in reads(node) if name in makers]
    return sorted(found)


def sort_nodes(graph) -> None:
    """Put a graph's nodes in an order in which they can run; ONNX Runtime's own sort overlooks what branches read."""
    nodes = list(graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    before = {index: [makers[name] for name in reads(node) if name in makers] for index, node in enumerate(nodes)}
    order = [nodes[index] for index in TopologicalSorter(before).static_order()]
    del graph.node[:]
    graph.node.extend(order)


def reads(node) -> list[str]:
    """Names of the tensors that an ONNX node reads, in its branches too, if it is an If."""
    branches = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [*node.input, *(name for branch in branches for inner in branch.node for name in reads(inner))]
