"""`lab04-nvidia.py --check`: a PASS or FAIL line for everything the lab assumes of a machine with a GPU."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab04 import LabError, said
from lab04.artefact import Tokeniser, load
from lab04.compare.closing_check import check_fp16
from lab04.console import suggest
from lab04.read.texts import held_out_headlines
from lab04.run import runtimes, tensorrt_engine

CALLS, WARM_UPS = 60, 10  # of the latency step
INDEPENDENT = ("TensorRT", "PyCUDA", "driver")  # worth knowing even where another step failed
HEADLINES = 3  # run by the last steps


def self_check(build: Callable) -> None:
    """Run every step and print its line; LabError at the end if one failed. The engine goes to a scratch folder.

    build: fills a folder as the lab does; returns the FP32 classifier, and why there is no engine or None
    """
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, work in Steps(build, Path(scratch)).all.items():
            if failed and name not in INDEPENDENT:
                print(f"SKIP  {name}")
                continue
            try:
                print(f"PASS  {name}: {work()}")
            except Exception as error:  # whatever it is: the point is to report it
                failed.append(name)
                kind = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
                print(f"FAIL  {name}: {kind}{said(error)}")
    if failed:
        raise LabError(
            f"failed: {', '.join(failed)}. If docs/tensorrt.md does not help, open an issue with the lines "
            "above and the output of nvidia-smi and pip freeze"
        )
    suggest("python lab04-nvidia.py")


class Steps:
    """The steps of the check. Each returns a line of detail or raises; later ones use what earlier ones made."""

    def __init__(self, build: Callable, folder: Path):
        self._build, self._folder = build, folder
        self.all = {
            "TensorRT": self.tensorrt,
            "PyCUDA": self.pycuda,
            "driver": self.driver,
            "build": self.build,
            "agreement": self.agreement,
            "labels": self.labels,
            "latency": self.latency,
            "context clean-up": self.clean_up,
        }

    def tensorrt(self) -> str:
        return f"version {tensorrt_engine.import_tensorrt().__version__}"

    def pycuda(self) -> str:
        try:
            import pycuda
        except ModuleNotFoundError as error:
            raise LabError(f"not installed: {tensorrt_engine.INSTALL}") from error
        return f"version {pycuda.VERSION_TEXT}"

    def driver(self) -> str:
        cuda = tensorrt_engine.import_pycuda()
        major, minor = divmod(cuda.get_driver_version() // 10, 100)
        return f"CUDA {major}.{minor}, {cuda.Device(0).name()}"

    def build(self) -> str:
        self._fp32, absent = self._build(self._folder)
        if absent:
            raise LabError(absent)
        self._built = load(self._folder)
        self._tokenise = Tokeniser(self._built)
        return f"{self._built.model_file.name}, {self._built.model_mb:.1f} MB"

    def agreement(self) -> str:
        result = check_fp16(self._folder, self._fp32, 1)
        return (
            f"{result['agreement']:.1%} of {result['headlines']} labels as FP32, "
            f"logits within {result['max_logit_change']:.4f}"
        )

    def labels(self) -> str:
        names, texts = self._built.labels, held_out_headlines()[:HEADLINES]
        self._logits = self._run(texts)
        found, expected = self._logits.argmax(axis=1), self._fp32.logits(texts).argmax(axis=1)
        if found.tolist() != expected.tolist():
            raise LabError(f"{[names[i] for i in found]} where FP32 says {[names[i] for i in expected]}")
        return f"{len(names)} of them; the first headlines are {', '.join(names[i] for i in found)}"

    def latency(self) -> str:
        tokens, times = self._tokenise(held_out_headlines()[:1]), []
        with runtimes.open_backend(self._built) as backend:
            for _ in range(CALLS):
                backend.logits(tokens)
                times.append((backend.compute_ms, backend.end_to_end_ms))
        compute_ms, end_to_end_ms = np.median(times[WARM_UPS:], axis=0)
        if not 0 < compute_ms <= end_to_end_ms:
            raise LabError(f"{compute_ms} ms of computing within {end_to_end_ms} ms end to end cannot be")
        length = tokens["input_ids"].shape[1]
        return f"compute {compute_ms:.3f} ms, end to end {end_to_end_ms:.3f} ms, one headline of {length} tokens"

    def clean_up(self) -> str:
        again = self._run(held_out_headlines()[:HEADLINES])
        if tensorrt_engine.import_pycuda().Context.get_current() is not None:
            raise LabError("a CUDA context is still current after closing")
        if not np.allclose(again, self._logits, atol=1e-3):
            raise LabError("a second engine in the same process gives other logits")
        return "no context left current, and a second engine agrees with the first"

    def _run(self, texts: list[str]) -> np.ndarray:
        """Logits of an engine opened and closed for these texts alone."""
        with runtimes.open_backend(self._built) as backend:
            return backend.logits(self._tokenise(texts))
