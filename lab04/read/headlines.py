"""The one reader of headlines: CSV, TSV, JSON lines, a JSON array or text, a headline at a time."""

import argparse
import codecs
import csv
import functools
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lab04 import LabError

FORMATS = ("csv", "tsv", "jsonl", "json", "text")
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "title", "headline"), ("label", "class index")
AG_NEWS_COLUMNS = ["class index", "title", "description"]
AG_NEWS_CLASSES = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}  # its classes.txt, counted from 1
DELIMITERS = ",;\t"
HEADER_LINES = 100  # a header with line breaks in its cells has no more: beyond, a quote was never closed
MAGIC = {
    b"\x1f\x8b": "compressed: unpack it, e.g. with gunzip",
    b"PK\x03\x04": "a workbook or zip: save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "a workbook: save it as CSV UTF-8",
}
Cells = tuple[int, list[str], list]  # line (place in a JSON array), names of the columns in lower case, values


class Row(NamedTuple):
    """A headline, the line it begins on (its place in a JSON array), its label if it has one, AG News' second text."""

    line: int
    text: str
    label: str | None = None
    description: str = ""


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
) -> Iterator[Row]:
    """The headlines of a file, or of stdin for `-`, as they come in, with labels in the spelling of `labels`.

    Blank headlines are skipped and counted on stderr. Raises LabError, naming the line, for what cannot be read, for a
    label that is none of `labels`, and if there are no headlines at all.
    """
    name = "standard input" if str(source) == "-" else str(source)
    ending = Path(source).suffix.lower().lstrip(".")
    kind = format or (ending if ending in FORMATS else "text")
    own = None if labels is None else tuple(labels)
    known: list[str] = []
    count = skipped = 0
    for line, names, values in parse(source, name, kind, certain=format is not None, named=text_column is not None):
        place = f"{name}, {'row' if kind == 'json' else 'line'} {line}"
        if names is not known:  # once in a table; every JSON object names its own
            where = place if kind in ("json", "jsonl") else name
            text_at = find_column(names, text_column, TEXT_COLUMNS, "--text-column", where)
            label_at = find_column(names, label_column, LABEL_COLUMNS, "--label-column", where)
            ag_news = sorted(names) == sorted(AG_NEWS_COLUMNS)
            known = names
        if text_at is None:
            raise LabError(f"{where} has no column text, title or headline: name it with --text-column")
        text = as_text(values[text_at], place)
        if text:
            label = None if label_at is None else as_label(values[label_at], place)
            label = label and own_label(label, own, ag_news, place)
            further = values[names.index("description")] if "description" in names else None
            yield Row(line, text, label, str(further or "").strip())
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


# --- Lines ------------------------------------------------------------------------------------------------


def parse(source: str | Path, name: str, kind: str, certain: bool, named: bool) -> Iterator[Cells]:
    """The rows of a file of some kind.

    certain: it is of that kind, so that the first line of text need not be looked at
    named: the user named a column, so a table must have a header
    """
    try:
        with open(0 if str(source) == "-" else source, "rb", closefd=str(source) != "-") as raw:
            # CSV keeps its line ends for quoted cells; elsewhere CRLF and CR end a line as LF does.
            lines = decode(raw, name, newline="" if kind in ("csv", "tsv") else None)
            if kind in ("csv", "tsv"):
                yield from parse_table(lines, name, "\t" if kind == "tsv" else None, named)
            elif kind in ("json", "jsonl"):
                yield from parse_json(lines, name, kind)
            else:
                yield from parse_text(lines, name, certain)
    except UnicodeDecodeError as error:
        raise LabError(f"{name} begins as UTF-16 but is not: save it as UTF-8 ({error.reason})") from error
    except OSError as error:
        raise LabError(f"cannot read {name}: {error.strerror}") from error


def decode(raw, name: str, newline: str | None) -> Iterator[str]:
    """The lines of an open binary file in UTF-8, or in UTF-16 if its byte order mark says so."""
    start = raw.peek(4)[:4]
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise LabError(f"{name} is {what}")
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # What is not UTF-8 is kept as surrogates until its line is reached: it can be named, and those before it were read.
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    for number, line in enumerate(io.TextIOWrapper(raw, encoding, errors, newline), start=1):
        if "\0" in line:
            raise LabError(
                f"{name}, line {number} has a null byte: if it is UTF-16, convert it: iconv -f UTF-16LE -t UTF-8"
            )
        if not is_unicode(line):
            raise LabError(f"{name} is not UTF-8 (line {number}): convert it, e.g. iconv -f LATIN1 -t UTF-8")
        yield line


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: halves of surrogate pairs cannot, and no tokeniser takes them."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


# --- Formats ----------------------------------------------------------------------------------------------


def parse_text(lines: Iterator[str], name: str, certain: bool) -> Iterator[Cells]:
    """A headline a line. Raises LabError if the first is plainly that of another format."""
    names = ["text"]
    for number, line in enumerate(lines, start=1):
        if line.strip() and not certain:
            certain, other = True, looks_like(line)
            if other:
                raise LabError(f"{name} looks like {other}: say --format {other}, or --format text if it is text")
        yield number, names, [line]


