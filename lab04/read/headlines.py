"""The one reader of headlines, in any form that people have them in: a headline at a time, with its label."""

import argparse
import functools
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lab04 import LabError
from lab04.read.formats import BY_ROW, FORMATS, LABEL_COLUMNS, TEXT_COLUMNS, is_unicode, kind_of, parse

AG_NEWS_CLASSES = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}  # its Class Index counts from 1


class Row(NamedTuple):
    """A headline, the line it begins on (its place in a JSON array), its label if it has one."""

    line: int
    text: str
    label: str | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of everything that reads a file of headlines; `options` hands them to `read`."""
    parser.add_argument("--format", choices=FORMATS, help="what the file is (default: by its name, else text)")
    parser.add_argument("--text-column", metavar="NAME", help="its column of headlines (default: text/title/headline)")
    parser.add_argument("--label-column", metavar="NAME", help="its column of labels (default: label or Class Index)")


def options(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("format", "text_column", "label_column")}


def read(
    source: str | Path,
    labels: Iterable[str] | None = None,
    *,
    format: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    no_labels: bool = False,
) -> Iterator[Row]:
    """The headlines of a file, or of stdin for `-`, as they come in, with labels in the spelling of `labels`.

    `labels` are the model's, in its order; a file may give their numbers in place of names. `no_labels`: the file's
    own are not looked at. Blank headlines are skipped and counted on stderr. Raises LabError, naming the line, for
    what cannot be read, for a label that is none of `labels`, and if there are no headlines at all.
    """
    name = "standard input" if str(source) == "-" else str(source)
    kind = format or kind_of(source)
    own = None if labels is None else tuple(labels)
    known: list[str] = []
    count = skipped = 0
    numbered = False
    for line, names, values in parse(source, name, kind, certain=format is not None):
        place = f"{name}, {'row' if kind in BY_ROW else 'line'} {line}"
        if names is not known:  # once in a table; every JSON object names its own
            where = place if kind in ("json", "jsonl") else name
            text_at = find_column(names, text_column, TEXT_COLUMNS, "--text-column", where)
            label_at = None if no_labels else find_column(names, label_column, LABEL_COLUMNS, "--label-column", where)
            known = names
        if text_at is None:
            raise LabError(f"{where} has no column text, title or headline: name it with --text-column")
        text = as_text(values[text_at], place)
        if text:
            label = None if label_at is None else as_label(values[label_at], place)
            if label and own is not None:
                if not numbered and class_number(label, own, names) is not None:
                    numbered = True
                    meant = ", ".join(f"{number} {each}" for number, each in enumerate(own[:3]))
                    print(f"{name}: labels are numbers, taken as the model's classes: {meant} …", file=sys.stderr)
                label = own_label(label, own, names, place)
            yield Row(line, text, label)
            count += 1
        elif kind != "text":
            skipped += 1
    if skipped:
        print(f"{name}: {skipped} blank headline{'s' * (skipped > 1)} skipped", file=sys.stderr)
    if not count:
        raise LabError(f"{name} holds no headlines")


def read_labelled(source: str | Path, labels: list[str], **columns) -> tuple[list[str], list[int]]:
    """Texts and label indices of a labelled file, in its order. Raises LabError, naming the line, if one has none."""
    texts, truth = [], []
    for row in read(source, labels, **columns):
        if row.label is None:
            raise LabError(f"{source}, line {row.line} has no label: every headline needs one here")
        texts.append(row.text)
        truth.append(labels.index(row.label))
    return texts, truth


# --- Cells ------------------------------------------------------------------------------------------------


def find_column(names: list[str], wanted: str | None, usual: tuple[str, ...], option: str, where: str) -> int | None:
    """Where a column is, or None. Raises LabError if the one asked for is missing, or if two would do."""
    candidates = (wanted.strip().lower(),) if wanted else usual
    found = [index for index, name in enumerate(names) if name in candidates]
    if len(found) > 1:
        both = " and ".join(repr(names[index]) for index in found)
        raise LabError(f"{where} has the columns {both}: name the one you mean with {option}, or rename the other")
    if wanted and not found:
        raise LabError(f"{where} has no column {wanted!r}, only {', '.join(names)}")
    return found[0] if found else None


def as_text(value: object, place: str) -> str:
    """A cell as a headline; null and NaN are blank ones. Raises LabError for any other value or half a character."""
    value = None if is_nan(value) else value
    if not isinstance(value, str | None):
        raise LabError(f"{place}: the text is no string")
    text = (value or "").strip()
    if not is_unicode(text):
        raise LabError(f"{place}: the text has half a surrogate pair")
    return text


def as_label(value: object, place: str) -> str | None:
    """A cell as a label; blank, null and NaN are none. Raises LabError for a JSON array or object."""
    if value is None or is_nan(value):
        return None
    if not isinstance(value, str | int | float):
        raise LabError(f"{place}: the label is neither a string nor a number")
    if isinstance(value, float) and value.is_integer():  # pandas: a column of whole numbers, of which some are missing
        value = int(value)
    return str(value).strip() or None


def is_nan(value: object) -> bool:
    """Whether a value is what pandas writes for a missing one."""
    return isinstance(value, float) and math.isnan(value)


def own_label(label: str, labels: tuple[str, ...], names: list[str], place: str) -> str:
    """A file's label in the spelling of `labels`; a number that is no name is AG News' class, or the model's."""
    name = AG_NEWS_CLASSES.get(label, label) if "class index" in names else label
    own = match_label(label, labels) or match_label(name, labels)
    if own is None and (number := class_number(label, labels, names)) is not None:
        own = labels[number]
    if own is None:
        raise LabError(
            f"{place}: label {name!r} is not one of the model's: {', '.join(sorted(labels))} "
            "(predict.py --no-labels leaves labels out)"
        )
    return own


def class_number(label: str, labels: tuple[str, ...], names: list[str]) -> int | None:
    """The class a label numbers as the model does, from 0; None for a name. AG News' own files number otherwise."""
    if {"class index", "description"} & set(names) or match_label(label, labels) or not label.isdecimal():
        return None
    return int(label) if len(label) < 5 and int(label) < len(labels) else None


@functools.lru_cache(maxsize=1000)
def match_label(label: str, labels: tuple[str, ...]) -> str | None:
    """The one of `labels` that is meant: blanks around do not count, nor does case where it tells no two apart."""
    for same in (str.strip, lambda text: text.strip().casefold()):
        found = {own for own in labels if same(own) == same(label)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None
