"""The benchmark on small random models: file formats, the whole run, resuming, rows that cannot be measured."""

import csv
import json
import re
import shutil
import subprocess
import sys
from functools import cache

import cpuinfo
import numpy as np
import pytest
from conftest import ROOT, copy_model, run_benchmark, run_in_process

from benchmark import __main__ as benchmark
from benchmark import documents, environment, floor, journal, peers, results, run, study_tables, tables, worker
from benchmark.charts import overview
from benchmark.journal import Journal
from benchmark.process import Process, WorkerFault
from benchmark.studies import families, pictures, profile, static, steps
from lab04 import LabError, artefact
from lab04.artefact import contract, sealing
from lab04.quantise import preparation, this_cpu
from lab04.read.texts import TEST_HEADLINES, held_out_headlines
from lab04.run import runtimes
from lab04.run.backend import Unavailable

with TEST_HEADLINES.open(encoding="utf-8", newline="") as file:
    TEXTS = [row["text"] for row in csv.DictReader(file)][:40]


def write_data(path, labels: int):
    """Forty of the lab's headlines under the labels of a random model."""
    rows = [(text, f"topic {row % labels}") for row, text in enumerate(TEXTS)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "headlines.csv", labels=9)


# --- A whole run ------------------------------------------------------------------------------------------


OTHER_CLASSES = ("distilbert", 2)  # a family and a number of classes that are not the lab's own


@pytest.fixture(scope="session")
def quick_run(model_folder, artefact_folder, tmp_path_factory):
    """`python -m benchmark --quick` on the three artefacts of one model: its process and results folder."""
    output = tmp_path_factory.mktemp("results")
    data = write_data(tmp_path_factory.mktemp("data") / "headlines.csv", labels=2)
    built = [artefact_folder(backend, *OTHER_CLASSES) for backend in ("torch", "onnx", "tensorrt")]
    unnamed = copy_model(
        model_folder(*OTHER_CLASSES),
        tmp_path_factory.mktemp("model") / "unnamed",
        id2label={"0": "LABEL_0", "1": "LABEL_1"},
        label2id={"LABEL_0": 0, "LABEL_1": 1},
    )
    arguments = ["--artefacts", *built, "--model", unnamed, "--labels", "topic 0,topic 1", "--data", data]
    process = run_benchmark("--quick", *arguments, "--output", output)
    assert process.returncode == 0, process.stderr
    [folder] = output.iterdir()
    return process, folder


def test_quick_run_measures_everything(quick_run):
    _, folder = quick_run
    measured = results.load(folder)
    assert measured["finished"]
    assert list(measured["backends"])[:4] == ["fp32-torch", "fp32-onnx", "torch-int8", "onnxruntime-int8"]
    for name in list(measured["backends"])[:4]:
        row = measured["backends"][name]
        assert 0 <= row["consistency"]["batch_changed"] <= row["quality"]["headlines"]
        assert row["reason"] is None
        assert row["quality"]["headlines"] == 40
        speed = row["latency"]["1"]
        assert 0 < speed["min_ms"] <= speed["p50_ms"] <= speed["p90_ms"] <= speed["p95_ms"] <= speed["p99_ms"]
        assert list(row["throughput"]["1"]) == ["1", "8", "32"]
        cold = row["cold_start"]
        parts = sum(cold[key] for key in ("process_ms", "imports_ms", "load_ms", "first_ms"))
        assert cold["total_ms"] == pytest.approx(parts)
        assert cold["memory_mb"] > 20
        assert row["model_mb"] > 0
    reference = measured["backends"]["fp32-torch"]
    assert reference["latency"]["1"]["speed_up"] == 1
    assert reference["consistency"]["agreement"] == 1
    assert measured["backends"]["fp32-onnx"]["consistency"]["max_change"] < 1e-4
    changes = {name: row["consistency"]["batch_max_change"] for name, row in list(measured["backends"].items())[:4]}
    assert changes["fp32-torch"] < 1e-3 < changes["onnxruntime-int8"] < 3, "dynamic INT8 feels its neighbours"
    assert measured["tokenisation"]["p50_ms"] > 0


