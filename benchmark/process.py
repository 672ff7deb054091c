"""A worker process (benchmark/worker.py) seen from outside."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lab04 import ROOT, LabError
from lab04.run.backend import Unavailable


class Process:
    """A worker process that runs one backend (benchmark/worker.py); closing it ends it."""

    def __init__(self, log: Path, threads: int = 1):
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmark.worker"],
                cwd=ROOT,
                # CI: OpenVINO and NNCF then send no usage statistics, nor spend time on it.
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CI": "true"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                encoding="utf-8",
            )

    def ask(self, do: str, **fields) -> dict:
        """Have a command carried out. Raises Unavailable if the backend cannot, LabError if the user must act."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self._log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            raise Unavailable(f"its process ended with code {self._process.wait()}: {last.strip()[:150]}")
        answer = json.loads(answer)
        if "error" in answer:
            raise LabError(answer["error"])
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(BrokenPipeError):  # it died, and has not read all it was told
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
