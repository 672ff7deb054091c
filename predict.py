"""Compare the quantised backends on a few headlines: top five, times, a chart each, and a summary.

    python predict.py                                  # the lab's three headlines, about 5 seconds
    python predict.py "Your headline" "Another one"
    python predict.py --file my.csv                    # one headline a line, or CSV with text[,label]
    python predict.py --json --file - < my.txt         # for the next program in the pipe

Reads the quantised-model-* folders; running them needs neither `transformers` nor `peft`.
Exit codes: 0 done, 2 wrong input or artefact, 130 interrupted, 141 the reader of our output stopped reading.
"""

import argparse
import contextlib
import itertools
import json
import random
import re
import sys
import time
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab04 import ROOT, LabError  # before numpy: it says in one line that no library is installed

# isort: split
import numpy as np

from lab04 import artefact, backends, charts, headlines, lab
from lab04.backend import Backend, Unavailable
from lab04.consistency import softmax, top

ARTEFACTS = {
    "torch": "quantised-model-torch",
    "onnx": "quantised-model-optimum",
    "tensorrt": "quantised-model-tensorrt",
}
HEADLINES = {
    "Cybersecurity breach exposes NHS patient records": "security",
    "AI tutor program set to roll out in Scottish schools": "education",
    "Climate report warns UK cities face extreme flooding by 2030": "climate",
}
WARM_UPS = 5  # the first calls of TorchScript and ONNX Runtime prepare kernels and memory: they are not timed
RUNS = 30  # timed calls of every backend for a headline given by hand; a file's headlines are run once each
CHARTS = 20


@dataclass
class Headline:
    """A headline and, where the input names it, the label it should get."""

    text: str
    label: str | None = None


@dataclass
class Runner:
    """One backend of the comparison and what was measured of it.

    `reason` says why it runs as a mere check of its labels, if so: its times then say nothing of its real device.
    """

    artefact: artefact.Artefact
    backend: Backend
    reason: str = ""
    times_ms: array = field(default_factory=lambda: array("d"))
    labelled: int = 0
    correct: int = 0
    rechecked: int = 0

    def last_rechecked(self) -> bool:
        """Whether the backend's last headline was decided by its second graph."""
        return self.backend.rechecked is not None and bool(self.backend.rechecked[0])

    @property
    def name(self) -> str:
        """What tables and charts call it."""
        return "TensorRT's graph on the CPU" if self.reason else self.backend.name


def main() -> None:
    arguments = parse_arguments()
    artefacts = [artefact.load(folder) for folder in arguments.artefacts]
    artefact.check_together(artefacts)
    given = read_headlines(arguments, artefacts[0].labels)
    # Wrong input is reported before anything is loaded; a file may be endless, so only its first line is known by then.
    known = list(itertools.islice(given, 1 if arguments.file else None))
    given = itertools.chain(known, given)
    tokenise = artefact.Tokeniser(artefacts[0])
    runners = [open_runner(item, arguments.threads) for item in artefacts]
    warm_up(runners, tokenise)
    if arguments.json:
        write_json(runners, tokenise, given, arguments)
    else:
        write_report(runners, tokenise, given, arguments)


def natural(text: str) -> int:
    """An argument that must be a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("headlines", nargs="*", metavar="HEADLINE", help="headlines (default: the lab's three)")
    add("--file", help="headlines: CSV, TSV, JSON lines, JSON, or one a line; - reads stdin")
    headlines.add_options(parser)
    add("--backends", nargs="+", choices=list(ARTEFACTS), default=list(ARTEFACTS), help="which to run (default: all)")
    add("--artefacts", nargs="+", type=Path, metavar="FOLDER", help="artefact folders to run instead of the lab's own")
    add("--output", type=Path, default=Path(), help="folder for the charts (default: the current one)")
    add(
        "--threads", type=lab.positive, default=backends.DEFAULT_THREADS, help="CPU threads each (default: %(default)s)"
    )
    add("--runs", type=lab.positive, help=f"timed calls a headline (default: {RUNS}, with --file 1)")
    add("--charts", type=natural, default=CHARTS, help="draw at most this many charts (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object a headline on stdout and nothing else; no charts")
    arguments = parser.parse_args()
    if arguments.headlines and arguments.file:
        raise LabError("give headlines or --file, not both")
    if named := [text for text in arguments.headlines if text != "-" and is_file(text)]:
        raise LabError(f"{named[0]} is a file, not a headline: python predict.py --file {named[0]}")
    arguments.artefacts = arguments.artefacts or [ROOT / ARTEFACTS[name] for name in arguments.backends]
    arguments.runs = arguments.runs or (1 if arguments.file else RUNS)
    return arguments


def is_file(text: str) -> bool:
    """Whether a headline is really the name of a file; most headlines are no possible name at all."""
    with contextlib.suppress(OSError, ValueError):
        return Path(text).is_file()
    return False


# --- Input ------------------------------------------------------------------------------------------------


def read_headlines(arguments: argparse.Namespace, labels: list[str]) -> Iterator[Headline]:
    """The headlines to run, one at a time. Raises LabError on the first that cannot be used, or if there is none."""
    if arguments.file:
        for row in headlines.read(arguments.file, labels, **headlines.options(arguments)):
            yield Headline(row.text, row.label)
        return
    # The default headlines' labels are the default model's; another model is not judged by them.
    known = [(text, label if label in labels else None) for text, label in HEADLINES.items()]
    given = [(text, None) for text in arguments.headlines] or known
    for number, (text, label) in enumerate(given, start=1):
        if not text.strip():
            raise LabError(f"headline {number} is empty")
        yield Headline(text, label)


# --- Running ----------------------------------------------------------------------------------------------


def open_runner(item: artefact.Artefact, threads: int) -> Runner:
    """The artefact's backend, or, where its device is missing, its graph on the CPU as a check of its labels."""
    try:
        return Runner(item, backends.open_backend(item, threads))
    except Unavailable as error:
        return Runner(item, backends.open_fp16_check(item, threads), reason=str(error))


