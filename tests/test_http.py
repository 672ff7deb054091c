"""The HTTP example as a process on the loopback: what it answers and refuses, and that no fault stops or fills it."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import HEADLINES, ROOT, run_script, training_texts

for package in ("starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements/http.txt")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from benchmark import results, study_tables  # noqa: E402
from lab04 import artefact  # noqa: E402
from lab04.run.runtimes import open_backend  # noqa: E402
from lab04.run.scores import softmax  # noqa: E402

SCRIPT = "examples/http/serve.py"
QUEUE = 150  # more than the longest list: such a list is refused for its length, not for want of room


@pytest.fixture(scope="module")
def folder(artefact_folder):
    return artefact_folder("onnx")


@contextmanager
def serving(folder, *options):
    """A server process on a free port: the process, its port in `port`."""
    command = [sys.executable, "-u", str(ROOT / SCRIPT), "--artefact", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("Serving "), process.stderr.read()
            process.port = int(re.search(r":(\d+)/classify", said)[1])
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(folder):
    """One server for all tests, which must be as well at their end as at the start."""
    with serving(folder, "--queue", str(QUEUE), "--threads", "2") as process:
        yield process
        assert post(process, HEADLINES[0])[0] == 200
        assert process.poll() is None


def ask(server, method: str, path: str, body: bytes | None = None, timeout: float = 30):
    """Status, headers and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def post(server, body) -> tuple[int, object]:
    """Status and answer; a body that is no bytes is sent as JSON."""
    status, _, answer = ask(server, "POST", "/classify", body if isinstance(body, bytes) else json.dumps(body).encode())
    return status, json.loads(answer)


def begin(server, sent: bytes) -> socket.socket:
    """A connection on which something was sent, and nothing read yet."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(sent)
    return connection


def request(body: bytes, length: int | None = None, header: bytes = b"") -> bytes:
    """A POST as bytes; `length` is what it promises, `header` one more line."""
    start = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n" % (length or len(body), header)
    return start + body


CLOSE = b"Connection: close\r\n"


def answers(connection: socket.socket) -> list[tuple[int, object]]:
    """Statuses and answers of all that comes until the server closes a connection."""
    with connection, connection.makefile("rb") as file:
        parts = file.read().split(b"HTTP/1.1 ")[1:]
    final = [part for part in parts if not part.startswith(b"100")]
    return [(int(part[:3]), json.loads(part.split(b"\r\n\r\n", 1)[1])) for part in final]


def metrics(server) -> dict[str, float]:
    """Every sample of /metrics by its name and, where it has some, its labels' values."""
    status, headers, text = ask(server, "GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value for item in families for sample in item.samples
    }


