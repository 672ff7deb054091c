"""The one reader of headlines: CSV, TSV, JSON lines, a JSON array or text, a headline at a time."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lab04 import LabError

FORMATS = ("csv", "tsv", "jsonl", "json", "text")
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "title", "headline"), ("label", "class index")
AG_NEWS_CLASSES = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}  # its classes.txt, counted from 1
MAGIC = {
    b"\x1f\x8b": "compressed: unpack it, e.g. with gunzip",
    b"PK\x03\x04": "a workbook or zip: save it as CSV UTF-8",
}


def read(
    name: str, format: str | None = None, text_column: str | None = None, label_column: str | None = None
) -> Iterator[tuple[int, str, str | None]]:
    """Line numbers, texts and labels (None where there is none) of a file, or of stdin for `-`; streaming.

    Blank headlines are skipped and counted on stderr. Raises LabError, naming the line, for what cannot be read.
    """
    ending = Path(name).suffix.lower().lstrip(".")
    kind = format or (ending if ending in FORMATS else "text")
    rows: Iterator[tuple[int, str, str | None]]
    skipped = 0
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as raw:
            start = raw.peek(4)[:4]
            for magic, what in MAGIC.items():
                if start.startswith(magic):
                    raise LabError(f"{name} is {what}")
            utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            # CSV keeps its line ends for quoted cells; elsewhere CRLF and CR end a line as LF does.
            newline = "" if kind in ("csv", "tsv") else None
            file = io.TextIOWrapper(raw, encoding="utf-16" if utf16 else "utf-8-sig", newline=newline)
            if kind in ("csv", "tsv"):
                rows = read_table(file, name, "\t" if kind == "tsv" else None, text_column, label_column)
            elif kind in ("json", "jsonl"):
                rows = read_json(file, name, kind, text_column, label_column)
            else:
                rows = ((number, line, None) for number, line in enumerate(file, start=1))
            for number, text, label in rows:
                if text.strip():
                    yield number, text.strip(), (label or "").strip() or None
                elif kind != "text":
                    skipped += 1
    except UnicodeDecodeError as error:
        raise LabError(f"{name} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv -t UTF-8") from error
    except OSError as error:
        raise LabError(f"cannot read {name}: {error.strerror}") from error
    if skipped:
        print(f"{name}: {skipped} blank headline{'s' * (skipped > 1)} skipped", file=sys.stderr)


def find_column(header: list[str], wanted: str | None, usual: tuple[str, ...], name: str) -> int | None:
    """Where the column is, or None. Raises LabError if the one asked for is missing, or if two would do."""
    names = [cell.strip().lower() for cell in header]
    for candidate in [wanted.strip().lower()] if wanted else usual:
        if names.count(candidate) > 1:
            raise LabError(f"{name} has two columns {candidate!r}: rename one")
        if candidate in names:
            return names.index(candidate)
    if wanted:
        raise LabError(f"{name} has no column {wanted!r}, only {', '.join(header)}")
    return None


def read_table(file, name: str, delimiter: str | None, text_column, label_column):
    """Rows of an open CSV or TSV file; the header names the delimiter unless it is given."""
    first, skip = file.readline(), 0
    if first.lower().startswith("sep="):
        delimiter, first, skip = first.rstrip("\r\n")[4:5], file.readline(), 1
    delimiter = delimiter or max(",;\t", key=first.count)
    reader = csv.reader((line for part in ([first], file) for line in part), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        line = skip + 1
        text_at: int | None
        label_at: int | None
        ag_news = len(header) == 3 and header[0] in AG_NEWS_CLASSES
        if ag_news:
            yield line, header[1], AG_NEWS_CLASSES[header[0]]
            text_at, label_at = 1, 0
        else:
            text_at = find_column(header, text_column, TEXT_COLUMNS, name)
            label_at = find_column(header, label_column, LABEL_COLUMNS, name)
            if text_at is None:
                raise LabError(f"{name} has no column text, title or headline: name it with --text-column")
            ag_news = {"title", "description"} <= {cell.strip().lower() for cell in header}
        line = skip + reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise LabError(
                    f"{name}, line {line} has {len(row)} cells, not {len(header)}: quote the one with {delimiter!r}"
                )
            if row:
                label = row[label_at].strip() if label_at is not None else None
                yield line, row[text_at], AG_NEWS_CLASSES.get(label or "", label) if ag_news else label
            line = skip + reader.line_num + 1
    except csv.Error as error:
        raise LabError(f"{name}, line {line}: {error} (a quote that never closes?)") from error


def read_json(file, name: str, kind: str, text_column, label_column):
    """Rows of an open file of JSON objects, one a line, or in one array."""
    text_names = [text_column] if text_column else TEXT_COLUMNS
    label_names = [label_column] if label_column else LABEL_COLUMNS
    line = 1
    try:
        for line, row in enumerate(json.load(file) if kind == "json" else file, start=1):
            if kind == "jsonl":
                if not row.strip():
                    continue
                row = json.loads(row)
            cells = {key.strip().lower(): value for key, value in row.items()}
            text = next(cells[key.lower()] for key in text_names if key.lower() in cells)
            label = next((cells[key.lower()] for key in label_names if key.lower() in cells), None)
            if not isinstance(text, str):
                raise TypeError
            yield line, text, None if label is None else str(label)
    except (ValueError, AttributeError, TypeError, StopIteration) as error:
        raise LabError(f"{name}, {'row' if kind == 'json' else 'line'} {line} is no JSON object with a text") from error


def label_names(labels) -> dict[str, str]:
    """The model's labels by what a file may write for them: any case, blanks around."""
    return {label.strip().casefold(): label for label in labels}


def read_labelled(path: Path, labels: list[str], **columns) -> tuple[list[str], list[int]]:
    """Texts and label indices of a labelled file, in its order. Raises LabError, naming the line, if unknown."""
    names, texts, truth = label_names(labels), [], []
    for line, text, label in read(str(path), **columns):
        if (label or "").casefold() not in names:
            raise LabError(f"{path} line {line}: label {label!r} is not one of the model's: {', '.join(labels)}")
        texts.append(text)
        truth.append(labels.index(names[(label or "").casefold()]))
    if not texts:
        raise LabError(f"{path} has no headlines")
    return texts, truth