def test_a_model_of_another_class_count_named_by_hand_is_measured(quick_run):
    measured = results.load(quick_run[1])
    assert measured["settings"]["labels"] == ["topic 0", "topic 1"]
    for name in ("fp32-torch", "fp32-onnx", "torch-int8", "onnxruntime-int8", "tensorrt-fp16-graph"):
        assert np.array(measured["backends"][name]["quality"]["confusion"]).shape == (2, 2)


def test_tensorrt_without_gpu_is_a_row_with_its_reason(quick_run):
    measured = results.load(quick_run[1])
    engine, graph = measured["backends"]["tensorrt-fp16"], measured["backends"]["tensorrt-fp16-graph"]
    if not engine["latency"]:
        assert engine["reason"]
        assert engine["reason"] in quick_run[0].stdout
    assert graph["consistency"]["agreement"] == 1
    assert graph["latency"] == graph["throughput"] == {} and graph["cold_start"] is None, "no speed is claimed for it"


def test_results_know_their_origin(quick_run, artefact_folder):
    measured = results.load(quick_run[1])
    built = artefact.load(artefact_folder("torch", *OTHER_CLASSES))
    assert measured["settings"]["weights_sha256"] == built.manifest["weights_sha256"]
    here = measured["environment"]
    assert here["cpu"] and here["cores"] >= 1 and here["libraries"]["torch"]
    assert here["date"] and measured["load"]["load_average_start"] is not None
    assert measured["settings"]["shipped"] is False
    assert quick_run[1].name == environment.folder_name(here, "unnamed quick"), "a full run of ours is not replaced"


def test_files_of_a_run(quick_run):
    process, folder = quick_run
    for name in ("overview", "speed-up", "latency", "throughput", "confusion", "reliability"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with (folder / "latency.csv").open() as file:
        samples = list(csv.DictReader(file))
    measured = results.load(folder)
    times = [float(row["ms"]) for row in samples if row["backend"] == "torch-int8"]
    assert np.median(times) == pytest.approx(measured["backends"]["torch-int8"]["latency"]["1"]["p50_ms"], abs=1e-3)
    with (folder / "summary.csv").open() as file:
        assert {row["backend"] for row in csv.DictReader(file)} == set(measured["backends"])
    texts = "".join(
        path.read_text()
        for path in folder.iterdir()
        if path.suffix in (".json", ".jsonl", ".csv") and path.name != results.CHANGED
    )
    assert not any(text in texts for text in TEXTS), "only the file that git ignores contains the data"
    assert "1.00×" in process.stdout
    assert process.stdout.splitlines()[-2].startswith("Wrote ")
    assert process.stdout.splitlines()[-1].startswith("This was a quick look: its figures go into no table")
    assert process.stderr == ""


def test_redraw_gives_the_same_results(quick_run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(quick_run[1] / journal.FILE, copy)
    assert run_in_process("benchmark/__main__.py", "--redraw", copy) == 0
    assert results.load(copy) == results.load(quick_run[1])


def test_committed_results_are_drawn_again_without_a_journal(quick_run, tmp_path):
    shutil.copy(quick_run[1] / results.RESULTS, tmp_path)
    assert run_in_process("benchmark/__main__.py", "--redraw", tmp_path) == 0
    assert (tmp_path / "overview.png").read_bytes() == (quick_run[1] / "overview.png").read_bytes()


def test_redraw_needs_results(tmp_path, capsys):
    assert run_in_process("benchmark/__main__.py", "--redraw", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no readable" in error


def test_no_name_of_the_overview_covers_another():
    import matplotlib.pyplot as plt

    rows = {}
    for place in range(12):  # all but on one spot
        row = {"name": f"Backend {place}", "precision": "INT8", "group": "peer", "colour": "#BBBBBB", "model_mb": 23.0}
        row |= {"latency": {"1": {"p50_ms": 4 + 0.05 * place, "p95_ms": 5}}, "consistency": {"changed": place}}
        rows[str(place)] = row | {"quality": {"headlines": 1000}}
    figure = overview.draw(plt, rows, ["1"], {"floor_ms": 0.6})
    figure.draw_without_rendering()
    [axes] = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if " MB" in text.get_text()]
    assert len(boxes) == 12
    inside = axes.get_window_extent()
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 for box in boxes), "none over an axis"
    assert axes.get_xlim()[0] < 0.6 and min(axes.get_xticks()) <= 0.5, "the floor is in the picture, and so is a tick"
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    plt.close(figure)


# --- Interruptions, in this process for speed -------------------------------------------------------------


describe_once = cache(environment.describe)  # a second for every run: py-cpuinfo starts processes


class InProcess:
    """Stands in for benchmark.process.Process: the same commands, carried out here; `limit` more are answered."""

    limit = float("inf")
    asked = 0
    exported: dict = {}  # model: the folder that it was exported to, once for all runs

    def __init__(self, _log, _threads=1, _forgiving=False):
        self.worker = worker.Worker()

    def ask(self, do, **fields):
        InProcess.asked += 1
        if InProcess.asked > InProcess.limit:
            raise KeyboardInterrupt
        if do == "export" and fields["model"] in InProcess.exported:
            shutil.copytree(InProcess.exported[fields["model"]], fields["reference"])
            return {}
        return getattr(self.worker, do)(**json.loads(json.dumps(fields)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def run_here(monkeypatch, model_folder, artefact_folder, reference_folder, data, tmp_path):
    """`run_here(*arguments, limit=n)`: a tiny run in this process that Ctrl-C ends after n commands."""
    small = run.QUICK | {"rounds": 2, "headlines_per_round": 2, "batches": [1, 2], "throughput_headlines": 4}
    monkeypatch.setattr(run, "QUICK", small)
    monkeypatch.setattr(run, "Process", InProcess)
    monkeypatch.setattr(environment, "describe", describe_once)
    monkeypatch.setattr(InProcess, "exported", {str(model_folder("bert", 9)): reference_folder})

    def run_limited(*arguments, limit=float("inf")):
        InProcess.limit, InProcess.asked = limit, 0
        fixed = [
            "--quick",
            "--artefacts",
            artefact_folder("onnx"),
            "--model",
            model_folder("bert", 9, 0),
            "--data",
            data,
        ]
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, [*fixed, "--output", tmp_path, *arguments])])
        benchmark.main()
        return read_run(tmp_path)

    return run_limited


