"""A file of any length through one back end, in batches: what is next is read and tokenised while the model runs."""

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lab04 import LabError
from lab04.artefact import Tokeniser, Tokens
from lab04.read.headlines import Row
from lab04.run.backend import Backend
from lab04.run.scores import softmax

LEAVE_S = 0.5  # a batch of the longest texts is tokenised in a fraction of it
AHEAD = 2  # batches that wait for the model: one is enough to keep it busy, the other for a slow moment of the reader


class Answer(NamedTuple):
    """What was found of a headline: its tokens, probabilities float64 [labels], and the batch that it ran in.

    rechecked: whether a second graph decided, None where there is none
    """

    row: Row
    tokens: int
    truncated: bool
    probabilities: np.ndarray
    rechecked: bool | None
    batch: int
    batch_ms: float


def answers(rows: Iterable[Row], tokenise: Tokeniser, backend: Backend, batch: int) -> Generator[Answer, None, None]:
    """The answers to all rows, in their order, of which a few batches are in memory at a time.

    Raises what `rows` raises, after the answers to all rows before.
    """
    waiting: queue.Queue = queue.Queue(AHEAD)
    stop = threading.Event()
    model = ThreadPoolExecutor(1, "model")  # a call at a time, so that the next begins while answers are printed

    def read_ahead() -> None:
        try:
            for chunk in batches(rows, batch):
                if stop.is_set():
                    return
                tokens = tokenise([row.text for row in chunk])
                waiting.put((chunk, tokens, model.submit(run, backend, tokens)))
            waiting.put(None)
        except BaseException as error:  # to be raised where the answers are asked for
            waiting.put(error)

    # A daemon: it may wait for a pipe that says nothing more, and Ctrl-C must not wait with it.
    reader = threading.Thread(target=read_ahead, name="reader", daemon=True)
    reader.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            chunk, tokens, result = item
            probabilities, rechecked, batch_ms = result.result()
            lengths = tokens["attention_mask"].sum(axis=1).tolist()
            for row, length, scores, again in zip(chunk, lengths, probabilities, rechecked, strict=True):
                truncated = length == tokenise.max_length and tokenise.dropped(row.text, tokens) > 0
                yield Answer(row, length, truncated, scores, again, len(chunk), batch_ms)
    finally:
        stop.set()
        model.shutdown(cancel_futures=True)  # what waits is dropped
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()  # the reader may wait for room
        # In a pipe's silence it may stay. In the tokeniser it must not: Python's end there aborts the process.
        reader.join(LEAVE_S)


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last of what is left; also where the rows end in a LabError, which is then raised."""
    chunk, failure = [], None
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except LabError as error:
        failure = error
    if chunk:
        yield chunk
    if failure:
        raise failure


def run(backend: Backend, tokens: Tokens) -> tuple[np.ndarray, list[bool | None], float]:
    """Probabilities [batch, labels], which headlines ran again in a second graph, milliseconds of the call."""
    started = time.perf_counter()
    probabilities = softmax(backend.logits(tokens))
    batch_ms = 1e3 * (time.perf_counter() - started)
    rechecked = [None] * len(probabilities) if backend.rechecked is None else backend.rechecked.tolist()
    return probabilities, rechecked, batch_ms
