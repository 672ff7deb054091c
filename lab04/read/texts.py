"""The texts a lab looks at: our headlines, or a user's, some to prepare the weights and the others to check."""

import argparse
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from lab04 import ROOT, LabError
from lab04.read import headlines

TRAIN_HEADLINES = ROOT / "lora-news" / "headlines" / "train.csv"
TEST_HEADLINES = ROOT / "lora-news" / "headlines" / "test.csv"
MIN_TEXTS, MAX_TEXTS = 32, 2000  # of a user's; half prepare and half check, and more of them gain nothing
MAX_ROWS = 1_000_000  # looked at for them: a pipe may have no end


def held_out_headlines() -> list[str]:
    """The headlines every lab checks its result on. Agreement with FP32 needs no labels, so they serve any model."""
    return [row.text for row in headlines.read(TEST_HEADLINES)]


def training_headlines() -> list[str]:
    """The headlines that stand in for a user's own texts where a network is prepared."""
    return [row.text for row in headlines.read(TRAIN_HEADLINES)]


@dataclass(frozen=True)
class Texts:
    """Texts of a user's for preparing and for checking, and what the manifest says of them; None: our headlines."""

    prepare: list[str] | None
    check: list[str]
    record: dict


def choose(arguments: argparse.Namespace) -> Texts:
    """Our headlines, or a user's texts, every other one for the check. Raises LabError if there are too few."""
    file = arguments.texts
    if file is None:
        return Texts(None, held_out_headlines(), {"file": "the lab's own headlines"})
    rows = headlines.read(file, **headlines.options(arguments), no_labels=True)
    found = spread(row.text for row in itertools.islice(rows, MAX_ROWS))
    if len(found) < MIN_TEXTS:
        raise LabError(
            f"{file} has {len(found)} different texts: at least {MIN_TEXTS} are needed, better some hundreds"
        )
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    prepare, check = found[::2], found[1::2]
    record = {"file": file.name, "sha256": digest, "prepared": len(prepare), "checked": len(check)}
    return Texts(prepare, check, record)


def spread(texts: Iterable[str]) -> list[str]:
    """At most MAX_TEXTS different texts, evenly from first to last: a file may be sorted by label."""
    kept: dict[str, None] = {}
    stride = 1
    for number, text in enumerate(texts):
        if number % stride == 0:
            kept[text] = None
            if len(kept) > MAX_TEXTS:
                kept, stride = dict.fromkeys(list(kept)[::2]), 2 * stride
    return list(kept)
