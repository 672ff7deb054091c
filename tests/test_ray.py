"""The Ray examples on two small nodes of this machine: every row once, bad rows and bad requests answered."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import HEADLINES, ROOT, training_texts

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
ARTEFACT = ROOT / "quantised-model-optimum"
PORT = 18_472
BAD = {"null": None, "empty": "  ", "not text: int": 7}  # `error`, and the text it is about

if not ARTEFACT.exists():
    pytest.skip("no quantised-model-optimum: make lab", allow_module_level=True)

from lab04 import LabError, artefact  # noqa: E402
from lab04.run import runtimes  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Ray's own cluster for tests: a head without cores, a machine that stays, one that may be lost."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    cluster.lost = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def classify(cluster):
    """The script as a module that has joined the cluster; its code travels as that of a script does."""
    spec = importlib.util.spec_from_file_location("classify", ROOT / "examples" / "ray" / "classify.py")
    module = sys.modules["classify"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.connect()
    module.connect = lambda: None
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def run(classify, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["classify.py", *map(str, arguments)])
    classify.main()


def test_a_worker_with_another_runtime_or_artefact_is_refused_in_one_line(classify, tmp_path, monkeypatch):
    source, shipped = tmp_path / "in.csv", classify.ship(artefact.load(ARTEFACT))
    source.write_text("text\nA headline\n")
    with pytest.raises(LabError, match="another artefact"):
        classify.open_shipped(shipped | {"sha256": "0"})
    monkeypatch.setattr(classify, "ship", lambda item: shipped | {"runtime": "0.1"})
    with pytest.raises(LabError, match="not 0.1 as here") as refusal:
        run(classify, monkeypatch, source, tmp_path / "out.parquet")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == [source]


def test_fields_of_json_lines_may_vary_from_block_to_block(classify, tmp_path, monkeypatch):
    """More than a block each of: no field at all, null, a whole number; then all it may be besides."""
    source, output, many = tmp_path / "in.jsonl", tmp_path / "out.parquet", 3_000
    blocks = [{"n": 1, "late": None}, {"n": None, "flag": True}, {"n": 2.5, "late": "text", "mixed": 1}]
    rows = [
        {"text": HEADLINES[0], "id": many * b + i, "pad": "x" * 500} | blocks[b] for b in range(3) for i in range(many)
    ]
    odd = [{"text": "A", "late": "\ud800", "mixed": {"a": [1]}, "big": 2**60, "label": 3}, {"text": 5}, {"mixed": "é"}]
    lines = [json.dumps(row) for row in rows + odd]
    source.write_text("\n".join([*lines, "[1]", "{"]) + "\n")
    run(classify, monkeypatch, source, output, "--batch-size", "2048")

    table = classify.pa.parquet.read_table(output)
    found = sorted(table.to_pylist(), key=lambda row: (row["id"] is None, row["id"]))
    assert [row["id"] for row in found] == [*range(3 * many), *[None] * 5]
    for row, expected in zip(found, rows, strict=False):
        names = ("n", "late", "flag")
        assert [row[name] for name in names] == [expected.get(name) for name in names]
        assert row["mixed"] == ("1" if "mixed" in expected else None) and row["label"] and row["error"] is None
    rest = {
        (row["text"], row["late"], row["mixed"], row["big"], row["input_label"], row["error"]) for row in found[-5:]
    }
    assert rest == {
        ("A", "?", '{"a": [1]}', str(2**60), 3, None),
        ("5", None, None, None, None, "not text: int"),
        (None, None, "é", None, None, "null"),
        ("[1]", None, None, None, None, "no JSON object"),
        ("{", None, None, None, None, "no JSON object"),
    }


def test_parquet_is_read_though_every_core_has_its_worker(classify, tmp_path, monkeypatch):
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    classify.pa.parquet.write_table(classify.pa.table({"text": [f"Headline {number}" for number in range(40)]}), source)
    run(classify, monkeypatch, source, output)  # without --workers they are as many as cores
    assert classify.pa.parquet.read_table(output).num_rows == 40


def test_what_was_done_is_kept_when_a_job_ends_early(classify, tmp_path, capsys):
    class Fails:
        def iter_batches(self, **options):
            yield classify.pa.table({"text": ["A", "B"], "error": [None, "null"]})
            raise KeyboardInterrupt

    output = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        classify.write(Fails(), output)
    partial = classify.partial_of(output)
    assert list(tmp_path.iterdir()) == [partial] and str(partial) in capsys.readouterr().err
    assert classify.pa.parquet.read_table(partial)["text"].to_pylist() == ["A", "B"]


def test_every_row_comes_out_once_though_a_machine_is_lost(classify, cluster, tmp_path, monkeypatch, capsys):
    texts = [*training_texts() * 2, *BAD.values()]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(json.dumps({"id": i, "text": text, "label": "x"}) + "\n" for i, text in enumerate(texts)))
    computed = classify.classified

    class LosesAMachine:
        """The dataset, which loses a machine when the first of its tables is there."""

        def __init__(self, *arguments):
            self.dataset = computed(*arguments)

        def iter_batches(self, **options):
            for number, table in enumerate(self.dataset.iter_batches(**options)):
                if number == 0:
                    cluster.remove_node(cluster.lost, allow_graceful=False)
                yield table

    monkeypatch.setattr(classify, "classified", LosesAMachine)
    run(classify, monkeypatch, source, output, "--probabilities")
    assert f"{len(texts)} headlines, 3 of them with an error" in capsys.readouterr().out

    rows = sorted(classify.pa.parquet.read_table(output).to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(len(texts)))
    assert {row["input_label"] for row in rows} == {"x"}
    assert [row["error"] for row in rows] == [None] * (len(texts) - 3) + list(BAD)
    assert all(row["label"] is row["score"] is None for row in rows[-3:])

    item = artefact.load(ARTEFACT)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    logits = np.concatenate([backend.logits(tokenise([text])) for text in training_texts()])
    alone = [item.labels[index] for index in logits.argmax(axis=1)] * 2
    same = np.mean([row["label"] == label for row, label in zip(rows, alone, strict=False)])
    assert same > 0.98, "INT8 answers depend a little on their batch, not more"
    for row in rows[:-3]:
        probabilities = {label: row[f"p_{label}"] for label in item.labels}
        assert max(probabilities, key=probabilities.get) == row["label"]
        assert sum(probabilities.values()) == pytest.approx(1) and row["score"] == max(probabilities.values())

    with pytest.raises(LabError, match="exists"):
        run(classify, monkeypatch, source, output)


# --- Serving ----------------------------------------------------------------------------------------------


def post(body) -> tuple[int, object]:
    """Status and answer of a request; a body that is no bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/classify", data, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text)["error"] if text.startswith("{") else text


@pytest.fixture(scope="module")
def server():
    """Ray Serve with a Ray of its own, as `python examples/ray/serve.py` starts it on one machine."""
    command = [sys.executable, ROOT / "examples" / "ray" / "serve.py", "--port", str(PORT), "--queue", "150"]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=alone)
    for line in process.stdout:
        if line.startswith("Serving "):
            break
    else:
        pytest.fail("serve.py ended before it served")
    yield process
    process.kill()
    process.wait()


