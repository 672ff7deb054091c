"""What the README shows of single headlines: `python -m benchmark.studies.single_headlines`. Half a minute.

Runs predict.py over our own test headlines and keeps those whose FP32 label INT8 changed, with everyone's
probabilities, and what it prints for the lab's first headline. Writes results/HARDWARE-headlines/: results.json and
changed.png. Labels do not depend on how busy the machine is.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmark import environment, results
from benchmark.charts.changed import draw_changed
from lab04 import ROOT, LabError, console, labs
from lab04.read import classifier, headlines
from lab04.read.texts import TEST_HEADLINES
from lab04.run.scores import softmax

INT8 = [ROOT / lab.folder for lab in labs.LABS if lab.precision == "INT8"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.single_headlines", description=console.first_line(__doc__)
    )
    parser.add_argument("--artefacts", type=Path, nargs="+", default=INT8, help="default: the two INT8 labs'")
    parser.add_argument("--model", default=classifier.DEFAULT_MODEL, help="what they were built from")
    parser.add_argument("--data", type=Path, default=TEST_HEADLINES, help="labelled headlines (default: ours)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()

    here = environment.describe()
    folder = arguments.output / environment.folder_name(here, "headlines")
    fp32 = classifier.load(arguments.model)
    measured = {
        "format": results.FORMAT,
        "environment": here,
        "weights_sha256": fp32.weights_sha256,
        "data": arguments.data.name,
        "predicted": predict(arguments.artefacts)[0],
        "changed": changed_headlines(fp32, arguments.artefacts, arguments.data),
    }
    folder.mkdir(parents=True, exist_ok=True)
    results.save_json(folder / results.RESULTS, measured)
    draw_changed(folder, measured)
    print(f"{len(measured['changed'])} of the headlines of {arguments.data.name} get another label than in FP32")
    print(f"Wrote {folder}")
    console.suggest("make readme")


def predict(artefacts: list[Path], *arguments: object) -> list[dict]:
    """What `predict.py --json` says, one object a headline; without arguments of the lab's own three."""
    command = [sys.executable, ROOT / "predict.py", "--json", *arguments, "--artefacts", *artefacts]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ended.returncode:
        raise LabError((ended.stderr.strip().splitlines() or ["predict.py failed"])[-1])
    return [json.loads(line) for line in ended.stdout.splitlines()]


def changed_headlines(fp32: classifier.Classifier, artefacts: list[Path], data: Path) -> list[dict]:
    """The headlines that an artefact labels otherwise than FP32, the clearest to FP32 first.

    Each with `text`, `label` (the right one) and `probabilities`: label to 0..1 by name of the back end, FP32 first.
    """
    texts, _ = headlines.read_labelled(data, fp32.labels)
    rows = []
    for said, scores in zip(predict(artefacts, "--file", data), softmax(fp32.logits(texts)), strict=True):
        probabilities = {"FP32": dict(zip(fp32.labels, scores.round(4).tolist(), strict=True))}
        for name, answer in said["backends"].items():
            probabilities[name] = {label: round(score, 4) for label, score in answer["probabilities"].items()}
        best = {max(scores, key=lambda label: scores[label]) for scores in probabilities.values()}
        if len(best) > 1:
            rows.append({"text": said["text"], "label": said["label"], "probabilities": probabilities})
    return sorted(rows, key=lambda row: -max(row["probabilities"]["FP32"].values()))


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
