"""The contract of every runtime: `logits(tokens) -> float32 [batch, labels]`."""

import math

import numpy as np

from lab04 import LabError
from lab04.artefact import Artefact, Tokens


class Unavailable(LabError):
    """A backend cannot run on this machine; the message is the reason, for its row in the table."""


class Backend:
    """What every runtime has: a device, `logits`, and it can be closed, or used in a `with` block."""

    device: str
    rechecked: np.ndarray | None = None  # bool [batch] of the last call, where a second graph decides close ones

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the process would otherwise hold until its end."""

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class OutputCheck:
    """Refuses logits whose width is not the artefact's number of labels, or that are not finite."""

    def __init__(self, artefact: Artefact):
        self._artefact = artefact

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        # A sum of infinities or NaN is not finite. By NumPy's isfinite this took 1 % of a headline's time.
        if logits.shape[-1] != len(self._artefact.labels) or not math.isfinite(sum(logits.ravel().tolist())):
            raise LabError(
                f"{self._artefact.folder} gives {logits.shape[-1]} scores for {len(self._artefact.labels)} labels, "
                f"or scores that are no numbers: run {self._artefact.rebuild_command}"
            )
        return logits
