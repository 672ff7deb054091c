"""Measure both Ray examples on this machine, and write results/<hardware>-serving/ and its text in docs/serving.md.

    python examples/ray/measure.py amd-epyc-zen3-2-cores           # over an hour for a million headlines
    python examples/ray/measure.py amd-epyc-zen3-2-cores --render  # only write the chart and the text again

Needs wrk (apt-get install wrk), and matplotlib and psutil beside requirements/ray.txt.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import classify  # beside this file
import numpy as np
import psutil

from lab04 import ROOT, LabError, artefact, console, options
from lab04.compare import charts
from lab04.read.texts import held_out_headlines
from lab04.run import runtimes

HERE = Path(__file__).resolve().parent
PORT = 18_473
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES = (1, 4, 16, 64, 256)
LIST = 32  # headlines of the one load that sends several a request
SCRIPT = 'wrk.method = "POST"\nwrk.body = [==[{body}]==]\n'
HEADLINE = "Cybersecurity breach exposes NHS patient records"
BEGIN, END = "<!-- figures: examples/ray/measure.py -->\n", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardware", help="name of the machine, as in results/")
    parser.add_argument("--headlines", type=options.positive, default=1_000_000, help="default: %(default)s")
    parser.add_argument(
        "--requests", type=options.positive, default=100_000, help="of the memory run; default: %(default)s"
    )
    parser.add_argument("--seconds", type=options.positive, default=20, help="of each load; default: %(default)s")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    folder = ROOT / "results" / f"{arguments.hardware}-serving"
    if not arguments.render:
        result = measure(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    render(folder)


def measure(arguments: argparse.Namespace) -> dict:
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "ray": classify.ray.__version__,
        "headlines": arguments.headlines,
    }
    with tempfile.TemporaryDirectory() as folder:
        return {
            "machine": machine,
            "files": measure_files(Path(folder), arguments.headlines),
            "serving": measure_serving(Path(folder), arguments.seconds, arguments.requests),
        }


# --- Files ------------------------------------------------------------------------------------------------


def measure_files(folder: Path, count: int) -> dict:
    """Headlines/s of one process and of classify.py with one and two workers; labels that batching changed."""
    known = held_out_headlines()
    item = artefact.load(ROOT / "quantised-model-optimum")
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    alone = {text: item.labels[backend.logits(tokenise([text])).argmax()] for text in known}
    rates = {batch: one_process(backend, tokenise, known * 4, batch) for batch in BATCHES}
    best = max(rates, key=rates.get)

    source = folder / "headlines.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([known[index % len(known)]] for index in range(count))])
    workers = {}
    for number in (1, 2):
        output = folder / f"{number}.parquet"
        options = ["--workers", str(number), "--batch-size", str(best)]
        ended = subprocess.run(
            [sys.executable, HERE / "classify.py", source, output, *options], capture_output=True, text=True
        )
        if ended.returncode:
            raise LabError(f"classify.py failed: {ended.stderr.strip().splitlines()[-1]}")
        table = classify.pa.parquet.read_table(output, columns=["text", "label"]).to_pylist()
        workers[number] = {
            "headlines_per_second": int(re.search(r"(\d+) headlines/s", ended.stdout)[1]),
            "rows": len(table),
            "changed_labels": sum(alone[row["text"]] != row["label"] for row in table),
        }
    return {"batch": best, "one_process": rates, "workers": workers}


def one_process(backend, tokenise, texts: list[str], batch: int) -> float:
    """Headlines/s of logits() in this process, tokenising included, in the file's order."""
    started = time.perf_counter()
    for first in range(0, len(texts), batch):
        backend.logits(tokenise(texts[first : first + batch]))
    return round(len(texts) / (time.perf_counter() - started), 1)


# --- Serving ----------------------------------------------------------------------------------------------


