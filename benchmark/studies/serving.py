"""How many requests one core answers: `python -m benchmark.studies.serving`, about half an hour on a quiet machine.

Starts examples/http/serve.py, examples/ray/serve.py with Ray's own settings and with ours, and an app that does nothing
on Ray; drives each with `wrk` from this machine, one headline a request. Writes results/HARDWARE-serving/: results.json
and load.png, which docs/serving.md shows. A look in seconds:

    python -m benchmark.studies.serving --servers http --seconds 1 --requests 1000 --headlines 0
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmark import environment, results
from benchmark.charts import load as load_chart
from lab04 import ROOT, LabError, artefact, console, options
from lab04.read.texts import held_out_headlines
from lab04.run.runtimes import open_backend
from lab04.run.scores import softmax

CLIENTS = (1, 8, 32, 64, 256)
BATCH = 32  # of the model's own rate: the app's largest
OVERLOAD = {"clients": 256, "queue": 64}  # four times as many clients as find room
EVERY_S = 0.005  # between the requests of the one client that is timed during an overload
EXAMPLES = ROOT / "examples"
HTTP, RAY = EXAMPLES / "http" / "serve.py", EXAMPLES / "ray" / "serve.py"
PLAIN = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "0", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
FAST = PLAIN | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SERVERS: dict[str, tuple[str, list, dict[str, str]]] = {  # title, command, environment
    "http": ("uvicorn", [HTTP], {}),
    "ray": ("Ray Serve", [RAY], {}),
    "ray-empty": ("Ray Serve, empty app", ["-m", "benchmark.studies.empty_app"], {}),
    "ray-plain": ("Ray Serve, no settings", [RAY], PLAIN),
    "ray-no-haproxy": ("Ray Serve, no HAProxy", [RAY], FAST),
}
# What wrk runs: one headline after another, and what became of them in one line of JSON. Times in microseconds.
SCRIPT = """
local bodies, ready, next_one = {{ {bodies} }}, {{}}, 0
function init()
  for index, body in ipairs(bodies) do ready[index] = wrk.format("POST", "/classify", nil, body) end
end
function request()
  next_one = next_one % #ready + 1
  return ready[next_one]
end
function done(summary, latency)
  local lost = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format('{{"answers": %d, "refused": %d, "lost": %d, "us": %d, "p50_us": %d, "p99_us": %d}}\\n',
    summary.requests, summary.errors.status, lost, summary.duration, latency:percentile(50), latency:percentile(99)))
end
"""
# A client that does as Retry-After says. wrk asks `delay` before each request, not which connection it is for.
PATIENT = """
local pauses = {}
function response(status, headers)
  if status == 503 then table.insert(pauses, 1000 * tonumber(headers["retry-after"] or headers["Retry-After"])) end
