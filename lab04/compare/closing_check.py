"""The check that decides a lab's exit code: the finished artefact, run as `predict.py` will, against the FP32 weights.

One headline at a time and in batches, its speed beside FP32 PyTorch's, and the headlines whose label changed. What
must hold is in `consistency.check`; docs/measuring.md says why these bounds.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab04 import LabError, in_one_line
from lab04.artefact import Tokeniser, load
from lab04.compare import consistency
from lab04.read.classifier import Classifier
from lab04.read.texts import Texts, held_out_headlines
from lab04.run import runtimes
from lab04.run.backend import Backend
from lab04.run.scores import softmax

BATCHES = (2, 8, 32)  # padded ones too: a mask at the wrong input shows there, and hardly without padding
IN_BATCHES, LONG = 64, 8  # texts that run in batches, and those of them made as long as the model reads
TIMED, BLOCK, WARM_UPS = 100, 10, 3  # headlines timed beside FP32, in how many a row, after how many untimed calls
# What neighbours in a batch may change of a static artefact's logits: of ONNX Runtime's not a bit. PyTorch's attention
# adds up in another order beside padding, and a value at the border of two steps then moves by one (docs/int8.md).
NEIGHBOURS_CHANGE = {"onnxruntime": 0.0, "torch": 0.15}
SHOWN_CHANGES = 5
MAX_UNKNOWN = 0.5  # share of unknown tokens above which a check on such texts says little
KNOWN_HEADLINES = 24  # run each time an artefact is opened: milliseconds; with 16, right and wrong kernels overlapped
# FP16 moves logits by about 0.1 % of their range; inputs bound in the wrong order move them by 6 % and more.
MAX_FP16_CHANGE = 0.02


def check_int8(folder: Path, fp32: Classifier, threads: int, chosen: Texts) -> dict:
    """Compare the sealed artefact in `folder` with FP32 on our test headlines, or on the user's texts.

    Prints what quantisation bought and cost; returns the figures for the manifest. Raises LabError if they are out of
    bounds, alone or in batches.
    """
    texts, built = chosen.check, load(folder)
    tokenise = Tokeniser(built)
    with runtimes.open_backend(built, threads) as backend:
        reference, logits = fp32.logits(texts), run_alone(backend, tokenise, texts)
        result = consistency.check(reference, logits, rechecked="recheck" in built.options)
        print(
            f"   {result['headlines']} headlines: {result['agreement']:.1%} same label as FP32, "
            f"largest probability change {result['max_probability_change']:.3f}"
        )
        check_batches(backend, tokenise, fp32, texts)
        if built.options == ("static",):
            check_neighbours(backend, tokenise, texts, NEIGHBOURS_CHANGE[built.backend])
        print_rechecked(backend, tokenise, texts)
        speed = race(fp32, backend, tokenise, texts[:TIMED], threads)
        changed = changed_headlines(texts, reference, logits, built.labels)
        print_bought(speed, changed, result)
        warn_of_unknown(unknown := unknown_share(fp32, texts))
        shown = changed[:SHOWN_CHANGES]
        if chosen.prepare:  # a user's texts may be private, and an artefact travels: the known ones are ours
            texts, shown = held_out_headlines(), []
            reference, logits = fp32.logits(texts), run_alone(backend, tokenise, texts)
    known = known_headlines(texts, reference, logits)
    facts = {"changed_headlines": shown, "unknown_tokens": round(unknown, 4), "known_headlines": known}
    return {**result, **speed, **facts}


def check_fp16(folder: Path, fp32: Classifier, threads: int) -> dict:
    """Compare the FP16 graph on the CPU and, if there is one, the engine with FP32; returns the figures of the last.

    One headline at a time and in padded batches. Raises LabError if the logits are out of bounds.
    """
    built, texts = load(folder), held_out_headlines()
    tokenise, reference = Tokeniser(built), fp32.logits(texts)
    openers = [runtimes.open_fp16_check] + [runtimes.open_backend] * bool(built.manifest["engine"])
    for open_backend in openers:
        results = []
        with open_backend(built, threads) as backend:
            for size in (1, BATCHES[-1]):
                logits = run_batches(backend, tokenise, texts, size)
                results.append(check_fp16_logits(reference, logits, f"{backend.device}, batches of {size}"))
    return max(results, key=lambda result: result["max_logit_change"])


def check_fp16_logits(reference: np.ndarray, logits: np.ndarray, what: str) -> dict:
    """`consistency.check` with the narrower bounds of FP16, printed."""
    result = consistency.check(reference, logits)
    change = result["max_logit_change"] / float(np.ptp(reference))
    print(f"   {what}: {result['agreement']:.1%} same label, logits within {change:.2%} of their range")
    if change > MAX_FP16_CHANGE or result["decided_agreement"] < 1:
        raise LabError(
            f"check failed: FP16 may move logits by {MAX_FP16_CHANGE:.0%} of their range and no clear label; "
            "nothing was written"
        )
    return result


def run_batches(backend: Backend, tokenise: Tokeniser, texts: list[str], size: int) -> np.ndarray:
    """Logits [texts, labels] of an artefact, `size` texts a call, in their order."""
    batches = [texts[first : first + size] for first in range(0, len(texts), size)]
    with in_one_line(f"the artefact fails on batches of {size}, nothing was written"):
        return np.concatenate([backend.logits(tokenise(batch)) for batch in batches])


def run_alone(backend: Backend, tokenise: Tokeniser, texts: list[str]) -> np.ndarray:
    return run_batches(backend, tokenise, texts, 1)


def check_batches(backend: Backend, tokenise: Tokeniser, fp32: Classifier, texts: list[str]) -> None:
    """Run short texts and some as long as the model reads together, in batches of several sizes.

    Raises LabError if they are out of the bounds that hold for single headlines.
    """
    some = short_and_long(texts)
    reference = fp32.logits(some)
    logits = [run_batches(backend, tokenise, some, size) for size in BATCHES]
    try:
        result = consistency.check(np.concatenate([reference] * len(BATCHES)), np.concatenate(logits))
    except LabError as error:
        raise LabError(
            f"in batches of {', '.join(map(str, BATCHES))}, short and long texts together: {error}"
        ) from error
    print(f"   in batches of {', '.join(map(str, BATCHES))}: {result['agreement']:.1%} same label")


def print_rechecked(backend: Backend, tokenise: Tokeniser, texts: list[str]) -> None:
    """Say how many texts a second graph decides, if there is one: those take several times as long."""
    decided: list[bool] = []
    for text in texts[:TIMED]:
        backend.logits(tokenise([text]))
        decided += [] if backend.rechecked is None else backend.rechecked.tolist()
        if not decided:
            return
    print(f"   {np.mean(decided):.0%} of the texts run again in the second graph")


def check_neighbours(backend: Backend, tokenise: Tokeniser, texts: list[str], allowed: float) -> None:
    """Raise LabError if a text's neighbours in a batch move its logits by more than `allowed`, or change its label."""
    some = short_and_long(texts)
    alone = run_alone(backend, tokenise, some)
    for size in BATCHES:
        logits = run_batches(backend, tokenise, some, size)
        moved = float(np.abs(logits - alone).max())
        if moved > allowed or (logits.argmax(axis=1) != alone.argmax(axis=1)).any():
            raise LabError(
                f"check failed: in batches of {size} neighbours move a text's logits by {moved:.2g}, and static INT8 "
                f"allows {allowed:g}; build this model without --static"
            )
    print(f"   beside other texts: the same labels, logits {f'within {allowed}' if allowed else 'the same to the bit'}")


