"""One backend in one process of its own: `python -m benchmark.worker`, spoken to by benchmark/process.py.

Commands come as one JSON object a line on stdin, each is answered by one on stdout; the process ends with its stdin.
A process of its own makes peak memory and cold starts mean something, and keeps one runtime's threads and
allocator out of another's times.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from lab04 import LabError, artefact, said
from lab04.run import runtimes
from lab04.run.backend import Unavailable
from lab04.run.recheck import RecheckedBackend


class Worker:
    """Carries out the commands; a public method is a command, its arguments are the command's fields."""

    def export(self, model: str, labels: str | None, reference: str) -> dict:
        """Write the FP32 reference folder of a model."""
        from benchmark import peers

        peers.export_reference(model, labels, Path(reference))
        return {}

    def build(self, peer: str, reference: str, folder: str) -> dict:
        """Build a peer's files from the FP32 folder."""
        from benchmark import peers

        peers.build(peer, Path(reference), Path(folder))
        return {}

    def open(self, runner: str, folder: str, reference: str, threads: int) -> dict:
        """Import the libraries, load the model, get the tokeniser. Returns the times of both in ms.

        runner: `artefact` for a lab's folder, `graph` for the FP16 graph in one, else the name of a reference or peer.
        """
        started = time.perf_counter()
        built = artefact.load(folder if runner in ("artefact", "graph") else reference)
        if runner == "artefact":
            needed = () if "this-cpu" in built.options else RUNTIMES[built.backend]  # the engine loads no library
            libraries, make = needed, lambda: runtimes.open_backend(built, threads)
        elif runner == "graph":
            libraries, make = RUNTIMES["onnxruntime"], lambda: runtimes.open_fp16_check(built, threads)
        else:
            from benchmark import peers

            peer = {**peers.REFERENCES, **peers.PEERS}[runner]
            libraries, make = peer.libraries, lambda: peer.open(Path(folder), built, threads)
        checked = time.perf_counter()
        for library in libraries:
            importlib.import_module(library)
        imported = time.perf_counter()
        self._backend = make()
        self._tokenise = artefact.Tokeniser(built)
        loaded = time.perf_counter()
        return {"imports_ms": (imported - checked) * 1e3, "load_ms": (loaded - imported + checked - started) * 1e3}

    def logits(self, texts: list[str]) -> dict:
        """Logits [texts, labels], one unpadded headline at a time; how many a second graph decided, if there is one."""
        rows, rechecked = [], []
        for text in texts:
            rows.append(self._backend.logits(self._tokenise([text]))[0])
            if isinstance(self._backend, RecheckedBackend) and self._backend.rechecked is not None:
                rechecked.append(bool(self._backend.rechecked[0]))
        return {"logits": as_json(np.stack(rows))} | ({"rechecked": sum(rechecked)} if rechecked else {})

    def logits_in_batches(self, texts: list[str], batch: int) -> dict:
        """Logits [texts, labels] again, with whatever neighbours the order of the texts brings."""
        batches = [self._tokenise(texts[start : start + batch]) for start in range(0, len(texts), batch)]
        return {"logits": as_json(np.concatenate([self._backend.logits(tokens) for tokens in batches]))}

    def latency(self, texts: list[str], warm_ups: int) -> dict:
        """Milliseconds of each headline on its own, after some untimed ones; token ids are ready before the clock."""
        batches = [self._tokenise([text]) for text in texts]
        for tokens in batches[:warm_ups]:
            self._backend.logits(tokens)
        times = []
        for tokens in batches:
            started = time.perf_counter_ns()
            self._backend.logits(tokens)
            times.append((time.perf_counter_ns() - started) / 1e6)
        return {"ms": times}

    def throughput(self, texts: list[str], batch: int) -> dict:
        """Headlines per second in batches of one size; sorted by length, so that little of a batch is padding."""
        texts = sorted(texts, key=lambda text: self._tokenise([text])["input_ids"].shape[1])
        batches = [self._tokenise(texts[start : start + batch]) for start in range(0, len(texts), batch)]
        self._backend.logits(batches[-1])
        started = time.perf_counter()
        for tokens in batches:
            self._backend.logits(tokens)
        return {"per_second": len(texts) / (time.perf_counter() - started)}

    def first(self, text: str) -> dict:
        """The first prediction of a process: its time in ms, tokenisation included."""
        started = time.perf_counter()
        self._backend.logits(self._tokenise([text]))
        return {"first_ms": (time.perf_counter() - started) * 1e3}

    def tokenisation(self, texts: list[str], reference: str) -> dict:
        """Milliseconds to turn each headline into token ids."""
        tokenise, times = artefact.Tokeniser(artefact.load(reference)), []
        for text in texts[:20] + texts:
            started = time.perf_counter_ns()
            tokenise([text])
            times.append((time.perf_counter_ns() - started) / 1e6)
        return {"ms": times[len(texts[:20]) :]}

    def memory(self) -> dict:
        """Peak resident memory of this process in MB (10^6 bytes)."""
        return {"memory_mb": peak_memory_bytes() / 1e6}


RUNTIMES = {"torch": ("torch",), "onnxruntime": ("onnxruntime",), "tensorrt": ()}


def as_json(logits: np.ndarray) -> list:
    return logits.round(6).astype(float).tolist()


def peak_memory_bytes() -> int:
    """The most memory this process has held. Linux's getrusage would also count the parent it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def serve() -> None:
    """Answer commands until stdin ends. Libraries print where they like; only answers go to the real stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our stdin
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Unavailable as error:
            answer = {"unavailable": str(error)}
        except LabError as error:
            answer = {"error": str(error)}
        except Exception as error:  # whether it is a peer's misfortune or a fault of ours, process.py knows
            answer = {"fault": f"{type(error).__name__}: {said(error)}", "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