def warm_up(runners: list[Runner], tokenise: artefact.Tokeniser) -> None:
    for text in HEADLINES:
        tokens = tokenise([text])
        for runner in runners:
            for _ in range(0 if runner.reason else WARM_UPS):
                runner.backend.logits(tokens)


def run_headline(runners: list[Runner], tokens: artefact.Tokens, runs: int) -> list[tuple[np.ndarray, float]]:
    """Probabilities [labels] and median milliseconds of every backend for one headline, batch 1, unpadded.

    Every round calls the backends in a new random order, so that none is always measured in another's wake. One that
    runs as a mere check of its labels is called once: no time of it is shown.
    """
    times_ms: list[list[float]] = [[] for _ in runners]
    logits = [np.empty(0)] * len(runners)
    for round_number in range(runs):
        places = [place for place, runner in enumerate(runners) if round_number == 0 or not runner.reason]
        for place in random.sample(places, len(places)):
            started = time.perf_counter()
            logits[place] = runners[place].backend.logits(tokens)
            times_ms[place].append(1e3 * (time.perf_counter() - started))
    for runner, times in zip(runners, times_ms, strict=True):
        runner.times_ms.extend(times)
    return [(softmax(row[0]), float(np.median(times))) for row, times in zip(logits, times_ms, strict=True)]


def count_correct(runner: Runner, headline: Headline, probabilities: np.ndarray) -> None:
    if headline.label is not None:
        runner.labelled += 1
        runner.correct += runner.artefact.labels[int(probabilities.argmax())] == headline.label


# --- Output -----------------------------------------------------------------------------------------------


def write_json(
    runners: list[Runner], tokenise: artefact.Tokeniser, headlines: Iterator[Headline], arguments: argparse.Namespace
) -> None:
    """One JSON object a headline, each line flushed so that an interruption loses nothing that was done."""
    from tqdm import tqdm

    for headline in tqdm(headlines, unit=" headlines", file=sys.stderr, disable=None):
        tokens = tokenise([headline.text])
        record = {
            "text": headline.text,
            "tokens": tokens["input_ids"].shape[1],
            "truncated": tokenise.dropped(headline.text) > 0,
            "label": headline.label,
            "backends": {},
        }
        for runner, (scores, ms) in zip(runners, run_headline(runners, tokens, arguments.runs), strict=True):
            best = int(scores.argmax())
            record["backends"][runner.backend.name] = {
                "label": runner.artefact.labels[best],
                "id": best,
                "probabilities": dict(zip(runner.artefact.labels, scores.tolist(), strict=True)),
                "ms": None if runner.reason else ms,
            }
            if runner.backend.rechecked is not None:
                record["backends"][runner.backend.name]["rechecked"] = runner.last_rechecked()
        print(json.dumps(record), flush=True)


