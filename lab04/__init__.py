"""What the lab's scripts share, in rooms in the order in which a weight and a headline pass.

read: what comes in. quantise: what is done to the weights. artefact: the folder that carries the result.
run: tokens in, logits out. compare: what is said of it beside FP32. labs.py names the labs, console.py and options.py
are the terminal's. Imports run down only: quantise and compare may use run, run may use read and artefact.
"""

import contextlib
import os
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the scripts and the default folders are here, wherever one starts them

# Nothing leaves the machine unasked. The libraries read these when they are imported, which is after this file.
# ONNX Runtime from 1.29 on otherwise keeps a device id and a database of events for upload under ~/.cache.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")  # a user's own setting wins

FORESEEN = (OSError, ValueError, LookupError, RuntimeError)  # what libraries raise for files they cannot read

REPORT = "please report this line; LAB04_DEBUG=1 shows more"

interrupted = threading.Event()  # set by Ctrl-C (`lab.run`): a library's bare `except` may swallow the exception


if find_spec("numpy") is None:  # no environment at all: say so before the first import of a library is a traceback
    print(
        f"{Path(sys.argv[0]).name}: the lab's libraries are not installed for {sys.executable}: run it with "
        f"{ROOT / '.venv' / 'bin' / 'python'}, which make lab sets up",
        file=sys.stderr,
    )
    sys.exit(2)


class LabError(Exception):
    """A foreseeable failure. Its message is one line: what is wrong and what to do about it."""

    exit_code = 2


@contextlib.contextmanager
def in_one_line(failed: str, *let_through: type[Exception]) -> Iterator[None]:
    """Turn what a library raises while it reads or converts a user's files into one line that begins with `failed`.

    LabError, a missing package, a closed pipe, `let_through` and faults of our own code go through as they are; with
    LAB04_DEBUG=1 everything does.
    """
    passing: tuple[type[Exception], ...] = (LabError, ModuleNotFoundError, BrokenPipeError, *let_through)
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if os.environ.get("LAB04_DEBUG") or is_ours(error):
            raise
        unforeseen = "" if isinstance(error, FORESEEN) else f" ({type(error).__name__}; {REPORT})"
        raise LabError(f"{failed}: {said(error)}{unforeseen}") from error


def one_line(text: str) -> str:
    """A text without line breaks: control characters become blanks, runs of blanks one."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def said(error: Exception) -> str:
    """An exception's message, or its name if it has none, on one line of readable length."""
    return textwrap.shorten(one_line(str(error)) or type(error).__name__, 200, placeholder=" …")


def is_ours(error: Exception) -> bool:
    """Whether a mistake in our own files, not in what a library was given, raised an exception."""
    mistakes = (NameError, AttributeError, TypeError, LookupError, AssertionError, ArithmeticError)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, mistakes) and raised_in.is_relative_to(ROOT) and ".venv" not in raised_in.parts
