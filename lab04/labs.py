"""The one table of the labs: what each makes, what runs it, and under which name and colour it is shown."""

from dataclasses import dataclass

# Safe for colour-blind readers: Okabe and Ito, "Color Universal Design", 2008; static forms are a darker shade.
BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"
DARK_BLUE, DARK_ORANGE, DARK_SKY, DARK_PURPLE = "#00405F", "#A86A00", "#1F7FB8", "#8A4A70"


@dataclass(frozen=True)
class Lab:
    """A lab script and the artefacts it makes.

    name: what `predict.py --backends` calls it
    backend: which runtime opens the artefact, as the manifest records it
    shown: title and colour of what it makes, by the options that make another artefact of it
    """

    name: str
    script: str
    folder: str
    backend: str
    precision: str
    shown: dict[tuple[str, ...], tuple[str, str]]


LABS = (
    Lab(
        "torch",
        "lab04-torch.py",
        "quantised-model-torch",
        "torch",
        "INT8",
        {
            (): ("PyTorch Quantised", BLUE),
            ("static",): ("PyTorch Static", DARK_BLUE),
            ("this-cpu",): ("This CPU", PURPLE),
            ("this-cpu", "recheck"): ("This CPU Rechecked", DARK_PURPLE),
        },
    ),
    Lab(
        "onnx",
        "lab04-optimum.py",
        "quantised-model-optimum",
        "onnxruntime",
        "INT8",
        {
            (): ("ONNX Quantised", ORANGE),
            ("static",): ("ONNX Static", DARK_ORANGE),
            ("recheck",): ("ONNX Rechecked", SKY),
            ("static", "recheck"): ("ONNX Static Rechecked", DARK_SKY),
        },
    ),
    Lab("tensorrt", "lab04-nvidia.py", "quantised-model-tensorrt", "tensorrt", "FP16", {(): ("TensorRT FP16", GREEN)}),
)
SPARE_COLOURS = ["#D55E00", "#000000", "#999999"]  # for a second artefact of one kind beside the first
GRAPH_ON_CPU = "TensorRT's graph on the CPU"  # a check of its labels where there is no engine


def of_backend(backend: str) -> Lab:
    """The lab whose artefacts a runtime opens. Raises ValueError if there is none."""
    found = [lab for lab in LABS if lab.backend == backend]
    if not found:
        raise ValueError(f"no lab makes an artefact for {backend!r}")
    return found[0]
