"""Recheck: INT8 answers, and where its two best labels lie close together an exact graph decides.

Rounding moves logits a little, so it can only change a label whose two best logits were close to begin with.
"""

import numpy as np

from lab04.artefact import Tokeniser, Tokens
from lab04.run.backend import Backend
from lab04.run.scores import gaps

GRAPH_FILE = "model_recheck.onnx"
# Headlines that the threshold is found from. A change seen among this many is exceeded by about one in as many
# others, and such a one would also have to lie at a border to change its label.
HEADLINES = 1500
# A tenth more, for headlines unlike the training ones. On 2,407 real headlines the changed labels of the shipped model
# all had gaps below 0.47, where the threshold is 0.70 (an Intel CPU with AVX512-VNNI): the largest change seldom meets
# a headline at a border.
MARGIN = 1.1


class RecheckedBackend(Backend):
    """INT8 logits, replaced by the exact graph's where the INT8 gap is below `threshold` (logits).

    `rechecked` is a bool array [batch]: which headlines of the last call the exact graph decided.
    """

    device = "CPU"

    def __init__(self, quick: Backend, exact: Backend, threshold: float):
        self._quick, self._exact, self._threshold = quick, exact, threshold

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        logits = self._quick.logits(tokens)
        close = gaps(logits) < self._threshold
        if close.any():
            logits = logits.copy()
            logits[close] = self._exact.logits({name: ids[close] for name, ids in tokens.items()})
        self.rechecked = close
        return logits

    def close(self) -> None:
        """Give back what both graphs hold."""
        self._quick.close()
        self._exact.close()


def threshold_from(quick: np.ndarray, exact: np.ndarray) -> float:
    """The gap below which INT8 is rechecked: the most by which INT8 overstated a gap of its best label, and more.

    Both are [headlines, labels]. The gaps are those to every other label: FP32's may be the third. A gap that INT8
    understates cannot hide a change, since FP32 then holds its label all the more.
    """
    best = quick.argmax(axis=1)[:, None]
    of_quick, of_exact = (np.take_along_axis(logits, best, 1) - logits for logits in (quick, exact))
    return float(MARGIN * (of_quick - of_exact).max())


def find_threshold(quick: Backend, exact: Backend, tokenise: Tokeniser, texts: list[str]) -> float:
    """`threshold_from` the logits of at most some HEADLINES texts, one at a time as they are served."""
    tokens = [tokenise([text]) for text in texts[:: max(1, len(texts) // HEADLINES)]]
    return threshold_from(*(np.concatenate([graph.logits(row) for row in tokens]) for graph in (quick, exact)))
