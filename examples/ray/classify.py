"""Classify a file of headlines with Ray Data: on this machine, or on the cluster that RAY_ADDRESS names.

    python examples/ray/classify.py headlines.csv labelled.parquet       # columns label, score and error are added
    python examples/ray/classify.py news.parquet labelled.parquet --column title --probabilities --workers 8

INPUT is Parquet (also a folder of it), CSV or JSON lines, where every machine of the cluster can read it. OUTPUT is
written here, in the order of completion. Machines need only requirements/ray.txt: our code and the artefact travel.
A row whose text is null, empty or no text gets its reason in `error`, and the job goes on. What a job that ends early
has done is kept beside OUTPUT.

Take the static artefact (`lab04-optimum.py --static`). Dynamic INT8 takes the scale of a layer's inputs from the whole
batch, so that a row's label depends on its neighbours, and here on how Ray cut the file. Static scales are constants.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home unless the user wants it; read on import
try:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet
    import ray.data
except ModuleNotFoundError as missing:
    print(f"{missing.name} is not installed: pip install -r requirements/ray.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, Python looks only in its folder
from lab04 import ROOT, LabError, artefact, console, options
from lab04.artefact import contract
from lab04.artefact.tokeniser import clean
from lab04.run import runtimes
from lab04.run.backend import Backend
from lab04.run.scores import softmax

JSON_LINES = (".jsonl", ".json")
LARGEST_EXACT = 2**53  # the largest whole number up to which a float64 holds every one
BATCH = 256  # headlines a call: sorted by length there, so that the more there are, the less padding is computed


def main() -> None:
    arguments = parse_arguments()
    if arguments.output.exists():
        raise LabError(f"{arguments.output} exists: choose another OUTPUT; nothing is overwritten")
    if (partial := partial_of(arguments.output)).exists():
        raise LabError(f"{partial} holds what an earlier job had done: move it away first")
    if not arguments.input.exists():
        raise LabError(f"no input at {arguments.input}")
    item = artefact.load(arguments.artefact)
    options.say_if_dynamic(item)
    connect()
    started = time.perf_counter()
    try:
        rows, bad = write(classified(item, arguments), arguments.output)
    except ray.exceptions.RayError as error:
        raise LabError(f"cannot classify {arguments.input}: {reason_of(error)}") from error
    except OSError as error:
        raise LabError(f"cannot write {arguments.output}: {error.strerror or error}") from error
    seconds = time.perf_counter() - started
    print(f"{rows} headlines, {bad} of them with an error, in {seconds:.1f} s: {rows / seconds:.0f} headlines/s")
    print(f"Wrote {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="Parquet, CSV or JSON lines (.jsonl, .json)")
    add("output", type=Path, metavar="OUTPUT", help="folder to write; must not exist")
    options.add_artefact(parser)
    add("--column", default="text", help="column of the headlines (default: %(default)s)")
    add("--workers", type=options.positive, help="processes of one thread each (default: one a core of the cluster)")
    add("--batch-size", type=options.positive, default=BATCH, help="headlines a call (default: %(default)s)")
    add("--probabilities", action="store_true", help="one more column for each label")
    return parser.parse_args()


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one here; its processes get `lab04` and one thread each."""
    telemetry = {"ORT_DISABLE_TELEMETRY": os.environ.get("ORT_DISABLE_TELEMETRY", "1")}
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {"py_modules": [str(ROOT / "lab04")], "env_vars": telemetry | threads}
    for handler in logging.getLogger("ray.data").handlers:
        handler.setLevel(logging.CRITICAL)  # a failed job says so in one line of ours, not in pages of a traceback
    try:
        ray.init(runtime_env=environment, logging_level="WARNING", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LabError(f"cannot join the Ray cluster: {str(error).splitlines()[0]}") from error


def ship(item: artefact.Artefact) -> dict:
    """What a worker needs to run an artefact exactly as here: its files, its hash, the version of its runtime."""
    names = [*item.manifest["files"], contract.MANIFEST]
    return {
        "files": {name: (item.folder / name).read_bytes() for name in names},
        "sha256": item.manifest["sha256"],
        "runtime": version(item.backend),
    }


@contextlib.contextmanager
def unpacked(shipped: dict) -> Iterator[Path]:
    """A folder with what `ship` packed, for a block. Raises LabError unless artefact and runtime are as there."""
    with tempfile.TemporaryDirectory() as name:
        folder, node = Path(name), os.uname().nodename
        for file, content in shipped["files"].items():
            (folder / file).write_bytes(content)
        item = artefact.load(folder)
        here, wanted = version(item.backend), shipped["runtime"]
        if item.manifest["sha256"] != shipped["sha256"]:
            raise LabError(f"worker on {node} has another artefact than was sent")
        if here != wanted:
            raise LabError(f"worker on {node} has {item.backend} {here}, not {wanted} as here")
        yield folder


def open_shipped(shipped: dict) -> tuple[artefact.Artefact, artefact.Tokeniser, Backend]:
    """Open what `ship` packed. Raises LabError as `unpacked` does."""
    with unpacked(shipped) as folder:
        item = artefact.load(folder)
        return item, artefact.Tokeniser(item), runtimes.open_backend(item, threads=1)


class Worker:
    """One process of the job: opens the artefact once, then adds columns to one Arrow table after another."""

    def __init__(self, shipped, column: str, every_probability: bool, schema: pa.Schema | None):
        self.item, self.tokenise, self.backend = open_shipped(ray.get(shipped))
        self.column, self.every_probability, self.schema = column, every_probability, schema  # None: not JSON lines

    def __call__(self, table):
        labels = self.item.labels
        if self.schema:
            table, errors = parse(table["text"].to_pylist(), self.column, self.schema)
        elif self.column in table.column_names:
            errors = [error_of(text) for text in table[self.column].to_pylist()]
        else:
            raise LabError(f"no column {self.column!r}: the input has {', '.join(table.column_names)}")
        texts = table[self.column].to_pylist()
        good = [index for index, error in enumerate(errors) if error is None]
        scores = np.full((len(texts), len(labels)), np.nan)
        if good:
            scores[good] = softmax(self.backend.logits(self.tokenise([texts[index] for index in good])))
        bad = np.isnan(scores[:, 0])
        best = np.where(bad, 0, scores.argmax(axis=1))
        added = {
            "label": pa.array(np.array(labels, dtype=object)[best], pa.string(), mask=bad),
            "score": pa.array(scores.max(axis=1), mask=bad),
            "error": pa.array(errors, pa.string()),
        }
        if self.every_probability:
            added |= {f"p_{label}": pa.array(scores[:, i], mask=bad) for i, label in enumerate(labels)}
        # The input's own columns stay; one of a name that we add, such as the true label, steps aside.
        table = table.rename_columns([f"input_{name}" if name in added else name for name in table.column_names])
        for name, column in added.items():
            table = table.append_column(name, column)
        return table


def error_of(text: object) -> str | None:
    """Why a value cannot be classified, or None."""
    if text is None:
        return "null"
    if not isinstance(text, str):
        return f"not text: {type(text).__name__}"
    return None if text.strip() else "empty"


def classified(item: artefact.Artefact, arguments: argparse.Namespace):
    """The Ray Dataset of the input with our columns, not computed yet. Raises LabError for other kinds of file."""
    cores = int(ray.cluster_resources().get("CPU", 1))
    workers = arguments.workers or cores
    if workers > cores:
        raise LabError(f"{workers} workers need a core each: the cluster has {cores}")
    shipped = ray.put(ship(item))
    return read(arguments.input, arguments.column).map_batches(
        Worker,
        fn_constructor_args=(
            shipped,
            arguments.column,
            arguments.probabilities,
            schema_of(arguments.input, arguments.column) if arguments.input.suffix.lower() in JSON_LINES else None,
        ),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        batch_size=arguments.batch_size,
        batch_format="pyarrow",
    )


def read(path: Path, column: str):
    """A file as a Ray Dataset, its headlines' column as text."""
    context = ray.data.DataContext.get_current()
    # Half a minute's work a block: none waits long for the last, and a lost one is soon done again.
    context.target_max_block_size = 1_000_000
    # Since 2.60 Ray lists Parquet files in a task that wants a core, whatever is said of reading: with a worker on each
    # core it would wait for ever.
    context.use_datasource_v2 = False
    where, options = str(path.absolute()), {"num_cpus": 0}  # little work beside the model: it claims no core
    match path.suffix.lower():
        case ".parquet" | "":
            return ray.data.read_parquet(where, **options)
        case ".csv":
            as_text = pa.csv.ConvertOptions(column_types={column: "string"})  # else a column of numbers becomes numbers
            quoted = pa.csv.ParseOptions(newlines_in_values=True)
            return ray.data.read_csv(where, convert_options=as_text, parse_options=quoted, **options)
        case suffix if suffix in JSON_LINES:
            return ray.data.read_text(where, **options)  # the worker parses: one odd line must not end the job
    raise LabError(f"{path} is no .parquet, .csv, .jsonl or .json")


def schema_of(path: Path, column: str) -> pa.Schema:
    """The one schema of a file of JSON lines: every field of any line, with a type that holds all its values.

    Found before the work starts, from all lines: a field may come late, or be null, or a whole number, at first.
    Whole numbers beside fractions become fractions. Any other mixture, lists and objects become text (`as_text`).
    """
    kinds: dict[str, set[type]] = {column: {str}}
    with path.open("rb") as lines:
        for line in lines:
            for name, value in (row_of(line) or {}).items():
                too_large = isinstance(value, int) and abs(value) > LARGEST_EXACT
                kinds.setdefault(name, set()).add(str if too_large else type(value))
    return pa.schema([(name, arrow_type(found - {type(None)})) for name, found in kinds.items()])


def arrow_type(kinds: set[type]) -> pa.DataType:
    """The Arrow type for values of these Python types."""
    if kinds == {bool}:
        return pa.bool_()
    if kinds and kinds <= {int, float}:
        return pa.int64() if kinds == {int} else pa.float64()
    return pa.string()


def row_of(line: bytes | str) -> dict | None:
    """A line's JSON object, or None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return {clean(name): value for name, value in row.items()} if isinstance(row, dict) else None


def as_text(value: object) -> str | None:
    """A value for a column of text: text and null as they are, the others as JSON."""
    return value if value is None else clean(value if isinstance(value, str) else json.dumps(value))


def parse(lines: list[str], column: str, schema: pa.Schema):
    """JSON lines as an Arrow table of a schema, and each line's error or None."""
    rows, errors = [], []
    for line in lines:
        row = row_of(line)
        errors.append("no JSON object" if row is None else error_of(row.get(column)))
        rows.append({column: line} if row is None else row)
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        columns.append(pa.array(map(as_text, values) if field.type == pa.string() else values, field.type))
    return pa.Table.from_arrays(columns, schema=schema), errors


def reason_of(error: Exception) -> str:
    """The last line of what went wrong in a worker, without its traceback."""
    found = re.findall(r"LabError: (.+)", str(error))
    return found[-1] if found else str(error).strip().splitlines()[-1]


def partial_of(output: Path) -> Path:
    """Where the rows of a job that ends early are kept."""
    return output.with_name(f"{output.name}.partial")


def write(dataset, output: Path) -> tuple[int, int]:
    """Write a Dataset as one Parquet file. Returns its rows and how many have an error.

    Only this process writes: whatever is computed twice because a machine was lost, is written once. If the job ends
    early, `output` is not written, and what was done is left in `partial_of(output)`, as readable as a whole one.
    """
    temporary, writer, rows, bad = output.with_name(f".{output.name}.new-{os.getpid()}"), None, 0, 0
    try:
        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                writer = writer or pa.parquet.ParquetWriter(temporary, table.schema)
                writer.write_table(table.cast(writer.schema))
                rows, bad = rows + len(table), bad + len(table) - table["error"].null_count
        except BaseException:  # Ctrl-C too
            if writer:
                writer.close()
                temporary.rename(partial_of(output))
                print(f"Kept the {rows} rows that were done in {partial_of(output)}", file=sys.stderr)
            raise
        if writer is None:
            raise LabError("the input has no rows")
        writer.close()
        os.link(temporary, output)  # unlike a renaming, this refuses what another job wrote meanwhile
    finally:
        temporary.unlink(missing_ok=True)
    return rows, bad


if __name__ == "__main__":
    console.run(main)
