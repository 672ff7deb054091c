"""The contract of an artefact folder: what must be in it, and that nothing in it was edited.

A folder holds the model file, config.json (id2label), tokenizer.json (+ its config) and manifest.json. It is
complete on its own: running it needs neither the FP32 weights nor `transformers`.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lab04 import LabError, labs
from lab04.artefact.rebuilding import rebuild_command

MANIFEST = "manifest.json"
FORMAT = 2  # raised when an older folder can no longer be read as it was meant
READABLE = 1, FORMAT  # those of format 1 know five clear headlines by their FP32 logits alone


@dataclass(frozen=True)
class Artefact:
    """A checked artefact folder. `labels` are in logit order; `manifest` is manifest.json as read."""

    folder: Path
    manifest: dict
    labels: list[str]

    @property
    def backend(self) -> str:
        return self.manifest["backend"]

    @property
    def model_file(self) -> Path:
        return self.folder / self.manifest["model_file"]

    @property
    def options(self) -> tuple[str, ...]:
        """The lab's options that make it another artefact than the plain one, as `labs.LABS` lists them."""
        recorded = {"static": "static", "this-cpu": "compiled_for", "recheck": "recheck"}
        return tuple(option for option, key in recorded.items() if key in self.manifest)

    @property
    def title(self) -> str:
        """What tables and charts call it."""
        return labs.of_backend(self.backend).shown[self.options][0]

    @property
    def colour(self) -> str:
        """Its colour in every chart."""
        return labs.of_backend(self.backend).shown[self.options][1]

    @property
    def rebuild_command(self) -> str:
        """What to run to build it again, for messages."""
        return rebuild_command(self.folder)

    @property
    def model_mb(self) -> float:
        """Size in MB (10^6 bytes) of the model file, and of the graph that rechecks it where there is one."""
        graphs = [self.manifest["model_file"]] + (
            [self.manifest["recheck"]["graph"]] if "recheck" in self.options else []
        )
        return sum(self.manifest["files"][name]["bytes"] for name in graphs) / 1e6


def load(folder: Path | str) -> Artefact:
    """Read and check an artefact folder: every file's size and SHA-256, the manifest's own hash, the labels.

    Raises LabError, naming the command that rebuilds, if anything is missing, truncated, edited or of another format.
    """
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        # The file must be exactly what we wrote: any edited byte, even a blank, fails here or in its own hash.
        if text != render(manifest) or manifest["sha256"] != hash_manifest(manifest):
            raise ValueError(f"{MANIFEST} was edited")
        if manifest["format"] not in READABLE:
            raise ValueError(f"format {manifest['format']}, this lab reads {' and '.join(map(str, READABLE))}")
        for name, recorded in manifest["files"].items():
            check_file(folder, name, recorded)
        labels = read_labels(folder / "config.json")
        # What will be opened must be among the files just checked.
        model_file = manifest["model_file"]
        opened = {"config.json", "tokenizer.json", model_file, manifest.get("graph", model_file)}
        opened.add(manifest.get("compiled_for", {}).get("library", model_file))
        if "recheck" in manifest:
            opened.add(manifest["recheck"]["graph"])
            if not 0 <= manifest["recheck"]["threshold"] < float("inf"):
                raise ValueError(f"{MANIFEST} names no usable threshold")
        if not opened <= manifest["files"].keys():
            raise ValueError(f"{MANIFEST} names no known model file")
        labs.of_backend(manifest["backend"])
    except FileNotFoundError as error:
        missing = folder if not folder.is_dir() else error.filename
        raise LabError(f"missing artefact {missing}: run {rebuild_command(folder)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"corrupt artefact {folder} ({error}): run {rebuild_command(folder)}") from error
    return Artefact(folder, manifest, labels)


def check_file(folder: Path, name: str, recorded: dict) -> None:
    """Raise ValueError unless the file is the recorded one; names that leave the folder are refused."""
    if name != Path(name).name:
        raise ValueError(f"file name {name!r} leaves the folder")
    with (folder / name).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != recorded["bytes"]:
            raise ValueError(f"{name} has {size} bytes, not {recorded['bytes']}")
        if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
            raise ValueError(f"{name} was edited")


def read_labels(config: Path) -> list[str]:
    """Label names in logit order from a config.json. Raises ValueError unless they are 2 or more, distinct, 0..n-1."""
    id2label = json.loads(config.read_text(encoding="utf-8"))["id2label"]
    labels = [id2label.get(str(index)) for index in range(len(id2label))]
    if len(labels) < 2 or None in labels or len(set(labels)) < len(labels):
        raise ValueError(f"{config.name} has no usable id2label")
    return labels


def check_together(artefacts: list[Artefact]) -> None:
    """Raise LabError unless all artefacts come from the same weights, labels and tokeniser."""
    for other in artefacts[1:]:
        first = artefacts[0]
        for what, differs in (
            ("weights", first.manifest["weights_sha256"] != other.manifest["weights_sha256"]),
            ("labels", first.labels != other.labels),
            ("tokeniser", first.manifest["files"]["tokenizer.json"] != other.manifest["files"]["tokenizer.json"]),
        ):
            if differs:
                raise LabError(
                    f"{first.folder} and {other.folder} come from different {what}: "
                    "build them again with the same --model, or compare one with --artefacts"
                )


def describe_file(path: Path) -> dict:
    """Size and SHA-256 of a file, as the manifest records them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def hash_manifest(manifest: dict) -> str:
    """SHA-256 of a manifest without its own hash."""
    return hashlib.sha256(render({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def render(manifest: dict) -> str:
    """The one text form of a manifest."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
