"""The terminal: Ctrl-C, closed pipes, the one line a failure ends in, commands that work as they are printed."""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from lab04 import ROOT, LabError, interrupted

INTERRUPTED = 130  # what a shell reports for Ctrl-C
writing = threading.Event()  # set while a line is printed that Ctrl-C must not tear
READER_GONE = 141  # and for a pipe that nobody reads any more


def run(main: Callable[[], None], requirements: str = "requirements.txt") -> None:
    """Run a script's main; every foreseeable failure ends in one line on stderr and a non-zero exit code.

    requirements: the file that lists what the script imports, for where a package is missing.
    """
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
        message, code = f"{error.name} is not installed: pip install -r {requirements}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
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


def suggest(command: str) -> None:
    """Print what comes next, as it is typed here."""
    print(as_run_here(f"Next: {command}"))


def as_run_here(message: str) -> str:
    """A message whose `python SCRIPT` and `pip install` work as they stand, from where one stands.

    The Python is the one that runs now, which many lack on PATH; a script of ours gets the way to it.
    """
    python = shlex.quote(from_here(Path(sys.executable)))
    elsewhere = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "

    def scripts(found: re.Match) -> str:
        script = ROOT / found[1]
        return f"{python} {shlex.quote(from_here(script)) if script.is_file() else found[1]}"

    message = re.sub(r"(?<!\S)python ([\w./-]+\.py)", scripts, message)
    message = re.sub(r"(?<!\S)python (?=-m )", lambda _: f"{elsewhere}{python} ", message)
    return re.sub(r"(?<!-m )(?<![\w/-])pip (?=(?:un)?install)", lambda _: f"{elsewhere}{python} -m pip ", message)


def from_here(path: Path) -> str:
    """A path as one would type it: from the current folder if it is below, else the whole."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


def first_line(docstring: str | None) -> str | None:
    """What a script's docstring says it is, if Python kept it: `python -OO` does not."""
    return docstring and docstring.splitlines()[0]


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
def whole_line() -> Iterator[None]:
    """Let Ctrl-C wait until what is printed in this block is out."""
    writing.set()
    try:
        yield
    finally:
        writing.clear()
    if interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def remembering_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt as ever, and also set `lab04.interrupted`, which no `except` can swallow.

    Python itself swallows one raised in a callback of its own, and would print that; here it ends the run all the same.
    """

    def interrupt(*_):
        interrupted.set()
        if not writing.is_set():
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    report = sys.unraisablehook
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = lambda error: None if error.exc_type is KeyboardInterrupt else report(error)
    try:
        yield
    finally:
        interrupted.clear()
        sys.unraisablehook = report
        if ours:
            signal.signal(signal.SIGINT, before)
