"""Parquet and Arrow files, as `datasets`, pandas and Spark write them, read by pyarrow, which training installs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab04 import LabError, in_one_line


def parse(source: str | Path, name: str, kind: str) -> Iterator[tuple[int, list[str], list]]:
    """The rows of a file: number, names of the columns in lower case, values. Whole numbers of classes get names.

    Raises LabError if it cannot be read, or if pyarrow is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise LabError(f"{name} needs pyarrow: pip install pyarrow, or save it as CSV") from error
    with in_one_line(f"cannot read {name} as {kind.capitalize()}"):
        opened = pyarrow.BufferReader(sys.stdin.buffer.read()) if str(source) == "-" else pyarrow.OSFile(str(source))
        schema, batches = open_parquet(opened) if kind == "parquet" else open_arrow(opened)
        names = [column.strip().lower() for column in schema.names]
        classes = [class_names(schema).get(column) for column in schema.names]
        number = 0
        for batch in batches:
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, names, [named(*pair) for pair in zip(values, classes, strict=True)]


def open_parquet(opened) -> tuple[Any, Iterator]:
    """The schema of a Parquet file and its batches of rows."""
    from pyarrow import parquet

    file = parquet.ParquetFile(opened)
    return file.schema_arrow, file.iter_batches(batch_size=1000)


def open_arrow(opened) -> tuple[Any, Iterator]:
    """The schema of an Arrow file and its batches of rows. `datasets` keeps its own as streams."""
    from pyarrow import ArrowInvalid, ipc

    try:
        file = ipc.open_file(opened)
        return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
    except ArrowInvalid:
        opened.seek(0)
        stream = ipc.open_stream(opened)
        return stream.schema, iter(stream)


def class_names(schema) -> dict[str, list[str]]:
    """The names of classes that `datasets` writes beside columns of their numbers."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    numbered = {name: kind for name, kind in features.items() if isinstance(kind, dict) and "names" in kind}
    return {name: kind["names"] for name, kind in numbered.items() if kind.get("_type") == "ClassLabel"}


def named(value, classes: list[str] | None):
    """A value; where a column has names of classes, the one of its number, or None for `datasets`' -1."""
    if classes is None or not isinstance(value, int) or value >= len(classes):
        return value
    return classes[value] if value >= 0 else None
