"""The backends of one comparison: open them, run a headline on all, keep what was measured."""

import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lab04 import labs
from lab04.artefact import Artefact, Tokeniser, Tokens
from lab04.artefact.contract import check_together, load
from lab04.run import runtimes
from lab04.run.backend import Backend, Unavailable
from lab04.run.scores import softmax

WARM_UPS = 5  # the first calls of TorchScript and ONNX Runtime prepare kernels and memory: they are not timed


@dataclass
class Runner:
    """One backend of the comparison and what was measured of it.

    name, colour: in tables and charts; no two runners share a name
    reason: why it runs as a mere check of its labels, if so: its times then say nothing of its real device
    """

    artefact: Artefact
    backend: Backend
    name: str
    colour: str
    reason: str = ""
    times_ms: array = field(default_factory=lambda: array("d"))
    labelled: int = 0
    correct: int = 0
    rechecked: int = 0

    def last_rechecked(self) -> bool:
        """Whether the backend's last headline was decided by its second graph."""
        return self.backend.rechecked is not None and bool(self.backend.rechecked[0])

    def count(self, label: str | None, probabilities: np.ndarray) -> None:
        """Count the last headline, whose right label is `label` if the input names one."""
        self.rechecked += self.last_rechecked()
        if label is not None:
            self.labelled += 1
            self.correct += self.artefact.labels[int(probabilities.argmax())] == label


def load_artefacts(folders: list[Path]) -> list[Artefact]:
    """Artefacts that may be compared. Raises LabError if one cannot be used, or if they are of different weights."""
    artefacts = [load(folder) for folder in folders]
    check_together(artefacts)
    return artefacts


def open_runners(artefacts: list[Artefact], threads: int) -> list[Runner]:
    """A runner of each artefact, with a name and a colour of its own."""
    runners = [open_runner(item, threads) for item in artefacts]
    shown = Counter(runner.name for runner in runners)
    spare = iter(labs.SPARE_COLOURS * len(runners))
    seen = set()
    for runner in runners:
        if shown[runner.name] > 1:
            runner.colour = next(spare) if runner.colour in seen else runner.colour
            seen.add(runner.colour)
            runner.name = f"{runner.name} ({runner.artefact.folder})"
    return runners


def open_runner(item: Artefact, threads: int) -> Runner:
    """The artefact's backend, or, where its device is missing, its graph on the CPU as a check of its labels."""
    try:
        return Runner(item, runtimes.open_backend(item, threads), item.title, item.colour)
    except Unavailable as error:
        check = runtimes.open_fp16_check(item, threads)
        return Runner(item, check, labs.GRAPH_ON_CPU, item.colour, reason=str(error))


def warm_up(runners: list[Runner], tokenise: Tokeniser, texts: list[str]) -> None:
    for text in texts:
        tokens = tokenise([text])
        for runner in runners:
            for _ in range(0 if runner.reason else WARM_UPS):
                runner.backend.logits(tokens)


def run_headline(runners: list[Runner], tokens: Tokens, runs: int) -> list[tuple[np.ndarray, float]]:
    """Probabilities [labels] and median milliseconds of every backend for one headline, batch 1, unpadded.

    Every round calls the backends in a new random order, so that none is always measured in another's wake. One that
    runs as a mere check of its labels is called once: no time of it is shown.
    """
    times_ms: list[list[float]] = [[] for _ in runners]
    logits = [np.empty(0)] * len(runners)
    for round_number in range(runs):
        places = [place for place, runner in enumerate(runners) if round_number == 0 or not runner.reason]
        for place in random.sample(places, len(places)):
            started = time.perf_counter()
            logits[place] = runners[place].backend.logits(tokens)
            times_ms[place].append(1e3 * (time.perf_counter() - started))
    for runner, times in zip(runners, times_ms, strict=True):
        runner.times_ms.extend(times)
    return [(softmax(row[0]), float(np.median(times))) for row, times in zip(logits, times_ms, strict=True)]