end
function delay() return table.remove(pauses) or 0 end
"""


def main() -> None:
    arguments = parse_arguments()
    if not shutil.which("wrk"):
        raise LabError("wrk is not installed: sudo apt-get install wrk")
    if find_spec("ray") is None and (arguments.headlines or set(arguments.servers) != {"http"}):
        raise LabError(
            "ray is not installed: pip install -r requirements/ray.txt, or measure --servers http --headlines 0"
        )
    here = environment.describe()
    folder = arguments.output / environment.folder_name(here, "serving")
    folder.mkdir(parents=True, exist_ok=True)
    for measured in measure(arguments, here):
        results.save_json(folder / results.RESULTS, measured)
        load_chart.save(folder / "load.png", measured)
    print(f"Wrote {folder / results.RESULTS} and load.png beside it")
    console.suggest("python -m benchmark --readme")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.serving", description=console.first_line(__doc__)
    )
    options.add_artefact(parser)
    add, number = parser.add_argument, options.positive
    add("--servers", nargs="+", choices=SERVERS, default=[*SERVERS], help="default: all")
    add("--clients", type=number, nargs="+", default=CLIENTS, help="default: 1 8 32 64 256")
    add("--seconds", type=number, default=20, help="of each load (default: %(default)s)")
    add("--requests", type=number, default=100_000, help="over which memory is watched (default: %(default)s)")
    add("--headlines", type=int, default=200_000, help="in the file for Ray Data, 0: none (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    add("--port", type=number, default=18_473, help="of the servers (default: %(default)s)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, here: dict) -> Iterator[dict]:
    """results.json, after each piece of work: if the next one fails, what was measured is there."""
    item = artefact.load(arguments.artefact)
    measured = {
        "format": results.FORMAT,
        "environment": here,
        "date": time.strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {name: version for name in ("ray", "uvicorn", "starlette") if (version := installed(name))},
        "artefact": {"title": item.title, "weights_sha256": item.manifest["weights_sha256"]},
        "seconds": arguments.seconds,
        "model": measure_model(item, arguments.seconds),
        "servers": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        measured["overload"] = measure_overload(arguments, Path(scratch))
        for name in arguments.servers:
            measured["servers"][name] = measure_server(name, arguments, Path(scratch))
            yield measured
        if arguments.headlines:
            measured["file"] = measure_file(item, arguments.headlines, Path(scratch))
            yield measured


def installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def measure_model(item: artefact.Artefact, seconds: float) -> dict:
    """The model alone, in one thread: ms for a headline from text to probabilities, and headlines/s in batches."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be a second core, which the app does not take
    tokenise, backend, texts = artefact.Tokeniser(item), open_backend(item, 1), held_out_headlines()

    def call_ms(batch: list[str]) -> float:
        started = time.perf_counter()
        softmax(backend.logits(tokenise(batch)))
        return 1e3 * (time.perf_counter() - started)

    def repeat(size: int) -> list[float]:
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            times += [call_ms(texts[first : first + size]) for first in range(0, len(texts) - size + 1, size)]
        return times[len(texts) // size // 10 :]  # the first ones warm up

    return {"p50_ms": float(np.median(repeat(1))), "per_second": BATCH * 1e3 / float(np.mean(repeat(BATCH)))}


def measure_server(name: str, arguments: argparse.Namespace, scratch: Path) -> dict:
    """Answers/s, p50 and p99 by clients; memory before and after many requests, where the server tells it."""
    title = SERVERS[name][0]
    script = write_script(scratch, arguments)
    with running(name, arguments) as port:
        wrk(script, port, 8, max(1, arguments.seconds // 5))  # warm up
        load = []
        for clients in arguments.clients:
            row = {"clients": clients} | wrk(script, port, clients, arguments.seconds)
            print(f"{title}, {clients} clients: {row['per_second']:.0f} answers/s, p50 {row['p50_ms']} ms")
            load.append(row)
        memory = None
        if name in load_chart.COLOURS:
            memory, done = {"before_mb": memory_mb(port)}, 0
            while done < arguments.requests:
                done += wrk(script, port, 32, arguments.seconds)["answers"]
            memory |= {"after_mb": memory_mb(port), "requests": done}
    return {"title": title, "load": load, "memory": memory}


@contextlib.contextmanager
def running(name: str, arguments: argparse.Namespace, *more: str) -> Iterator[int]:
    """A server's process for the time of a block; gives its port. Raises LabError if it does not start."""
    title, command, settings = SERVERS[name]
    given = [] if name == "ray-empty" else ["--artefact", str(arguments.artefact)]
    command = [sys.executable, *(str(part) for part in command), *given, "--port", str(arguments.port), *more]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, env=os.environ | settings
        ) as server,
    ):
        try:
            if not any(line.startswith("Serving ") for line in server.stdout or ()):
                said.seek(0)
                raise LabError(f"{title} does not start: {(said.read().splitlines() or ['no word'])[-1]}")
            yield arguments.port
        finally:
            server.terminate()


def write_script(scratch: Path, arguments: argparse.Namespace, patient: bool = False) -> Path:
    """A script for wrk; `patient`: a refused client waits as long as it is told.

    It sends the headlines that the artefact reads whole: the others would be refused.
    """
    path = scratch / f"{'patient' if patient else 'load'}.lua"
    tokenise = artefact.Tokeniser(artefact.load(arguments.artefact))
    texts = [text for text in held_out_headlines() if not tokenise.dropped(text, tokenise([text]))]
    bodies = ", ".join(f"[==[{json.dumps(text)}]==]" for text in texts)
    path.write_text(SCRIPT.format(bodies=bodies) + PATIENT * patient, encoding="utf-8")
    return path


def wrk(script: Path, port: int, clients: int, seconds: int) -> dict:
    """One load: answers, refusals (not 2xx), requests lost, answers/s; p50 and p99 in ms where all were answered.

    wrk does not tell the time of an answer from that of a refusal, which is quick.
    """
    options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script)]
    ended = subprocess.run(["wrk", *options, f"http://127.0.0.1:{port}/classify"], capture_output=True, text=True)
    found = re.search(r'^\{"answers".*', ended.stdout, re.MULTILINE)
    if not found:
        raise LabError(f"wrk failed: {(ended.stderr or ended.stdout).strip()}")
    told = json.loads(found[0])
    answers = told["answers"] - told["refused"]
    row = {"answers": answers, "refused": told["refused"], "lost": told["lost"]}
    row["per_second"] = round(answers / told["us"] * 1e6, 1)
    timed = answers and not told["refused"]
    row |= {f"{key}_ms": round(told[f"{key}_us"] / 1e3, 2) if timed else None for key in ("p50", "p99")}
    return row