def test_it_is_the_app_of_the_http_example(server):
    item = artefact.load(ARTEFACT)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    expected = [item.labels[backend.logits(tokenise([text])).argmax()] for text in HEADLINES]
    assert [post(text)[1]["label"] for text in HEADLINES] == expected
    status, answers = post(HEADLINES)
    assert status == 200 and [answer["label"] for answer in answers] == expected
    assert list(answers[0]) == ["label", "score", "probabilities"]
    for path, words in (("healthz", item.manifest["sha256"]), ("metrics", 'classify_requests_total{status="200"} 4.0')):
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/{path}") as response:
            assert words in response.read().decode()
    for body, status, words in ((b"[", 400, "no JSON"), (["x"] * 129, 413, "too many")):
        code, sentence = post(body)
        assert code == status and words in sentence


def test_a_full_queue_is_refused_rather_than_growing(server):
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(post, [HEADLINES * 33] * 40))
    assert {status for status, _ in answers} == {200, 503}
    assert {answer for status, answer in answers if status == 503} == {"the queue is full: try again later"}


def test_what_was_taken_is_answered_before_it_stops(server):
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, HEADLINES * 10) for _ in range(4)]
        time.sleep(0.1)  # all are taken, hardly any is answered
        server.send_signal(signal.SIGTERM)
        assert [len(answer.result()[1]) for answer in answers] == [30] * 4
    assert server.wait(60) == 0
