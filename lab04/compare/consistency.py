"""How far quantised scores are from the FP32 ones. numpy only, so that every script can afford it."""

import numpy as np

from lab04 import LabError
from lab04.run.scores import softmax

# A headline whose two best FP32 probabilities lie closer than this has no clear label to keep.
DECIDED_MARGIN = 0.10
# What a lab accepts of its own result. INT8 moves a probability by a few hundredths (docs/measuring.md);
# swapped inputs, a wrong head or saturating arithmetic move it by tenths.
MIN_DECIDED_AGREEMENT = 0.98
MAX_MEAN_CHANGE = 0.05


def compare(reference_logits: np.ndarray, logits: np.ndarray) -> dict:
    """Compare logits [headlines, labels] with the FP32 reference.

    Returns the headline count, label agreement (0..1) over all headlines and over the decided ones (FP32 top-two
    gap of at least DECIDED_MARGIN), and the largest and mean change of any headline's top FP32 probability.
    """
    reference, result = softmax(reference_logits), softmax(logits)
    labels = reference.argmax(axis=1)
    same = labels == result.argmax(axis=1)
    best_two = np.sort(reference, axis=1)[:, -2:]
    decided = best_two[:, 1] - best_two[:, 0] >= DECIDED_MARGIN
    change = np.abs(result - reference).max(axis=1)
    return {
        "headlines": len(labels),
        "agreement": float(same.mean()),
        "decided": int(decided.sum()),
        "decided_agreement": float(same[decided].mean()) if decided.any() else 1.0,
        "max_probability_change": float(change.max()),
        "mean_probability_change": float(change.mean()),
        "max_logit_change": float(np.abs(logits - reference_logits).max()),
    }


def check(reference_logits: np.ndarray, logits: np.ndarray, rechecked: bool = False) -> dict:
    """`compare`, and raise LabError if the result is not finite, not of the right shape, or too far from FP32.

    `rechecked`: no label may differ at all.
    """
    if logits.shape != reference_logits.shape:
        raise LabError(f"check failed: logits of shape {logits.shape}, FP32 has {reference_logits.shape}")
    if not np.isfinite(logits).all():
        raise LabError("check failed: the logits are not all finite")
    result = compare(reference_logits, logits)
    if result["decided_agreement"] < MIN_DECIDED_AGREEMENT or result["mean_probability_change"] > MAX_MEAN_CHANGE:
        raise LabError(
            f"check failed: {result['decided_agreement']:.1%} of clear labels kept (at least "
            f"{MIN_DECIDED_AGREEMENT:.0%} wanted), probabilities move by {result['mean_probability_change']:.3f} "
            f"on average (at most {MAX_MEAN_CHANGE} allowed); nothing was written"
        )
    if rechecked and result["agreement"] < 1:
        raise LabError(
            f"check failed: {1 - result['agreement']:.1%} of labels differ despite the recheck; nothing was written"
        )
    return result
