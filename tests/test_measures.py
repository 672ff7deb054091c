"""The statistics against scikit-learn, scipy, or cases worked by hand."""

import numpy as np
import pytest
from scipy.special import rel_entr
from sklearn.metrics import accuracy_score, f1_score

from benchmark import measures
from lab04.run.scores import softmax

LABELS = ["a", "b", "c", "d"]


@pytest.fixture
def sample():
    """Truth and two sets of logits [300, 4] that mostly agree; label `d` never occurs in the truth."""
    random = np.random.default_rng(1)
    truth = random.integers(3, size=300)
    reference = random.normal(size=(300, 4)) + 2 * np.eye(4)[truth]
    return truth, reference, reference + 0.3 * random.normal(size=(300, 4))


def test_quality_is_scikit_learns(sample):
    truth, logits, _ = sample
    result = measures.quality(truth, logits, LABELS)
    predicted = logits.argmax(axis=1)
    assert result["accuracy"] == accuracy_score(truth, predicted)
    assert result["macro_f1"] == pytest.approx(f1_score(truth, predicted, labels=[0, 1, 2], average="macro"))
    assert list(result["f1"]) == ["a", "b", "c"], "macro-F1 is over the labels that occur"
    assert np.trace(result["confusion"]) == (predicted == truth).sum()
    assert np.array(result["confusion"]).shape == (4, 4)
    for measure in ("accuracy", "macro_f1"):
        low, high = result[f"{measure}_interval"]
        assert low < result[measure] < high < low + 0.2


def test_quick_macro_f1_is_scikit_learns(sample):
    truth, logits, _ = sample
    predicted = logits.argmax(axis=1)
    for rows in (slice(0, 300), slice(0, 5), slice(0, 1)):
        expected = f1_score(truth[rows], predicted[rows], labels=[0, 1, 2], average="macro", zero_division=0)
        assert measures.macro_f1(truth[rows], predicted[rows], np.array([0, 1, 2])) == pytest.approx(expected)


def test_consistency_counts_both_kinds_of_flips():
    # truth        0       0       1       1       2   |  before → after
    reference = np.log([[8, 1, 1], [8, 1, 1], [8, 1, 1], [1, 8, 1], [8, 1, 1]])
    after = np.log([[8, 1, 1], [1, 8, 1], [1, 8, 1], [1, 1, 8], [1, 8, 1]])
    result = measures.consistency(reference, after, np.array([0, 0, 1, 1, 2]))
    assert result["agreement"] == 0.2
    assert result["changed"] == 4
    assert (result["right_to_wrong"], result["wrong_to_right"]) == (2, 1)  # the last is wrong before and after
    assert result["max_change"] == pytest.approx(0.7)
    assert result["mean_change"] == pytest.approx(4 * 0.7 / 5)
    assert result["kl"] == pytest.approx(4 / 5 * 0.7 * np.log(8))


def test_consistency_with_itself_is_perfect(sample):
    truth, logits, _ = sample
    result = measures.consistency(logits, logits, truth)
    assert result["agreement"] == result["mcnemar_p"] == result["loyalty"] == 1
    assert result["changed"] == result["kl"] == result["max_change"] == result["macro_f1_change"] == 0
    assert result["macro_f1_change_interval"] == [0, 0]


def test_consistency_of_near_logits(sample):
    truth, reference, logits = sample
    result = measures.consistency(reference, logits, truth)
    p, q = softmax(reference), softmax(logits)
    assert result["kl"] == pytest.approx(rel_entr(p, q).sum(axis=1).mean())
    assert result["changed"] == round((1 - result["agreement"]) * 300)
    flips = result["right_to_wrong"] - result["wrong_to_right"]
    before, after = (accuracy_score(truth, scores.argmax(axis=1)) for scores in (reference, logits))
    assert after - before == pytest.approx(-flips / 300), "the accuracy lost is the balance of the flips"
    low, high = result["agreement_interval"]
    assert low < result["agreement"] < high


@pytest.mark.parametrize(("flips", "p"), [((0, 0), 1), ((1, 0), 1), ((5, 0), 2 / 32), ((1, 9), 22 / 1024), ((4, 4), 1)])
def test_mcnemar_by_hand(flips, p):
    assert measures.mcnemar(*flips) == pytest.approx(p)


def test_calibration_error_by_hand():
    # Ten sure headlines of which eight are right, ten at 0.6 of which six are: (0.9 - 0.8) / 2 + 0.
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    truth = np.array([0] * 8 + [1] * 2 + [0] * 6 + [1] * 4)
    assert measures.expected_calibration_error(truth, probabilities) == pytest.approx(0.05)
    assert [b["count"] for b in measures.reliability_bins(truth, probabilities)] == [10, 10]


def test_calibration_of_certainty():
    assert measures.expected_calibration_error(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]])) == 0


def test_latency_summarises_all_samples():
    result = measures.latency([[1.0, 2.0, 3.0], [2.0, 3.0, 94.0]])
    assert result["p50_ms"] == 2.5
    assert result["mean_ms"] == 17.5
    assert result["min_ms"] == 1
    assert (result["samples"], result["rounds"]) == (6, 2)
    assert result["p99_ms"] > 80
    assert len(result["quantiles_ms"]) == 99


def test_speed_up_compares_within_rounds():
    # The machine is ten times slower in the second round: the ratio does not see it.
    result = measures.speed_up([[4, 4], [40, 40], [4, 4]], [[1, 1], [10, 10], [1, 1]])
    assert result == {"speed_up": 4, "speed_up_interval": [4, 4]}


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = measures.bootstrap(400, lambda rows: values[rows].mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_what_a_batch_changes_is_counted_by_label_and_measured_in_logits():
    alone = np.array([[0.0, 1.0], [2.0, 1.0], [0.5, 0.25]])
    batched = np.array([[0.0, 1.0], [2.0, 1.5], [0.25, 0.5]])
    assert measures.batch_change(alone, batched) == {"batch_changed": 1, "batch_max_change": 0.5}
    assert measures.batch_change(alone, alone) == {"batch_changed": 0, "batch_max_change": 0.0}