def write_report(
    runners: list[Runner], tokenise: artefact.Tokeniser, headlines: Iterator[Headline], arguments: argparse.Namespace
) -> None:
    """Print every headline's top five as the original lab did, save its chart, and close with the summary."""
    tokenise_ms, chart_names, count = array("d"), ChartNames(arguments.output), 0
    for count, headline in enumerate(headlines, start=1):
        started = time.perf_counter()
        tokens = tokenise([headline.text])
        tokenise_ms.append(1e3 * (time.perf_counter() - started))
        print(f"\nPredicting: {charts.one_line(headline.text)!r}")
        if dropped := tokenise.dropped(headline.text):
            print(f"(too long: the last {dropped} tokens are not read)")
        results = run_headline(runners, tokens, arguments.runs)
        for runner, (scores, ms) in zip(runners, results, strict=True):
            count_correct(runner, headline, scores)
            runner.rechecked += runner.last_rechecked()
            print_top_five(runner, scores, ms)
        if count <= arguments.charts:
            path = chart_names.next(headline.text)
            labels, rows = runners[0].artefact.labels, chart_rows(runners, results)
            charts.save_confidence_chart(path, headline.text, labels, rows, headline.label)
            print(f"\n>> Saved prediction confidence comparison to: {path}")
    if 0 < arguments.charts < count:
        print(f"\n(charts for the first {arguments.charts} headlines only: --charts {count} draws them all)")
    print_summary(runners, float(np.median(tokenise_ms)), count, arguments)


def print_top_five(runner: Runner, scores: np.ndarray, ms: float) -> None:
    labels, best = runner.artefact.labels, top(scores)
    took = "a check of its labels, no speed claimed" if runner.reason else f"{ms / 1e3:.4f} sec"
    took += ", rechecked" * runner.last_rechecked()
    print(f"\n[{runner.name}]: {labels[best[0]]} ({best[0]}) | {took}")
    print("Top 5 Predictions:" if len(best) == 5 else "Predictions:")
    width = max(12, *(len(labels[index]) for index in best))
    for index in best:
        print(f"  - {labels[index]:<{width}} {scores[index]:.4f}")


def chart_rows(runners: list[Runner], results: list[tuple[np.ndarray, float]]) -> list[dict]:
    """What a chart shows of every backend."""
    return [
        {
            "backend": runner.artefact.backend,
            "name": runner.name,
            "note": "labels only" if runner.reason else f"{ms:.1f} ms" + ", rechecked" * runner.last_rechecked(),
            "probabilities": scores,
        }
        for runner, (scores, ms) in zip(runners, results, strict=True)
    ]


class ChartNames:
    """File names of the charts; headlines that begin alike get a number, so that none overwrites another."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot write to {folder}: {error.strerror}") from error

    def next(self, text: str) -> Path:
        ascii_text = unicodedata.normalize("NFKD", text[:20]).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "_", ascii_text.lower()).strip("_") or "headline"
        self._used[slug] = self._used.get(slug, 0) + 1
        number = f"_{self._used[slug]}" if self._used[slug] > 1 else ""
        return self._folder / f"confidence_{slug}{number}.png"


def print_summary(runners: list[Runner], tokenise_ms: float, count: int, arguments: argparse.Namespace) -> None:
    """Print one row a backend: what it is, what it weighs, how fast and how right it was."""
    from tabulate import tabulate

    columns = ["Backend", "Precision", "Device", "Size\nMB", "p50\nms", "p95\nms", "Throughput\nsamples/s"]
    columns += ["Correct", "As FP32*", "× FP32*"]
    print(
        f"\nSummary: {count} headline{'s' * (count != 1)}, {arguments.runs} timed calls each, batch 1, no padding, "
        f"{arguments.threads} CPU thread{'s' * (arguments.threads != 1)}"
    )
    print(tabulate(map(summary_row, runners), columns, tablefmt="plain", disable_numparse=True))
    print(f"\nTokenising took {tokenise_ms:.3f} ms a headline (median), apart from these times; all got the same ids.")
    check = runners[0].artefact.manifest["check"]
    print(
        f"* same label as the FP32 weights, and times as fast as they are in PyTorch, on {check['headlines']} test "
        "headlines, measured when it was built"
    )
    for runner in runners:
        if runner.backend.rechecked is not None:
            print(
                f"{runner.backend.name}: {runner.rechecked / count:.1%} of the headlines ran again in its second graph"
            )
        if runner.reason:
            print(lab.as_run_here(f"{runner.name}: {runner.reason}"))


def summary_row(runner: Runner) -> tuple[str, ...]:
    manifest = runner.artefact.manifest
    p50, p95 = np.percentile(runner.times_ms, (50, 95))
    times = ("–", "–", "–") if runner.reason else (f"{p50:.2f}", f"{p95:.2f}", f"{1e3 / np.mean(runner.times_ms):.0f}")
    return (
        runner.name,
        manifest["precision"],
        runner.backend.device,
        f"{runner.artefact.model_mb:.1f}",
        *times,
        f"{runner.correct} of {runner.labelled}" if runner.labelled else "–",
        f"{manifest['check']['agreement']:.1%}",
        "–" if runner.reason or "speed_up" not in manifest["check"] else f"{manifest['check']['speed_up']:.1f}",
    )


if __name__ == "__main__":
    lab.run(main)
