"""`--threads`: a call's parts side by side, with every bit as in one thread, and callers that come at once."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import training_texts

from lab04 import artefact
from lab04.run import runtimes
from lab04.run.recheck import RecheckedBackend

TEXTS = [text + " again" * (number % 9) for number, text in enumerate(training_texts()[:67])]


@pytest.fixture(autouse=True)
def one_thread_again():
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["torch", "onnx"])
def built(request, artefact_folder):
    return artefact.load(artefact_folder(request.param))


def of_parts(backend) -> list[threading.Thread]:
    """This backend's alone: those of one that another test dropped end when Python collects it."""
    return [thread for thread in backend._pool._threads if thread.is_alive()]


@pytest.mark.parametrize("threads", [2, 5])
def test_every_bit_is_as_in_one_thread(threads, built):
    tokens = artefact.Tokeniser(built)(TEXTS)
    with runtimes.open_backend(built) as one, runtimes.open_backend(built, threads) as several:
        assert not of_parts(several), "the headlines of an opening are single ones and need none"
        np.testing.assert_array_equal(several.logits(tokens), one.logits(tokens))
        assert not of_parts(one), "one thread needs no other"
        assert 1 < len(of_parts(several)) <= threads
    assert not of_parts(several), "closed"


def test_parts_run_at_once(built):
    """Each part waits until another has come, which only comes while the first is still waiting."""
    meeting = threading.Barrier(2, timeout=30)
    backend = runtimes.BACKENDS[built.backend](built, 2)
    run = backend._run
    backend._run = lambda tokens: meeting.wait() in (0, 1) and run(tokens)
    with backend:
        assert backend.logits(artefact.Tokeniser(built)(TEXTS[:64])).shape == (64, 9)


def test_a_part_has_one_thread_in_a_batch_and_all_when_it_is_alone(artefact_folder):
    built = artefact.load(artefact_folder("torch"))
    tokenise, seen = artefact.Tokeniser(built), []
    with runtimes.TorchBackend(built, 3) as backend:
        module = backend._module
        backend._module = lambda *tokens: seen.append(torch.get_num_threads()) or module(*tokens)
        backend.logits(tokenise(TEXTS))
        assert set(seen) == {1} and len(seen) == 9
        backend.logits(tokenise(TEXTS[:1]))
    assert seen[9:] == [3]


def test_a_wide_network_splits_its_products_instead(artefact_folder, tmp_path):
    folder = shutil.copytree(artefact_folder("onnx"), tmp_path / "wide")
    built = artefact.Artefact(folder, artefact.load(folder).manifest, artefact.load(folder).labels)
    tokens = artefact.Tokeniser(built)(TEXTS)
    for name, threads_within in (("vocab_size", 1), ("hidden_size", 2), ("dim", 2)):
        (folder / "config.json").write_text(json.dumps({name: 768}))
        with runtimes.OnnxRuntimeBackend(built, 1) as one, runtimes.OnnxRuntimeBackend(built, 2) as two:
            assert two._session.get_session_options().intra_op_num_threads == threads_within
            np.testing.assert_allclose(two.logits(tokens), one.logits(tokens), atol=1e-5)
            assert bool(of_parts(two)) == (threads_within == 1)


def test_callers_that_come_at_once_get_their_own_answers(built):
    tokenise = artefact.Tokeniser(built)
    calls = [tokenise(TEXTS[start : start + size]) for start, size in enumerate((1, 30, 2, 8, 20, 9) * 4)]
    with runtimes.open_backend(built, 2) as backend, ThreadPoolExecutor(4) as callers:
        expected = [backend.logits(tokens) for tokens in calls]
        for found, alone in zip(callers.map(backend.logits, calls), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_callers_of_a_rechecked_backend_get_their_own_answers(artefact_folder):
    built, exact = (artefact.load(artefact_folder(name)) for name in ("onnx", "tensorrt"))
    graphs = runtimes.OnnxRuntimeBackend(built, 2), runtimes.open_fp16_check(exact, 2)
    tokenise = artefact.Tokeniser(built)
    calls = [tokenise(TEXTS[start : start + 1 + start % 12]) for start in range(48)]
    gaps = [np.ptp(graphs[0].logits(tokens)) for tokens in calls]
    with RecheckedBackend(*graphs, float(np.median(gaps)) / 2) as backend, ThreadPoolExecutor(4) as callers:
        expected = [backend.logits(tokens) for tokens in calls]
        for found, alone in zip(callers.map(backend.logits, calls), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_what_a_part_raises_is_raised(built):
    backend = runtimes.BACKENDS[built.backend](built, 2)
    tokens = artefact.Tokeniser(built)(TEXTS)
    tokens["input_ids"][13] = 10**6  # no such token
    with backend, pytest.raises(Exception, match="(?i)index|range|bounds"):
        backend.logits(tokens)
