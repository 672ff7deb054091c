"""Labelled headlines from a file: `text,label` CSV, AG News' own CSV, or JSON lines."""

import csv
import json
from pathlib import Path

from lab04 import LabError

AG_NEWS_CLASSES = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}  # its classes.txt, counted from 1


def read_labelled(path: Path, labels: list[str]) -> tuple[list[str], list[int]]:
    """Texts and label indices of a file, in its order.

    Formats: CSV with columns text and label; AG News with the header label,title,description or, as first published,
    without header and with class numbers (the title is the text: the lab classifies headlines); JSON lines with
    "text" and "label". Raises LabError, naming the line, for anything else and for labels the model lacks.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(read_json_lines(file) if path.suffix in (".jsonl", ".json") else read_csv(file))
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise LabError(f"cannot read {path}: {reason}") from error
    if not rows:
        raise LabError(f"{path} has no headlines")
    indices = {label: index for index, label in enumerate(labels)}
    for line, text, label in rows:
        if not text:
            raise LabError(f"{path} line {line}: empty headline")
        if label not in indices:
            raise LabError(f"{path} line {line}: label {label!r} is not one of the model's: {', '.join(labels)}")
    return [text for _, text, _ in rows], [indices[label] for _, _, label in rows]


def read_csv(file):
    """Yield (line, text, label) of an open CSV file, with or without AG News' columns."""
    reader = csv.reader(file, strict=True)
    header = next(reader, [])
    if len(header) == 3 and header[0] in AG_NEWS_CLASSES:
        yield 1, header[1].strip(), AG_NEWS_CLASSES[header[0]]
        columns = 1, 0
    elif "label" in header and ("text" in header or "title" in header):
        columns = header.index("text" if "text" in header else "title"), header.index("label")
    else:
        raise ValueError("the first line names no columns text,label (or label,title,description)")
    for row in reader:
        if row:
            if len(row) <= max(columns):
                raise ValueError(f"line {reader.line_num} has {len(row)} of {len(header)} columns")
            text, label = row[columns[0]].strip(), row[columns[1]].strip()
            yield reader.line_num, text, AG_NEWS_CLASSES.get(label, label) if columns == (1, 0) else label


def read_json_lines(file):
    """Yield (line, text, label) of an open file of JSON objects, one a line."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield number, str(row["text"]).strip(), str(row["label"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f'line {number} is no JSON object with "text" and "label"') from error
