"""predict.py as a user starts it: what it prints, what it writes, how it ends."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import HEADLINES, ROOT, run_in_process, run_script

from lab04 import console
from lab04.compare import charts, closing_check

CHARTS = [
    "confidence_ai_tutor_program_set.png",
    "confidence_climate_report_warns.png",
    "confidence_cybersecurity_breach.png",
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def onnx(artefact_folder):
    return artefact_folder("onnx")


@pytest.fixture
def predict(onnx, tmp_path, monkeypatch, capfd):
    """`predict(*arguments)`: a run over the ONNX artefact of nine labels, in an empty folder.

    In this process, where the libraries are loaded; with `input`, which only a process has, in one of its own.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments, artefacts=(onnx,), **options):
        given = ["--artefacts", *artefacts, "--", *arguments]
        if arguments and str(arguments[0]).startswith("--"):
            given = [*arguments, "--artefacts", *artefacts]
        if options:
            return run_script("predict.py", *given, **options)
        capfd.readouterr()  # what the labs printed, if this test was the first to need them
        code = run_in_process("predict.py", *given)
        return subprocess.CompletedProcess(given, code, *capfd.readouterr())

    return run


@pytest.fixture
def rejected(predict):
    """`rejected(*arguments)`: the one line on stderr of a run that must fail, before it wrote anything."""

    def run(*arguments, **options) -> str:
        result = predict(*arguments, **options)
        assert result.returncode == 2, result
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert line.startswith("predict.py: ")
        return line

    return run


# --- What it prints and writes ----------------------------------------------------------------------------


def test_default_headlines_in_the_labs_form(artefact_folder, tmp_path):
    folders = [artefact_folder(backend) for backend in ("torch", "onnx", "tensorrt")]
    result = run_script("predict.py", "--runs", 2, "--artefacts", *folders, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("Predicting: ")] == [f"Predicting: {h!r}" for h in HEADLINES]
    for name in ("PyTorch Quantised", "ONNX Quantised", "TensorRT's graph on the CPU"):
        heads = [line for line in lines if line.startswith(f"[{name}]: topic ")]
        assert len(heads) == 3, name
    assert lines.count("Top 5 Predictions:") == 9
    for place in (i for i, line in enumerate(lines) if line == "Top 5 Predictions:"):
        scores = [float(line.split()[-1]) for line in lines[place + 1 : place + 6]]
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1.001
    assert sorted(path.name for path in tmp_path.iterdir()) == CHARTS
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG)
        assert f">> Saved prediction confidence comparison to: {path.name}" in lines
    summary = lines[lines.index(next(line for line in lines if line.startswith("Summary: 3 headlines"))) :]
    assert {line.split("  ")[0] for line in summary} >= {
        "PyTorch Quantised",
        "ONNX Quantised",
        "TensorRT's graph on the CPU",
    }
    assert any(line.startswith("TensorRT's graph on the CPU: ") for line in summary), "why TensorRT does not run here"


def test_headlines_that_begin_alike_get_charts_of_their_own(predict, tmp_path):
    result = predict("Same words at the start, one", "Same words at the start, two", "!!!")
    assert result.returncode == 0, result.stderr
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == [
        "confidence_headline.png",
        "confidence_same_words_at_the_st.png",
        "confidence_same_words_at_the_st_2.png",
    ]


def test_over_long_headline_is_cut_and_said_so(predict):
    result = predict("the " * 300)
    assert result.returncode == 0, result.stderr
    assert "too long: the last 238 tokens are not read" in result.stdout  # 300, less 64 positions, [CLS] and [SEP]


def test_fewer_labels_than_five(artefact_folder, predict):
    result = predict("A headline", artefacts=[artefact_folder("onnx", "distilbert", 2)])
    assert result.returncode == 0, result.stderr
    assert "\nPredictions:\n" in result.stdout
    assert result.stdout.count("  - topic ") == 2


