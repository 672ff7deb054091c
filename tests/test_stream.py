"""A file through one back end in batches: `predict.py --batch` and `--csv`."""

import argparse
import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script, training_texts

from benchmark import environment, study_tables
from benchmark.studies import million
from lab04 import LabError, artefact
from lab04.read.headlines import Row
from lab04.run import runtimes, scores, stream

TEXTS = [*training_texts()[:40], "the " * 300, 'One, with a "comma"', "One\nof two lines", "$x$ 🙂"]


@pytest.fixture(scope="module")
def onnx(artefact_folder):
    return artefact_folder("onnx")


def rows(texts):
    return (Row(number, text) for number, text in enumerate(texts, start=1))


def command(onnx, *options) -> list[str]:
    return [sys.executable, str(ROOT / "predict.py"), "--file", "-", "--artefacts", str(onnx), *map(str, options)]


@pytest.mark.parametrize("batch, threads", [(1, 1), (16, 1), (30, 2), (100, 3)])
def test_answers_are_the_backends_own_in_the_order_of_the_file(batch, threads, onnx):
    built = artefact.load(onnx)
    tokenise = artefact.Tokeniser(built)
    with runtimes.open_backend(built, threads) as backend:
        found = list(stream.answers(rows(TEXTS), tokenise, backend, batch))
        parts = [TEXTS[start : start + batch] for start in range(0, len(TEXTS), batch)]
        expected = np.concatenate([scores.softmax(backend.logits(tokenise(part))) for part in parts])
    assert [answer.row.text for answer in found] == TEXTS
    np.testing.assert_array_equal([answer.probabilities for answer in found], expected)
    assert [answer.batch for answer in found] == [len(part) for part in parts for _ in part]
    assert [answer.tokens for answer in found] == [tokenise([text])["input_ids"].shape[1] for text in TEXTS]
    assert [answer.row.text for answer in found if answer.truncated] == ["the " * 300]


def test_what_comes_before_a_bad_line_is_answered(onnx):
    def given():
        yield from rows(TEXTS[:7])
        raise LabError("line 8 is bad")

    built = artefact.load(onnx)
    with runtimes.open_backend(built) as backend:
        answers = stream.answers(given(), artefact.Tokeniser(built), backend, 5)
        assert [next(answers).row.text for _ in range(7)] == TEXTS[:7]
        with pytest.raises(LabError, match="line 8 is bad"):
            next(answers)


def test_only_a_few_batches_are_read_ahead(onnx):
    built, read = artefact.load(onnx), itertools.count()
    endless = (Row(next(read), "A headline") for _ in itertools.repeat(None))
    with runtimes.open_backend(built) as backend:
        answers = stream.answers(endless, artefact.Tokeniser(built), backend, 10)
        for _ in range(200):
            next(answers)
        assert next(read) <= 200 + 10 * (stream.AHEAD + 3)
        answers.close()


def test_json_and_csv_say_the_same(onnx, tmp_path):
    with (tmp_path / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    options = ("--file", tmp_path / "texts.jsonl", "--artefacts", onnx, "--threads", 2)
    lines = run_script("predict.py", *options, "--json", "--batch", 64, cwd=tmp_path)
    table = run_script("predict.py", *options, "--csv", cwd=tmp_path)
    assert (lines.returncode, lines.stderr, table.returncode, table.stderr) == (0, "", 0, "")
    records = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [record["text"] for record in records] == [text.strip() for text in TEXTS]
    for record in records:
        [answer] = record["backends"].values()
        assert set(answer) == {"label", "id", "probabilities", "batch", "batch_ms"}, "no time of a single headline"
        assert answer["batch"] == len(TEXTS) and answer["batch_ms"] > 0
    answers = [record["backends"]["ONNX Quantised"] for record in records]
    best = [(answer["label"], f"{max(answer['probabilities'].values()):.4f}") for answer in answers]
    head, *cells = csv.reader(io.StringIO(table.stdout))
    assert head == ["text", "label", "score"]
    assert cells == [[text.strip(), *answer] for text, answer in zip(TEXTS, best, strict=True)]
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_batch_is_answered_though_the_pipe_stays_open_and_ctrl_c_loses_nothing(onnx):
    with subprocess.Popen(
        command(onnx, "--csv", "--batch", 2), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"First headline\nSecond headline\nThird headline\n")
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(3)]  # or this waits for ever
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert [line.split(b",")[0] for line in lines] == [b"text", b"First headline", b"Second headline"]
    assert (process.returncode, rest, len(errors.splitlines())) == (130, b"", 1), errors