def read_run(output):
    [folder] = output.iterdir()
    return Journal(folder / journal.FILE).entries, results.load(folder)


def test_a_rechecked_artefact_is_a_row_of_its_own(run_here, artefact_folder, tmp_path):
    folder = shutil.copytree(artefact_folder("onnx"), tmp_path.parent / f"{tmp_path.name}-optimum-recheck")
    manifest = artefact.load(folder).manifest
    shutil.copy(folder / manifest["model_file"], folder / "second.onnx")
    files = manifest["files"] | {"second.onnx": contract.describe_file(folder / "second.onnx")}
    recheck = {"graph": "second.onnx", "threshold": 1e9}  # every headline runs again
    sealing.write_manifest(folder, {**manifest, "files": files, "recheck": recheck, "check": {}})
    entries, measured = run_here("--artefacts", artefact_folder("onnx"), folder)
    plain, rechecked = (measured["backends"][name] for name in ("onnxruntime-int8", "onnxruntime-int8-recheck"))
    assert (plain["name"], rechecked["name"]) == ("ONNX Quantised", "ONNX Rechecked")
    assert rechecked["rechecked"] == 1 and "rechecked" not in plain
    assert rechecked["model_mb"] == pytest.approx(2 * plain["model_mb"])
    means = [row["latency"]["1"]["mean_ms"] for row in (rechecked, plain)]
    printed = " ".join(tables.summary(measured).split())
    assert "ONNX Rechecked: 100.0% of the headlines ran again" in printed
    assert "mean {:.2f} ms, without recheck {:.2f}.".format(*means) in printed
    assert rechecked["latency"]["1"]["p95_ms"] > 0


