"""Write an artefact folder whole or not at all: build it beside its place, and let it step in."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lab04 import LabError, interrupted
from lab04.artefact.contract import MANIFEST


@contextlib.contextmanager
def building(output: Path | str, mark: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an exception.

    Interrupted or failed builds leave what stood there before. Of two builds at once the later wins, whole.
    A symbolic link stays one: what it points to is written.
    mark: a file by which a folder shows that it may be replaced
    Raises LabError if `output` holds something else, or cannot be written.
    """
    output = Path(os.path.realpath(output))
    # Unique beyond process ids, which mean nothing between containers that share a volume.
    temporary = output.with_name(f".{output.name}.new-{secrets.token_hex(8)}")
    try:
        make_room(output, mark)
        with contextlib.ExitStack() as alive:
            with locked(output.parent):  # a folder that is made but not yet locked would look like a dead build's
                remove_stale(output)
                temporary.mkdir()
                alive.enter_context(locked(temporary))
            yield temporary
            if interrupted.is_set():  # a library swallowed Ctrl-C
                raise KeyboardInterrupt
            let_read(temporary)
            with locked(output.parent):
                replace(output, temporary, mark)
    except OSError as error:
        raise LabError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def let_read(folder: Path) -> None:
    """Let whoever may read a folder read its files too: safetensors writes them for their owner alone."""
    readers = folder.stat().st_mode & 0o444
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(path.stat().st_mode | readers)


def check_output(output: Path, mark: str = MANIFEST) -> None:
    """Raise LabError as `building` would, before the work whose result `output` is to hold."""
    output = Path(os.path.realpath(output))
    try:
        make_room(output, mark)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.new-", dir=output.parent):
            pass
    except OSError as error:
        raise LabError(f"cannot write {output}: {error.strerror or error}") from error


def make_room(output: Path, mark: str) -> None:
    """Make the folder that `output` will be in. Raises LabError if there is something else in its place."""
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / mark).exists())):
        raise LabError(f"{output} exists and has no {mark}: choose another --output")
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


def replace(output: Path, temporary: Path, mark: str) -> None:
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
            replace_files(output, temporary, mark)
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


def replace_files(output: Path, temporary: Path, mark: str) -> None:
    """Replace the files of a mount point, which cannot itself be renamed.

    The file `mark` goes first and comes last: a folder without it is refused, so no mixture is ever read.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=output) as copied:
        shutil.copytree(temporary, copied, dirs_exist_ok=True)  # a full disk shows here, and the old artefact stays
        (output / mark).unlink(missing_ok=True)
        for path in output.iterdir():
            if path.is_file():
                path.unlink()
        for path in sorted(Path(copied).iterdir(), key=lambda path: path.name == mark):
            path.rename(output / path.name)
