"""What a constant input scale buys and costs, beside one a call: `python -m benchmark.studies.static`.

Runs the dynamic and the static artefact of both INT8 labs over texts like those they were prepared on and over texts
far from them, alone and in batches of random neighbours. Writes results/HARDWARE-static/results.json, which
docs/int8.md shows.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmark import environment, results, study_tables
from benchmark.measures import batch_change
from lab04 import ROOT, LabError, artefact, console, labs, options
from lab04.artefact import contract
from lab04.compare.closing_check import run_alone, run_batches
from lab04.read import classifier, headlines
from lab04.read.texts import TEST_HEADLINES, held_out_headlines
from lab04.run import runtimes

INT8 = [lab for lab in labs.LABS if lab.precision == "INT8"]
FOLDERS = [ROOT / f"{lab.folder}{ending}" for lab in INT8 for ending in ("", "-static")]
BATCHES = (8, 32)
SOME = 400  # texts of a kind at most, other than --data, which all run
GERMAN = [
    "Bundestag streitet über den Haushalt für das kommende Jahr",
    "Zahl der Wärmepumpen in Neubauten steigt weiter",
    "Forscher warnen vor Dürre im Osten des Landes",
    "Krankenhäuser fordern mehr Geld für Pflegekräfte",
    "Angriff auf das Netz einer Universität legt Prüfungen lahm",
    "Schulen bekommen neue Rechner erst im Herbst",
    "Autobauer streicht Stellen im Werk an der Donau",
    "Zentralbank lässt den Leitzins unverändert",
    "Neues Teleskop findet Wasser auf fernem Planeten",
    "Künstliche Intelligenz hilft Ärzten bei der Diagnose",
    "Hochwasser an der Elbe erreicht den höchsten Stand seit Jahren",
    "Gericht verbietet die Abholzung des alten Waldes",
    "Studierende klagen über teure Wohnungen in den Städten",
    "Verhandlungen über den Frieden beginnen in Genf",
    "Sparkassen melden Störung beim Bezahlen mit Karte",
    "Impfung gegen Grippe für Kinder wird empfohlen",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.studies.static", description=console.first_line(__doc__))
    options.add_model_options(parser)
    parser.add_argument("--data", type=Path, default=TEST_HEADLINES, help="headlines (default: test.csv)")
    parser.add_argument("--titles", type=Path, help="also texts of another source, such as AG News' titles")
    headlines.add_options(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()
    built = [artefact.load(folder) for folder in FOLDERS if folder.exists()]
    if len(built) < 2:
        raise LabError(
            "nothing to compare: run python lab04-optimum.py, and again with --static --output FOLDER-static"
        )

    here = environment.describe()
    folder = arguments.output / environment.folder_name(here, "static")
    fp32 = classifier.load(arguments.model, arguments.labels)
    contract.check_together(built)
    if built[0].manifest["weights_sha256"] != fp32.weights_sha256:
        raise LabError(f"{built[0].folder} comes from other weights than {arguments.model}: build it again from these")
    read = [row.text for row in headlines.read(arguments.data, **headlines.options(arguments))]
    kinds = {arguments.data.name: read} | dict(far_texts(fp32, arguments.titles))
    rows = [row for kind, texts in kinds.items() for row in compare(kind, texts, built, fp32)]
    folder.mkdir(parents=True, exist_ok=True)
    measured = {
        "format": results.FORMAT,
        "environment": here,
        "data": arguments.data.name,
        "weights_sha256": fp32.weights_sha256,
        "static": rows,
    }
    results.save_json(folder / results.RESULTS, measured)
    print(study_tables.static(measured))
    print(f"Wrote {folder}")
    console.suggest("make readme")


def far_texts(fp32: classifier.Classifier, titles: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Kinds of texts that no scale was made from, by name: each further from our headlines."""
    ours, chance = held_out_headlines(), random.Random(0)
    if titles:
        rows = [row.text for row in headlines.read(titles)]
        yield "titles of another source", chance.sample(rows, min(SOME, len(rows)))
    yield "of 128 tokens", [" ".join(chance.choices(ours, k=20)) for _ in range(SOME // 4)]
    words = sorted({word for text in ours for word in text.split()})
    yield "single words", chance.sample(words, min(SOME, len(words)))
    yield "German", GERMAN
    vocabulary = [token for token in sorted(fp32.tokenizer.get_vocab()) if token.isalnum()]
    yield "random tokens", [" ".join(chance.choices(vocabulary, k=12)) for _ in range(SOME)]


def compare(kind: str, texts: list[str], built: list[artefact.Artefact], fp32: classifier.Classifier) -> list[dict]:
    """One row an artefact: error of its logits as a share of their spread, labels changed, and what batches change."""
    reference, order = fp32.logits(texts), random.Random(0).sample(range(len(texts)), len(texts))
    mixed, rows = [texts[index] for index in order], []
    for item in built:
        tokenise = artefact.Tokeniser(item)
        with runtimes.open_backend(item) as backend:
            alone = run_alone(backend, tokenise, texts)
            batches = {size: run_batches(backend, tokenise, mixed, size) for size in BATCHES}
        error = np.sqrt(np.mean((alone - reference) ** 2)) / reference.std(axis=0).mean()
        rows.append(
            {"texts": kind, "count": len(texts), "artefact": item.title, "error": float(error)}
            | {"changed": int((alone.argmax(axis=1) != reference.argmax(axis=1)).sum())}
            | {"batches": {str(size): batch_change(alone[order], logits) for size, logits in batches.items()}}
        )
    return rows


if __name__ == "__main__":
    console.run(main)
