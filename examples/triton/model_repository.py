"""Write a Triton Inference Server model repository from artefact folders.

    python examples/triton/model_repository.py                 # the lab's own artefacts -> model-repository/
    python examples/triton/model_repository.py --artefacts my-onnx my-tensorrt --output /srv/models
    ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository model-repository

One model an artefact, named after its folder, and a second one if it was built with --recheck: ONNX Runtime's back end
for an ONNX file, TensorRT's for an engine.
Clients send token ids made with the artefact's tokenizer.json, which lies beside the model, and get logits.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, Python looks only in its folder
from lab04 import ROOT, LabError, artefact, console

ARTEFACTS = [ROOT / "quantised-model-optimum", ROOT / "quantised-model-tensorrt"]
QUEUE_MICROSECONDS = 500  # how long a headline may wait for others; less than one prediction takes
MAX_BATCH = 32  # for ONNX Runtime, which takes any; an engine has its own

# Triton adds the batch dimension; -1 is the length in tokens.
CONFIG = """\
name: {name}
backend: "{backend}"
default_model_filename: "{file_name}"
max_batch_size: {batch}
input [
  {inputs}
]
output [
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {labels} ] label_filename: "labels.txt" }}
]
instance_group [ {{ kind: {device} count: 1 }} ]
# Requests of one length run together; INT8 answers then depend a little on their batch.
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=console.first_line(__doc__))
    parser.add_argument("--artefacts", nargs="+", type=Path, metavar="FOLDER", help="default: the lab's ONNX and FP16")
    parser.add_argument("--output", type=Path, default=Path("model-repository"), help="default: %(default)s")
    arguments = parser.parse_args()
    folders = arguments.artefacts or [folder for folder in ARTEFACTS if folder.exists()] or ARTEFACTS[:1]
    artefacts = [artefact.load(folder) for folder in folders]
    try:
        for name, (item, model_file) in models(artefacts).items():
            write_model(item, model_file, arguments.output / name)
            if model_file != item.model_file:
                print(
                    f"   Clients must ask {name} again where the two best logits of {item.folder.resolve().name} lie "
                    f"closer than {item.manifest['recheck']['threshold']}: examples/README.md"
                )
    except OSError as error:
        raise LabError(f"cannot write {arguments.output}: {error.strerror or error}") from error
    print(f"Wrote {arguments.output}")
    # The server is a process of its own, and its ONNX Runtime reads the variable there.
    print(f"Next: ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository {arguments.output}")


def models(artefacts: list[artefact.Artefact]) -> dict[str, tuple[artefact.Artefact, Path]]:
    """The model files to serve by Triton's names for them. Raises LabError before anything is written."""
    found: dict[str, tuple[artefact.Artefact, Path]] = {}
    for item in artefacts:
        triton_form(item)
        if broken := [label for label in item.labels if {"\r", "\n"} & set(label)]:
            raise LabError(
                f"{item.folder} has a label of several lines ({broken[0]!r}), and Triton reads one a line: "
                "name the classes with the lab's --labels"
            )
        name = item.folder.resolve().name
        files = {name: item.model_file}
        if recheck := item.manifest.get("recheck"):
            files[f"{name}-recheck"] = item.folder / recheck["graph"]
        for name, model_file in files.items():
            if name in found:
                raise LabError(
                    f"{found[name][0].folder} and {item.folder} would both be served as {name}: rename one folder"
                )
            found[name] = item, model_file
    return found


def write_model(item: artefact.Artefact, model_file: Path, folder: Path) -> None:
    """Write one model: config.pbtxt, labels.txt, the tokeniser, and version 1 of a model file of an artefact."""
    backend, file_name, device = triton_form(item)
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model_file, folder / "1" / file_name)
    shutil.copyfile(item.folder / "tokenizer.json", folder / "tokenizer.json")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in item.labels), encoding="utf-8")
    engine = item.manifest.get("engine") if backend == "tensorrt" else None
    batch = engine["profile"]["max"][0] if engine else MAX_BATCH
    inputs = [
        f'{{ name: "{name}" data_type: TYPE_INT64 dims: [ -1 ] }}' for name in item.manifest["tokenizer"]["inputs"]
    ]
    config = CONFIG.format(
        name=json.dumps(folder.name),
        backend=backend,
        file_name=file_name,
        batch=batch,
        inputs=",\n  ".join(inputs),
        labels=len(item.labels),
        device=device,
        delay=QUEUE_MICROSECONDS,
    )
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    print(f"   {folder.name}: {backend}, {len(item.labels)} labels")


def triton_form(item: artefact.Artefact) -> tuple[str, str, str]:
    """Triton's back end, file name and device for an artefact's model file. Raises LabError if it has none for it."""
    if item.backend == "torch":
        raise LabError(f"{item.folder} is PyTorch's: serve the ONNX one, which needs no PyTorch in the server")
    if item.model_file.suffix != ".onnx":
        return "tensorrt", "model.plan", "KIND_GPU"
    # ONNX Runtime's dynamic INT8 kernels are the CPU's; the FP16 graph belongs on a GPU where there is one.
    return "onnxruntime", "model.onnx", "KIND_CPU" if item.manifest["precision"] == "INT8" else "KIND_AUTO"


if __name__ == "__main__":
    console.run(main)
