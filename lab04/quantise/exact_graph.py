"""The graph without INT8 that decides close headlines, and the gap below which it is asked (`--recheck`)."""

import shutil
from pathlib import Path

from lab04.artefact import Tokeniser, load, sealing
from lab04.quantise import onnx_graph, preparation
from lab04.read import texts
from lab04.read.classifier import Classifier
from lab04.run import recheck, runtimes


def write(fp32: Classifier, checked: list[str], threads: int, scratch: Path, folder: Path) -> None:
    """Write the fused graph, without INT8, that decides where INT8 is close to a border.

    Its weights are stored in FP16 if that changes the label of none of the `checked` texts, else in FP32.
    """
    network = preparation.trimmed(fp32.model, fp32.encode(texts.held_out_headlines()[:8]))
    fused = onnx_graph.fuse(onnx_graph.export(network, scratch), fp32.model.config, scratch / "fused.onnx")
    half = onnx_graph.store_in_fp16(fused, scratch / "fp16.onnx")
    kept = find_labels(half, fp32, checked, threads) == find_labels(fused, fp32, checked, threads)
    shutil.move(half if kept else fused, folder / recheck.GRAPH_FILE)
    print(f"   {recheck.GRAPH_FILE}: weights stored in {'FP16' if kept else 'FP32, as FP16 would change a label'}")


def find_labels(graph: Path, fp32: Classifier, texts: list[str], threads: int) -> list[int]:
    """The label ids an ONNX graph gives texts, one at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), runtimes.session_options(threads))
    names = [item.name for item in session.get_inputs()]
    encoded = (fp32.encode([text]) for text in texts)
    return [int(session.run(None, {name: row[name].numpy() for name in names})[0].argmax()) for row in encoded]


def record_threshold(folder: Path, given: list[str] | None, threads: int) -> None:
    """Find the threshold of a sealed folder's recheck and record it; on `given` texts, or our training headlines."""
    built, looked_at = load(folder), given or texts.training_headlines()
    quick = runtimes.open_runtime(built, threads)
    exact = runtimes.OnnxRuntimeBackend(built, threads, folder / recheck.GRAPH_FILE)
    threshold = recheck.find_threshold(quick, exact, Tokeniser(built), looked_at)
    print(f"   recheck below a gap of {threshold:.3f} logits")
    sealing.write_manifest(folder, {**built.manifest, "recheck": {"graph": recheck.GRAPH_FILE, "threshold": threshold}})
