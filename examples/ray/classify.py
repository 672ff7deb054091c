"""Classify a file of headlines with Ray Data: on this machine, or on the cluster that RAY_ADDRESS names.

    python examples/ray/classify.py headlines.csv labelled.parquet       # columns label, score and error are added
    python examples/ray/classify.py news.parquet labelled.parquet --column title --probabilities --workers 8

INPUT is Parquet (also a folder of it), CSV or JSON lines, where every machine of the cluster can read it. OUTPUT is
written here, in the order of completion. Machines need only requirements/ray.txt: our code and the artefact travel.
A row whose text is null, empty or no text gets its reason in `error`, and the job goes on.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
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
from lab04.run import runtimes
from lab04.run.backend import Backend
from lab04.run.scores import softmax

JSON_LINES = (".jsonl", ".json")
BATCH = 256  # headlines a call: sorted by length there, so that the more there are, the less padding is computed


def main() -> None:
    arguments = parse_arguments()
    if arguments.output.exists():
        raise LabError(f"{arguments.output} exists: choose another OUTPUT; nothing is overwritten")
    if not arguments.input.exists():
        raise LabError(f"no input at {arguments.input}")
    item = artefact.load(arguments.artefact)
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
    add("--artefact", type=Path, default=ROOT / "quantised-model-optimum", help="default: quantised-model-optimum")
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


def open_shipped(shipped: dict) -> tuple[artefact.Artefact, artefact.Tokeniser, Backend]:
    """Open what `ship` packed. Raises LabError if the artefact or its runtime's version is another than there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in shipped["files"].items():
            (Path(folder) / name).write_bytes(content)
        item = artefact.load(folder)
        here, wanted = version(item.backend), shipped["runtime"]
        if item.manifest["sha256"] != shipped["sha256"]:
            raise LabError(f"worker on {os.uname().nodename} has another artefact than was sent")
        if here != wanted:
            raise LabError(f"worker on {os.uname().nodename} has {item.backend} {here}, not {wanted} as here")
        return item, artefact.Tokeniser(item), runtimes.open_backend(item, threads=1)


class Worker:
    """One process of the job: opens the artefact once, then adds columns to one Arrow table after another."""

    def __init__(self, shipped, column: str, every_probability: bool, json_lines: bool):
        self.item, self.tokenise, self.backend = open_shipped(ray.get(shipped))
        self.column, self.every_probability, self.json_lines = column, every_probability, json_lines

    def __call__(self, table):
        labels = self.item.labels
        if self.json_lines:
            table, errors = parse(table["text"].to_pylist(), self.column)
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
            arguments.input.suffix.lower() in JSON_LINES,
        ),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        batch_size=arguments.batch_size,
        batch_format="pyarrow",
    )


def read(path: Path, column: str):
    """A file as a Ray Dataset, its headlines' column as text."""
    # Half a minute's work a block: none waits long for the last, and a lost one is soon done again.
    ray.data.DataContext.get_current().target_max_block_size = 1_000_000
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


def parse(lines: list[str], column: str):
    """JSON lines as an Arrow table, and each line's error or None. What is no text becomes its JSON text."""
    rows, errors = [], []
    for line in lines:
        try:
            row = json.loads(line)
            errors.append(error_of(row.setdefault(column, None)))
        except (ValueError, AttributeError, RecursionError):
            row = {column: line}
            errors.append("no JSON object")
        if not isinstance(row[column], str | None):
            row[column] = json.dumps(row[column])
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows]), errors


def reason_of(error: Exception) -> str:
    """The last line of what went wrong in a worker, without its traceback."""
    found = re.findall(r"LabError: (.+)", str(error))
    return found[-1] if found else str(error).strip().splitlines()[-1]


def write(dataset, output: Path) -> tuple[int, int]:
    """Write a Dataset as one Parquet file, whole or not at all. Returns its rows and how many have an error.

    Only this process writes: whatever is computed twice because a machine was lost, is written once.
    """
    temporary, writer, rows, bad = output.with_name(f".{output.name}.new-{os.getpid()}"), None, 0, 0
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            writer = writer or pa.parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table.cast(writer.schema))
            rows, bad = rows + len(table), bad + len(table) - table["error"].null_count
        if writer is None:
            raise LabError("the input has no rows")
        writer.close()
        os.link(temporary, output)  # unlike a renaming, this refuses what another job wrote meanwhile
    finally:
        temporary.unlink(missing_ok=True)
    return rows, bad


if __name__ == "__main__":
    console.run(main)
