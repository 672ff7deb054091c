"""Lab 3 of 3: TensorRT FP16 on an NVIDIA GPU.

    python lab04-nvidia.py                       # about 30 seconds without a GPU, a minute or two with one
    python lab04-nvidia.py --check               # PASS or FAIL for everything the lab assumes of a GPU machine

Reads lora-news/adapter (or --model) and writes quantised-model-tensorrt/: the FP16 ONNX graph and, where TensorRT and
a CUDA device exist, the engine built from it. Without them it says so and ends with exit code 3. TensorRT's timing
cache stays beside the folder, so that building again is quick.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH=1 and -P leave out

from lab04 import LabError, in_one_line, labs, options
from lab04.artefact import folder, rebuilding, sealing
from lab04.compare import closing_check, report, tensorrt_check
from lab04.console import run
from lab04.quantise import fp16_graph, onnx_graph, tensorrt_build
from lab04.read import classifier
from lab04.run.backend import Unavailable

LAB = labs.LABS[2]
ENGINE_FILE = "model_fp16.engine"
PROFILE = {"min": (1, 1), "opt": (1, 16), "max": (32, classifier.MAX_TOKENS)}  # a headline is about 16 tokens long


class NoEngine(Unavailable):
    """The FP16 graph was written, but this machine cannot build an engine."""

    exit_code = 3


def main() -> None:
    parser = options.argument_parser(__doc__, LAB)
    for name, (batch, length) in PROFILE.items():
        parser.add_argument(
            f"--{name}",
            type=shape,
            metavar="BATCHxTOKENS",
            help=f"{name} shape of the engine's optimisation profile (default: {batch}x{length})",
        )
    parser.add_argument(
        "--workspace-mb", type=options.positive, help="GPU memory the build may use (default: TensorRT's, all there is)"
    )
    parser.add_argument("--check", action="store_true", help="check this machine step by step; writes no artefact")
    arguments = parser.parse_args()
    command = rebuilding.record(LAB.script, parser, arguments)
    if arguments.check:
        tensorrt_check.self_check(lambda built: write(built, arguments, command))
        return

    with folder.building(arguments.output) as built:
        fp32, absent = write(built, arguments, command)
        print("4. Check against FP32 on the test headlines")
        artefact = sealing.record_check(built, closing_check.check_fp16(built, fp32, arguments.threads))
    report.close_lab(fp32, artefact, arguments.output, "python predict.py")
    if absent:
        raise NoEngine(
            f"no engine here, which is no failure: {absent}; on a machine with an NVIDIA GPU "
            "python lab04-nvidia.py --check tells what is missing"
        )


def shape(text: str) -> tuple[int, int]:
    """An argument of the form BATCHxTOKENS, such as 1x16."""
    batch, _, length = text.lower().partition("x")
    return options.positive(batch), options.positive(length)


def write(built: Path, arguments: argparse.Namespace, command: dict) -> tuple[classifier.Classifier, str | None]:
    """Fill an artefact folder. Returns the FP32 classifier and why there is no engine, or None if there is one."""
    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)
    profile = choose_profile(arguments, fp32.max_length)

    print("2. Export to ONNX and convert to FP16, LayerNorm kept in FP32")
    graph = built / fp16_graph.GRAPH_FILE
    with tempfile.TemporaryDirectory() as scratch, in_one_line("cannot turn this model into an FP16 graph", OSError):
        fp16_graph.convert(onnx_graph.export(fp32.model, Path(scratch)), graph)

    print("3. Build the TensorRT engine")
    engine = absent = None
    try:
        cache = arguments.output.absolute().with_name("timing.cache")
        inputs, workspace_mb = fp32.input_names, arguments.workspace_mb
        engine = tensorrt_build.build(graph, built / ENGINE_FILE, inputs, profile, cache, workspace_mb)
    except Unavailable as reason:
        absent = str(reason)
        print("   skipped: the FP16 graph runs on the CPU as a check of its labels")
    model_file = ENGINE_FILE if engine else graph.name
    facts = {"command": command, "graph": graph.name, "engine": engine, "engine_absent": absent}
    sealing.seal(built, fp32, LAB.backend, LAB.precision, model_file, **facts)
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


if __name__ == "__main__":
    run(main)