def short_and_long(texts: list[str]) -> list[str]:
    """Some of the texts, and a few as long as the model reads, mixed."""
    some = texts[:IN_BATCHES] + [" ".join(random.Random(number).choices(texts, k=40)) for number in range(LONG)]
    random.Random(0).shuffle(some)
    return some


def unknown_share(fp32: Classifier, texts: list[str]) -> float:
    """Share (0..1) of the tokens of some texts that the tokeniser does not know; special tokens do not count."""
    unknown = fp32.tokenizer.unk_token_id
    ids = [number for row in fp32.tokenizer(texts, add_special_tokens=False).input_ids for number in row]
    return ids.count(unknown) / len(ids) if ids and unknown is not None else 0.0


def warn_of_unknown(share: float) -> None:
    if share > MAX_UNKNOWN:
        print(
            f"   {share:.0%} of the tokens of these texts are unknown to the tokeniser: they say little about this "
            "model. Give texts like those it will read with --texts FILE",
            file=sys.stderr,
        )


def race(fp32: Classifier, backend: Backend, tokenise: Tokeniser, texts: list[str], threads: int) -> dict:
    """Median ms a headline of FP32 PyTorch (`fp32_ms`) and of `backend` (`ms`), and their ratio `speed_up`.

    `busy`: whether other programs took more than a tenth of the time, which makes the ratio unsure.

    In blocks of some headlines, in random order and each warmed up, as the benchmark does it: called in turn, each
    would always find the other's weights in the cache in place of its own.
    """
    import torch

    def time_block(call, inputs) -> list[float]:
        for item in inputs[:WARM_UPS]:
            call(item)
        times_ms = []
        for item in inputs:
            started = time.perf_counter()
            call(item)
            times_ms.append(1e3 * (time.perf_counter() - started))
        return times_ms

    runs: list[tuple[Callable, list, list[float]]] = [
        (lambda inputs: fp32.model(**inputs), [fp32.encode([text]) for text in texts], []),
        (backend.logits, [tokenise([text]) for text in texts], []),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started, computed = time.perf_counter(), time.process_time()
    try:
        with torch.inference_mode():
            for first in range(0, len(texts), BLOCK):
                for call, inputs, times_ms in random.sample(runs, len(runs)):
                    times_ms.extend(time_block(call, inputs[first : first + BLOCK]))
    finally:
        torch.set_num_threads(before)
    busy = time.process_time() - computed < 0.9 * (time.perf_counter() - started)
    fp32_ms, ms = (float(np.median(times_ms)) for _, _, times_ms in runs)
    return {"fp32_ms": round(fp32_ms, 3), "ms": round(ms, 3), "speed_up": round(fp32_ms / ms, 2), "busy": busy}


def changed_headlines(texts: list[str], reference: np.ndarray, logits: np.ndarray, labels: list[str]) -> list[dict]:
    """The headlines whose label differs from FP32's: `text`, and label and probability of `fp32` and `quantised`."""

    def answer(row):
        scores = softmax(row)
        return {"label": labels[int(scores.argmax())], "score": round(float(scores.max()), 4)}

    return [
        {"text": text, "fp32": answer(before), "quantised": answer(after)}
        for text, before, after in zip(texts, reference, logits, strict=True)
        if before.argmax() != after.argmax()
    ]


def print_bought(speed: dict, changed: list[dict], result: dict) -> None:
    """Say what quantisation bought and what it cost, with some of the headlines that changed."""
    print(
        f"   {speed['speed_up']:.1f} times as fast as FP32 PyTorch ({speed['fp32_ms']:.1f} → {speed['ms']:.1f} ms), "
        f"{len(changed)} of {result['headlines']} labels changed"
    )
    if speed["busy"]:
        print("   (other programs ran meanwhile: the speed is unsure)")
    for headline in changed[:SHOWN_CHANGES]:
        before, after = headline["fp32"], headline["quantised"]
        print(
            f"     {before['label']} {before['score']:.2f} → {after['label']} {after['score']:.2f}: {headline['text']}"
        )


def known_headlines(texts: list[str], reference: np.ndarray, logits: np.ndarray) -> list[dict]:
    """Headlines from the clearest to the closest with the logits they have here, for a check wherever it is opened.

    reference, logits: float32 [texts, labels], FP32 and quantised; only headlines on which both agree are chosen. At a
    clear label's logits another kernel's errors are as large as at a border; an even choice is of both.
    """
    best_two = np.sort(softmax(reference), axis=1)[:, -2:]
    order = np.argsort(best_two[:, 0] - best_two[:, 1], kind="stable")
    order = order[reference.argmax(axis=1)[order] == logits.argmax(axis=1)[order]]
    places = np.linspace(0, len(order) - 1, min(KNOWN_HEADLINES, len(order))).round().astype(int)
    return [
        {"text": texts[index], "fp32_logits": rounded(reference[index]), "logits": rounded(logits[index])}
        for index in order[places].tolist()
    ]


def rounded(logits: np.ndarray) -> list[float]:
    return logits.astype(float).round(4).tolist()
