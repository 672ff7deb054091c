"""README.md and docs/: their figures are those of results/, and a reader can follow them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from benchmark import __main__ as benchmark
from benchmark import answers, documents, environment, machines, results, study_tables, tables
from benchmark.studies import single_headlines
from lab04 import LabError
from predict import HEADLINES

RESULTS = ROOT / "results"
TRACKED = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True).stdout.split()
WORDS, CHARACTERS, LINES = 30, 400, 190  # of a sentence, of a paragraph, of the README


@pytest.fixture
def machine(tmp_path):
    """A folder of results of the shipped weights that a test may change: `machine(tag, **settings)` writes one."""
    whole = results.load(RESULTS / "intel-xeon-2-cores-real-headlines")
    trained = json.loads((ROOT / "lora-news" / "adapter" / "training.json").read_text())
    whole["settings"]["weights_sha256"] = trained["weights_sha256"]

    def write(tag: str, environment_=(), load=(), **settings) -> Path:
        measured = json.loads(json.dumps(whole))
        measured["settings"] |= settings
        measured["environment"] |= dict(environment_)
        measured["load"] |= dict(load)
        folder = tmp_path / environment.folder_name(measured["environment"], tag)
        folder.mkdir(exist_ok=True)
        results.save_json(folder / results.RESULTS, measured)
        return folder

    return write


def block(what: str, root: Path) -> str:
    return documents.fill(f"<!-- results:{what} --><!-- /results -->", root)


# --- Figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", documents.FILES)
def test_documents_say_what_was_measured(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert documents.fill(text, RESULTS) == text, "run python -m benchmark --readme"


def test_every_table_of_a_run_is_filled(machine, tmp_path):
    name = machine("").name
    of_a_run = tables.OF_A_RUN.keys() | answers.OF_A_MACHINE.keys()
    blocks = "\n".join(f"<!-- results:{name}/{table} --><!-- /results -->" for table in of_a_run)
    everything = "\n".join(f"<!-- results:all/{table} --><!-- /results -->" for table in machines.OF_ALL)
    value = f"<!-- results:{name}/backends.torch-int8.model_mb:.1f -->?<!-- /results -->"
    text = f"{blocks}\n{everything}\nIt has {value} MB.\n"
    filled = documents.fill(text, tmp_path)
    assert "-->23.5<!-- /results --> MB." in filled
    assert filled.count("\n| ") > 60
    assert documents.fill(filled, tmp_path) == filled
    with pytest.raises(LabError, match="asks for nonsense"):
        block(f"{name}/nonsense", tmp_path)
    with pytest.raises(LabError, match="run python -m benchmark"):
        block("elsewhere/summary", tmp_path)


def test_a_quick_look_and_a_strangers_model_are_no_figures_of_ours(machine, tmp_path, capsys):
    ours = machine("")
    for settings in ({"quick": True}, {"shipped": False, "model": "adapter"}, {"model": "my-model"}):
        other = machine("other", {"cpu": "Elsewhere"}, **settings)
        assert "Elsewhere" not in machines.by_cpu(tmp_path), settings
        with pytest.raises(LabError, match="a document shows none of its figures"):
            block(f"{other.name}/summary", tmp_path)
        benchmark.suggest_next(results.load(other))
        said = capsys.readouterr().out
        assert "go into no table" in said and "--readme" not in said
    benchmark.suggest_next(results.load(ours))
    assert "--readme" in capsys.readouterr().out


def test_a_busy_machine_is_said_to_be_one(machine, tmp_path):
    quiet, busy = machine("quiet"), machine("busy", {"cpu": "Busy"}, {"load_average_start": 3.7})
    assert "busy" not in block(f"{quiet.name}/summary", tmp_path)
    for table in ("summary", "hardware"):
        assert "load average 3.7 on 2 cores at the start" in block(f"{busy.name}/{table}", tmp_path)
    rows = {line.split(" (")[0]: line for line in machines.by_cpu(tmp_path).splitlines()}
    assert "busy machine" in rows["| Busy"] and "busy machine" not in rows["| Intel Xeon"]
    assert not environment.busy({"load_average": 2.3, "stolen_share": 0.001}, 2), "the run itself is part of the load"
    assert environment.busy({"stolen_share": 0.2}, 2) and environment.busy({"others_share": 0.4}, 2)
    assert environment.busy(None, 2) == ""


def test_a_watch_sees_what_others_do():
    watch = environment.Watch()
    busy = "import time; end = time.perf_counter() + 1.2\nwhile time.perf_counter() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", busy])  # still running: no time of ours
    try:
        other.wait(0.9)
    except subprocess.TimeoutExpired:
        assert watch.load()["others_share"] > 0.15 / environment.usable_cores()
    other.wait()


def test_earlier_artefacts_and_weights_are_told_apart(machine, tmp_path):
    machine("new", {"date": "2030-01-01", "cpu": "New"})
    old = machine("old", {"cpu": "Old"})
    measured = results.load(old)
    measured["backends"]["torch-int8"]["model_mb"] += 0.001
    results.save_json(old / results.RESULTS, measured)
    machine("before", {"cpu": "Before"}, weights_sha256="0" * 64)
    rows = {line.split(" (")[0]: line for line in machines.by_cpu(tmp_path).splitlines()}
    assert "earlier" not in rows["| New"]
    assert "earlier artefacts" in rows["| Old"] and "(earlier)" in rows["| Before"]
    assert "Before" not in machines.by_cpu(tmp_path, brief=True)
    sentence = machines.first_sentence(tmp_path)
    assert "New" in sentence and "Old" not in sentence and "Before" not in sentence


def test_claims_go_no_further_than_the_figures(machine, tmp_path):
    folder = machine("")
    lines = {line.split("|")[2].strip(): line for line in machines.label_claims(tmp_path).splitlines()[2:]}
    assert re.search(r"\| +12 \| +2 \| +0\.01 \| a sign of real harm", lines["ONNX Quantised INT8"])
    assert re.search(r"\| +8 \| +6 \| +0\.79 \| no sign", lines["PyTorch Quantised INT8"])
    assert "no label changed" in lines["ONNX Rechecked INT8"]
    assert machines.verdict({"changed": 9, "right_to_wrong": 1, "wrong_to_right": 8, "mcnemar_p": 0.04}) == (
        "a sign of a real gain"
    )
    sentence = machines.first_sentence(tmp_path)
    assert "26% of its size" in sentence and "4.9 to 6.5 times as fast" in sentence
    # Of all whose speed it tells: the compiled one changed 17, the two portable ones 15 and 16.
    assert "Compiled for" in sentence and "Of 2,407 real headlines 15 to 17 get another label" in sentence
    measured = results.load(folder)
    del measured["backends"]["torch-int8-this-cpu"]
    results.save_json(folder / results.RESULTS, measured)
    sentence = machines.first_sentence(tmp_path)
    assert "Compiled for" not in sentence and "Of 2,407 real headlines 15 to 16 get another label" in sentence
    assert "No run" in machines.first_sentence(tmp_path / "nothing")


def test_which_one_follows_the_figures(machine, tmp_path):
    folder = machine("")
    measured = results.load(folder)
    measured["settings"]["threads"] = [1, 2]
    for name, rate in (("torch-int8", 999.0), ("onnxruntime-int8", 500.0), (results.REFERENCE, 100.0)):
        measured["backends"][name]["throughput"]["2"] = {"8": rate}
    measured["backends"]["torch-int8"]["latency"]["1"]["p50_ms"] = 0.5
    rows = {line.split("|")[1].strip(): line for line in answers.which_one(measured, None).splitlines()[2:]}
    assert "`lab04-torch.py`" in rows["one text at a time"] and "p50 0.5 ms" in rows["one text at a time"]
    assert "15 of 2,407 labels changed" in rows["one text at a time"]
    assert "999 headlines/s with 2 threads in batches of 8; FP32 100" in rows["one process on all cores"]
    assert "`lab04-optimum.py --recheck`" in rows["no label may change"]
    assert "0 of 2,407 changed; p95 6.5 ms in place of 2.2" in rows["no label may change"]
    assert "not measured by us" in rows["an NVIDIA GPU"]


def test_columns_of_what_was_not_measured_are_left_out(machine, tmp_path):
    folder = machine("")
    assert "floor" not in block(f"{folder.name}/six-rows", tmp_path)
    measured = results.load(folder)
    measured["backends"]["onnxruntime-int8"]["consistency"] |= {"batch_changed": 7, "batch_max_change": 0.125}
    results.save_json(folder / results.RESULTS, measured)
    floor = tmp_path / environment.folder_name(measured["environment"], "floor")
    floor.mkdir()
    results.save_json(floor / results.RESULTS, {"floor_ms": 0.7, "weights_sha256": "another model's"})
    assert "floor" not in block(f"{folder.name}/six-rows", tmp_path)
    weights = measured["settings"]["weights_sha256"]
    results.save_json(floor / results.RESULTS, {"floor_ms": 0.7, "weights_sha256": weights})
    table = block(f"{folder.name}/six-rows", tmp_path)
    assert "of the floor" in table and "changed by a batch" in table
    [line] = [line for line in table.splitlines() if line.startswith("| ONNX Quantised")]
    assert f"{0.7 / measured['backends']['onnxruntime-int8']['latency']['1']['p50_ms']:.0%}" in line and "7 |" in line
    assert "0.125" in block(f"{folder.name}/consistency", tmp_path)


def test_the_excerpt_is_what_predict_prints(artefact_folder, tmp_path):
    folder = artefact_folder("onnx")
    text = next(iter(HEADLINES))
    shown = study_tables.excerpt({"predicted": single_headlines.predict([folder])[0]})
    printed = run_script("predict.py", text, "--artefacts", folder, "--output", tmp_path, "--charts", 0).stdout
    plain = [re.sub(r"\d\.\d{4} sec", "? sec", lines) for lines in (shown.strip("`\n"), printed)]
    assert plain[0] in plain[1]


def test_changed_headlines_come_with_everyones_probabilities(model_folder, artefact_folder, tmp_path, monkeypatch):
    data = tmp_path / "few.csv"
    with (ROOT / "lora-news" / "headlines" / "test.csv").open(encoding="utf-8") as file:
        texts = [line.rsplit(",", 1)[0] for line in file][1:61]
    data.write_text("\n".join(["text,label", *(f"{text},topic 1" for text in texts)]), encoding="utf-8")
    folders = [artefact_folder("torch"), artefact_folder("onnx")]
    arguments = ["--model", model_folder("bert", 9), "--data", data, "--output", tmp_path, "--artefacts", *folders]
    monkeypatch.setattr(sys, "argv", ["headlines", *map(str, arguments)])
    single_headlines.main()
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    measured = results.load(folder)
    for row in measured["changed"]:
        assert list(row["probabilities"]) == ["FP32", "PyTorch Quantised", "ONNX Quantised"]
        best = {max(scores, key=scores.get) for scores in row["probabilities"].values()}
        assert len(best) > 1 and row["text"] in data.read_text(encoding="utf-8")
    assert (folder / "changed.png").exists() == bool(measured["changed"])


# --- Reading ----------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The prose of a Markdown file: no code, tables, headings, generated blocks, pictures; a list item is one."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- results:\S+ -->\n.*?<!-- /results -->", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- figures: .*?<!-- end of figures -->", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\||#|!\[|\[!|<).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n", text, flags=re.MULTILINE)
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    return [re.sub(r"\]\([^)]*\)", "]", part) for part in found if part]


@pytest.mark.parametrize("name", TRACKED)
def test_sentences_and_paragraphs_are_short(name):
    found = paragraphs((ROOT / name).read_text(encoding="utf-8"))
    long = [part for part in found if len(part) > CHARACTERS]
    sentences = [sentence for part in found for sentence in re.split(r"(?<=[.!?:;])\s", part)]
    long += [sentence for sentence in sentences if len(sentence.split()) > WORDS]
    assert not long, "\n\n".join(long)


def test_the_readme_is_no_longer_than_it_may_be():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LINES


def test_the_readme_explains_its_words():
    """A word of the trade stands in the README only where it, or a page before it, says what it means."""
    prose = " ".join(paragraphs((ROOT / "README.md").read_text(encoding="utf-8")))
    for word in ("PEFT", "VNNI", "logit", "GELU", "eager", "artefact", "adapter", "LoRA", "softmax", "dynamic"):
        first = re.search(rf"\b{word}s?\b", prose)
        assert not first or f"*{first[0]}*" in prose or f"**{first[0]}**" in prose, f"{word} is not explained"


def test_every_command_of_the_documents_exists():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split()
    files = [f"/{file}" for file in tracked]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in TRACKED:
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE))
        assert named <= targets, (name, named - targets)
        scripts = re.findall(r"(?:python|\.venv/bin/python) ((?:[\w-]+/)*[\w-]+\.py)", text)
        assert all(any(file.endswith(f"/{script}") for file in files) for script in scripts), (name, scripts)
        links = re.findall(r"\]\((?!http)([^)#\s]+)", text)
        assert all((ROOT / name).parent.joinpath(link).exists() for link in links), (name, links)


def test_the_readmes_python_runs_as_it_stands(artefact_folder, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 10
    shutil.copytree(artefact_folder("onnx"), tmp_path / "quantised-model-optimum")
    environment_ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment_, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    label, score = ended.stdout.split()[:2], ended.stdout.split()[-1]
    assert label[0] == "topic" and 0 < float(score) <= 1
