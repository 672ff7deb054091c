"""The arguments that several scripts share."""

import argparse
import sys
from pathlib import Path

from lab04 import ROOT, labs
from lab04.artefact import Artefact
from lab04.console import first_line
from lab04.read import classifier, headlines
from lab04.run import runtimes


def argument_parser(description: str | None, lab: labs.Lab) -> argparse.ArgumentParser:
    """A parser with the arguments all labs have: --model, --labels, --output, --threads."""
    parser = argparse.ArgumentParser(description=first_line(description))
    add_model_options(parser)
    help_output = f"artefact folder (default: {lab.folder})"
    parser.add_argument("--output", type=Path, default=ROOT / lab.folder, help=help_output)
    add_threads(parser, "CPU threads of the check")
    return parser


def add_threads(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --threads."""
    default = runtimes.DEFAULT_THREADS
    parser.add_argument("--threads", type=positive, default=default, help=f"{what} (default: {default})")


def add_artefact(parser: argparse.ArgumentParser) -> None:
    """Add --artefact, of what runs the headlines of many together: the static one by default, where it was built."""
    static, plain = ROOT / "quantised-model-optimum-static", ROOT / "quantised-model-optimum"
    default = static if static.exists() else plain
    parser.add_argument("--artefact", type=Path, default=default, help=f"artefact folder (default: {default.name})")


def say_if_dynamic(item: Artefact) -> None:
    """Say on stderr that the neighbours of a batch change answers, where they do."""
    if {"static", "this-cpu"}.isdisjoint(item.options):  # the engine has a scale for each token
        print(
            f"{item.title} is not static: an answer depends a little on what shares its batch. Build the other: "
            "python lab04-optimum.py --static --output quantised-model-optimum-static",
            file=sys.stderr,
        )


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


def int8_argument_parser(description: str | None, lab: labs.Lab) -> argparse.ArgumentParser:
    """The parser of the two labs that look at texts while they quantise: with --texts."""
    parser = argument_parser(description, lab)
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="texts like those the model will be given, in any form predict.py reads: half prepare the weights, the "
        "others check the result (default: our English headlines)",
    )
    headlines.add_options(parser)
    return parser


def add_static(parser: argparse.ArgumentParser) -> None:
    """Add --static."""
    parser.add_argument(
        "--static",
        action="store_true",
        help="fix the scale of every product's input when building: no headline's answer then depends on its "
        "neighbours in a batch",
    )


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def natural(text: str) -> int:
    """An argument that must be a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number
