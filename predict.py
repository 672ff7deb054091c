"""Compare the quantised backends on a few headlines: top five, times, a chart each, and a summary.

    python predict.py                                  # the lab's three headlines, about 5 seconds
    python predict.py "Your headline" "Another one"
    python predict.py --file my.csv                    # one headline a line, or CSV with text[,label]
    python predict.py --json --file - < my.txt         # for the next program in the pipe
    python predict.py --csv --backends onnx --threads 8 --batch 256 --file big.csv > labelled.csv

Reads the quantised-model-* folders; running them needs neither `transformers` nor `peft`.
Exit codes: 0 done, 2 wrong input or artefact, 130 interrupted, 141 the reader of our output stopped reading.
"""

import argparse
import contextlib
import csv
import itertools
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH=1 and -P leave out

from lab04 import ROOT, LabError, labs, options
from lab04.artefact import Tokeniser
from lab04.compare import charts, report, side_by_side
from lab04.compare.side_by_side import Runner
from lab04.console import run, whole_line
from lab04.read import headlines
from lab04.read.formats import ENDINGS
from lab04.read.headlines import Row
from lab04.run import stream

HEADLINES = {
    "Cybersecurity breach exposes NHS patient records": "security",
    "AI tutor program set to roll out in Scottish schools": "education",
    "Climate report warns UK cities face extreme flooding by 2030": "climate",
}
FOLDERS = {lab.name: lab.folder for lab in labs.LABS}
RUNS = 30  # timed calls of every backend for a headline given by hand; a file's headlines are run once each
CHARTS = 20
BATCH = 256  # with --csv: enough for 16 threads, and of like length in parts: 4 % less padding than with 64


