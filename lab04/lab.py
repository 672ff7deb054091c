"""The steps every lab script shares: arguments, the FP32 reference, the closing check, one-line errors."""

import argparse
import contextlib
import hashlib
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab04 import ROOT, LabError, artefact, backends, classifier, consistency, headlines, interrupted
from lab04.backend import Backend

TRAIN_HEADLINES = ROOT / "lora-news" / "headlines" / "train.csv"
TEST_HEADLINES = ROOT / "lora-news" / "headlines" / "test.csv"
MIN_TEXTS, MAX_TEXTS = 32, 2000  # of a user's; half prepare and half check, and more of them gain nothing
TIMED = 100  # headlines the closing check times beside FP32: some seconds
SHOWN_CHANGES = 5
MAX_UNKNOWN = 0.5  # share of unknown tokens above which a check on such texts says little
INTERRUPTED = 130  # what a shell reports for Ctrl-C
KNOWN_HEADLINES = 5  # run each time an artefact is opened: milliseconds
UNDER_MAKE = "LAB_UNDER_MAKE"  # set by the Makefile
READER_GONE = 141  # and for a pipe that nobody reads any more


def argument_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments all labs have: --model, --labels, --output, --threads."""
    parser = argparse.ArgumentParser(description=first_line(description))
    add_model_options(parser)
    parser.add_argument("--output", type=Path, default=ROOT / output, help=f"artefact folder (default: {output})")
    parser.add_argument(
        "--threads",
        type=positive,
        default=backends.DEFAULT_THREADS,
        help="CPU threads of the check (default: %(default)s)",
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model and --labels: the arguments of `classifier.load`."""
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


def int8_argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The parser of the two labs that look at texts while they quantise: with --texts."""
    parser = argument_parser(description, output)
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="texts like those the model will be given, in any form predict.py reads: half prepare the weights, the "
        "others check the result (default: our English headlines)",
    )
    headlines.add_options(parser)
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


def test_texts() -> list[str]:
    """The headlines every lab checks its result on. Agreement with FP32 needs no labels, so they serve any model."""
    return [row.text for row in headlines.read(TEST_HEADLINES)]


def train_texts() -> list[str]:
    """The headlines that stand in for a user's own texts where a network is prepared."""
    return [row.text for row in headlines.read(TRAIN_HEADLINES)]


@dataclass(frozen=True)
class Texts:
    """Texts of a user's for preparing and for checking, and what the manifest says of them; None: our headlines."""

    prepare: list[str] | None
    check: list[str]
    record: dict


def choose_texts(arguments: argparse.Namespace) -> Texts:
    """Our headlines, or a user's texts, every other one for the check. Raises LabError if there are too few."""
    file = arguments.texts
    if file is None:
        return Texts(None, test_texts(), {"file": "the lab's own headlines"})
    rows = headlines.read(file, **headlines.options(arguments))
    texts = list(dict.fromkeys(row.text for row in rows))
    if len(texts) < MIN_TEXTS:
        raise LabError(
            f"{file} has {len(texts)} different texts: at least {MIN_TEXTS} are needed, better some hundreds"
        )
    texts = texts[:MAX_TEXTS]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    prepare, check = texts[::2], texts[1::2]
    record = {"file": file.name, "sha256": digest, "prepared": len(prepare), "checked": len(check)}
    return Texts(prepare, check, record)


def unknown_share(fp32: classifier.Classifier, texts: list[str]) -> float:
    """Share (0..1) of the tokens of some texts that the tokeniser does not know; special tokens do not count."""
    unknown = fp32.tokenizer.unk_token_id
    ids = [number for row in fp32.tokenizer(texts, add_special_tokens=False).input_ids for number in row]
    return ids.count(unknown) / len(ids) if ids and unknown is not None else 0.0