def test_ctrl_c_at_full_speed_leaves_whole_lines(onnx, tmp_path):
    with (
        (tmp_path / "out.jsonl").open("wb") as out,
        subprocess.Popen(["yes", "A headline"], stdout=subprocess.PIPE) as yes,
    ):
        options = command(onnx, "--json", "--batch", 32, "--threads", 2)
        process = subprocess.Popen(options, stdin=yes.stdout, stdout=out, stderr=subprocess.PIPE)
        yes.stdout.close()
        while (tmp_path / "out.jsonl").stat().st_size < 10**5 and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, len(errors.splitlines())) == (130, 1), errors
    assert all(json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1])
    assert (tmp_path / "out.jsonl").read_bytes().endswith(b"}\n")


def test_reader_that_stops_early_is_no_error(onnx):
    line = f"yes 'A headline' | {' '.join(command(onnx, '--csv'))} | head -n 3"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (len(result.stdout.splitlines()), result.stderr) == (3, "")


def test_memory_does_not_grow_with_the_file(onnx):
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "from benchmark.worker import peak_memory_bytes; print(peak_memory_bytes(), file=sys.stderr)"
    )
    peaks, environment = [], {**os.environ, "PYTHONPATH": str(ROOT)}
    for count in (500, 5000):
        text = "".join(f"{TEXTS[i % 40]} {i}\n" for i in range(count))
        run = [sys.executable, "-c", program, *command(onnx, "--csv")[1:]]
        result = subprocess.run(run, input=text, capture_output=True, text=True, timeout=200, env=environment)
        assert len(result.stdout.splitlines()) == count + 1, result.stderr
        peaks.append(int(result.stderr))
    assert peaks[1] < 1.05 * peaks[0]


def test_the_study_of_a_large_file_counts_every_line(onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(million, "RATE_HEADLINES", 128)
    texts = list(itertools.islice(million.made_headlines(), 500))
    assert len(set(texts)) > 490
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    settings = argparse.Namespace(headlines=500, batch=64)
    run = million.measure(onnx, tmp_path / "texts.txt", 1, settings)
    assert run["per_second"] == pytest.approx(500 / run["seconds"])
    assert run["minutes_for_a_million"] * 60 * 500 == pytest.approx(run["seconds"] * 1e6)
    whole = {"runs": [run], "headlines": 500, "environment": environment.describe()}
    assert f"{run['minutes_for_a_million']:.0f} with ONNX Quantised" in study_tables.million(whole)
    assert run["model_per_second"] > 0 and run["memory_mb"] > 20 and run["cores"] == 1
    lines = (tmp_path / "labelled.csv").read_text().splitlines(keepends=True)
    for wrong in (lines[:-1], [*lines[:9], lines[10], lines[9], *lines[11:]], [*lines, lines[-1]]):
        (tmp_path / "labelled.csv").write_text("".join(wrong))
        with pytest.raises(LabError, match="came back as"):
            million.check_order(tmp_path / "texts.txt", tmp_path / "labelled.csv")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--csv"], "--csv takes one back end: add --backends onnx"),
        (["--json", "--batch", "8"], "--batch takes one back end"),
        (["--batch", "8", "--backends", "onnx"], "--batch goes with --json or --csv"),
        (["--csv", "--json"], "not both"),
        (["--csv", "--runs", "3", "--backends", "onnx"], "leave out --runs"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(options, said):
    result = run_script("predict.py", *options)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert said in result.stderr
