"""The floor of this core, and each back end's share of it: `python -m benchmark --floor`.

No INT8 network can be quicker than its multiply-adds at the core's measured peak, nor than reading its weights once.
Writes results/HARDWARE-floor/results.json; another model's goes into a folder of its own with --tag NAME. One thread,
one headline at a time, by the process's own CPU time.
"""

import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from tabulate import tabulate

from benchmark import environment, results
from benchmark.results import FLOOR
from lab04 import LabError, artefact
from lab04.artefact import contract
from lab04.quantise import this_cpu
from lab04.run import runtimes

SOURCE = Path(__file__).with_suffix(".cpp")
ROUNDS, BLOCK = 60, 20  # blocks of headlines of every back end, in random order, each after a warm-up


def run(artefacts: list[Path], texts: list[str], output: Path, tag: str = "") -> None:
    """Measure the core and CPU artefact folders of one model on texts; print, and write the results folder."""
    here = environment.describe()
    built = [artefact.load(path) for path in artefacts]
    contract.check_together(built)
    counts = [int(artefact.Tokeniser(built[0])([text])["attention_mask"].sum()) for text in texts]
    config = json.loads((built[0].folder / "config.json").read_text(encoding="utf-8"))
    core = measure_core(weight_bytes(config))
    work = sum(multiply_adds(config, tokens) for tokens in counts) / len(counts)
    floor_ms = 1e3 * max(work / core["multiply_adds_per_s"], weight_bytes(config) / core["weight_bytes_per_s"])
    measured = {
        "format": results.FORMAT,
        "environment": here,
        "core": core,
        "weights_sha256": built[0].manifest["weights_sha256"],
        "headlines": len(texts),
        "mean_tokens": sum(counts) / len(counts),
        "multiply_adds": work,
        "weight_bytes": weight_bytes(config),
        "multiply_ms": 1e3 * work / core["multiply_adds_per_s"],
        "read_ms": 1e3 * weight_bytes(config) / core["weight_bytes_per_s"],
        "floor_ms": floor_ms,
        "backends": {
            item.folder.name: {"title": item.title, "cpu_ms": ms, "share_of_floor": floor_ms / ms}
            for item, ms in zip(built, measure_artefacts(built, texts), strict=True)
        },
    }
    print(
        f"{environment.hardware_line(here)}\n{work / 1e6:.0f} million multiply-adds a headline at "
        f"{core['multiply_adds_per_s'] / 1e9:.0f} billion a second ({core['instruction']}): "
        f"{measured['multiply_ms']:.2f} ms; reading {measured['weight_bytes'] / 1e6:.1f} MB of weights: "
        f"{measured['read_ms']:.2f} ms\n"
    )
    rows = [["floor of this core", floor_ms, 1.0]]
    rows += [[item["title"], item["cpu_ms"], item["share_of_floor"]] for item in measured["backends"].values()]
    print(tabulate(rows, headers=["", "ms a headline", "share of the floor"], floatfmt=("", ".2f", ".0%")))
    folder = output / environment.folder_name(here, f"{FLOOR} {tag}".strip())
    folder.mkdir(parents=True, exist_ok=True)
    results.save_json(folder / results.RESULTS, measured)
    print(f"\nWrote {folder / results.RESULTS}")


def measure_core(weights: int) -> dict:
    """The core's peak of INT8 multiply-adds, and how fast it reads so many bytes. Raises LabError without g++."""
    this_cpu.check_here()
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "floor"
        command = [this_cpu.COMPILER, "-std=gnu++17", "-O3", "-march=native", str(SOURCE), "-o", str(program)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise LabError("--floor does not know this processor's INT8 instructions: it needs AVX2 or VNNI")
        return json.loads(subprocess.run([program, str(weights)], capture_output=True, text=True, check=True).stdout)


def multiply_adds(config: dict, tokens: int) -> int:
    """Those of a headline's INT8 products, where the last layer goes on with the first token alone.

    Attention itself is left out: it is in FP32 in every back end, and at 16 tokens two per cent.
    """
    width, inner, layers = shape(config)
    embedding = config.get("embedding_size", width) if config["model_type"] == "electra" else width
    layer = 4 * width * width + 2 * width * inner
    last = 2 * width * width * tokens + 2 * width * width + 2 * width * inner
    head = width * width + width * len(config["id2label"])
    project = embedding * width * tokens if embedding != width else 0
    return project + (layers - 1) * layer * tokens + last + head


def weight_bytes(config: dict) -> int:
    """Bytes of INT8 weights that every headline reads: all Linears of the layers."""
    width, inner, layers = shape(config)
    return layers * (4 * width * width + 2 * width * inner)


def shape(config: dict) -> tuple[int, int, int]:
    """Width, inner width and layers of a BERT, DistilBERT, RoBERTa or ELECTRA."""
    if config["model_type"] == "distilbert":
        return config["dim"], config["hidden_dim"], config["n_layers"]
    return config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]


def measure_artefacts(built: list[artefact.Artefact], texts: list[str]) -> list[float]:
    """CPU milliseconds a headline of every artefact: the median of its blocks, those of all in turn."""
    chance = random.Random(0)
    tokenise = artefact.Tokeniser(built[0])
    tokens = [tokenise([text]) for text in texts]
    backends = [runtimes.open_backend(item, 1) for item in built]
    times: list[list[float]] = [[] for _ in built]
    for _ in range(ROUNDS):
        block = chance.sample(tokens, min(BLOCK, len(tokens)))
        for index in chance.sample(range(len(built)), len(built)):
            backends[index].logits(block[0])
            started = time.process_time()
            for item in block:
                backends[index].logits(item)
            times[index].append(1e3 * (time.process_time() - started) / len(block))
    for backend in backends:
        backend.close()
    return [median(blocks) for blocks in times]
