"""The ONNX INT8 artefact outside this Python: what runs it on this machine, and whether it answers the same.

    python -m benchmark.studies.elsewhere                 # all targets; 2 GB into .elsewhere/ at first
    python -m benchmark.studies.elsewhere node browser    # these targets, beside what was seen of the others

Writes results/elsewhere/results.json, from which `python -m benchmark --readme` fills the table of examples/README.md.
tests/test_elsewhere.py asks the same targets with difficult texts, those that are set up already.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmark import environment, results
from benchmark.studies.fetching import Missing
from benchmark.studies.targets import EMULATED, EVERY, QUIET, TARGETS, Target
from lab04 import ROOT, LabError, artefact, console
from lab04.read.texts import held_out_headlines
from lab04.run import runtimes, scores

RESULTS = ROOT / "results" / "elsewhere" / "results.json"


def ask(target: Target, folder: Path, texts: list[str]) -> list[dict]:
    """The answers of a target: `probabilities` by label, `ms`, and `tokens` where it tells."""
    command, variables, _ = target
    environment_ = {**os.environ, **QUIET, **variables}
    words = [str(part) for part in (*command, folder, *texts)]
    done = subprocess.run(words, cwd=ROOT, env=environment_, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise LabError(f"{Path(words[0]).name} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def reference(folder: Path, texts: list[str]) -> tuple[list[int], np.ndarray]:
    """Token counts and probabilities [texts, labels] of an artefact here."""
    item = artefact.load(folder)
    tokenise = artefact.Tokeniser(item)
    with runtimes.open_backend(item) as backend:
        tokens = [tokenise([text]) for text in texts]
        logits = np.concatenate([backend.logits(row) for row in tokens])
    return [row["input_ids"].shape[1] for row in tokens], scores.softmax(logits)


def compare(answers: list[dict], labels: list[str], expected: np.ndarray) -> dict:
    """Same labels, largest difference of a probability, median ms."""
    found = np.array([[answer["probabilities"][label] for label in labels] for answer in answers])
    return {
        "headlines": len(expected),
        "same": int((found.argmax(axis=1) == expected.argmax(axis=1)).sum()),
        "difference": float(np.abs(found - expected).max()),
        "ms": float(np.median([answer["ms"] for answer in answers])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.elsewhere", description=console.first_line(__doc__)
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - TARGETS.keys():
        raise LabError(f"no target {', '.join(sorted(unknown))}: choose of {', '.join(TARGETS)}")
    folder, texts = ROOT / "quantised-model-optimum", held_out_headlines()
    labels, (_, expected) = artefact.load(folder).labels, reference(folder, texts)
    seen = json.loads(RESULTS.read_text(encoding="utf-8"))["targets"] if RESULTS.exists() else {}
    for name in arguments.targets or TARGETS:
        title, prepare = TARGETS[name]
        try:
            target = prepare(True)
        except Missing as error:
            print(f"   {name}: {error}", file=sys.stderr)
            continue
        every = EVERY if name in EMULATED else 1
        answers = ask(target, folder, texts[::every])
        row = compare(answers, labels, expected[::every])
        versions = target[-1]
        if "image_mb" in answers[0]:
            versions += f", {answers[0]['image_mb']:.0f} MB, ready in {answers[0]['start_s']:.1f} s"
        seen[name] = {"title": title, "versions": versions, **row, "emulated": name in EMULATED}
        print(f"   {name}: {row['same']} of {row['headlines']} labels, {row['difference']:.1e}, {row['ms']:.1f} ms")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        kept = {other: seen[other] for other in TARGETS if other in seen}
        results.save_json(RESULTS, {"format": results.FORMAT, "environment": environment.describe(), "targets": kept})
    print(f"Wrote {RESULTS.relative_to(ROOT)}")
    print("Next: python -m benchmark --readme")


if __name__ == "__main__":
    console.run(main)