def check_against_fp32(folder: Path, fp32: classifier.Classifier, threads: int, own: Texts | None = None) -> dict:
    """Run the sealed artefact in `folder` as `predict.py` will, and compare it with FP32 on our test headlines.

    On texts of the user's in place of ours if there are. Returns the figures of `consistency.check` and the share of
    unknown tokens. Raises LabError if they are out of bounds.
    """
    texts = own.check if own else test_texts()
    built = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(built), backends.open_backend(built, threads)

    def run(texts):
        return np.concatenate([backend.logits(tokenise([text])) for text in texts])

    reference, logits = fp32_logits(fp32, texts), run(texts)
    result = consistency.check(reference, logits, rechecked="recheck" in built.manifest)
    print(
        f"   {result['headlines']} headlines: {result['agreement']:.1%} same label as FP32, "
        f"largest probability change {result['max_probability_change']:.3f}"
    )
    speed = race(fp32, backend, tokenise, texts[:TIMED], threads)
    changed = changed_headlines(texts, reference, logits, built.labels)
    print_bought(speed, changed, result)
    unknown = unknown_share(fp32, texts)
    if unknown > MAX_UNKNOWN:
        print(
            f"   {unknown:.0%} of the tokens of these texts are unknown to the tokeniser: they say little about this "
            "model. Give texts like those it will read with --texts FILE",
            file=sys.stderr,
        )
    if own and own.prepare:  # a user's texts may be private, and an artefact travels: the known ones are ours
        texts = test_texts()
        reference, logits, changed = fp32_logits(fp32, texts), run(texts), []
    known = known_headlines(texts, reference, logits)
    return {
        **result,
        **speed,
        "changed_headlines": changed[:SHOWN_CHANGES],
        "unknown_tokens": round(unknown, 4),
        "known_headlines": known,
    }


def race(fp32: classifier.Classifier, backend: Backend, tokenise, texts: list[str], threads: int) -> dict:
    """Median ms a headline of FP32 PyTorch (`fp32_ms`) and of `backend` (`ms`), and their ratio `speed_up`.

    In turn on the same headlines, tokenised before, so that whatever else the machine does meets both alike.
    """
    import torch

    def call_fp32(text):
        inputs = fp32.encode([text])
        started = time.perf_counter()
        fp32.model(**inputs)
        return 1e3 * (time.perf_counter() - started)

    def call_backend(text):
        tokens = tokenise([text])
        started = time.perf_counter()
        backend.logits(tokens)
        return 1e3 * (time.perf_counter() - started)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            times = [(call_fp32(text), call_backend(text)) for text in texts]
    finally:
        torch.set_num_threads(before)
    fp32_ms, ms = np.median(times, axis=0).tolist()
    return {"fp32_ms": round(fp32_ms, 3), "ms": round(ms, 3), "speed_up": round(fp32_ms / ms, 2)}


def changed_headlines(texts: list[str], reference: np.ndarray, logits: np.ndarray, labels: list[str]) -> list[dict]:
    """The headlines whose label differs from FP32's: `text`, and label and probability of `fp32` and `quantised`."""

    def answer(row):
        scores = consistency.softmax(row)
        return {"label": labels[int(scores.argmax())], "score": round(float(scores.max()), 4)}

    return [
        {"text": text, "fp32": answer(before), "quantised": answer(after)}
        for text, before, after in zip(texts, reference, logits, strict=True)
        if before.argmax() != after.argmax()
    ]


def print_bought(speed: dict, changed: list[dict], result: dict) -> None:
    """Say what quantisation bought and what it cost, with some of the headlines that changed."""
    print(
        f"   {speed['speed_up']:.1f} times as fast as FP32 PyTorch ({speed['fp32_ms']:.1f} → {speed['ms']:.1f} ms), "
        f"{len(changed)} of {result['headlines']} labels changed"
    )
    for headline in changed[:SHOWN_CHANGES]:
        before, after = headline["fp32"], headline["quantised"]
        print(
            f"     {before['label']} {before['score']:.2f} → {after['label']} {after['score']:.2f}: {headline['text']}"
        )


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


def report(fp32: classifier.Classifier, built: artefact.Artefact, output: Path, next_command: str) -> None:
    """Print sizes before and after, what was written, and what to run next.

    `built` was read before it took the place of `output`: by now another build may have taken that.
    """
    before_mb = sum(p.numel() * p.element_size() for p in fp32.model.parameters()) / 1e6
    print(f"   FP32 weights {before_mb:.1f} MB -> {built.model_file.name} {built.model_mb:.1f} MB")
    here = Path.cwd()
    print(f"Wrote {output.relative_to(here) if output.is_relative_to(here) else output}")
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
        close_console(script, message and as_run_here(message))
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
