"""Our own headlines: enough of every label, and no two alike within or between the files."""

from collections import Counter

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from lab04.read import headlines
from lab04.read.texts import TEST_HEADLINES, TRAIN_HEADLINES, held_out_headlines, training_headlines

LABELS = {"Business", "Sci/Tech", "Sports", "World", "climate", "education", "health", "security", "tech-policy"}
BLOCK = 500  # headlines at a time: all at once take eight gigabytes
TOO_ALIKE = 0.8  # cosine of character 3- to 5-grams; the same sentence with one noun swapped is above it


def most_alike(texts: list[str]) -> tuple[float, str, str]:
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(texts)
    best = (0.0, "", "")
    for start in range(0, len(texts), BLOCK):
        alike = (vectors[start : start + BLOCK] @ vectors.T).toarray()
        alike[range(len(alike)), range(start, start + len(alike))] = 0  # each with itself
        row, column = np.unravel_index(alike.argmax(), alike.shape)
        best = max(best, (alike[row, column], texts[start + row], texts[column]))
    return best


def test_every_label_has_enough_headlines():
    train, test = (Counter(row.label for row in headlines.read(path)) for path in (TRAIN_HEADLINES, TEST_HEADLINES))
    assert set(train) == set(test) == LABELS
    assert min(train.values()) >= 150
    assert min(test.values()) >= 40


def test_no_two_headlines_are_alike():
    texts = training_headlines() + held_out_headlines()
    score, first, second = most_alike(texts)
    assert score < TOO_ALIKE, f"{first!r} and {second!r}"


def test_a_swapped_noun_counts_as_alike():
    pair = ["School in Leeds closes after roof collapse leaves pupils without classrooms"]
    pair.append(pair[0].replace("Leeds", "Derby"))
    score, _, _ = most_alike([*pair, *held_out_headlines()])
    assert score >= TOO_ALIKE