def journal_of(path, logits, truth):
    """A journal of the quality stage: `logits` by (id, group)."""
    journal = Journal(path)
    settings = {"labels": ["cold", "warm"], "threads": [1], "random_weights": False}
    journal.append("start", settings=settings, environment={}, truth=truth)
    for (name, group), values in logits.items():
        journal.append("backend", id=name, name=name, precision="INT8", group=group, model_mb=1.0)
        journal.append("logits", id=name, logits=values)
    return journal


def test_changed_headlines_come_with_every_backends_answer_the_clearest_first(tmp_path):
    fp32 = [[0.0, 3.0], [0.1, 0.0], [0.0, 0.4], [2.0, 0.0]]
    ours = [[0.0, 3.0], [0.0, 0.1], [0.4, 0.0], [2.0, 0.0]]  # changes the second and, with the larger gap, the third
    peer = [[3.0, 0.0], [0.1, 0.0], [0.4, 0.0], [2.0, 0.0]]  # a peer's change alone is not shown
    logits = {("fp32-torch", "reference"): fp32, ("onnxruntime-int8", "lab"): ours, ("other", "peer"): peer}
    journal = journal_of(tmp_path / "journal.jsonl", logits, [1, 0, 0, 0])
    rows = results.changed_rows(journal, ["first", "second", "third", "fourth"])
    assert [row["headline"] for row in rows] == ["third", "second"]
    assert rows[0]["true_label"] == "cold" and rows[0]["fp32_gap"] == 0.4
    assert [rows[0][f"{name}_label"] for name, _ in logits] == ["warm", "cold", "cold"]
    assert rows[1]["other_label"] == "cold"
    assert rows[0]["fp32-torch_score"] == pytest.approx(1 / (1 + np.exp(-0.4)), abs=1e-4)
    printed = tables.changed(rows, most=1)
    assert "2 headlines" in printed and "'third' warm 0.60; onnxruntime-int8: cold, other: cold" in printed
    assert "second" not in printed
    measured = results.summarise(journal)
    assert sum(measured["fp32_gaps"]["headlines"]) == 4
    assert measured["backends"]["onnxruntime-int8"]["changed_gaps"] == pytest.approx([0.1, 0.4])
    results.write_changed(tmp_path, rows)
    with (tmp_path / results.CHANGED).open() as file:
        assert [row["headline"] for row in csv.DictReader(file)] == ["third", "second"]
    results.write_changed(tmp_path, [])
    assert not (tmp_path / results.CHANGED).exists(), "an earlier run's headlines are not this one's"


def test_resume_keeps_what_was_measured(run_here, tmp_path):
    with pytest.raises(LabError, match="go on with --resume") as stopped:
        run_here(limit=14)
    assert stopped.value.exit_code == 130
    before, measured = read_run(tmp_path)
    assert not measured["finished"]
    assert measured["backends"]["fp32-torch"]["quality"], "results.json has what there was"

    with pytest.raises(LabError, match="interrupted run"):
        run_here()
    with pytest.raises(LabError, match="other seed"):
        run_here("--resume", "--seed", "1")
    # A kill in the middle of a write leaves half a line.
    [folder] = tmp_path.iterdir()
    with (folder / journal.FILE).open("a") as file:
        file.write('{"unit": "latency", "thr')

    after, measured = run_here("--resume")
    assert measured["finished"]
    assert after[: len(before)] == before
    units = [(entry["unit"], entry.get("id"), entry.get("threads"), entry.get("round")) for entry in after]
    assert len(units) == len(set(units)), "nothing was measured twice"
    assert measured["backends"]["onnxruntime-int8"]["latency"]["1"]["rounds"] == 2


