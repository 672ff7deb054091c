"""Static INT8 for ONNX Runtime: every input's scale is a constant, so that no headline's answer depends on another's.

A dynamic product takes the scale of its input from all rows of a call, neighbours and padding included. Here it comes
from the headlines that preparation saw (docs/int8.md, "Static or dynamic?").
"""

from pathlib import Path

from lab04 import LabError
from lab04.quantise.onnx_graph import replace
from lab04.quantise.preparation import scale_and_zero_point


def make_static(quantised: Path, fused: Path, network) -> None:
    """Give the inputs of a dynamic INT8 graph constant scales and zero points, in place.

    `fused` is the FP32 graph it was made from, `network` the prepared one, whose Linears know their `input_range`.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    ranges = find_ranges(onnx.load(fused).graph, network)
    model = onnx.load(quantised)
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "DynamicQuantizeLinear"]:
        tensor, (number, scale, zero_point) = node.input[0], node.output
        if tensor not in ranges:
            raise LabError(f"the range of {tensor} in this model's graph is not known: build without --static")
        constants = zip((scale, zero_point), ranges[tensor], (np.float32, np.uint8), strict=True)
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, kind), name) for name, value, kind in constants
        )
        replace(graph, node, [helper.make_node("QuantizeLinear", [tensor, scale, zero_point], [number])])
    join_products(graph)
    onnx.save(model, quantised)


def find_ranges(graph, network) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the input tensor of every product of a fused FP32 graph.

    A product is known by its weights: the exporter and the optimiser give them names of their own.
    """
    import numpy as np
    from onnx import numpy_helper

    known: dict[bytes, tuple[float, float]] = {}
    for module in network.modules():
        if hasattr(module, "input_range"):
            weights = module.weight.detach().numpy().T.tobytes()
            low, high = known.get(weights, (0.0, 0.0))
            known[weights] = min(low, module.input_range[0]), max(high, module.input_range[1])
    constants = {item.name: item for item in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in ("Attention", "MatMul", "Gemm") and node.input[1] in constants:
            weights = numpy_helper.to_array(constants[node.input[1]])
            if node.op_type == "Attention":  # query, key and value side by side, all of one input
                weights = weights[:, : weights.shape[1] // 3]
            if any(item.name == "transB" and item.i for item in node.attribute):
                weights = weights.T
            if (given := np.ascontiguousarray(weights).tobytes()) in known:
                found[node.input[0]] = scale_and_zero_point(*known[given])
    return found


def join_products(graph) -> None:
    """Make one MatMulIntegerToFloat of each product, its scales and its bias.

    Under constant scales the session no longer recognises the parts, as it does in a dynamic graph.
    """
    from onnx import helper

    widths = {item.name: list(item.dims)[-1:] for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def reader(tensor: str):
        """The only node that reads a tensor, None if there are more."""
        readers = [node for node in graph.node if tensor in node.input]
        return readers[0] if len(readers) == 1 else None

    for product in [node for node in graph.node if node.op_type == "MatMulInteger"]:
        number, weights, zero_point = product.input[:3]
        cast = reader(product.output[0])
        last = reader(cast.output[0])
        [scales] = [makers[name] for name in last.input if name != cast.output[0]]
        parts, bias, add = [product, cast, scales, last], [], reader(last.output[0])
        if add is not None and add.op_type == "Add":
            bias = [name for name in add.input if widths.get(name) == widths[weights]]
            parts, last = ([*parts, add], add) if bias else (parts, last)
        inputs = [number, weights, *scales.input, zero_point, "", *bias]
        whole = helper.make_node("MatMulIntegerToFloat", inputs, list(last.output), domain="com.microsoft")
        replace(graph, parts.pop(), [whole])
        for node in parts:
            graph.node.remove(node)