def wait_until(condition, seconds: float = 10) -> bool:
    """Whether something comes true; for what a server does after its client has gone."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


# --- Answers ----------------------------------------------------------------------------------------------


def test_one_headline_gets_what_the_back_end_says(server, folder):
    item = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(item), open_backend(item)
    for text in [*HEADLINES, "Zürich – ein Überblick 🗞", "\ud800"]:
        [expected] = softmax(backend.logits(tokenise([text])))
        status, answer = post(server, text)
        assert status == 200 and list(answer) == ["label", "score", "probabilities"]
        assert list(answer["probabilities"]) == item.labels
        assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert answer["label"] == item.labels[expected.argmax()] and answer["score"] == max(
            answer["probabilities"].values()
        )


def test_lists_and_many_clients_get_their_own_answers_in_order(server, folder):
    item = artefact.load(folder)
    tokenise, backend = artefact.Tokeniser(item), open_backend(item)
    texts = training_texts()[:120]
    alone = np.concatenate([softmax(backend.logits(tokenise([text]))) for text in texts])
    apart = np.abs(alone[:, None] - alone[None]).max(axis=2)

    def right(index, answer) -> bool:
        """Whether an answer is this headline's: nearer to it alone than to any that is clearly another one's."""
        given = np.array(list(answer["probabilities"].values()))
        distance = np.abs(alone - given).max(axis=1)
        return distance[index] < 0.1 and distance[index] <= distance[apart[index] > 0.2].min(initial=1)

    status, answers = post(server, texts)
    assert status == 200 and all(right(index, answer) for index, answer in enumerate(answers))
    assert post(server, [texts[0]])[1][0]["label"] == item.labels[alone[0].argmax()], "a list of one stays a list"
    with ThreadPoolExecutor(16) as pool:
        each = list(pool.map(lambda text: post(server, text), texts))
    assert {status for status, _ in each} == {200}
    assert all(right(index, answer) for index, (_, answer) in enumerate(each))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"[", 400, "no JSON"),
        (b"\xff", 400, "no JSON"),
        (b"", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        ([], 400, "empty"),
        ([HEADLINES[0], " "], 400, "headline 2 is empty"),
        ({"text": "x"}, 400, "not text"),
        (None, 400, "not text"),
        ([[HEADLINES[0]]], 400, "headline 1 is not text"),
        ("long " * 200, 413, "too long: the model would not read its last"),
        (["x"] * 129, 413, "129 headlines are too many for one request: at most 128"),
        (b'"' + b"x" * 2_000_000 + b'"', 413, "larger than 1000000 bytes"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_wrong_request_is_answered_with_a_sentence(server, body, status, words):
    code, answer = post(server, body)
    assert code == status and words in answer["error"]


def test_other_methods_and_paths_are_refused_in_json_too(server):
    for method, path, status in (("GET", "/classify", 405), ("PUT", "/classify", 405), ("GET", "/nothing", 404)):
        code, _, body = ask(server, method, path)
        assert code == status and json.loads(body)["error"]


def test_it_says_that_it_is_ready_and_what_it_did(server, folder):
    status, _, body = ask(server, "GET", "/healthz")
    assert status == 200
    item = artefact.load(folder)
    assert json.loads(body) == {"status": "ready", "artefact": item.title, "sha256": item.manifest["sha256"]}
    before = metrics(server)
    assert post(server, HEADLINES)[0] == 200 and post(server, [])[0] == 400
    after = metrics(server)
    done = Counter(after)
    done.subtract(before)
    assert done["classify_requests_total 200"] == 1 and done["classify_requests_total 400"] == 1
    assert done["classify_batch_headlines_sum"] == done["classify_queue_seconds_count"] == len(HEADLINES)
    assert done["classify_model_seconds_count"] == done["classify_batch_headlines_count"] > 0
    assert done["classify_model_seconds_sum"] > 0 and after["process_resident_memory_bytes"] > 1e6


# --- Faults -----------------------------------------------------------------------------------------------


def test_what_finds_no_room_is_told_when_to_come_again(server):
    lists = json.dumps(training_texts()[:100]).encode()
    with ThreadPoolExecutor(40) as pool:
        asked = list(pool.map(lambda _: ask(server, "POST", "/classify", lists), range(40)))
    assert Counter(status for status, *_ in asked).keys() == {200, 503}
    for status, headers, body in asked:
        if status == 503:
            assert int(headers["Retry-After"]) >= 1 and "queue is full" in json.loads(body)["error"]
    assert post(server, HEADLINES[0])[0] == 200


def test_a_full_queue_answers_one_connections_requests_in_their_turn(folder):
    """Lists of one to four headlines, sent while the first ones wait: an answer's length says whose it is."""
    first, *others = (request(json.dumps(["A headline"] * size).encode()) for size in (1, 2, 3, 4))
    others.append(request(b'"The last one"', header=CLOSE))
    with serving(folder, "--queue", "4") as small:
        asking = [begin(small, first) for _ in range(40)]
        for connection in asking:
            connection.sendall(b"".join(others))
        given = [answers(connection) for connection in asking]
        counted = metrics(small)
    for five in given:
        assert len(five) == 5
        for size, (status, answer) in enumerate(five[:4], start=1):
            assert status == 503 and "queue is full" in answer["error"] or status == 200 and len(answer) == size
    found = Counter(status for five in given for status, _ in five)
    assert found.keys() == {200, 503}
    assert {code: counted[f"classify_requests_total {code}"] for code in found} == found


