"""The artefact folder: write it atomically, check it, read its labels and its tokeniser.

A folder holds the model file, config.json (id2label), tokenizer.json (+ its config) and manifest.json. It is
complete on its own: running it needs neither the FP32 weights nor `transformers`.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from lab04 import LabError, interrupted

MANIFEST = "manifest.json"
FORMAT = 1  # raised when an older folder can no longer be read as it was meant
MAX_TOKENS = 128  # longer than any headline; also the longest sequence the TensorRT engine is built for
LIBRARIES = ("torch", "transformers", "peft", "optimum", "onnx", "onnxruntime", "tensorrt", "pycuda", "numpy")
BUILDERS = {"torch": "lab04-torch.py", "onnxruntime": "lab04-optimum.py", "tensorrt": "lab04-nvidia.py"}
VARIANTS = {"torch": "this-cpu", "onnxruntime": "recheck"}  # the option that makes a builder's other artefact

Tokens = dict[str, np.ndarray]  # input_ids, attention_mask[, token_type_ids]: int64 [batch, sequence]


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
    def rechecks(self) -> bool:
        """Whether a second graph decides the headlines that INT8 leaves open (lab04/recheck.py)."""
        return "recheck" in self.manifest

    @property
    def compiled(self) -> bool:
        """Whether it is code for one kind of processor (lab04/this_cpu.py)."""
        return "compiled_for" in self.manifest

    @property
    def model_mb(self) -> float:
        """Size in MB (10^6 bytes) of the model file, and of the graph that rechecks it where there is one."""
        graphs = [self.manifest["model_file"]] + ([self.manifest["recheck"]["graph"]] if self.rechecks else [])
        return sum(self.manifest["files"][name]["bytes"] for name in graphs) / 1e6


class Tokeniser:
    """Headlines to token ids, with the artefact's own tokenizer.json and nothing else."""

    def __init__(self, artefact: Artefact):
        from tokenizers import Tokenizer

        config = artefact.manifest["tokenizer"]
        self._tokenizer = Tokenizer.from_file(str(artefact.folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(config["max_length"], direction=config.get("truncation_side", "right"))
        self._tokenizer.no_padding()
        self._pad_id = config["pad_id"]
        self._pad_left = config.get("padding_side") == "left"
        self._names = config["inputs"]
        # Where the model takes types and the tokeniser gives none, they are zeros.
        self._typed = config.get("typed", False)

    def __call__(self, texts: list[str]) -> Tokens:
        """Token ids of a batch, padded to its longest text: int64 arrays [batch, sequence]."""
        encodings = self._tokenizer.encode_batch_fast([clean(text) for text in texts])
        longest = max(len(encoding.ids) for encoding in encodings)
        tokens = {name: np.zeros((len(texts), longest), dtype=np.int64) for name in self._names}
        tokens["input_ids"][:] = self._pad_id
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            place = slice(longest - length, None) if self._pad_left else slice(length)
            tokens["input_ids"][row, place] = encoding.ids
            tokens["attention_mask"][row, place] = 1
            if self._typed:
                tokens["token_type_ids"][row, place] = encoding.type_ids
        return tokens

    def dropped(self, text: str) -> int:
        """How many tokens of a text lie beyond the model's maximum length."""
        return sum(part.special_tokens_mask.count(0) for part in self._tokenizer.encode(clean(text)).overflowing)


def clean(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 library accepts, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


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
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this lab reads format {FORMAT}")
        for name, recorded in manifest["files"].items():
            check_file(folder, name, recorded)
        labels = read_labels(folder / "config.json")
        # What will be opened must be among the files just checked.
        model_file = manifest["model_file"]
        opened = {"config.json", "tokenizer.json", model_file, manifest.get("graph", model_file)}
        if "recheck" in manifest:
            opened.add(manifest["recheck"]["graph"])
            if not 0 <= manifest["recheck"]["threshold"] < float("inf"):
                raise ValueError(f"{MANIFEST} names no usable threshold")
        if manifest["backend"] not in BUILDERS or not opened <= manifest["files"].keys():
            raise ValueError(f"{MANIFEST} names no known backend or model file")
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


@contextlib.contextmanager
def building(output: Path | str) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an exception.

    Interrupted or failed builds leave what stood there before. Of two builds at once the later wins, whole.
    A symbolic link stays one: what it points to is written.
    Raises LabError if `output` holds something that is no artefact, or cannot be written.
    """
    output = Path(os.path.realpath(output))
    # Unique beyond process ids, which mean nothing between containers that share a volume.
    temporary = output.with_name(f".{output.name}.new-{secrets.token_hex(8)}")
    try:
        make_room(output)
        with contextlib.ExitStack() as alive:
            with locked(output.parent):  # a folder that is made but not yet locked would look like a dead build's
                remove_stale(output)
                temporary.mkdir()
                alive.enter_context(locked(temporary))
            yield temporary
            if interrupted.is_set():  # a library swallowed Ctrl-C
                raise KeyboardInterrupt
            with locked(output.parent):
                replace(output, temporary)
    except OSError as error:
        raise LabError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise LabError as `building` would, before the work whose result `output` is to hold."""
    output = Path(os.path.realpath(output))
    try:
        make_room(output)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.new-", dir=output.parent):
            pass
    except OSError as error:
        raise LabError(f"cannot write {output}: {error.strerror or error}") from error


def make_room(output: Path) -> None:
    """Make the folder that `output` will be in. Raises LabError if there is something else in its place."""
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / MANIFEST).exists())):
        raise LabError(f"{output} exists and is no artefact folder: choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which the system gives back however a process ends, in every container on the machine.

    Yields whether the lock was got; where the file system knows no locks it is not.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        got = True
    except OSError:
        got = False
    try:
        yield got
    finally:
        os.close(descriptor)


def remove_stale(output: Path) -> None:
    """Remove what a killed build left beside `output`; folders that a living build holds locked stay."""
    for path in list(output.parent.iterdir()):
        if path.name.startswith((f".{output.name}.new-", f".{output.name}.old-")):
            with contextlib.suppress(OSError), locked(path, wait=False) as dead:
                if dead:
                    shutil.rmtree(path, ignore_errors=True)


def replace(output: Path, temporary: Path) -> None:
    """Put `temporary` in the place of `output`. A folder cannot be replaced in one step, so the old one steps aside."""
    aside = temporary.with_name(temporary.name.replace(".new-", ".old-"))
    while True:
        try:
            output.rename(aside)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            replace_files(output, temporary)
            return
        try:
            temporary.rename(output)
        except OSError:
            if output.exists():  # another build was quicker: step over its result too
                shutil.rmtree(aside, ignore_errors=True)
                continue
            if aside.exists():
                aside.rename(output)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return


def replace_files(output: Path, temporary: Path) -> None:
    """Replace the files of a mount point, which cannot itself be renamed.

    The manifest goes first and comes last: an artefact without one is refused, so no mixture is ever read.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=output) as copied:
        shutil.copytree(temporary, copied, dirs_exist_ok=True)  # a full disk shows here, and the old artefact stays
        (output / MANIFEST).unlink(missing_ok=True)
        for path in output.iterdir():
            if path.is_file():
                path.unlink()
        for path in sorted(Path(copied).iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(output / path.name)


def seal(folder: Path, classifier, backend: str, precision: str, model_file: str, **details) -> None:
    """Write config.json, the tokeniser and manifest.json beside the model file of a folder under construction.

    `classifier` is a `lab04.classifier.Classifier`; `details` (such as the engine) go into the manifest as given.
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
        "max_length": max_length(classifier),
        "truncation_side": classifier.tokenizer.truncation_side,
    }


def max_length(classifier) -> int:
    """The longest sequence, in tokens, that the lab gives a classifier: its own limit, the tokeniser's or the lab's."""
    limits = [MAX_TOKENS, classifier.tokenizer.model_max_length]
    if positions := getattr(classifier.model.config, "max_position_embeddings", None):
        limits.append(positions)
    for name, module in classifier.model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its kin count positions from the padding id on.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed, of those that matter to a result."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


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


def rebuild_command(folder: Path) -> str:
    """The command that builds the artefact a folder's name speaks of, into that folder."""
    name = re.sub(r"^\.(.+)\.new-\w+$", r"\1", folder.name)  # one that is being built
    for backend, script in BUILDERS.items():
        lab = script.removeprefix("lab04-").removesuffix(".py")
        if backend in name or lab in name:
            variant = VARIANTS.get(backend)
            option = f" --{variant}" if variant and variant in name else ""
            output = shlex.quote(str(folder.parent / name))
            return f"python {script}{option}" + f" --output {output}" * (name != f"quantised-model-{lab}")
    return "the lab script that built it"
