"""Lab 3 of 3: TensorRT FP16 on an NVIDIA GPU.

    python lab04-nvidia.py                       # about 30 seconds without a GPU, a minute or two with one
    python lab04-nvidia.py --check               # PASS or FAIL for everything the lab assumes of a GPU machine

Reads lora-news/adapter (or --model) and writes quantised-model-tensorrt/: the FP16 ONNX graph and, where TensorRT and
a CUDA device exist, the engine built from it. Without them it says so and ends with exit code 3. TensorRT's timing
cache stays beside the folder, so that building again is quick.
"""

import argparse
import os
import sys
import tempfile
from graphlib import TopologicalSorter
from pathlib import Path

from lab04 import LabError, in_one_line  # before numpy: it says in one line that no library is installed

# isort: split
import numpy as np

from lab04 import (
    artefact,
    backends,
    classifier,
    consistency,
    lab,
    tensorrt_build,
    tensorrt_check,
    tensorrt_engine,
)
from lab04.backend import Unavailable

GRAPH_FILE = "model_fp16.onnx"
ENGINE_FILE = "model_fp16.engine"
PROFILE = {"min": (1, 1), "opt": (1, 16), "max": (32, artefact.MAX_TOKENS)}  # a headline is about 16 tokens long
CHECK_BATCHES = (1, 32)  # padded batches too: a mask at the wrong input shows there, and hardly without padding
# FP16 moves logits by about 0.1 % of their range; inputs bound in the wrong order move them by 6 % and more.
MAX_LOGIT_CHANGE = 0.02


class NoEngine(Unavailable):
    """The FP16 graph was written, but this machine cannot build an engine."""

    exit_code = 3


def main() -> None:
    arguments = parse_arguments()
    if arguments.check:
        tensorrt_check.self_check(
            lambda folder: write_artefact(folder, arguments),
            lambda folder, fp32: check_artefact(folder, fp32, arguments.threads),
        )
        return
    with artefact.building(arguments.output) as folder:
        fp32, absent = write_artefact(folder, arguments)
        print("4. Check against FP32 on the test headlines")
        built = artefact.record_check(folder, check_artefact(folder, fp32, arguments.threads))
    lab.report(fp32, built, arguments.output, "python predict.py")
    if absent and lab.UNDER_MAKE in os.environ:  # predict.py runs next, and says why
        sys.exit(NoEngine.exit_code)
    if absent:
        raise NoEngine(
            f"no engine here: {absent}; on a machine with an NVIDIA GPU run "
            f"{tensorrt_engine.INSTALL} && python lab04-nvidia.py"
        )


def parse_arguments() -> argparse.Namespace:
    parser = lab.argument_parser(__doc__, output="quantised-model-tensorrt")
    for name, (batch, length) in PROFILE.items():
        parser.add_argument(
            f"--{name}",
            type=shape,
            metavar="BATCHxTOKENS",
            help=f"{name} shape of the engine's optimisation profile (default: {batch}x{length})",
        )
    parser.add_argument(
        "--workspace-mb", type=lab.positive, help="GPU memory the build may use (default: TensorRT's, all there is)"
    )
    parser.add_argument("--check", action="store_true", help="check this machine step by step; writes no artefact")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """An argument of the form BATCHxTOKENS, such as 1x16."""
    batch, _, length = text.lower().partition("x")
    return lab.positive(batch), lab.positive(length)


def write_artefact(folder: Path, arguments: argparse.Namespace) -> tuple[classifier.Classifier, str | None]:
    """Fill an artefact folder. Returns the FP32 classifier and why there is no engine, or None if there is one."""
    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)
    profile = choose_profile(arguments, artefact.max_length(fp32))

    print("2. Export to ONNX and convert to FP16, LayerNorm kept in FP32")
    with tempfile.TemporaryDirectory() as scratch, in_one_line("cannot turn this model into an FP16 graph", OSError):
        convert(lab.export_onnx(fp32.model, Path(scratch)), folder / GRAPH_FILE)

    print("3. Build the TensorRT engine")
    engine = absent = None
    try:
        engine = tensorrt_build.build(
            folder / GRAPH_FILE,
            folder / ENGINE_FILE,
            fp32.input_names,
            profile,
            cache=arguments.output.absolute().with_name("timing.cache"),
            workspace_mb=arguments.workspace_mb,
        )
    except Unavailable as reason:
        absent = str(reason)
        print("   skipped, which is no failure: the FP16 graph runs on the CPU as a check of its labels")
    model_file = ENGINE_FILE if engine else GRAPH_FILE
    artefact.seal(folder, fp32, "tensorrt", "FP16", model_file, graph=GRAPH_FILE, engine=engine, engine_absent=absent)
    return fp32, absent


def choose_profile(arguments: argparse.Namespace, longest: int) -> tensorrt_build.Profile:
    """The optimisation profile asked for, its defaults cut to what the model and the other shapes allow."""
    profile = {"max": arguments.max or (PROFILE["max"][0], longest)}
    profile["opt"] = arguments.opt or tuple(map(min, PROFILE["opt"], profile["max"]))
    profile["min"] = arguments.min or tuple(map(min, PROFILE["min"], profile["opt"]))
    if profile["max"][1] > longest:  # TensorRT itself would build it, and read beyond the position embeddings
        raise LabError(f"--max of {profile['max'][1]} tokens: the lab gives this model at most {longest}")
    if not all(a <= b <= c for a, b, c in zip(profile["min"], profile["opt"], profile["max"], strict=True)):
        raise LabError("--min, --opt and --max must not fall, neither in batch size nor in tokens")
    return profile


def convert(exported: Path, output: Path) -> None:
    """Write the FP16 form of an FP32 graph: half weights and arithmetic, LayerNorm and inputs and outputs as before.

    The precision is in the file, because TensorRT 11 has no FP16 switch and builds what the types of a graph say.
    """
    import onnx
    from onnxruntime.transformers import float16

    model = onnx.load(exported)
    with lab.quiet_logging():
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


def check_artefact(folder: Path, fp32: classifier.Classifier, threads: int) -> dict:
    """Check the FP16 graph on the CPU and, if there is one, the engine; returns the figures of the last.

    One headline at a time and in padded batches. Raises LabError if the logits are out of bounds.
    """
    built, texts = artefact.load(folder), lab.test_texts()
    tokenise, reference = artefact.Tokeniser(built), lab.fp32_logits(fp32, texts)
    openers = [backends.open_fp16_check] + [backends.open_backend] * bool(built.manifest["engine"])
    for open_backend in openers:
        results = []
        with open_backend(built, threads) as backend:
            for size in CHECK_BATCHES:
                batches = [texts[first : first + size] for first in range(0, len(texts), size)]
                logits = np.concatenate([backend.logits(tokenise(batch)) for batch in batches])
                results.append(check_logits(reference, logits, f"{backend.device}, batches of {size}"))
    return max(results, key=lambda result: result["max_logit_change"])


def check_logits(reference: np.ndarray, logits: np.ndarray, what: str) -> dict:
    """`consistency.check` with the narrower bounds of FP16, printed."""
    result = consistency.check(reference, logits)
    change = result["max_logit_change"] / float(np.ptp(reference))
    print(f"   {what}: {result['agreement']:.1%} same label, logits within {change:.2%} of their range")
    if change > MAX_LOGIT_CHANGE or result["decided_agreement"] < 1:
        raise LabError(
            f"check failed: FP16 may move logits by {MAX_LOGIT_CHANGE:.0%} of their range and no clear label; "
            "nothing was written"
        )
    return result


if __name__ == "__main__":
    lab.run(main)