def test_labelled_file_is_scored(predict, onnx, tmp_path):
    texts = HEADLINES + ["One, with a comma", 'One "quoted"', "One\nof two lines"]
    first = predict("--json", "--file", write_csv(tmp_path / "texts.csv", [{"text": text} for text in texts]))
    records = [json.loads(line) for line in first.stdout.splitlines()]
    assert [record["text"] for record in records] == texts
    found = [record["backends"]["ONNX Quantised"]["label"] for record in records]
    wrong = [*found[:-1], "topic 0" if found[-1] != "topic 0" else "topic 1"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, wrong, strict=True)]
    second = predict("--file", write_csv(tmp_path / "labelled.csv", rows), "--charts", 0)
    assert "5 of 6" in second.stdout
    assert "Summary: 6 headlines" in second.stdout


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- JSON for the next program ----------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(predict, tmp_path):
    texts = ["First", "Ünïcödé 🙂 مرحبا", "$x$ <b>", "the " * 300]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    result = predict("--json", "--file", tmp_path / "texts.txt")
    assert (result.returncode, result.stderr) == (0, "")  # the progress bar is for terminals
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["text"] for record in records] == [text.strip() for text in texts]
    assert [record["truncated"] for record in records] == [False, False, False, True]
    assert records[3]["tokens"] == 64
    for record in records:
        assert set(record) == {"text", "tokens", "truncated", "label", "backends"}
        for answer in record["backends"].values():
            assert set(answer) == {"label", "id", "probabilities", "ms"}
            assert sum(answer["probabilities"].values()) == pytest.approx(1)
            assert answer["ms"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_stdin_and_file_give_the_same_answers(predict, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(HEADLINES), encoding="utf-8-sig")
    answers = []
    for result in (
        predict("--json", "--file", tmp_path / "texts.txt"),
        predict("--json", "--file", "-", input="\n".join(HEADLINES)),
        predict("--json", *HEADLINES),
    ):
        assert result.returncode == 0, result.stderr
        records = [json.loads(line) for line in result.stdout.splitlines()]
        answers.append([(r["text"], r["backends"]["ONNX Quantised"]["probabilities"]) for r in records])
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 3


def test_reader_that_stops_early_is_no_error(onnx):
    command = f"yes 'A headline' | {sys.executable} {ROOT}/predict.py --json --file - --artefacts {onnx} | head -n 3"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(result.stdout.splitlines()) == 3
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 1


def test_interrupted_stream_keeps_what_was_done(onnx, tmp_path):
    """Ctrl-C while an endless input is read: whole lines so far, exit code 130, one line."""
    command = [sys.executable, str(ROOT / "predict.py"), "--json", "--file", "-", "--artefacts", str(onnx)]
    with (tmp_path / "out.jsonl").open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE, text=True)
        process.stdin.write("A headline\n" * 400)
        process.stdin.flush()
        wait_for(lambda: (tmp_path / "out.jsonl").read_bytes().count(b"\n") >= 20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1, errors
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) >= 20
    assert all(json.loads(line)["text"] == "A headline" for line in lines)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_stream_needs_no_more_memory_for_more_headlines(onnx, tmp_path):
    """3,000 and 300 headlines take the same memory; what is kept of each is two times of eight bytes."""
    peaks = []
    for count in (300, 3000):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"{HEADLINES[i % 3]} number {i}\n" for i in range(count)))
        program = (
            "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        command = [sys.executable, "-c", program, ROOT / "predict.py", "--json", "--file", path, "--artefacts", onnx]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=environment)
        assert len(result.stdout.splitlines()) == count, result.stderr
        peaks.append(int(result.stderr))
    assert peaks[1] < 1.05 * peaks[0]


# --- Bad input --------------------------------------------------------------------------------------------


def test_missing_artefact(rejected, tmp_path):
    assert f"{ROOT}/lab04-torch.py --output quantised-model-torch" in rejected(
        "A", artefacts=[tmp_path / "quantised-model-torch"]
    )
    assert f"{ROOT}/lab04-optimum.py --output quantised-model-optimum" in rejected(
        "A", artefacts=[tmp_path / "quantised-model-optimum"]
    )


def test_empty_headline_and_file(rejected, tmp_path):
    assert "headline 2 is empty" in rejected("A", " \t")
    for content in ("", "\n \n\n", "\ufeff"):
        (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
        assert "holds no headlines" in rejected("--file", tmp_path / "empty.txt")


def test_a_blank_cell_does_not_end_a_run(predict, tmp_path):
    (tmp_path / "blank.csv").write_text("text;Label\nA headline;Topic 1\n ;topic 2\n")
    result = predict("--json", "--file", tmp_path / "blank.csv")
    assert result.returncode == 0
    assert [json.loads(line)["label"] for line in result.stdout.splitlines()] == ["topic 1"]
    assert "1 blank headline skipped" in result.stderr


def test_unreadable_files(rejected, tmp_path):
    assert "No such file" in rejected("--file", tmp_path / "nowhere.txt")
    assert "is not UTF-8" in rejected("--file", "-", input="Caf\udce9\n", errors="surrogateescape")


def test_unknown_label(rejected, tmp_path):
    (tmp_path / "labels.csv").write_text("text,label\nA headline,no such topic\n")
    line = rejected("--file", tmp_path / "labels.csv")
    assert "line 2: label 'no such topic' is not one of the model's" in line
    assert "topic 8" in line


def test_headlines_and_file_together(rejected, tmp_path):
    assert "not both" in rejected("--file", tmp_path / "x.txt", "--runs", "1", "A headline", artefacts=["x"])


@pytest.mark.parametrize("options", [("--threads", "0"), ("--runs", "-1"), ("--runs", "many")])
def test_impossible_numbers(options, predict):
    result = predict(*options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("predict.py: error: argument --")


def test_unwritable_output(predict, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        result = predict("--output", output, "--runs", 1)
        assert result.returncode == 2
        [line] = result.stderr.splitlines()
        assert line.startswith("predict.py: cannot write to ")
    assert (tmp_path / "file").read_text() == "in the way"


def test_corrupt_artefact(rejected, onnx, tmp_path):
    broken = shutil.copytree(onnx, tmp_path / "quantised-model-optimum")
    with (broken / "model_quantized.onnx").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    line = rejected("A headline", artefacts=[broken])
    assert "corrupt artefact" in line
    assert f"{ROOT}/lab04-optimum.py --model " in line


@pytest.mark.parametrize("headline", ["Rain", "Rain later", "Rain " * 100])
def test_a_headline_after_the_artefacts_is_not_taken_for_one(headline, onnx, capfd):
    assert run_in_process("predict.py", "--artefacts", onnx, headline) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "put headlines before --artefacts" in line


def test_labels_of_another_taxonomy_are_left_out(onnx, tmp_path, capfd):
    (tmp_path / "rows.csv").write_text("text,label\nRain later,Weather\n")
    arguments = ["--json", "--artefacts", onnx, "--file", tmp_path / "rows.csv"]
    assert run_in_process("predict.py", *arguments) == 2
    assert "--no-labels" in capfd.readouterr().err
    assert run_in_process("predict.py", *arguments, "--no-labels") == 0
    assert json.loads(capfd.readouterr().out)["label"] is None


def test_artefacts_of_different_weights(rejected, onnx, artefact_folder):
    line = rejected("A headline", artefacts=[onnx, artefact_folder("torch", "bert", 9, 1)])
    assert "come from different weights" in line


def test_missing_model(tmp_path):
    for script in ("lab04-torch.py", "lab04-optimum.py", "lab04-nvidia.py"):
        result = run_script(script, "--model", tmp_path / "nowhere", "--output", tmp_path / "built")
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert "no model at" in result.stderr
        assert list(tmp_path.iterdir()) == []


def test_library_that_is_not_installed(capsys, monkeypatch, onnx):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail as for a missing package
    assert run_in_process("predict.py", "--artefacts", onnx, "--", "A headline") == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err


def test_a_file_given_as_a_headline_is_noticed(rejected, tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("text\nA headline\n")
    assert f"is a file, not a headline: {sys.executable} {ROOT}/predict.py --file {path}" in rejected(str(path))


def test_without_any_library_one_line_says_what_to_do(tmp_path):
    bare = [sys.executable, "-S", ROOT / "predict.py"]  # -S: without site-packages
    process = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "make lab" in process.stderr


def test_commands_in_messages_work_as_they_stand(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    asked = "run pip install -r a.txt && python lab04-nvidia.py; a python of theirs, python3 -m pip install b"
    assert console.as_run_here(asked) == (
        f"run cd {ROOT} && .venv/bin/python -m pip install -r a.txt && .venv/bin/python {ROOT}/lab04-nvidia.py; "
        "a python of theirs, python3 -m pip install b"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert console.as_run_here("python -m benchmark") == f"cd {ROOT} && {tmp_path}/.venv/bin/python -m benchmark"


def test_a_chart_shows_what_any_backend_finds_likely_and_the_right_label():
    first = np.array([0.5, 0.2, 0.1, 0.08, 0.07, 0.03, 0.02, 0.0])
    second = np.array([0.1, 0.5, 0.2, 0.08, 0.0, 0.02, 0.1, 0.0])  # its sixth is the other's fifth
    assert charts.choose_labels([first, second], right=None) == [1, 0, 2, 3, 6, 4]
    assert charts.choose_labels([first, second], right=7) == [1, 0, 2, 3, 6, 4, 7]


def test_a_build_says_what_it_bought_and_which_headlines_changed(capsys):
    texts, labels = ["Stays", "Changes"], ["a", "b"]
    reference, logits = np.array([[2.0, 0.0], [0.2, 0.0]]), np.array([[1.9, 0.0], [0.0, 0.2]])
    [changed] = closing_check.changed_headlines(texts, reference, logits, labels)
    score = round(1 / (1 + np.exp(-0.2)), 4)
    assert changed == {
        "text": "Changes",
        "fp32": {"label": "a", "score": score},
        "quantised": {"label": "b", "score": score},
    }
    closing_check.print_bought(
        {"speed_up": 4.56, "fp32_ms": 7.31, "ms": 1.6, "busy": True}, [changed], {"headlines": 2}
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "   4.6 times as fast as FP32 PyTorch (7.3 → 1.6 ms), 1 of 2 labels changed",
        "   (other programs ran meanwhile: the speed is unsure)",
        "     a 0.55 → b 0.55: Changes",
    ]


def test_the_summary_shows_fp32_beside_int8(artefact_folder, onnx, predict):
    check = json.loads((onnx / "manifest.json").read_text())["check"]
    assert check["speed_up"] == pytest.approx(check["fp32_ms"] / check["ms"], rel=0.01)
    assert len(check["changed_headlines"]) <= 5
    result = predict("--charts", "0", "--runs", "1", artefacts=[onnx, artefact_folder("tensorrt")])
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "INT8" in line or "FP16" in line]
    rows = {line.split("  ")[0]: line.split()[-1].rstrip("?") for line in lines}
    assert rows == {"ONNX Quantised": f"{check['speed_up']:.1f}", "TensorRT's graph on the CPU": "–"}
