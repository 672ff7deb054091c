"""A worker process (benchmark/worker.py) seen from outside."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lab04 import ROOT, LabError
from lab04.run.backend import Unavailable


class WorkerFault(Exception):
    """A fault of the lab's own code in a worker; the message is the worker's traceback."""


class Process:
    """A worker process that runs one backend (benchmark/worker.py); closing it ends it.

    forgiving: whatever goes wrong is a reason why the backend is unavailable. True for peers, whose libraries are not
    ours to mend; a fault of our own code ends the run.
    """

    def __init__(self, log: Path, threads: int = 1, forgiving: bool = False):
        self._log, self._forgiving = log, forgiving
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

        assert self._process.stdin is not None and self._process.stdout is not None  # as asked for above
        self._commands, self._answers = self._process.stdin, self._process.stdout

    def ask(self, do: str, **fields) -> dict:
        """Have a command carried out.

        Raises Unavailable if the backend cannot, LabError if the user must act, WorkerFault if our code is wrong.
        """
        try:
            self._commands.write(json.dumps({"do": do, **fields}) + "\n")
            self._commands.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self._log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            died = f"its process ended with code {self._process.wait()}: {last.strip()[:150]}"
            raise Unavailable(died) if self._forgiving else LabError(f"{self._log.stem}: {died}")
        said = json.loads(answer)
        if "error" in said:
            raise LabError(said["error"])
        if "unavailable" in said:
            raise Unavailable(said["unavailable"])
        if "fault" in said:
            raise Unavailable(said["fault"]) if self._forgiving else WorkerFault(said["traceback"])
        return said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(BrokenPipeError):  # it died, and has not read all it was told
            self._commands.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
