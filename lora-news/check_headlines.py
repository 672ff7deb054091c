"""Check that no two of our headlines are near-duplicates, and record which files were checked.

    python lora-news/check_headlines.py                       # after a change of headlines/*.csv
    python lora-news/check_headlines.py --apart measured.csv  # and none of training near one that is measured on

Prints every pair that is too alike; if there is none, writes headlines/checked.json, which a test compares with the
files. Takes a minute or two.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HEADLINES = Path(__file__).resolve().parent / "headlines"
sys.path.insert(0, str(HEADLINES.parent.parent))  # the package it shares with the labs

from lab04 import LabError, console  # noqa: E402
from lab04.read import headlines  # noqa: E402

CHECKED = HEADLINES / "checked.json"
BLOCK = 500  # headlines at a time: all at once take six gigabytes
# Cosines of character 3- to 5-grams. The same sentence with one noun swapped is above 0.8.
WITHIN, BETWEEN = 0.75, 0.45  # within a file of ours; between training headlines and test or measured ones


def main() -> None:
    parser = argparse.ArgumentParser(description=console.first_line(__doc__))
    parser.add_argument("--apart", type=Path, help="a file of headlines that those of training may not resemble either")
    apart = parser.parse_args().apart
    files = {name: [row.text for row in headlines.read(HEADLINES / name)] for name in ("train.csv", "test.csv")}
    if apart:
        files[str(apart)] = [row.text for row in headlines.read(apart)]
    pairs = list(too_alike(list(files.values())))
    for score, first, second in pairs:
        print(f"{score:.2f}  {first}\n      {second}")
    if pairs:
        raise LabError(f"{len(pairs)} pairs are too alike: write one of each anew")
    CHECKED.write_text(json.dumps(fingerprints(), indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {CHECKED}")


def fingerprints() -> dict[str, str]:
    """SHA-256 of our two files, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(HEADLINES.glob("*.csv"))}


def too_alike(files: list[list[str]]) -> Iterator[tuple[float, str, str]]:
    """Pairs of texts above the limits with their cosine; `files`: training, test and perhaps measured texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
    vectorizer.fit([text for texts in files for text in texts])
    vectors = [vectorizer.transform(texts) for texts in files]
    # Test and measured headlines may be near each other, and measured ones repeat themselves: none is trained on.
    for number, other in [(0, 0), (1, 1), *((0, other) for other in range(1, len(files)))]:
        for start in range(0, len(files[number]), BLOCK):
            cosines = (vectors[number][start : start + BLOCK] @ vectors[other].T).toarray()
            if number == other:
                cosines = np.triu(cosines, start + 1)  # each pair once, and none with itself
            for row, column in np.argwhere(cosines >= (WITHIN if number == other else BETWEEN)):
                yield cosines[row, column], files[number][start + row], files[other][column]


if __name__ == "__main__":
    console.run(main)
