"""The numbers: quality, agreement with FP32, latency, throughput, cold start, memory and size of every backend.

    python -m benchmark                          # about 10 minutes on two cores; --quick: under a minute
    python -m benchmark --data my.csv            # text,label CSV, AG News CSV or JSON lines
    python -m benchmark --peers                  # also what else one could pick: pip install -r requirements/peers.txt
    python -m benchmark --profile                # microseconds of every kind of operator, a chart
    python -m benchmark --floor                  # what this core could do at most, and each back end's share of it
    python -m benchmark --readme                 # put the committed results into README.md and docs/

Reads the quantised-model-* folders and the FP32 weights they came from (--model); writes results/HARDWARE/:
results.json, CSV files and charts. An interrupted run goes on with --resume.
"""

import argparse
import tempfile
from pathlib import Path

from benchmark import charts, documents, environment, floor, journal, peers, results, tables
from benchmark.journal import Journal
from benchmark.rows import ARTEFACTS, VARIANTS
from benchmark.run import Run
from benchmark.studies import profile
from lab04 import ROOT, LabError, console, options
from lab04.read import headlines
from lab04.read.texts import TEST_HEADLINES

CPU_ARTEFACTS = ARTEFACTS[:2]


def main() -> None:
    arguments = parse_arguments()
    if arguments.readme:
        for name in documents.FILES:
            documents.update(ROOT / name, arguments.output)
        return
    if arguments.profile:
        profile.run(arguments.artefacts or CPU_ARTEFACTS, arguments.threads[0], arguments.output)
        return
    if arguments.floor:
        folders = arguments.artefacts or [path for path in (*CPU_ARTEFACTS, *VARIANTS) if path.exists()]
        texts = [row.text for row in headlines.read(arguments.data, **headlines.options(arguments))]
        floor.run(folders, texts, arguments.output, arguments.tag)
        return
    if arguments.redraw:
        if (arguments.redraw / journal.FILE).exists():
            report(arguments.redraw, Journal(arguments.redraw / journal.FILE))
        else:  # committed results have no journal, and charts need none
            for chart in charts.save_all(arguments.redraw, results.load(arguments.redraw)):
                print(f"Wrote {chart}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(arguments, Path(scratch))
        try:
            run.measure()
        except KeyboardInterrupt:
            stopped = LabError(f"interrupted; what was measured is in {run.folder}: go on with --resume")
            stopped.exit_code = console.INTERRUPTED
            raise stopped from None
        finally:
            if run.journal.find("backend"):
                report(run.folder, run.journal, run.quality_texts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=console.first_line(__doc__))
    parser.add_argument("--artefacts", type=Path, nargs="+", help="artefact folders (default: quantised-model-*)")
    options.add_model_options(parser)
    parser.add_argument(
        "--data", type=Path, default=TEST_HEADLINES, help="labelled headlines (default: lora-news/headlines/test.csv)"
    )
    headlines.add_options(parser)
    parser.add_argument(
        "--threads", type=options.positive, nargs="+", help="CPU thread counts (default: 1 and all; with --quick: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="a rough look in under a minute")
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help=f"measure other quantisers too (without a name: all): {', '.join(peers.PEERS)}",
    )
    parser.add_argument("--random-weights", action="store_true", help="the weights mean nothing: measure speed only")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    parser.add_argument("--tag", default="", help="added to the name of the hardware's folder, as in bert-base")
    parser.add_argument("--seed", type=int, default=0, help="order of backends and choice of headlines (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--force", action="store_true", help="discard an interrupted run")
    parser.add_argument(
        "--redraw", type=Path, metavar="FOLDER", help="draw a run's charts again, where it ran also JSON and CSV"
    )
    parser.add_argument("--profile", action="store_true", help="instead: where a headline's time goes, by operator")
    parser.add_argument("--floor", action="store_true", help="instead: the least that a headline can cost on this core")
    parser.add_argument("--readme", action="store_true", help="write the tables of README.md and docs/")
    arguments = parser.parse_args()
    if not arguments.threads:
        arguments.threads = [1] if arguments.quick else sorted({1, environment.usable_cores()})
    return arguments


def report(folder: Path, run: Journal, texts: list[str] | None = None) -> None:
    """Write and print everything that follows from a journal, and, given its headlines, which of them changed.

    The journal itself holds none of the data.
    """
    measured = results.write(folder, run)
    written = charts.save_all(folder, measured)
    print(f"\n{environment.hardware_line(measured['environment'])}\n")
    for threads in map(str, measured["settings"]["threads"]):
        print(f"{tables.summary(measured, threads)}\n")
    print(f"Headlines a second, by batch size:\n\n{tables.throughput(measured)}")
    if texts is not None:
        changed = [] if measured["settings"]["random_weights"] else results.changed_rows(run, texts)
        results.write_changed(folder, changed)
        if changed:
            print(f"\n{tables.changed(changed)}")
    print(f"\nWrote {folder / results.RESULTS}, CSV files and {len(written)} charts beside it")
    suggest_next(measured)


def suggest_next(measured: dict) -> None:
    """What to do with the results: go on, put them into the documents, or, if they are no figures of ours, nothing."""
    if not measured["finished"]:
        console.suggest("python -m benchmark --resume")
    elif reason := results.why_not_shown(measured):
        print(f"This was {reason}: its figures go into no table of README.md or docs/")
    else:
        console.suggest("python -m benchmark --readme")


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
