"""Lab 2 of 3: ONNX export with Optimum, ONNX Runtime dynamic INT8 on the CPU.

    python lab04-optimum.py                      # about 25 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-optimum/: one ONNX file that any language with
ONNX Runtime can serve, on AVX2 and VNNI machines alike. `--keep-fp32` keeps the exported FP32 graph beside it.
"""

import shutil
import tempfile
from pathlib import Path

from lab04 import artefact, backends, classifier, in_one_line, lab, onnx_graph, preparation, recheck

MODEL_FILE = "model_quantized.onnx"  # the name Optimum gives it, and looks for
FP32_FILE = "model.onnx"


def main() -> None:
    parser = lab.int8_argument_parser(__doc__, output="quantised-model-optimum")
    parser.add_argument("--keep-fp32", action="store_true", help=f"also keep {FP32_FILE}, the unquantised graph")
    parser.add_argument(
        "--recheck",
        action="store_true",
        help=f"also write {recheck.GRAPH_FILE}, which decides headlines INT8 leaves open",
    )
    arguments = parser.parse_args()

    texts = lab.choose_texts(arguments)
    artefact.check_output(arguments.output)
    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)

    print("2. Prepare: trim the last layer, even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32, texts.prepare)

    with artefact.building(arguments.output) as folder, tempfile.TemporaryDirectory() as scratch:
        with in_one_line("cannot turn this model into an ONNX graph", OSError):
            print("3. Export to ONNX with Optimum")
            exported = lab.export_onnx(prepared, Path(scratch))

            print("4. Fuse BERT's attention and GELU")
            fused = onnx_graph.fuse(exported, fp32.model.config, Path(scratch) / "fused.onnx", tanh_gelu=True)

        print("5. Quantise to dynamic INT8")
        onnx_graph.quantise(fused, folder / MODEL_FILE)
        if arguments.keep_fp32:
            lab.export_onnx(fp32.model, folder).rename(folder / FP32_FILE)

        if arguments.recheck:
            write_exact(fp32, texts.check, arguments.threads, Path(scratch) / "exact", folder / recheck.GRAPH_FILE)

        print("6. Check against FP32")
        artefact.seal(folder, fp32, "onnxruntime", "INT8", MODEL_FILE, texts=texts.record)
        if arguments.recheck:
            record_threshold(folder, texts.prepare, arguments.threads)
        built = artefact.record_check(folder, lab.check_against_fp32(folder, fp32, arguments.threads, texts))
    lab.report(fp32, built, arguments.output, "python lab04-nvidia.py")


def write_exact(fp32: classifier.Classifier, texts: list[str], threads: int, scratch: Path, output: Path) -> None:
    """Write the fused graph, without INT8, that decides where INT8 is close to a border.

    Its weights are stored in FP16 if that changes the label of none of `texts`, else in FP32.
    """
    network = preparation.trimmed(fp32.model, fp32.encode(lab.test_texts()[:8]))
    fused = onnx_graph.fuse(lab.export_onnx(network, scratch), fp32.model.config, scratch / "fused.onnx")
    half = onnx_graph.store_in_fp16(fused, scratch / "fp16.onnx")
    kept = find_labels(half, fp32, texts, threads) == find_labels(fused, fp32, texts, threads)
    shutil.move(half if kept else fused, output)
    print(f"   {output.name}: weights stored in {'FP16' if kept else 'FP32, as FP16 would change a label'}")


def find_labels(graph: Path, fp32: classifier.Classifier, texts: list[str], threads: int) -> list[int]:
    """The label ids an ONNX graph gives texts, one at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), backends.session_options(threads))
    names = [item.name for item in session.get_inputs()]
    encoded = (fp32.encode([text]) for text in texts)
    return [int(session.run(None, {name: row[name].numpy() for name in names})[0].argmax()) for row in encoded]


def record_threshold(folder: Path, texts: list[str] | None, threads: int) -> None:
    """Find the threshold of a sealed folder's recheck, on our training headlines if not on `texts`; add it to it."""
    built, texts = artefact.load(folder), texts or lab.train_texts()
    quick = backends.OnnxRuntimeBackend(built, threads)
    exact = backends.OnnxRuntimeBackend(built, threads, folder / recheck.GRAPH_FILE)
    threshold = recheck.find_threshold(quick, exact, artefact.Tokeniser(built), texts)
    print(f"   recheck below a gap of {threshold:.3f} logits")
    artefact.write_manifest(
        folder, {**built.manifest, "recheck": {"graph": recheck.GRAPH_FILE, "threshold": threshold}}
    )


if __name__ == "__main__":
    lab.run(main)