def test_a_refused_request_holds_no_connection_longer_than_an_accepted_one(folder):
    """A queue that has room for one request and then is full for seven seconds; timeouts of half a second."""
    start = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import app, serve;"
        "room = iter([0, 0]); app.Batches.wait_s = lambda *_: next(room, 7);"  # asked twice of a request that fits
        "serve.HEADERS_TIMEOUT_S = 0.5; serve.main()"
    )
    command = [sys.executable, "-uc", start, str((ROOT / SCRIPT).parent), "--artefact", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.port = int(re.search(r":(\d+)/classify", process.stdout.readline())[1])
            both = request(b'"One"') + request(b'"Two"', header=CLOSE)
            assert [status for status, _ in answers(begin(process, both))] == [200, 503], "in the order of the requests"
            kept = http.client.HTTPConnection("127.0.0.1", process.port, timeout=30)
            for _ in range(2):
                kept.request("POST", "/classify", b"no JSON")
                response = kept.getresponse()
                assert (response.status, response.headers["Retry-After"]) == (503, "7")
                assert "queue is full" in json.loads(response.read())["error"]
                time.sleep(0.8)
            assert kept.sock is not None, "it is still the same connection"
            with begin(process, request(b'"Half a head', length=100)) as half:
                assert half.makefile("rb").read() == b""
            waits = answers(begin(process, request(b'"One"', header=b"Expect: 100-continue\r\n" + CLOSE)))
            assert [status for status, _ in waits] == [503]
            assert ask(process, "GET", "/healthz")[0] == 200
            assert metrics(process)["classify_requests_total 503"] == 4
            kept.close()
        finally:
            process.kill()


def test_one_that_is_larger_than_the_queue_is_told_what_would_fit(folder):
    with serving(folder, "--queue", "4") as small:
        status, answer = post(small, ["x"] * 5)
        assert status == 413 and "at most 4" in answer["error"]


def test_clients_that_go_away_leave_no_work_and_no_connection(server):
    before, rounds = metrics(server), 20
    wanted, unwanted = (json.dumps(training_texts()[:count]).encode() for count in (110, 40))
    for _ in range(rounds):
        with begin(server, request(wanted)) as stays:
            begin(server, request(unwanted)).close()
            assert stays.recv(100).startswith(b"HTTP/1.1 200")
    assert wait_until(lambda: metrics(server).get("classify_requests_total 499") == rounds)
    # As many as before; a connection of our own each time we look.
    assert wait_until(lambda: metrics(server)["process_open_fds"] <= before["process_open_fds"])
    ran = metrics(server)["classify_batch_headlines_sum"] - before["classify_batch_headlines_sum"]
    assert ran < rounds * (110 + 20), "hardly any of what nobody waits for was run"


def test_half_a_body_and_half_the_headers_hold_nobody_up_and_end(folder):
    """With timeouts of half a second in place of ten: the very code, in a process of its own."""
    start = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import app, serve;"
        "app.BODY_TIMEOUT_S = serve.HEADERS_TIMEOUT_S = 0.5; serve.main()"
    )
    command = [sys.executable, "-uc", start, str((ROOT / SCRIPT).parent), "--artefact", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.port = int(re.search(r":(\d+)/classify", process.stdout.readline())[1])
            before = metrics(process)["process_open_fds"]
            slow = [
                begin(process, b""),
                begin(process, b"POST /classify HTTP/1.1\r\nHost"),
                begin(process, request(b"", length=100)),
                begin(process, request(b'"Half a head', length=100)),
            ]
            trickling = begin(process, b"")

            def trickle():
                with pytest.raises(OSError):  # until the server has had enough
                    while True:
                        trickling.sendall(b"G")
                        time.sleep(0.05)

            writer = threading.Thread(target=trickle)
            writer.start()
            assert post(process, HEADLINES[0])[0] == 200, "others are answered meanwhile"
            ends = [connection.makefile("rb").read() for connection in slow]
            assert [end[:12] for end in ends] == [b"", b"", b"HTTP/1.1 408", b"HTTP/1.1 408"]
            writer.join(10)
            assert not writer.is_alive()
            assert wait_until(lambda: metrics(process)["process_open_fds"] <= before)
            # A connection that was answered may wait longer than that for its next request.
            kept, ports = http.client.HTTPConnection("127.0.0.1", process.port, timeout=30), set()
            for body in ('"One"', '"Two"'):
                kept.request("POST", "/classify", body)
                response = kept.getresponse()
                assert response.status == 200 and json.loads(response.read())["label"]
                ports.add(kept.sock.getsockname()[1])
                time.sleep(0.8)
            assert len(ports) == 1, "it is still the same connection"
            kept.close()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_taken_is_answered_before_it_stops(folder, number):
    with serving(folder, "--queue", "4000") as process, ThreadPoolExecutor(20) as pool:
        texts = training_texts()[:100]
        answers = [pool.submit(post, process, texts) for _ in range(20)]
        assert wait_until(lambda: metrics(process)["classify_batch_headlines_count"] >= 1)
        process.send_signal(number)
        assert [(status, len(rows)) for status, rows in (answer.result() for answer in answers)] == [(200, 100)] * 20
        assert process.wait(30) == 0 and process.stderr.read().count("\n") == 1, "that it is not static, and no more"
        with pytest.raises(ConnectionRefusedError):
            post(process, HEADLINES[0])


def test_what_cannot_be_served_is_said_in_one_line(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_script(SCRIPT, "--artefact", folder, "--port", port)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        f"serve.py: cannot listen on 127.0.0.1, port {port}: Address already in use"
    )
    ended = run_script(SCRIPT, "--artefact", tmp_path / "none")
    assert ended.returncode == 2 and ended.stderr.startswith("serve.py: missing artefact ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk: apt-get install wrk")
def test_the_study_measures_what_its_tables_show(folder, tmp_path):
    options = ["--servers", "http", "--clients", "1", "4", "--seconds", "1", "--requests", "50", "--headlines", "0"]
    command = [sys.executable, "-m", "benchmark.studies.serving", "--artefact", str(folder), "--port", "18483"]
    ended = subprocess.run([*command, *options, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    [written] = tmp_path.iterdir()
    assert written.name.endswith("-serving") and (written / "load.png").stat().st_size > 10_000
    measured = results.load(written)
    rows = measured["servers"]["http"]["load"]
    assert [row["clients"] for row in rows] == [1, 4]
    for row in rows:
        assert row["answers"] > 0 and row["refused"] == row["lost"] == 0 and 0 < row["p50_ms"] <= row["p99_ms"]
    overload = measured["overload"]
    for name in ("patient", "at_once"):
        assert overload[name]["per_second"] > 0
    memory = measured["servers"]["http"]["memory"]
    assert memory["requests"] >= 50 and 20 < memory["before_mb"] < 2_000 and 20 < memory["after_mb"] < 2_000
    for name, shown in (
        ("serving", rows[1]["p99_ms"]),
        ("serving-overload", overload["at_once"]["per_second"]),
        ("serving-memory", memory["after_mb"]),
    ):
        text = study_tables.OF_A_STUDY[name](measured)
        assert any(form.format(shown) in text for form in ("{:.0f}", "{:.1f}"))
    assert measured["date"] in study_tables.OF_A_STUDY["serving-run"](measured)
    assert "Not measured" in study_tables.OF_A_STUDY["serving-file"](measured)


def test_the_study_says_in_one_line_what_is_missing(folder):
    command = [sys.executable, "-m", "benchmark.studies.serving", "--artefact", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": ""})
    assert ended.returncode == 2
    assert ended.stderr == "serving.py: wrk is not installed: sudo apt-get install wrk\n"
