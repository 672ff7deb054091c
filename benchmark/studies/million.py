"""A million headlines through predict.py, on one core and on all: `python -m benchmark.studies.million`.

Writes a file of headlines, each of two halves of our test headlines, labels it as a user does with `predict.py --csv`,
checks that every line came back in its place, and takes the time of the whole command. Beside it stands the back end's
own rate in the same batches. Writes results/HARDWARE-file/results.json.
"""

import argparse
import contextlib
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import psutil

from benchmark import environment, results
from benchmark.process import Process
from benchmark.rows import ARTEFACTS, VARIANTS
from lab04 import ROOT, LabError, artefact, console, options
from lab04.read.texts import held_out_headlines

RATE_HEADLINES = 4096  # that the back end alone is timed with, before and after the file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.million", description=console.first_line(__doc__)
    )
    add = parser.add_argument
    engine = [folder for folder in VARIANTS if folder.name.endswith("this-cpu") and folder.exists()]
    add("--artefacts", type=Path, nargs="+", default=[*engine, *ARTEFACTS[:2]], help="folders (default: INT8's)")
    add("--headlines", type=options.positive, default=1_000_000, help="of the file (default: %(default)s)")
    add("--batch", type=options.positive, default=256, help="headlines of one call (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()

    here, runs = environment.describe(), []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "headlines.txt"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in islice(made_headlines(), arguments.headlines))
        for folder in arguments.artefacts:
            for cores in sorted({1, here["cores"]}):
                with only_cores(cores):
                    runs.append(measure(folder, source, cores, arguments))
                print(in_words(runs[-1]))
    output = arguments.output / environment.folder_name(here, "file")
    output.mkdir(parents=True, exist_ok=True)
    measured = {"format": results.FORMAT, "environment": here, "headlines": arguments.headlines}
    measured |= {"batch": arguments.batch, "runs": runs}
    results.save_json(output / results.RESULTS, measured)
    print(f"Wrote {output / results.RESULTS}")


def in_words(run: dict) -> str:
    return (
        f"{run['title']}, {run['cores']} core{'s' * (run['cores'] > 1)}: {run['per_second']:.0f} a second, "
        f"a million in {run['minutes_for_a_million']:.1f} minutes, {run['of_model']:.0%} of the back end's own rate, "
        f"{run['memory_mb']:.0f} MB"
    )


def made_headlines() -> Iterator[str]:
    """Endless headlines as long as real ones: the first half of one of ours and the second of another."""
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, held_out_headlines())]
    chance = random.Random(0)
    while True:
        yield " ".join(chance.choice(halves)[0] + chance.choice(halves)[1])


@contextlib.contextmanager
def only_cores(number: int) -> Iterator[None]:
    """Keep this process, and all that it starts, to so many cores, where the system lets it choose."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(folder: Path, source: Path, cores: int, arguments: argparse.Namespace) -> dict:
    """One artefact's file on so many cores. Raises LabError if a headline is missing or out of its place."""
    before = own_rate(folder, cores, arguments.batch)
    options = ["--csv", "--batch", arguments.batch, "--threads", cores, "--artefacts", folder, "--file", source]
    target = source.with_name("labelled.csv")
    with target.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "predict.py"), *map(str, options)], stdout=file)
        memory = 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = max(memory, psutil.Process(process.pid).memory_info().rss)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise LabError(f"predict.py ended with exit code {process.returncode}")
    check_order(source, target)
    rate = (before + own_rate(folder, cores, arguments.batch)) / 2
    per_second = arguments.headlines / seconds
    return {
        "artefact": folder.name,
        "title": artefact.load(folder).title,
        "cores": cores,
        "seconds": seconds,
        "per_second": per_second,
        "minutes_for_a_million": 1e6 / per_second / 60,
        "model_per_second": rate,
        "of_model": per_second / rate,
        "memory_mb": memory / 1e6,
    }


def own_rate(folder: Path, threads: int, batch: int) -> float:
    """Headlines a second of the back end alone: tokens ready, sorted by length, as `python -m benchmark` measures."""
    with tempfile.TemporaryDirectory() as scratch, Process(Path(scratch) / "log", threads) as worker:
        worker.ask("open", runner="artefact", folder=str(folder), reference="", threads=threads)
        texts = list(islice(made_headlines(), RATE_HEADLINES))
        return worker.ask("throughput", texts=texts, batch=batch)["per_second"]


def check_order(source: Path, target: Path) -> None:
    """Raise LabError unless each line of `source` is a row of `target`, in the same place."""
    with source.open(encoding="utf-8") as given, target.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for line, row in zip_longest(given, rows):
            if row is None or line is None or line.rstrip("\n") != row[0]:
                raise LabError(f"{line and line.strip()!r} came back as {row}")


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
