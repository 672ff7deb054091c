"""From logits to probabilities, the best labels and how close they are. numpy only."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits [..., labels], in float64 and safe from overflow."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def top(probabilities: np.ndarray, count: int = 5) -> list[int]:
    """Indices of the `count` largest of one row of probabilities, largest first; ties in label order."""
    return np.argsort(-probabilities, kind="stable")[:count].tolist()


def gaps(logits: np.ndarray) -> np.ndarray:
    """Best minus second logit of each row: float32 [batch] of logits [batch, labels], two labels or more."""
    best_two = np.partition(logits, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]
