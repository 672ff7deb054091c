"""The forms a file of headlines may have, and their rows: CSV, TSV, JSON lines, a JSON array, Parquet, Arrow, text."""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lab04 import LabError

FORMATS = ("csv", "tsv", "jsonl", "json", "text", "parquet", "arrow")
ENDINGS = {"ndjson": "jsonl", "jsonlines": "jsonl", "tab": "tsv", "txt": "text", "pq": "parquet", "feather": "arrow"}
ENDINGS |= {name: name for name in FORMATS}
BY_ROW = ("json", "parquet", "arrow")  # whose places are rows, not lines
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "title", "headline"), ("label", "class index")
DELIMITERS = ",;\t|"
HEADER_LINES = 100  # a header with line breaks in its cells has no more: beyond, a quote was never closed
LONGEST_CELL = 100_000_000  # characters; Python's own limit, 131,072, is less than some articles have
MARK = "\ufeff"  # a byte order mark, also where files were joined
MAGIC = {
    b"\x1f\x8b": "compressed: unpack it, e.g. with gunzip",
    b"\xfd7zXZ\x00": "compressed: unpack it, e.g. with unxz",
    b"\x28\xb5\x2f\xfd": "compressed: unpack it, e.g. with unzstd",
    b"PK\x03\x04": "a workbook or zip: save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "a workbook: save it as CSV UTF-8",
    b"PAR1": "Parquet: say --format parquet",
    b"ARROW1": "Arrow: say --format arrow",
}
BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
Cells = tuple[int, list[str], list]  # line (or row, for BY_ROW), names of the columns in lower case, values


def kind_of(source: str | Path) -> str:
    """The format that a file's name says, else text."""
    return ENDINGS.get(Path(source).suffix.lower().lstrip("."), "text")


# --- Lines ------------------------------------------------------------------------------------------------


def parse(source: str | Path, name: str, kind: str, certain: bool) -> Iterator[Cells]:
    """The rows of a file of some kind. `certain`: it is of that kind, so that text need not be looked at."""
    if kind in ("parquet", "arrow"):
        from lab04.read import columnar

        yield from columnar.parse(source, name, kind)
        return
    try:
        with open(0 if str(source) == "-" else source, "rb", closefd=str(source) != "-") as raw:
            # CSV keeps its line ends for quoted cells; elsewhere CRLF and CR end a line as LF does.
            lines = decode(raw, name, newline="" if kind in ("csv", "tsv") else None)
            if kind in ("csv", "tsv"):
                yield from parse_table(lines, name, "\t" if kind == "tsv" else None)
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
    start = raw.peek(10)[:10]
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise LabError(f"{name} is {what}")
    if BZIP2.match(start):
        raise LabError(f"{name} is compressed: unpack it, e.g. with bunzip2")
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
        yield line.removeprefix(MARK)


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


def parse_table(lines: Iterator[str], name: str, delimiter: str | None) -> Iterator[Cells]:
    """Rows of CSV or TSV; the header tells the delimiter unless it is given. A header that comes again is no row."""
    before = 0  # lines ahead of those that are counted
    head = [next(lines, "")]
    if separator := re.match(r'"?sep=(.)', head[0], re.IGNORECASE):  # Excel's
        delimiter, before, head = separator[1], 1, [next(lines, "")]
        if delimiter not in DELIMITERS:
            raise LabError(f"{name}, line 1: {delimiter!r} separates no cells")
    while "".join(head).count('"') % 2 and len(head) < HEADER_LINES and (more := next(lines, "")):
        head.append(more)
    delimiter = delimiter or max(DELIMITERS, key=re.sub('"[^"]*"', "", "".join(head)).count)
    header: list[str] = []
    names: list[str] = []
    for number, row in split_rows(itertools.chain(head, lines), name, delimiter, before):
        if not header:
            header, names = row, [cell.strip().lower() for cell in row]
        elif len(row) != len(names):
            raise LabError(
                f"{name}, line {number} has {len(row)} cells, not {len(names)}: one with {delimiter!r} needs quotes"
            )
        elif row != header:  # files joined with their headers
            yield number, names, row


def split_rows(lines: Iterator[str], name: str, delimiter: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """The line and the cells of every row that is not blank; `before`: lines ahead of the first.

    Some tools write TSV without quoting: a cell then may begin with a quote that belongs to it. Lines of TSV that
    make no sense with quotes are taken without.
    """
    csv.field_size_limit(LONGEST_CELL)
    bare, line = delimiter == "\t", before + 1
    taken = Taken(lines, HEADER_LINES if bare else None)
    table = csv.reader(taken, delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        taken.lines.clear()
        try:
            rows = [next(table)]
        except StopIteration:
            return
        except csv.Error as error:
            if not bare:
                raise LabError(f"{name}, line {line}: {error} (a quote that never closes?)") from error
            rows = [text.rstrip("\r\n").split(delimiter) if text.strip() else [] for text in taken.lines]
        each = len(taken.lines) if len(rows) == 1 else 1
        for row in rows:
            if row:
                yield line, row
            line += each


class Taken:
    """The lines of an iterator, and in `lines` those that were taken since it was last cleared; at most `most`."""

    def __init__(self, source: Iterator[str], most: int | None) -> None:
        self.source, self.most, self.lines = source, most, list[str]()

    def __iter__(self):
        return self

    def __next__(self) -> str:
        if self.most and len(self.lines) >= self.most:
            raise csv.Error("a quote is not closed for many lines")
        self.lines.append(next(self.source))
        return self.lines[-1]


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
