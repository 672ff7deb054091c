"""Lab 2 of 3: ONNX export with Optimum, ONNX Runtime INT8 on the CPU: dynamic, or with --static.

    python lab04-optimum.py                      # about 25 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-optimum/: one ONNX file that any language with
ONNX Runtime can serve, on AVX2 and VNNI machines alike. `--keep-fp32` keeps the exported FP32 graph beside it.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH=1 and -P leave out

from lab04 import in_one_line, labs, options
from lab04.artefact import folder, rebuilding, sealing
from lab04.compare import closing_check, report
from lab04.console import run
from lab04.quantise import exact_graph, onnx_graph, preparation, static_graph
from lab04.read import classifier, texts

LAB = labs.LABS[1]


def main() -> None:
    parser = options.int8_argument_parser(__doc__, LAB)
    parser.add_argument(
        "--keep-fp32", action="store_true", help=f"also keep {onnx_graph.FP32_FILE}, the unquantised graph"
    )
    parser.add_argument(
        "--recheck", action="store_true", help="also write the graph that decides what INT8 leaves open"
    )
    options.add_static(parser)
    arguments = parser.parse_args()
    chosen = texts.choose(arguments)
    folder.check_output(arguments.output)

    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)

    print("2. Prepare: even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32, chosen.prepare)

    with folder.building(arguments.output) as built, tempfile.TemporaryDirectory() as scratch:
        print("3. Export to ONNX with Optimum, fuse BERT's attention and GELU, quantise to INT8")
        with in_one_line("cannot turn this model into an ONNX graph", OSError):
            exported = onnx_graph.export(prepared, Path(scratch))
            fused = onnx_graph.fuse(exported, fp32.model.config, Path(scratch) / "fused.onnx", tanh_gelu=True)
        onnx_graph.quantise(fused, built / onnx_graph.MODEL_FILE)
        facts: dict = {}
        if arguments.static:
            static_graph.make_static(built / onnx_graph.MODEL_FILE, fused, prepared)
            facts["static"] = preparation.input_ranges(prepared)
        if arguments.keep_fp32:
            onnx_graph.export(fp32.model, built).rename(built / onnx_graph.FP32_FILE)
        if arguments.recheck:
            exact_graph.write(fp32, chosen.check, arguments.threads, Path(scratch) / "exact", built)
        facts |= {"command": rebuilding.record(LAB.script, parser, arguments), "texts": chosen.record}
        sealing.seal(built, fp32, LAB.backend, LAB.precision, onnx_graph.MODEL_FILE, **facts)
        if arguments.recheck:
            exact_graph.record_threshold(built, chosen.prepare, arguments.threads)

        print("4. Check against FP32")
        check = closing_check.check_int8(built, fp32, arguments.threads, chosen)
        artefact = sealing.record_check(built, check)
    report.close_lab(fp32, artefact, arguments.output, "python lab04-nvidia.py")


if __name__ == "__main__":
    run(main)
