"""The statistics of the benchmark: how good, how close to FP32, how fast, and how sure.

Every measure has its definition and source in its docstring. Shapes: `logits` and `probabilities` are
[headlines, labels], `truth` is [headlines] label indices. scikit-learn and scipy compute what they define.
"""

from collections.abc import Callable

import numpy as np

from lab04.run.scores import softmax

RESAMPLES = 2000  # enough for the second digit of a 95 % interval
CALIBRATION_BINS = 15  # Guo et al. 2017
PERCENTILES = (50, 90, 95, 99)


def quality(truth: np.ndarray, logits: np.ndarray, labels: list[str]) -> dict:
    """How good the labels are: accuracy, F1 per label and macro-F1 with bootstrap 95 % intervals, confusions, ECE.

    Macro-F1 is the plain mean over the labels that occur in `truth`; a prediction outside them is just wrong.
    `confusion` [truth, predicted] counts headlines, `reliability` is `reliability_bins`.
    """
    from sklearn.metrics import confusion_matrix, f1_score

    predicted, present = logits.argmax(axis=1), np.unique(truth)
    scores = f1_score(truth, predicted, labels=present, average=None, zero_division=0)
    confusion = confusion_matrix(truth, predicted, labels=range(len(labels)))
    probabilities = softmax(logits)
    return {
        "headlines": len(truth),
        "accuracy": float((predicted == truth).mean()),
        "accuracy_interval": bootstrap(len(truth), lambda rows: (predicted == truth)[rows].mean()),
        "macro_f1": float(scores.mean()),
        "macro_f1_interval": bootstrap(len(truth), lambda rows: macro_f1(truth[rows], predicted[rows], present)),
        "f1": {labels[index]: float(score) for index, score in zip(present, scores, strict=True)},
        "confusion": confusion.tolist(),
        "ece": expected_calibration_error(truth, probabilities),
        "reliability": reliability_bins(truth, probabilities),
    }


def consistency(reference: np.ndarray, logits: np.ndarray, truth: np.ndarray) -> dict:
    """How close logits stay to the FP32 reference logits of the same headlines.

    agreement       share of headlines with the same label (label loyalty: Xu et al., EMNLP 2021, arXiv:2109.03228),
                    with its Wilson 95 % interval; `changed` = headlines whose label differs (churn: Milani Fard
                    et al., NIPS 2016)
    right_to_wrong, wrong_to_right
                    the two kinds of flips of correctness (Dutta et al., NeurIPS 2024, arXiv:2407.09141); a label
                    that changes from one wrong one to another is `changed` but no flip
    mcnemar_p       exact McNemar test on the two flip counts: the chance of a split at least as uneven as this if
                    neither direction were likelier (Kuebler et al., arXiv:2602.10144)
    macro_f1_change INT8 minus FP32 macro-F1, with a paired bootstrap 95 % interval
    mean_change, max_change
                    mean over headlines, and maximum, of the largest change of any label's probability (0..1)
    kl              mean over headlines of sum p log(p/q) in nats, p = FP32 (as in arXiv:2407.09141)
    loyalty         probability loyalty: 1 - mean Jensen-Shannon distance in nats (arXiv:2109.03228)
    """
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import binomtest, entropy

    p, q = softmax(reference), softmax(logits)
    before, after = p.argmax(axis=1), q.argmax(axis=1)
    same, present = before == after, np.unique(truth)
    right_to_wrong = int(((before == truth) & (after != truth)).sum())
    wrong_to_right = int(((before != truth) & (after == truth)).sum())
    interval = binomtest(int(same.sum()), len(same)).proportion_ci(method="wilson")

    with np.errstate(invalid="ignore"):  # the root of a rounding error below zero, where p and q are the same
        distance = np.nan_to_num(jensenshannon(p, q, axis=1))

    def change_of_f1(rows):
        return macro_f1(truth[rows], after[rows], present) - macro_f1(truth[rows], before[rows], present)

    return {
        "agreement": float(same.mean()),
        "agreement_interval": [interval.low, interval.high],
        "changed": int((~same).sum()),
        "right_to_wrong": right_to_wrong,
        "wrong_to_right": wrong_to_right,
        "mcnemar_p": mcnemar(right_to_wrong, wrong_to_right),
        "macro_f1_change": float(change_of_f1(np.arange(len(truth)))),
        "macro_f1_change_interval": bootstrap(len(truth), change_of_f1),
        "mean_change": float(np.abs(p - q).max(axis=1).mean()),
        "max_change": float(np.abs(p - q).max()),
        "kl": float(entropy(p, q, axis=1).mean()),
        "loyalty": float(1 - distance.mean()),
        "ece_change": expected_calibration_error(truth, q) - expected_calibration_error(truth, p),
    }