def memory_mb(port: int) -> float:
    """Resident memory, in MB, of the process that holds the app."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return round(float(re.findall(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[0]) / 1e6, 1)


def measure_overload(arguments: argparse.Namespace, scratch: Path) -> dict:
    """More clients than find room, who come back when they were told to or at once, beside one that is timed."""
    measured: dict = {**OVERLOAD}
    with running("http", arguments, "--queue", str(OVERLOAD["queue"])) as port:
        for name, patient in (("patient", True), ("at_once", False)):
            with probing(port) as refusals_ms:
                row = wrk(write_script(scratch, arguments, patient), port, OVERLOAD["clients"], arguments.seconds)
            p50, p99 = np.percentile(refusals_ms, (50, 99)).round(2).tolist() if refusals_ms else (None, None)
            measured[name] = {key: row[key] for key in ("per_second", "refused", "lost")} | {
                "probe_refusals": len(refusals_ms),
                "refusal_p50_ms": p50,
                "refusal_p99_ms": p99,
            }
    return measured


@contextlib.contextmanager
def probing(port: int) -> Iterator[list[float]]:
    """One more client for the time of a block: the ms of each refusal that it met."""
    refusals_ms, stop = [], threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.wait(EVERY_S):
            started = time.perf_counter()
            connection.request("POST", "/classify", b'"A headline"')
            response = connection.getresponse()
            response.read()
            if response.status == 503:
                refusals_ms.append(1e3 * (time.perf_counter() - started))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield refusals_ms
    finally:
        stop.set()
        thread.join()


def measure_file(item: artefact.Artefact, count: int, scratch: Path) -> dict:
    """examples/ray/classify.py with one and two workers: headlines/s, and labels that are others than alone."""
    import pyarrow
    import pyarrow.parquet

    texts = held_out_headlines()
    tokenise, backend = artefact.Tokeniser(item), open_backend(item, 1)
    alone = {text: item.labels[backend.logits(tokenise([text])).argmax()] for text in texts}
    source, workers = scratch / "headlines.parquet", {}
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts[index % len(texts)] for index in range(count)]}), source)
    for number in (1, 2):
        output = scratch / f"{number}.parquet"
        command = [sys.executable, str(EXAMPLES / "ray" / "classify.py"), str(source), str(output)]
        command += ["--workers", str(number), "--artefact", str(item.folder)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise LabError(f"classify.py failed: {ended.stderr.strip().splitlines()[-1]}")
        rows = pyarrow.parquet.read_table(output, columns=["text", "label"]).to_pylist()
        workers[str(number)] = {
            "per_second": int(re.findall(r"(\d+) headlines/s", ended.stdout)[0]),
            "changed": sum(alone[row["text"]] != row["label"] for row in rows),
        }
    return {"headlines": count, "workers": workers}


if __name__ == "__main__":
    console.run(main)
