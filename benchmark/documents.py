"""The figures of README.md and docs/: every one is written here from results/, between markers.

    <!-- results:FOLDER/TABLE --> … <!-- /results -->     one of TABLES, from results/FOLDER/results.json
    <!-- results:FOLDER/ANSWER --> … <!-- /results -->    one of answers.OF_A_MACHINE, from the runs of its processor
    <!-- results:all/TABLE --> … <!-- /results -->        one of machines.OF_ALL, from every folder of results
    <!-- results:FOLDER/backends.torch-int8.model_mb:.1f --> … <!-- /results -->      a single value in a sentence

`python -m benchmark --readme` fills them in; a test fails when a file says anything else.
"""

import re
from pathlib import Path

from benchmark import answers, machines, results, tables
from benchmark.study_tables import OF_A_STUDY
from lab04 import LabError

BLOCK = re.compile(r"(<!-- results:([^/\s]+)/(\S+) -->)(.*?)(<!-- /results -->)", re.DOTALL)
TABLES = tables.OF_A_RUN | OF_A_STUDY
FILES = ("README.md", "docs/measuring.md", "docs/int8.md", "docs/tensorrt.md", "docs/serving.md", "examples/README.md")


def update(path: Path, root: Path) -> None:
    """Fill a file in place. Raises LabError if it cannot be read or written."""
    try:
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text, root), encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot update {path}: {error.strerror}") from error
    print(f"Wrote {path}")


def fill(text: str, root: Path) -> str:
    """The text with the content of every marked block made anew from the results below `root`."""

    def replace(match: re.Match) -> str:
        opening, folder, what, _, closing = match.groups()
        if folder == "all" and what in machines.OF_ALL:
            return f"{opening}\n{machines.OF_ALL[what](root)}\n{closing}"
        measured = shown(root / folder)
        if what in answers.OF_A_MACHINE:
            answer = answers.OF_A_MACHINE[what](measured, machines.on_real_headlines(root, measured))
            return f"{opening}\n{answer}\n{closing}"
        if what in TABLES:
            return f"{opening}\n{TABLES[what](measured)}\n{closing}"
        return f"{opening}{value(measured, what)}{closing}"

    return BLOCK.sub(replace, text)


def shown(folder: Path) -> dict:
    """The results of a folder. Raises LabError if there are none, or if they may not be shown as ours."""
    measured = results.load(folder)
    if "settings" in measured and (reason := results.why_not_shown(measured)):
        raise LabError(f"{folder} is {reason}: a document shows none of its figures")
    return measured


def value(measured: dict, path: str) -> str:
    """One value of results.json by dotted path and format: `backends.torch-int8.model_mb:.1f`."""
    keys, _, form = path.partition(":")
    found = measured
    try:
        for key in keys.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return format(found, form)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        names = ", ".join((*TABLES, *answers.OF_A_MACHINE))
        raise LabError(f"the text asks for {path}, which is neither in the results nor one of {names}") from error
