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
def server(cluster):
    command = [sys.executable, ROOT / "examples" / "ray" / "serve.py", "--port", str(PORT), "--queue", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("Serving "):
            break
    else:
        pytest.fail("serve.py ended before it served")
    yield process
    process.kill()
    process.wait()


def test_one_headline_and_lists_get_the_labels_of_python(server):
    item = artefact.load(ARTEFACT)
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    expected = [item.labels[backend.logits(tokenise([text])).argmax()] for text in HEADLINES]
    assert [post(text)[1]["label"] for text in HEADLINES] == expected
    status, answers = post(HEADLINES)
    assert status == 200 and [answer["label"] for answer in answers] == expected
    assert all(0 < answer["score"] <= 1 for answer in answers)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"[", 400, "no JSON"),
        (b"\xff", 400, "no JSON"),
        (b"", 400, "no JSON"),
        ([], 400, "empty"),
        ([HEADLINES[0], " "], 400, "headline 2 is empty"),
        ({"text": "x"}, 400, "not text"),
        ("long " * 200, 413, "too long"),
        (["x"] * 1000, 413, "too many"),
        (b'"' + b"x" * 2_000_000 + b'"', 413, "larger"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_wrong_request_is_answered_with_a_sentence(server, body, status, words):
    code, sentence = post(body)
    assert code == status and words in sentence


def test_a_full_queue_is_refused_rather_than_growing(server):
    with ThreadPoolExecutor(200) as pool:
        statuses = [status for status, _ in pool.map(post, [HEADLINES] * 200)]
    assert set(statuses) == {200, 503}


def test_what_was_taken_is_answered_before_it_stops(server):
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, HEADLINES * 10) for _ in range(8)]
        time.sleep(0.3)  # all are taken, hardly any is answered
        server.send_signal(signal.SIGTERM)
        assert [len(answer.result()[1]) for answer in answers] == [30] * 8
    assert server.wait(30) == 0
