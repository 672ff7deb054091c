"""Our own headlines: enough of every label, and no two alike within or between the files."""

import json
import runpy
from collections import Counter

from conftest import ROOT

from lab04.read import headlines
from lab04.read.texts import TEST_HEADLINES, TRAIN_HEADLINES, held_out_headlines

LABELS = {"Business", "Sci/Tech", "Sports", "World", "climate", "education", "health", "security", "tech-policy"}
CHECK = runpy.run_path(str(ROOT / "lora-news/check_headlines.py"))


def test_every_label_has_enough_headlines():
    train, test = (Counter(row.label for row in headlines.read(path)) for path in (TRAIN_HEADLINES, TEST_HEADLINES))
    assert set(train) == set(test) == LABELS
    assert min(train.values()) >= 1500
    assert set(test.values()) == {112}


def test_no_two_headlines_are_alike():
    # Looking at all pairs takes minutes, so the files as they are were looked at once.
    assert json.loads(CHECK["CHECKED"].read_text(encoding="utf-8")) == CHECK["fingerprints"](), (
        "the headlines changed: python lora-news/check_headlines.py looks at all pairs and records the files"
    )


def test_what_counts_as_alike():
    train, test = held_out_headlines()[:300], held_out_headlines()[300:]
    text = "School in Leeds closes after roof collapse leaves pupils without classrooms"
    swapped, told_anew = text.replace("Leeds", "Derby"), "Roof collapse closes school in Leeds"

    def found(*files: list[str]) -> set[tuple[str, str]]:
        return {(first, second) for _, first, second in CHECK["too_alike"](list(files)) if first in (text, told_anew)}

    assert found([*train, text, swapped], test) == {(text, swapped)}
    assert found([*train, text, told_anew], test) == set()  # one file may have both
    assert found([*train, text], [*test, told_anew]) == {(text, told_anew)}
    assert found([*train, text], test, [told_anew]) == {(text, told_anew)}
    assert found(train, [*test, text], [told_anew]) == set()  # neither is trained on
