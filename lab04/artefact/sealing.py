"""Seal a folder under construction: its configuration, its tokeniser, and the manifest that vouches for every file."""

import contextlib
import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lab04.artefact.contract import FORMAT, MANIFEST, Artefact, describe_file, hash_manifest, load, render

LIBRARIES = ("torch", "transformers", "peft", "optimum", "onnx", "onnxruntime", "tensorrt", "pycuda", "numpy")


def seal(folder: Path, classifier, backend: str, precision: str, model_file: str, **details) -> None:
    """Write config.json, the tokeniser and manifest.json beside the model file of a folder under construction.

    classifier: a `lab04.read.classifier.Classifier`; `details`, such as the command that builds the folder
    (`rebuilding.record`), go into the manifest as given.
    """
    classifier.model.config.save_pretrained(folder)
    # Earlier calls leave their padding and truncation in the tokeniser; the file must be the same in every artefact.
    classifier.tokenizer.backend_tokenizer.no_truncation()
    classifier.tokenizer.backend_tokenizer.no_padding()
    classifier.tokenizer.save_pretrained(folder)
    # Slow-tokeniser files say the same as tokenizer.json; two sources of one truth are one too many.
    for name in ("vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    manifest = {
        "format": FORMAT,
        "backend": backend,
        "precision": precision,
        "model_file": model_file,
        "weights_sha256": classifier.weights_sha256,
        "tokenizer": tokenizer_settings(classifier),
        "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "built_on": platform.processor() or platform.machine(),
        "libraries": library_versions(),
        **details,
        "files": {path.name: describe_file(path) for path in sorted(folder.iterdir())},
    }
    write_manifest(folder, manifest)


def record_check(folder: Path, check: dict) -> Artefact:
    """Add the result of the build's own check against FP32 to a sealed folder's manifest. Returns what is complete."""
    write_manifest(folder, {**load(folder).manifest, "check": check})
    return load(folder)


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json with its own hash in it."""
    manifest = {**{k: v for k, v in manifest.items() if k != "sha256"}, "sha256": hash_manifest(manifest)}
    (folder / MANIFEST).write_text(render(manifest), encoding="utf-8")


def tokenizer_settings(classifier) -> dict:
    """What running needs beyond tokenizer.json: inputs, padding, truncation, and whether it gives token types."""
    inputs = classifier.input_names
    return {
        "inputs": inputs,
        "typed": "token_type_ids" in inputs and "token_type_ids" in classifier.tokenizer.model_input_names,
        "pad_id": classifier.pad_id,
        "padding_side": classifier.tokenizer.padding_side,
        "max_length": classifier.max_length,
        "truncation_side": classifier.tokenizer.truncation_side,
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed, of those that matter to a result."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
