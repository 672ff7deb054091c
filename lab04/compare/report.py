"""What is printed: a lab's closing lines, and predict.py's top fives, JSON lines, table and summary."""

import json
from pathlib import Path

import numpy as np

from lab04 import one_line
from lab04.artefact import Artefact
from lab04.compare.side_by_side import Runner
from lab04.console import as_run_here, from_here, suggest
from lab04.read.classifier import Classifier
from lab04.read.headlines import Row
from lab04.run.scores import top
from lab04.run.stream import Answer

Result = tuple[np.ndarray, float]  # a headline's probabilities [labels] and milliseconds from one backend


def close_lab(fp32: Classifier, built: Artefact, output: Path, next_command: str) -> None:
    """Print sizes before and after, what was written, and what comes next.

    `built` was read before it took the place of `output`: by now another build may have taken that.
    """
    before_mb = sum(p.numel() * p.element_size() for p in fp32.model.parameters()) / 1e6
    files = built.model_file.name + (f" and {built.manifest['recheck']['graph']}" if "recheck" in built.options else "")
    print(f"   FP32 weights {before_mb:.1f} MB -> {files} {built.model_mb:.1f} MB")
    print(f"Wrote {from_here(output)}")
    suggest(next_command)


def counted(number: int, thing: str) -> str:
    """`1 headline`, `2 headlines`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def json_line(row: Row, tokens: int, truncated: bool, runners: list[Runner], results: list[Result]) -> str:
    """One headline as a JSON object: what every backend says, by its name."""
    said = {}
    for runner, (scores, ms) in zip(runners, results, strict=True):
        said[runner.name] = label_and_probabilities(runner, scores) | {"ms": None if runner.reason else ms}
        if runner.backend.rechecked is not None:
            said[runner.name]["rechecked"] = runner.last_rechecked()
    record = {"text": row.text, "tokens": tokens, "truncated": truncated, "label": row.label, "backends": said}
    return json.dumps(record)


def json_line_of_batch(answer: Answer, runner: Runner) -> str:
    """The same of a headline that ran in a batch: the time is the batch's, under a name of its own."""
    said = label_and_probabilities(runner, answer.probabilities)
    said |= {"batch": answer.batch, "batch_ms": None if runner.reason else answer.batch_ms}
    if answer.rechecked is not None:
        said["rechecked"] = answer.rechecked
    facts = {"text": answer.row.text, "tokens": answer.tokens, "truncated": answer.truncated}
    return json.dumps({**facts, "label": answer.row.label, "backends": {runner.name: said}})


def label_and_probabilities(runner: Runner, scores: np.ndarray) -> dict:
    """The best label, its number and the probabilities [labels] by their labels."""
    labels, best = runner.artefact.labels, int(scores.argmax())
    return {"label": labels[best], "id": best, "probabilities": dict(zip(labels, scores.tolist(), strict=True))}


def csv_row(answer: Answer, runner: Runner) -> tuple[str, str, str]:
    """Text, label and score of a headline."""
    best = int(answer.probabilities.argmax())
    return answer.row.text, runner.artefact.labels[best], f"{answer.probabilities[best]:.4f}"


def print_headline(text: str, dropped: int, runners: list[Runner], results: list[Result]) -> None:
    """Print a headline and every backend's top five, as the original lab did."""
    print(f"\nPredicting: {one_line(text)!r}")
    if dropped:
        print(f"(too long: the last {counted(dropped, 'token')} are not read)")
    for runner, (scores, ms) in zip(runners, results, strict=True):
        labels, best = runner.artefact.labels, top(scores)
        took = "a check of its labels, no speed claimed" if runner.reason else f"{ms / 1e3:.4f} sec"
        took += ", rechecked" * runner.last_rechecked()
        print(f"\n[{runner.name}]: {labels[best[0]]} ({best[0]}) | {took}")
        print("Top 5 Predictions:" if len(best) == 5 else "Predictions:")
        width = max(12, *(len(labels[index]) for index in best))
        for index in best:
            print(f"  - {labels[index]:<{width}} {scores[index]:.4f}")


def print_summary(runners: list[Runner], tokenise_ms: float, headlines: int, runs: int, threads: int) -> None:
    """Print one row a backend: what it is, what it weighs, how fast and how right it was."""
    from tabulate import tabulate

    columns = ["Backend", "Precision", "Device", "Size\nMB", "p50\nms", "p95\nms", "Throughput\nsamples/s"]
    columns += ["Correct", "As FP32*", "× FP32*"]
    print(
        f"\nSummary: {counted(headlines, 'headline')}, {counted(runs, 'timed call')} each, batch 1, no padding, "
        f"{counted(threads, 'CPU thread')}"
    )
    print(tabulate(map(summary_row, runners), columns, tablefmt="plain", disable_numparse=True))
    print(f"\nTokenising took {tokenise_ms:.3f} ms a headline (median), apart from these times; all got the same ids.")
    checked = {checked_on(runner.artefact): runner.name for runner in runners}
    on = "; ".join(f"{what} ({name})" if len(checked) > 1 else what for what, name in checked.items())
    print(f"* labels as the FP32 weights', and times as fast as they are in PyTorch: measured when built, on {on}")
    if any(runner.artefact.manifest["check"].get("busy") for runner in runners):
        print("? other programs ran while that was measured: build it again on a quiet machine")
    for runner in runners:
        if runner.backend.rechecked is not None:
            print(f"{runner.name}: {runner.rechecked / headlines:.1%} of the headlines ran again in its second graph")
        if runner.reason:
            print(as_run_here(f"{runner.name}: {runner.reason}"))


def checked_on(artefact: Artefact) -> str:
    """What an artefact was compared with FP32 on."""
    texts, number = artefact.manifest.get("texts", {}), artefact.manifest["check"]["headlines"]
    return f"{number} texts of {texts['file']}" if "checked" in texts else f"the lab's {number} test headlines"


def summary_row(runner: Runner) -> tuple[str, ...]:
    manifest, check = runner.artefact.manifest, runner.artefact.manifest["check"]
    p50, p95 = np.percentile(runner.times_ms, (50, 95))
    per_second = 1e3 / np.mean(runner.times_ms)
    times = (
        ("–", "–", "–")
        if runner.reason
        else (f"{p50:.2f}", f"{p95:.2f}", f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.2g}")
    )
    graph = manifest["files"].get(manifest.get("graph", ""))
    return (
        runner.name,
        manifest["precision"],
        runner.backend.device,
        "–" if runner.reason and graph is None else f"{runner.artefact.model_mb:.1f}",
        *times,
        f"{runner.correct} of {runner.labelled}" if runner.labelled else "–",
        f"{check['agreement']:.1%}",
        "–"
        if runner.reason or "speed_up" not in check
        else f"{check['speed_up']:.1f}" + "?" * check.get("busy", False),
    )
