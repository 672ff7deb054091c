"""The steps every lab script shares: arguments, the FP32 reference, the closing check, one-line errors."""

import argparse
import contextlib
import csv
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lab04 import ROOT, LabError, artefact, backends, classifier, consistency, interrupted

TRAIN_HEADLINES = ROOT / "lora-news" / "headlines" / "train.csv"
TEST_HEADLINES = ROOT / "lora-news" / "headlines" / "test.csv"
INTERRUPTED = 130  # what a shell reports for Ctrl-C
KNOWN_HEADLINES = 5  # run each time an artefact is opened: milliseconds
READER_GONE = 141  # and for a pipe that nobody reads any more


def argument_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments all labs have: --model, --output, --threads."""
    parser = argparse.ArgumentParser(description=first_line(description))
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
    reference, logits = fp32_logits(fp32, texts), np.concatenate([backend.logits(tokenise([t])) for t in texts])
    result = consistency.check(reference, logits)
    print(
        f"   {result['headlines']} headlines: {result['agreement']:.1%} same label as FP32, "
        f"largest probability change {result['max_probability_change']:.3f}"
    )
    return {**result, "known_headlines": known_headlines(texts, reference, logits)}


def known_headlines(texts: list[str], reference: np.ndarray, logits: np.ndarray) -> list[dict]:
    """The clearest headlines of up to five labels with their FP32 logits, for a check wherever the artefact is opened.

    reference, logits: float32 [texts, labels], FP32 and quantised; only headlines on which both agree are chosen.
    """
    probabilities = np.sort(consistency.softmax(reference), axis=1)
    clearest = np.argsort(probabilities[:, -2] - probabilities[:, -1], kind="stable")
    chosen: dict[int, int] = {}  # label to headline
    for index in clearest.tolist():
        if logits[index].argmax() == reference[index].argmax() and len(chosen) < KNOWN_HEADLINES:
            chosen.setdefault(int(reference[index].argmax()), index)
    return [{"text": texts[i], "fp32_logits": reference[i].astype(float).round(4).tolist()} for i in chosen.values()]


def report(fp32: classifier.Classifier, output: Path, next_command: str) -> None:
    """Print sizes before and after, what was written, and what to run next."""
    before_mb = sum(p.numel() * p.element_size() for p in fp32.model.parameters()) / 1e6
    built = artefact.load(output)
    print(f"   FP32 weights {before_mb:.1f} MB -> {built.model_file.name} {built.model_mb:.1f} MB")
    print(f"Wrote {output}")
    print(f"Next: {next_command}")


def first_line(docstring: str | None) -> str | None:
    """What a script's docstring says it is, if Python kept it: `python -OO` does not."""
    return docstring and docstring.splitlines()[0]


def run(main: Callable[[], None]) -> None:
    """Run a script's main; every foreseeable failure ends in one line on stderr and a non-zero exit code."""
    path = Path(sys.argv[0])
    script = path.parent.name if path.name == "__main__.py" else path.name
    open_console()
    message, code = None, 0
    try:
        with remembering_interrupts():
            main()
            if interrupted.is_set():
                raise KeyboardInterrupt
            sys.stdout.flush()  # what cannot be written must be noticed while it can still be told
    except LabError as error:
        message, code = str(error), error.exit_code
    except ModuleNotFoundError as error:
        message, code = f"{error.name} is not installed: pip install -r requirements.txt", 2
    except KeyboardInterrupt:
        message, code = "interrupted, nothing was changed", INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        code = READER_GONE
    except OSError as error:
        if error.filename is not None:  # files are read and written with messages of their own
            raise
        message, code = f"cannot write to standard output: {error.strerror}", 2
    finally:
        close_console(script, message)
    if code:
        sys.exit(code)


def open_console() -> None:
    """Make stdout and stderr take anything: no character ends a run, and closed ones become the null device."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Python found it closed. Left so, the next file that is opened would get its number, and all C++ prints.
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def close_console(script: str, message: str | None) -> None:
    """Say the last line on stderr. A stream that takes no more gets the null device, or Python's own flush fails."""
    with contextlib.suppress(OSError):
        if message:
            print(f"{script}: {message}", file=sys.stderr)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if not can_flush(stream):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)


def can_flush(stream) -> bool:
    """Whether a stream takes what was printed to it."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def remembering_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt as ever, and also set `lab04.interrupted`, which no `except` can swallow."""

    def interrupt(*_):
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        interrupted.clear()
        if ours:
            signal.signal(signal.SIGINT, before)
