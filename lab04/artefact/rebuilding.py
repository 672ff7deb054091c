"""The command that built a folder: recorded in its manifest, printed wherever it has to be built again."""

import argparse
import json
import os
import re
import shlex
from pathlib import Path

from lab04 import ROOT, labs
from lab04.console import from_here

FILES = ("model", "labels", "texts")  # options that may name a file or folder


def record(script: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict:
    """Script and options of a build that are not the defaults, for the manifest.

    Paths are kept as seen from the artefact folder: they hold where both move together, and tell less of a machine.
    """
    folder = os.path.realpath(arguments.output)
    given = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
    for name in FILES:
        if (value := given.get(name)) and Path(value).exists():
            given[name] = os.path.relpath(os.path.realpath(value), folder)
    return {"script": script, "options": {name: value for name, value in given.items() if name != "output"}}


def rebuild_command(folder: Path) -> str:
    """The command that builds `folder` again as it was built, as far as its manifest can still be read.

    Says so if the model or the texts it was built from are no longer there.
    """
    try:
        command = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["command"]
        script, options = command["script"], dict(command["options"])
        if script not in {lab.script for lab in labs.LABS} or not all(re.fullmatch(r"\w+", name) for name in options):
            raise ValueError("no command of the lab's")
    except (OSError, ValueError, KeyError, TypeError):  # damaged, missing, or of an earlier lab
        return unrecorded(folder)
    words, moved = [], []
    for name, value in options.items():
        if name in FILES and str(value).startswith(".."):
            value = from_here(Path(os.path.normpath(Path(os.path.realpath(folder)) / value)))
            moved += [value] * (not Path(value).exists())
        words += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    lost = f" (with the present place of {' and '.join(moved)})" if moved else ""
    return f"python {script}{''.join(f' {shlex.quote(word)}' for word in words)}{output_option(folder, script)}{lost}"


def unrecorded(folder: Path) -> str:
    """What to run for a folder that tells nothing: its lab, if it has the name that a lab gives."""
    for lab in labs.LABS:
        if final_name(folder) == lab.folder:
            return f"python {lab.script}{output_option(folder, lab.script)}"
    return f"the lab script that built it, with its --model and --output {shlex.quote(from_here(folder))}"


def output_option(folder: Path, script: str) -> str:
    """` --output FOLDER`, unless it is where the lab writes anyway."""
    folder = folder.absolute().with_name(final_name(folder))
    [usual] = [lab.folder for lab in labs.LABS if lab.script == script]
    return "" if folder == ROOT / usual else f" --output {shlex.quote(from_here(folder))}"


def final_name(folder: Path) -> str:
    """A folder's name, also while it is being built under another one (lab04/artefact/folder.py)."""
    return re.sub(r"^\.(.+)\.new-\w+$", r"\1", folder.name)
