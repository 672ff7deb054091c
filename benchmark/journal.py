"""What a run has measured so far: journal.jsonl, one JSON object a line, only ever added to.

A full disk or a kill may leave half a line at the end, a faulty disk one in the middle. Such a line is skipped and its
piece measured again; what stands before and after it is kept, and the file is never written anew.
"""

import errno
import json
import os
from pathlib import Path

from lab04 import LabError
from lab04.compare.report import counted

FILE = "journal.jsonl"


class Journal:
    """The finished pieces of a run, in memory and on disk.

    entries: the pieces, each with its kind under `unit`
    unreadable: how many lines were skipped
    """

    def __init__(self, path: Path):
        self.path, self.entries, self.unreadable = path, [], 0
        content = path.read_bytes() if path.exists() else b""
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                self.entries.append(entry | {"unit": entry["unit"]})
            except (ValueError, TypeError, KeyError):
                self.unreadable += 1

    def append(self, unit: str, **fields) -> None:
        """Add a piece of work, on disk before this returns. Raises LabError, the file as it was, if it has no room."""
        entry = {"unit": unit, **fields}
        # After half a line a new one begins, or this piece would be unreadable too.
        line = b"\n" * self._torn + json.dumps(entry).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) != len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LabError(
                f"cannot write {self.path}: {error.strerror}; what was measured before is kept: go on with --resume"
            ) from error
        self._torn = False
        self.entries.append(entry)

    def find(self, unit: str, **fields) -> list[dict]:
        """The entries of a kind whose fields have these values."""
        return [
            entry
            for entry in self.entries
            if entry["unit"] == unit and all(entry.get(name) == value for name, value in fields.items())
        ]

    def start_again(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self.entries, self.unreadable, self._torn = [], 0, False


def open_journal(folder: Path, settings: dict, resume: bool, force: bool) -> Journal:
    """The journal of a results folder, empty unless `resume`. Raises LabError rather than lose or mix measurements."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder / FILE)
        started = journal.find("start")
        if resume and started:
            differing = [key for key, value in settings.items() if started[0]["settings"].get(key) != value]
            if differing:
                raise LabError(f"cannot resume {folder}: other {', '.join(differing)}; discard it with --force")
            if journal.unreadable:
                print(f"{counted(journal.unreadable, 'unreadable line')} in {journal.path}: measured again")
            return journal
        if journal.entries and not journal.find("end") and not force:
            if not started:
                raise LabError(f"{journal.path} has lost its beginning: discard it with --force")
            raise LabError(f"{folder} holds an interrupted run: go on with --resume, or discard it with --force")
        journal.start_again()
    except OSError as error:
        raise LabError(f"cannot write {folder}: {error.strerror}") from error
    return journal