def measure_serving(folder: Path, seconds: int, requests: int) -> dict:
    """Requests/s, p50 and p99 at rising concurrency; the replica's memory over many requests."""
    script, several = folder / "one.lua", folder / "several.lua"
    script.write_text(SCRIPT.format(body=json.dumps(HEADLINE)))
    several.write_text(SCRIPT.format(body=json.dumps(held_out_headlines()[:LIST])))
    command = [sys.executable, HERE / "serve.py", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            if not any(line.startswith("Serving ") for line in server.stdout):
                raise LabError("serve.py ended before it served")
            wrk(script, 8, 3)  # warm up
            load = [{"concurrency": number} | wrk(script, number, seconds) for number in CONCURRENCY]
            lists = wrk(several, 4, seconds)
            memory, done = [[0, replica_mb()]], 0
            while done < requests:
                done += wrk(script, 16, seconds)["answered"]
                memory.append([done, replica_mb()])
        finally:
            server.send_signal(signal.SIGTERM)
    return {"seconds": seconds, "load": load, "lists": lists, "memory_mb": memory}


def wrk(script: Path, concurrency: int, seconds: int) -> dict:
    """One load of wrk: answered and refused (503) requests, requests/s of the answered, p50 and p99 of all in ms."""
    options = ["-t1", f"-c{concurrency}", f"-d{seconds}s", "--timeout", "30s", "--latency", "-s", str(script)]
    text = subprocess.run(
        ["wrk", *options, f"http://127.0.0.1:{PORT}/classify"], capture_output=True, text=True, check=True
    ).stdout
    total, duration = re.search(r"(\d+) requests in ([\d.]+)s", text).groups()
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    answered = int(total) - int(refused[1] if refused else 0)
    unit = {"us": 1e-3, "ms": 1, "s": 1e3}
    p50, p99 = (
        round(float(value) * unit[name], 2)
        for value, name in (re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", text).groups() for percent in (50, 99))
    )
    rate = round(answered / float(duration), 1)
    return {"answered": answered, "refused": int(total) - answered, "per_second": rate, "p50_ms": p50, "p99_ms": p99}


def replica_mb() -> float:
    """Resident memory of the one replica, in MB."""
    names = [process for process in psutil.process_iter(["cmdline"]) if "ray::ServeReplica" in str(process.info)]
    return round(max(process.memory_info().rss for process in names) / 1e6, 1)


# --- Text and chart ---------------------------------------------------------------------------------------


def render(folder: Path) -> None:
    """Write load.png beside results.json, and the figures between the marks of docs/serving.md."""
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    plt = charts.pyplot()
    load = result["serving"]["load"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, colour in (("p99_ms", "#D55E00"), ("p50_ms", "#0072B2")):
        axes.plot([row["concurrency"] for row in load], [row[name] for row in load], "o-", color=colour, label=name[:3])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(np.array(CONCURRENCY), [str(number) for number in CONCURRENCY])
    axes.set(xlabel="requests at once", ylabel="answered within (ms)", title="Ray Serve, one replica of one thread")
    axes.legend(frameon=False)
    charts.save(figure, folder / "load.png")
    page = ROOT / "docs" / "serving.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + figures(result, folder.name) + END + rest.split(END)[1], encoding="utf-8")


def figures(result: dict, name: str) -> str:
    """The figures of docs/serving.md as Markdown."""
    machine, files, serving = result["machine"], result["files"], result["serving"]
    best = max(files["one_process"].values())
    lines = [
        f"Measured on {machine['date']} on `{name.removesuffix('-serving')}` ({machine['cores']} cores, load average "
        f"{machine['load_before']} before the start), Ray {machine['ray']}; from `results/{name}/results.json`.",
        "",
        f"**A file** of {machine['headlines']:,} headlines (our test file, repeated), batches of {files['batch']}; "
        "Ray's start is not in these times, the workers' is:",
        "",
        "| | headlines/s | of one process each | labels that batching changed |",
        "|---|---|---|---|",
        f"| one process, `logits()` at its best batch | {best:.0f} | 100 % | |",
    ]
    for number, row in files["workers"].items():
        share = row["headlines_per_second"] / best / int(number)
        changed = f"{row['changed_labels']:,} of {row['rows']:,}"
        lines.append(f"| `classify.py --workers {number}` | {row['headlines_per_second']} | {share:.0%} | {changed} |")
    lines += [
        "",
        f"**One headline a request**, `wrk` on the same machine, {serving['seconds']} s each, one replica:",
        "",
        "| requests at once | answered/s | p50 ms | p99 ms | refused (503) |",
        "|---|---|---|---|---|",
    ]
    for row in serving["load"]:
        lines.append("| {concurrency} | {per_second} | {p50_ms} | {p99_ms} | {refused} |".format(**row))
    memory, lists = serving["memory_mb"], serving["lists"]
    lines += [
        "",
        f"With {LIST} headlines a request and 4 requests at once: {lists['per_second'] * LIST:.0f} headlines/s, p99 "
        f"{lists['p99_ms']:.0f} ms. Most of the time of a request with one headline is Ray's: send lists if you can.",
        "",
        f"![p50 and p99 over load](../results/{name}/load.png)",
        "",
        f"The replica held {memory[0][1]:.0f} MB before, {memory[len(memory) // 2][1]:.0f} MB halfway and "
        f"{memory[-1][1]:.0f} MB after {memory[-1][0]:,} more requests. Times are of all requests: a refusal is quick.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    console.run(main)
