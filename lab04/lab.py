"""The steps every lab script shares: arguments, the FP32 reference, the closing check, one-line errors."""

import argparse
import contextlib
import csv
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab04 import ROOT, LabError, artefact, backends, classifier, consistency

TRAIN_HEADLINES = ROOT / "lora-news" / "headlines" / "train.csv"
TEST_HEADLINES = ROOT / "lora-news" / "headlines" / "test.csv"
MIN_TEXTS, MAX_TEXTS = 32, 2000  # of a user's; half prepare and half check, and more of them gain nothing
MAX_UNKNOWN = 0.5  # share of unknown tokens above which a check on such texts says little
INTERRUPTED = 130  # what a shell reports for Ctrl-C
READER_GONE = 141  # and for a pipe that nobody reads any more


def argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments all labs have: --model, --labels, --output, --threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--model",
        default=classifier.DEFAULT_MODEL,
        help="PEFT adapter folder, model folder or hub id (default: lora-news/adapter)",
    )
    parser.add_argument(
        "--labels",
        metavar="a,b,c|FILE",
        help="names of the model's classes in logit order, or a file with one a line (default: as the model says)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / output, help=f"artefact folder (default: {output})")
    parser.add_argument(
        "--threads",
        type=positive,
        default=backends.DEFAULT_THREADS,
        help="CPU threads of the check (default: %(default)s)",
    )
    return parser


def int8_argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The parser of the two labs that look at texts while they quantise: with --texts."""
    parser = argument_parser(description, output)
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="unlabelled texts like those the model will be given, one a line: half prepare the weights, the others "
        "check the result (default: our English headlines)",
    )
    return parser


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def fp32_logits(fp32: classifier.Classifier, texts: list[str]) -> np.ndarray:
    """FP32 logits [texts, labels] of the `transformers` model, one unpadded headline at a time."""
    import torch

    rows = []
    with torch.inference_mode():
        for text in texts:
            rows.append(fp32.model(**fp32.encode([text])).logits[0].numpy())
    return np.stack(rows)


def export_onnx(network, folder: Path) -> Path:
    """Export a classifier network to `folder`/model.onnx with Optimum: FP32, dynamic batch and length."""
    from optimum.exporters.onnx import onnx_export_from_model

    with quiet_logging():
        # No validation here: it only warns. The closing check compares the finished artefact and decides.
        onnx_export_from_model(network, folder, task="text-classification", do_validation=False)
    return folder / "model.onnx"


@contextlib.contextmanager
def quiet_logging():
    """Drop the notices that exporters and quantisers log about things a user of the lab cannot change."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def read_rows(headlines: Path) -> list[dict]:
    """The rows of one of our own headline files: dicts of `text` and `label`."""
    with headlines.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_texts() -> list[str]:
    """The headlines every lab checks its result on. Agreement with FP32 needs no labels, so they serve any model."""
    return [row["text"] for row in read_rows(TEST_HEADLINES)]


@dataclass(frozen=True)
class Texts:
    """Texts of a user's for preparing and for checking, and what the manifest says of them; None: our headlines."""

    prepare: list[str] | None
    check: list[str]
    record: dict


def choose_texts(file: Path | None) -> Texts:
    """Our headlines, or a user's texts, every other one for the check. Raises LabError if there are too few."""
    if file is None:
        return Texts(None, test_texts(), {"file": "the lab's own headlines"})
    texts = read_texts(file)
    if len(texts) < MIN_TEXTS:
        raise LabError(
            f"{file} has {len(texts)} different texts: at least {MIN_TEXTS} are needed, better some hundreds"
        )
    texts = texts[:MAX_TEXTS]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    prepare, check = texts[::2], texts[1::2]
    record = {"file": file.name, "sha256": digest, "prepared": len(prepare), "checked": len(check)}
    return Texts(prepare, check, record)


def read_texts(file: Path) -> list[str]:
    """The different texts of a file, one a line, in its order. Raises LabError if it cannot be read as UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LabError(f"cannot read {file}: {reason}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def unknown_share(fp32: classifier.Classifier, texts: list[str]) -> float:
    """Share (0..1) of the tokens of some texts that the tokeniser does not know; special tokens do not count."""
    unknown = fp32.tokenizer.unk_token_id
    ids = [number for text in texts for number in fp32.tokenizer(text, add_special_tokens=False).input_ids]
    return ids.count(unknown) / len(ids) if ids and unknown is not None else 0.0


def check_against_fp32(folder: Path, fp32: classifier.Classifier, threads: int, own: Texts | None = None) -> dict:
    """Run the sealed artefact in `folder` as `predict.py` will, and compare it with FP32 on our test headlines.

    On texts of the user's in place of ours if there are. Returns the figures of `consistency.check` and the share of
    unknown tokens. Raises LabError if they are out of bounds.
    """
    texts = own.check if own else test_texts()
    built = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(built), backends.open_backend(built, threads)
    result = consistency.check(fp32_logits(fp32, texts), np.concatenate([backend.logits(tokenise([t])) for t in texts]))
    print(
        f"   {result['headlines']} headlines: {result['agreement']:.1%} same label as FP32, "
        f"largest probability change {result['max_probability_change']:.3f}"
    )
    unknown = unknown_share(fp32, texts)
    if unknown > MAX_UNKNOWN:
        print(
            f"   {unknown:.0%} of the tokens of these texts are unknown to the tokeniser: they say little about this "
            "model. Give texts like those it will read with --texts FILE",
            file=sys.stderr,
        )
    return {**result, "unknown_tokens": round(unknown, 4)}


def report(fp32: classifier.Classifier, output: Path, next_command: str) -> None:
    """Print sizes before and after, what was written, and what to run next."""
    before_mb = sum(p.numel() * p.element_size() for p in fp32.model.parameters()) / 1e6
    built = artefact.load(output)
    print(f"   FP32 weights {before_mb:.1f} MB -> {built.model_file.name} {built.model_mb:.1f} MB")
    print(f"Wrote {output}")
    print(f"Next: {next_command}")


def run(main: Callable[[], None]) -> None:
    """Run a script's main; every foreseeable failure ends in one line on stderr and a non-zero exit code."""
    path = Path(sys.argv[0])
    script = path.parent.name if path.name == "__main__.py" else path.name
    try:
        main()
    except LabError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        print(f"{script}: {error.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted, nothing was changed", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush fails aloud
        sys.exit(READER_GONE)