def batch_change(alone: np.ndarray, batched: np.ndarray) -> dict:
    """What neighbours in a batch do to a backend's own answers: labels changed, largest change of any logit.

    alone, batched: its logits [headlines, labels] for the same headlines. Dynamic INT8 takes the scale of an input
    from the whole batch; what does not is changed by the order of additions alone.
    """
    return {
        "batch_changed": int((alone.argmax(axis=1) != batched.argmax(axis=1)).sum()),
        "batch_max_change": float(np.abs(alone - batched).max()),
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray, present: np.ndarray) -> float:
    """scikit-learn's macro-F1 over the labels `present` (a label with no row counts 0), quick enough to bootstrap."""
    size = int(max(truth.max(), predicted.max(), present.max())) + 1
    hits = np.bincount(truth[truth == predicted], minlength=size)[present]
    rows = (np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size))[present]
    return float((2 * hits / np.maximum(rows, 1)).mean())


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided exact p-value of McNemar's test: a fair coin deciding the direction of each flip."""
    from scipy.stats import binomtest

    flips = right_to_wrong + wrong_to_right
    return float(binomtest(right_to_wrong, flips).pvalue) if flips else 1.0


def reliability_bins(truth: np.ndarray, probabilities: np.ndarray) -> list[dict]:
    """Headlines in 15 bins of equal width by their top probability: count, mean confidence and accuracy of each."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    # Bins are half-open from below, (0, 1/15], … as in Guo et al., so that a probability of exactly 1 has a bin.
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    return [
        {
            "count": int((place == index).sum()),
            "confidence": float(confidence[place == index].mean()),
            "accuracy": float(right[place == index].mean()),
        }
        for index in np.unique(place)
    ]


def expected_calibration_error(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean gap between confidence and accuracy, weighted by the bins' counts (Guo et al. 2017; biased for small n)."""
    bins = reliability_bins(truth, probabilities)
    return sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(truth)


def latency(rounds: list[list[float]]) -> dict:
    """Mean, percentiles, minimum and count of times in ms, `rounds` of samples; p50's interval resamples whole rounds.

    Samples of one round share a moment's clock and neighbours, so the round is what is independent.
    `quantiles_ms` are the 1st to 99th percentile, for charts.
    """
    samples = np.concatenate(rounds)
    return {
        "mean_ms": float(samples.mean()),
        **{f"p{p}_ms": float(np.percentile(samples, p)) for p in PERCENTILES},
        "p50_interval_ms": bootstrap(
            len(rounds), lambda chosen: np.median(np.concatenate([rounds[index] for index in chosen]))
        ),
        "min_ms": float(samples.min()),
        "samples": len(samples),
        "rounds": len(rounds),
        "quantiles_ms": np.percentile(samples, range(1, 100)).round(4).tolist(),
    }


def speed_up(reference: list[list[float]], rounds: list[list[float]]) -> dict:
    """How many times faster than the reference: the median over rounds of the ratio of the round's medians.

    Both ran the same headlines within seconds of each other, so drift and neighbours cancel within a round.
    """
    ratios = np.array([np.median(a) / np.median(b) for a, b in zip(reference, rounds, strict=True)])
    return {
        "speed_up": float(np.median(ratios)),
        "speed_up_interval": bootstrap(len(ratios), lambda chosen: np.median(ratios[chosen])),
    }


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> list[float]:
    """Percentile bootstrap 95 % interval (Efron 1979) of a statistic of `count` items, given as indices."""
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(count, size=count)) for _ in range(RESAMPLES)]
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]
