"""The steps every lab script shares: arguments, the FP32 reference, the closing check, one-line errors."""

import argparse
import contextlib
import csv
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab04 import ROOT, LabError, artefact, backends, classifier, consistency

TRAIN_HEADLINES = ROOT / "lora-news" / "headlines" / "train.csv"
TEST_HEADLINES = ROOT / "lora-news" / "headlines" / "test.csv"
INTERRUPTED = 130  # what a shell reports for Ctrl-C
UNDER_MAKE = "LAB_UNDER_MAKE"  # set by the Makefile
READER_GONE = 141  # and for a pipe that nobody reads any more


def argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments all labs have: --model, --output, --threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--model",
        default=classifier.DEFAULT_MODEL,
        help="PEFT adapter folder, model folder or hub id (default: lora-news/adapter)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / output, help=f"artefact folder (default: {output})")
    parser.add_argument(
        "--threads",
        type=positive,
        default=backends.DEFAULT_THREADS,
        help="CPU threads of the check (default: %(default)s)",
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
            tokens = fp32.tokenizer(text, truncation=True, max_length=artefact.max_length(fp32), return_tensors="pt")
            rows.append(fp32.model(**tokens).logits[0].numpy())
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


def check_against_fp32(folder: Path, fp32: classifier.Classifier, threads: int) -> dict:
    """Run the sealed artefact in `folder` as `predict.py` will, and compare it with FP32 on our test headlines.

    Returns the figures of `consistency.check`. Raises LabError if they are out of bounds.
    """
    texts = test_texts()
    built = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(built), backends.open_backend(built, threads)
    result = consistency.check(fp32_logits(fp32, texts), np.concatenate([backend.logits(tokenise([t])) for t in texts]))
    print(
        f"   {result['headlines']} headlines: {result['agreement']:.1%} same label as FP32, "
        f"largest probability change {result['max_probability_change']:.3f}"
    )
    return result


def report(fp32: classifier.Classifier, output: Path, next_command: str) -> None:
    """Print sizes before and after, what was written, and what to run next."""
    before_mb = sum(p.numel() * p.element_size() for p in fp32.model.parameters()) / 1e6
    built = artefact.load(output)
    print(f"   FP32 weights {before_mb:.1f} MB -> {built.model_file.name} {built.model_mb:.1f} MB")
    print(f"Wrote {output}")
    suggest(next_command)


def suggest(command: str) -> None:
    """Print what to run next, unless make runs it anyway."""
    if UNDER_MAKE not in os.environ:
        print(as_run_here(f"Next: {command}"))


def as_run_here(message: str) -> str:
    """A message whose `python SCRIPT` and `pip install` are those of the Python that runs now, which many lack on PATH.

    As in `run .venv/bin/python predict.py`: it works as it stands.
    """
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    message = re.sub(r"(?<!\S)python (?=\S+\.py|-m )", lambda _: f"{python} ", message)
    return re.sub(r"(?<!-m )(?<![\w/-])pip (?=(?:un)?install)", lambda _: f"{python} -m pip ", message)


def run(main: Callable[[], None]) -> None:
    """Run a script's main; every foreseeable failure ends in one line on stderr and a non-zero exit code."""
    path = Path(sys.argv[0])
    script = path.parent.name if path.name == "__main__.py" else path.name
    try:
        main()
    except LabError as error:
        print(as_run_here(f"{script}: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        message = f"{script}: {error.name} is not installed: pip install -r requirements.txt"
        print(as_run_here(message), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted, nothing was changed", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush fails aloud
        sys.exit(READER_GONE)