def main() -> None:
    arguments = parse_arguments()
    artefacts = side_by_side.load_artefacts(arguments.artefacts)
    given = read_headlines(arguments, artefacts[0].labels)
    # Wrong input is reported before anything is loaded; a file may be endless, so only its first line is known by then.
    known = list(itertools.islice(given, 1 if arguments.file else None))
    given = itertools.chain(known, given)
    tokenise = Tokeniser(artefacts[0])
    runners = side_by_side.open_runners(artefacts, arguments.threads)
    side_by_side.warm_up(runners, tokenise, list(HEADLINES))
    write = write_batches if arguments.batch else write_json if arguments.json else write_report
    write(runners, tokenise, given, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("headlines", nargs="*", metavar="HEADLINE", help="headlines (default: the lab's three)")
    add("--file", help="headlines: CSV, TSV, JSON lines, JSON, Parquet, Arrow or one a line; - reads stdin")
    headlines.add_options(parser)
    add("--no-labels", action="store_true", help="leave its labels out, as those of another taxonomy")
    add("--backends", nargs="+", metavar="NAME", help=f"which to run, of {', '.join(FOLDERS)} (default: all)")
    add("--artefacts", nargs="+", type=Path, metavar="FOLDER", help="artefact folders to run instead of the lab's own")
    add("--output", type=Path, default=Path(), help="folder for the charts (default: the current one)")
    options.add_threads(parser, "CPU threads each")
    add("--runs", type=options.positive, help=f"timed calls a headline (default: {RUNS}, with --file 1)")
    add("--charts", type=options.natural, default=CHARTS, help="draw at most this many charts (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object a headline on stdout and nothing else; no charts")
    add("--csv", action="store_true", help="text,label,score on stdout and nothing else, in batches")
    batch_help = "headlines of one call, with --json or --csv and one back end: times are then of batches"
    add("--batch", type=options.positive, help=f"{batch_help} (default: 1, with --csv {BATCH})")
    arguments = parser.parse_args()
    check_arguments(arguments)
    names = arguments.backends or list(FOLDERS)
    arguments.artefacts = arguments.artefacts or [ROOT / FOLDERS[name] for name in names]
    check_batches(arguments)
    arguments.runs = arguments.runs or (1 if arguments.file else RUNS)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise LabError for what was taken for something else than was meant."""
    if arguments.headlines and arguments.file:
        raise LabError("give headlines or --file, not both")
    for text in arguments.headlines:
        if text != "-" and is_file(text):
            raise LabError(f"{text} is a file, not a headline: python predict.py --file {text}")
        if " " not in text and Path(text).suffix.lower().lstrip(".") in ENDINGS:
            raise LabError(f"{text} looks like a file, and there is none of that name here")
    if wrong := [name for name in arguments.backends or [] if name not in FOLDERS]:
        raise LabError(f"--backends takes {', '.join(FOLDERS)}, not {wrong[0]!r}: put headlines before --backends")
    # A name without blanks that is not there may be a folder still to be built; what follows a folder is a headline.
    folders = list(map(str, arguments.artefacts or []))
    if wrong := [text for place, text in enumerate(folders) if not is_folder(text) and (place or " " in text)]:
        raise LabError(f"--artefacts takes artefact folders, not {wrong[0]!r}: put headlines before --artefacts")


def check_batches(arguments: argparse.Namespace) -> None:
    """Raise LabError for what does not go with batches; `--csv` sets their size if it is not given."""
    if arguments.json and arguments.csv:
        raise LabError("give --json or --csv, not both")
    if arguments.batch and not (arguments.json or arguments.csv):
        raise LabError("--batch goes with --json or --csv: what is printed and drawn else is of single headlines")
    if arguments.csv:
        arguments.batch = arguments.batch or BATCH
    option = "--csv" if arguments.csv else "--batch"
    if arguments.batch and len(arguments.artefacts) > 1:
        raise LabError(f"{option} takes one back end: add --backends onnx, or --artefacts with one folder")
    if arguments.batch and arguments.runs:
        raise LabError(f"{option} runs every headline once: leave out --runs")


def is_file(text: str) -> bool:
    """Whether a headline is really the name of a file; most headlines are no possible name at all."""
    with contextlib.suppress(OSError, ValueError):
        return Path(text).is_file()
    return False


def is_folder(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(text).is_dir()
    return False


def read_headlines(arguments: argparse.Namespace, labels: list[str]) -> Iterator[Row]:
    """The headlines to run, one at a time. Raises LabError on the first that cannot be used, or if there is none."""
    if arguments.file:
        columns = headlines.options(arguments)
        yield from headlines.read(arguments.file, labels, **columns, no_labels=arguments.no_labels)
        return
    # The default headlines' labels are the default model's; another model is not judged by them.
    known = [(text, label if label in labels else None) for text, label in HEADLINES.items()]
    given = [(text, None) for text in arguments.headlines] or known
    for number, (text, label) in enumerate(given, start=1):
        if not text.strip():
            raise LabError(f"headline {number} is empty")
        yield Row(number, text, label)


def write_json(runners: list[Runner], tokenise: Tokeniser, given: Iterator[Row], arguments: argparse.Namespace) -> None:
    """One JSON object a headline, each line flushed so that an interruption loses nothing that was done."""
    from tqdm import tqdm

    for row in tqdm(given, unit=" headlines", file=sys.stderr, disable=None):
        tokens = tokenise([row.text])
        results = side_by_side.run_headline(runners, tokens, arguments.runs)
        length, dropped = tokens["input_ids"].shape[1], tokenise.dropped(row.text, tokens)
        print(report.json_line(row, length, dropped > 0, runners, results), flush=True)


def write_batches(
    runners: list[Runner], tokenise: Tokeniser, given: Iterator[Row], arguments: argparse.Namespace
) -> None:
    """A line a headline, flushed, of one back end that runs them in batches."""
    from tqdm import tqdm

    [runner] = runners
    table = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.csv:
        table.writerow(("text", "label", "score"))
    answers = stream.answers(given, tokenise, runner.backend, arguments.batch)
    said = f"batches of {arguments.batch}"
    with contextlib.closing(answers):
        for answer in tqdm(answers, said, unit=" headlines", file=sys.stderr, disable=None):
            with whole_line():
                if arguments.csv:
                    table.writerow(report.csv_row(answer, runner))
                    sys.stdout.flush()
                else:
                    print(report.json_line_of_batch(answer, runner), flush=True)


def write_report(
    runners: list[Runner], tokenise: Tokeniser, given: Iterator[Row], arguments: argparse.Namespace
) -> None:
    """Print every headline's top five, save its chart, and close with the summary."""
    tokenise_ms, chart_names, count = array("d"), charts.ChartNames(arguments.output), 0
    for count, row in enumerate(given, start=1):
        started = time.perf_counter()
        tokens = tokenise([row.text])
        tokenise_ms.append(1e3 * (time.perf_counter() - started))
        results = side_by_side.run_headline(runners, tokens, arguments.runs)
        for runner, (scores, _) in zip(runners, results, strict=True):
            runner.count(row.label, scores)
        report.print_headline(row.text, tokenise.dropped(row.text, tokens), runners, results)
        if count <= arguments.charts:
            path = chart_names.next(row.text)
            charts.save_confidence_chart(path, row.text, row.label, runners, results)
            print(f"\n>> Saved prediction confidence comparison to: {path}")
    if 0 < arguments.charts < count:
        print(f"\n(charts for the first {arguments.charts} headlines only: --charts {count} draws them all)")
    median_ms = sorted(tokenise_ms)[len(tokenise_ms) // 2]
    report.print_summary(runners, median_ms, count, arguments.runs, arguments.threads)


if __name__ == "__main__":
    run(main)