def test_opening_a_journal_does_not_write_it_and_a_bad_line_costs_only_itself(tmp_path):
    path = tmp_path / journal.FILE
    good = [json.dumps({"unit": "latency", "round": number}).encode() for number in range(3)]
    content = b"\n".join([good[0], b'{"unit": "lat', good[1], b"\xff\x00", b"[1]", good[2], b'{"unit": "torn'])
    path.write_bytes(content)
    opened = Journal(path)
    assert path.read_bytes() == content, "a full disk cannot lose what is not written"
    assert [entry["round"] for entry in opened.entries] == [0, 1, 2] and opened.unreadable == 4
    opened.append("latency", round=3)
    assert [entry["round"] for entry in Journal(path).entries] == [0, 1, 2, 3], "nothing is added to half a line"


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    import resource

    path = tmp_path / journal.FILE
    opened = Journal(path)
    opened.append("latency", round=0)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(LabError, match="go on with --resume"):
            opened.append("latency", round=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(opened.entries) == 1
    opened.append("latency", round=1)
    assert [entry["round"] for entry in Journal(path).entries] == [0, 1]


def test_a_lost_round_is_measured_again_and_no_other(run_here, tmp_path, capsys):
    run_here("--threads", "1", "2")
    assert "Batch 1, 1 thread," in capsys.readouterr().out.replace("Batch 1, 2 threads,", "Batch 1, 1 thread,", 1)
    [folder] = tmp_path.iterdir()
    lines = (folder / journal.FILE).read_bytes().splitlines(keepends=True)
    lost = next(place for place, line in enumerate(lines) if b'"latency"' in line)
    lines[lost] = b"\x00" * 20 + b"\n"
    (folder / journal.FILE).write_bytes(b"".join(lines))
    entries, measured = run_here("--threads", "1", "2", "--resume")
    rounds = sorted((entry["threads"], entry["round"]) for entry in entries if entry["unit"] == "latency")
    assert rounds == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert "1 unreadable line" in capsys.readouterr().out


def test_force_discards(run_here, tmp_path):
    with pytest.raises(LabError):
        run_here(limit=8)
    _, measured = run_here("--force", "--seed", "5")
    assert measured["finished"] and measured["settings"]["seed"] == 5


def test_random_weights_show_no_quality(run_here):
    _, measured = run_here("--random-weights")
    assert not any("quality" in row or "consistency" in row for row in measured["backends"].values())
    assert "macro-F1" not in tables.summary(measured)


def test_a_peer_that_cannot_run_is_a_row(run_here, monkeypatch):
    def fail(_reference, _output):
        raise Unavailable("needs a larger machine")

    broken = peers.Peer("Broken", "INT8", (), fail, None)
    monkeypatch.setattr(peers, "PEERS", {"broken": broken})
    _, measured = run_here("--peers")
    assert measured["backends"]["broken"]["reason"] == "needs a larger machine"
    assert "needs a larger machine" in tables.summary(measured)


# --- Refusals ---------------------------------------------------------------------------------------------


def test_other_weights_are_refused(run_here, model_folder):
    with pytest.raises(LabError, match="built from other weights"):
        run_here("--model", model_folder("bert", 9, 7))


def test_unknown_peer_is_refused(run_here):
    with pytest.raises(LabError, match="unknown peer 'none': choose from torch-tutorial"):
        run_here("--peers", "none")


def test_only_a_peer_is_forgiven(tmp_path):
    """A fault of our own code once became a row "unavailable", and the run ended as if all were well."""
    for forgiving, fault, death in ((True, Unavailable, Unavailable), (False, WorkerFault, LabError)):
        with Process(tmp_path / "row.log", forgiving=forgiving) as process:
            with pytest.raises(fault, match="TypeError"):
                process.ask("open", runner="artefact")
            process._process.kill()
            with pytest.raises(death, match="its process ended with code -9") as ended:
                process.ask("memory")
            assert isinstance(ended.value, Unavailable) is forgiving


def test_worker_ends_with_its_stdin():
    command = [sys.executable, "-m", "benchmark.worker"]
    answer = subprocess.run(command, cwd=ROOT, input='{"do": "memory"}\n', capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0
    assert json.loads(answer.stdout)["memory_mb"] > 5


# --- Peers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "fp32"
    peers.export_reference(str(model_folder("bert", 9, 0)), None, folder)
    return folder


@pytest.mark.parametrize("name", [*peers.REFERENCES, *(name for name in peers.PEERS if name != "torch-compile")])
def test_peers_classify_as_fp32_does(name, reference_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CALIBRATION_ROWS", 30)
    peer = (peers.REFERENCES | peers.PEERS)[name]
    needed = {"openvino-int8": "nncf"}.get(name, peer.libraries[0])
    pytest.importorskip(needed)
    folder = tmp_path / name
    if name in peers.PEERS:
        peers.build(name, reference_folder, folder)
    assert peers.model_mb(name, folder, reference_folder) > 0
    built = artefact.load(reference_folder)
    tokenise, texts = artefact.Tokeniser(built), TEXTS[:30]
    runner, reference = peer.open(folder, built, 1), runtimes.open_backend(built)
    changes = [np.abs(runner.logits(tokenise([text])) - reference.logits(tokenise([text]))).max() for text in texts]
    assert np.mean(changes) < (1e-3 if peer.precision == "FP32" else 1)
    batch = runner.logits(tokenise(texts))
    assert batch.shape == (30, 9) and np.isfinite(batch).all()


# --- Machine and README -----------------------------------------------------------------------------------


def test_cpu_is_named_by_generation(monkeypatch):
    virtual = {"vendor_id_raw": "AuthenticAMD", "family": 25, "model": 17, "flags": ["avx2", "avx512_vnni"]}
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: virtual | {"brand_raw": "AMD EPYC 9R14 96-Core Processor"})
    assert environment.read_cpu() == {"name": "AMD EPYC 9R14 Zen4", "flags": ["avx2", "avx512_vnni"]}
    intel = {"vendor_id_raw": "GenuineIntel", "brand_raw": "Intel(R) Xeon(R) CPU E5-2670 v3 @ 2.30GHz"}
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: intel)
    assert environment.read_cpu()["name"] == "Intel Xeon E5-2670 v3"
    assert environment.strongest(["AVX2", "AVX-512", "AVX512-VNNI", "AVX512-BF16"]) == "AVX512-VNNI"
    here = {"cpu": "AMD EPYC Zen4", "gpu": None, "cores": 2}
    assert environment.folder_name(here, "bert-base") == "amd-epyc-zen4-2-cores-bert-base"


def test_ablation_adds_one_step_a_row(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "EVERY", 100)
    model = ["--model", str(model_folder("minilm", 100))]
    monkeypatch.setattr(sys, "argv", ["steps", *model, "--data", str(data), "--output", str(tmp_path)])
    steps.main()
    [folder] = tmp_path.iterdir()
    measured = results.load(folder)["steps"]
    assert len(measured) == 2 + len(steps.STEPS)
    assert measured[0]["speed"] == 1 and all(row["speed"] > 0 for row in measured)
    assert measured[-1]["error"] < min(row["error"] for row in measured[:-1])
    filled = documents.fill(f"<!-- results:{folder.name}/ablation --><!-- /results -->", tmp_path)
    assert f"| {100 * measured[-1]['error']:.1f} |" in re.sub(" +", " ", filled)


def test_static_is_compared_with_dynamic_on_texts_near_and_far(
    model_folder, artefact_folder, few_headlines, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparation, "EVERY", 400)
    monkeypatch.setattr(static, "SOME", 12)
    dynamic, model = artefact_folder("onnx", "minilm", 100), model_folder("minilm", 100)
    assert run_in_process("lab04-optimum.py", "--static", "--model", model, "--output", tmp_path / "built") == 0
    monkeypatch.setattr(static, "FOLDERS", [dynamic, tmp_path / "built", tmp_path / "none"])
    arguments = ["--model", str(model), "--data", str(data), "--titles", str(data), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["static", *arguments])
    static.main()
    [folder] = (tmp_path / "out").iterdir()
    rows = results.load(folder)["static"]
    assert len({row["texts"] for row in rows}) == 6 and len(rows) == 12
    for row in rows:
        moved = max(change["batch_max_change"] for change in row["batches"].values())
        assert (moved == 0) == (row["artefact"] == "ONNX Static") and row["error"] < 0.5
    assert "| ONNX Static" in study_tables.static({"static": rows})


def test_families_are_quantised_and_told_of(tmp_path, monkeypatch):
    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(families, "MINILM", small)
    monkeypatch.setitem(families.INT8_LABS, "onnxruntime", "predict.py")  # which takes no --model: a refusal
    monkeypatch.setattr(sys, "argv", ["families", "--families", "mpnet", "--output", str(tmp_path)])
    families.main()
    [folder] = tmp_path.iterdir()
    [row] = results.load(folder)["families"]
    assert row["torch"]["headlines"] == len(held_out_headlines()) and row["torch"]["agreement"] > 0.9
    assert row["torch"]["speed_up"] == pytest.approx(row["torch"]["fp32_ms"] / row["torch"]["ms"], abs=0.1)
    assert "unrecognized arguments" in row["onnxruntime"]["refused"]
    filled = documents.fill(f"<!-- results:{folder.name}/families --><!-- /results -->", tmp_path)
    assert f"{row['torch']['agreement']:.1%}" in filled and "refused" in filled


# --- Pictures ---------------------------------------------------------------------------------------------


def test_whole_numbers_are_those_the_runtime_computes():
    import torch

    values = np.random.default_rng(0).normal(0.3, 1, 500).astype(np.float32)
    codes, scale, zero_point = pictures.to_bytes(values)
    theirs = torch.quantize_per_tensor_dynamic(torch.from_numpy(values), torch.quint8, reduce_range=False)
    assert (scale, zero_point) == (pytest.approx(theirs.q_scale()), theirs.q_zero_point())
    assert np.abs(codes - theirs.int_repr().numpy()).max() <= 1  # a tie may fall to either side
    assert np.abs(scale * (codes - zero_point) - values).max() <= scale / 2 + 1e-6


def test_pictures_are_drawn_from_any_weights(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "EVERY", 500)
    monkeypatch.setattr(pictures, "NEIGHBOURS", 20)
    monkeypatch.setattr(sys, "argv", ["pictures", "--model", str(model_folder("bert", 9)), "--output", str(tmp_path)])
    pictures.main()
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["int8-headline.png", "int8-inputs.png", "int8-neighbour.png", "int8-weights.png"]


# --- Where the time goes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_profile_names_the_products(backend, artefact_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "HEADLINES", 30)
    monkeypatch.setattr(environment, "describe", describe_once)
    profile.run([artefact_folder(backend)], 1, tmp_path)
    [folder] = tmp_path.iterdir()
    measured = json.loads((folder / results.RESULTS).read_text())
    [row] = measured["backends"].values()
    said = capsys.readouterr().out
    for product in {"torch": ["quantized::linear_dynamic"], "onnx": ["DynamicQuantizeMatMul", "QAttention"]}[backend]:
        assert row["operators_us"][product] > 0 and product in said
    assert min(row["operators_us"].values()) >= 0 and list(row["operators_us"])[-1] == "all others"
    assert (folder / "operators.png").exists()


def test_the_floor_is_below_every_back_end(artefact_folder, tmp_path, monkeypatch, capsys):
    try:
        this_cpu.check_here()
    except LabError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(floor, "ROUNDS", 3)
    monkeypatch.setattr(environment, "describe", describe_once)
    floor.run([artefact_folder("onnx")], TEXTS[:20], tmp_path)
    [folder] = tmp_path.iterdir()
    measured = results.load(folder)
    [row] = measured["backends"].values()
    assert 0 < measured["floor_ms"] < row["cpu_ms"]
    assert row["share_of_floor"] == pytest.approx(measured["floor_ms"] / row["cpu_ms"])
    config = {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    assert floor.weight_bytes(config) == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert "share of the floor" in capsys.readouterr().out


def test_every_study_calls_itself_as_it_is_called():
    for path in (ROOT / "benchmark").rglob("*.py"):
        if "ArgumentParser(" in (text := path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            assert f'prog="python -m {module}"' in text, f"{path.name}: its usage line would name a file"


def test_help_names_the_command_and_the_peers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmark" / "__main__.py"), "--help"])
    with pytest.raises(SystemExit):
        benchmark.main()
    said = "".join(capsys.readouterr().out.split())
    assert said.startswith("usage:python-mbenchmark") and "".join(", ".join(peers.PEERS).split()) in said
