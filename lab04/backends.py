"""The runtimes behind one call: `logits(tokens) -> float32 [batch, labels]`.

All knowledge of *running* an artefact is here. Every backend takes the same token ids and the same number of
CPU threads; each imports its library only when it is opened.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab04.artefact import Artefact, Tokens
from lab04.backend import Backend, OutputCheck
from lab04.recheck import RecheckedBackend

# One thread: a second one gains less than half again for one headline of a small model, and its latency then
# depends on whoever else wants that core (README, "Threads").
DEFAULT_THREADS = 1


def open_backend(artefact: Artefact, threads: int = DEFAULT_THREADS):
    """The backend of an artefact, ready to run. Raises `backend.Unavailable` if its library or device is not here."""
    backend = BACKENDS[artefact.backend](artefact, threads)
    if recheck := artefact.manifest.get("recheck"):
        exact = OnnxRuntimeBackend(artefact, threads, artefact.folder / recheck["graph"])
        return RecheckedBackend(backend, exact, recheck["threshold"])
    return backend


def open_fp16_check(artefact: Artefact, threads: int = DEFAULT_THREADS):
    """A TensorRT artefact's FP16 graph on ONNX Runtime, where its engine cannot run: a check of its labels.

    ONNX Runtime computes in FP32 between FP16 weights here: this says nothing about a GPU's speed or arithmetic.
    """
    backend = OnnxRuntimeBackend(artefact, threads, artefact.folder / artefact.manifest["graph"])
    backend.name = "TensorRT FP16"
    return backend


class TorchBackend(Backend):
    """Frozen TorchScript with dynamic INT8 Linear and 8-bit Embedding, on the CPU."""

    name = "PyTorch Quantised"
    device = "CPU"

    def __init__(self, artefact: Artefact, threads: int):
        import torch

        self._torch = torch
        torch.set_num_threads(threads)
        torch.backends.quantized.engine = artefact.manifest["engine"]
        with quiet_stderr():
            self._module = torch.jit.load(str(artefact.model_file), map_location="cpu")
        self._names = artefact.manifest["tokenizer"]["inputs"]
        self._check = OutputCheck(artefact)

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        with self._torch.inference_mode():
            output = self._module(*(self._torch.from_numpy(tokens[name]) for name in self._names))
        return self._check(output.numpy())


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU; runs the INT8 artefact, or another `graph` when a check needs it."""

    name = "ONNX Quantised"
    device = "CPU"

    def __init__(self, artefact: Artefact, threads: int, graph: Path | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A spinning pool takes the core of whoever runs next (onnxruntime#13808).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(graph or artefact.model_file), options, providers=["CPUExecutionProvider"]
        )
        self._names = [item.name for item in self._session.get_inputs()]
        self._check = OutputCheck(artefact)

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        return self._check(self._session.run(None, {name: tokens[name] for name in self._names})[0])


@contextlib.contextmanager
def quiet_stderr():
    """Drop what C++ code writes to stderr: TorchScript's deprecation notice, on which a user cannot act."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def open_tensorrt(artefact: Artefact, threads: int):
    """The TensorRT backend, whose module is read only when it is asked for."""
    from lab04.tensorrt_engine import TensorRTBackend

    return TensorRTBackend(artefact, threads)


BACKENDS: dict[str, Callable[[Artefact, int], Backend]] = {
    "torch": TorchBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "tensorrt": open_tensorrt,
}