def looks_like(line: str) -> str | None:
    """The format that a first line is plainly of, if it is not text."""
    if re.match(r'\s*\{\s*("|$)', line):
        return "jsonl"
    if re.match(r'\s*\[\s*(["{[]|$)', line):
        return "json"
    if re.match(r'sep=|"?[1-4]"?,"', line, re.IGNORECASE):  # Excel's first line, or AG News without a header
        return "csv"
    for delimiter in DELIMITERS:
        cells = {cell.strip("\" '\r\n").lower() for cell in line.split(delimiter)}
        if cells & set(TEXT_COLUMNS) and not any(" " in cell for cell in cells - set(LABEL_COLUMNS)):
            return "tsv" if delimiter == "\t" else "csv"
    return None


def parse_table(lines: Iterator[str], name: str, delimiter: str | None, named: bool) -> Iterator[Cells]:
    """Rows of CSV or TSV; the header tells the delimiter unless it is given. AG News is published without a header."""
    before = 0  # lines ahead of those that the reader counts
    head = [next(lines, "")]
    if separator := re.match(r'"?sep=(.)', head[0], re.IGNORECASE):  # Excel's
        delimiter, before, head = separator[1], 1, [next(lines, "")]
        if delimiter not in DELIMITERS + "|":
            raise LabError(f"{name}, line 1: {delimiter!r} separates no cells")
    while "".join(head).count('"') % 2 and len(head) < HEADER_LINES and (more := next(lines, "")):
        head.append(more)
    delimiter = delimiter or max(DELIMITERS, key=re.sub('"[^"]*"', "", "".join(head)).count)
    table = csv.reader(itertools.chain(head, lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    names: list[str] = []
    line = before + 1
    try:
        for row in table:
            if not names and not named and len(row) == 3 and row[0] in AG_NEWS_CLASSES:
                names = AG_NEWS_COLUMNS
            if not names:
                names = [cell.strip().lower() for cell in row]
            elif row and len(row) != len(names):
                raise LabError(
                    f"{name}, line {line} has {len(row)} cells, not {len(names)}: one with {delimiter!r} needs quotes"
                )
            elif row:
                yield line, names, row
            line = before + table.line_num + 1
    except csv.Error as error:
        raise LabError(f"{name}, line {line}: {error} (a quote that never closes?)") from error


def parse_json(lines: Iterator[str], name: str, kind: str) -> Iterator[Cells]:
    """JSON objects (or mere texts), one a line, or in one array, which is read as a whole."""
    load = json.JSONDecoder(object_pairs_hook=unique_names).decode
    place = name
    try:
        rows = load("".join(lines)) if kind == "json" else lines
        if kind == "json" and not isinstance(rows, list):
            raise ValueError("it is no array")
        for number, row in enumerate(rows, start=1):
            place = f"{name}, {'row' if kind == 'json' else 'line'} {number}"
            if kind == "jsonl":
                if not row.strip():
                    continue
                row = load(row.strip())
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise ValueError("no object with a text")
            yield number, [key.strip().lower() for key in row], list(row.values())
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", error)
        needed = "an array of objects; one object a line is --format jsonl"
        if kind == "jsonl":
            needed = "one object a line; an array of them is --format json"
        raise LabError(f"{place} cannot be read as JSON ({said}): needed is {needed}") from error


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError if it has a name twice, of which Python would take the last in silence."""
    cells = dict(pairs)
    if len(cells) < len(pairs):
        raise ValueError("a name twice")
    return cells


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
    """A cell as a headline; null is a blank one. Raises LabError for another kind of JSON value or half a character."""
    if not isinstance(value, str | None):
        raise LabError(f"{place}: the text is no JSON string")
    text = (value or "").strip()
    if not is_unicode(text):
        raise LabError(f"{place}: the text has half a surrogate pair")
    return text


def as_label(value: object, place: str) -> str | None:
    """A cell as a label; a blank one is none. Raises LabError for a JSON array or object."""
    if not isinstance(value, str | int | float | None):
        raise LabError(f"{place}: the label is neither a JSON string nor a number")
    return None if value is None else str(value).strip() or None


def own_label(label: str, labels: tuple[str, ...] | None, ag_news: bool, place: str) -> str:
    """A file's label in the spelling of `labels`. AG News' numbers are names unless they are the model's own labels."""
    name = AG_NEWS_CLASSES.get(label, label) if ag_news else label
    if labels is None:
        return name
    own = match_label(label, labels) or match_label(name, labels)
    if own is None:
        raise LabError(f"{place}: label {name!r} is not one of the model's: {', '.join(sorted(labels))}")
    return own


@functools.lru_cache(maxsize=1000)
def match_label(label: str, labels: tuple[str, ...]) -> str | None:
    """The one of `labels` that is meant: blanks around do not count, nor does case where it tells no two apart."""
    for same in (str.strip, lambda text: text.strip().casefold()):
        found = {own for own in labels if same(own) == same(label)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None
