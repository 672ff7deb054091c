"""The runtimes behind one call: `logits(tokens) -> float32 [batch, labels]`.

All knowledge of *running* an artefact is here. Every backend takes the same token ids and the same number of
CPU threads; each imports its library only when it is opened.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab04 import LabError
from lab04.artefact import Artefact, Tokeniser, Tokens
from lab04.run.backend import Backend, OutputCheck
from lab04.run.recheck import RecheckedBackend
from lab04.run.scores import softmax

# One thread: a second one gains less than half again for one headline of a small model, and its latency then
# depends on whoever else wants that core (docs/measuring.md, "Threads").
DEFAULT_THREADS = 1
# Headlines of one call. Between the layers, 64 of 16 tokens are 6 MB in FP32, more than a core's own cache holds:
# larger parts were slower on every CPU tried (docs/int8.md).
PART = 8
X86 = ("x86_64", "amd64", "i386", "i686", "x86")
MAX_KNOWN_CHANGE = 0.3  # of a probability; INT8 moves those of clear labels by hundredths, wrong kernels at will


def open_backend(artefact: Artefact, threads: int = DEFAULT_THREADS):
    """The backend of an artefact, ready to run.

    Raises `backend.Unavailable` if its library or device is not here, LabError if it answers otherwise than FP32 did.
    """
    backend = open_runtime(artefact, threads)
    if recheck := artefact.manifest.get("recheck"):
        exact = OnnxRuntimeBackend(artefact, threads, artefact.folder / recheck["graph"])
        backend = RecheckedBackend(backend, exact, recheck["threshold"])
    try:
        check_known_headlines(artefact, backend)
    except BaseException:
        backend.close()
        raise
    return backend


def open_runtime(artefact: Artefact, threads: int) -> Backend:
    """The runtime of an artefact's own model, without the graph that may recheck it."""
    if "this-cpu" in artefact.options:
        from lab04.run.int8_engine import Int8EngineBackend

        return Int8EngineBackend(artefact, threads)
    return BACKENDS[artefact.backend](artefact, threads)


def check_known_headlines(artefact: Artefact, backend: Backend) -> None:
    """Run the headlines that the artefact knows the FP32 logits of: the lab's word on processors nobody tried.

    Raises LabError if a label, all of them clear ones, or the probabilities differ from FP32's.
    """
    known = artefact.manifest.get("check", {}).get("known_headlines", [])
    if not known:  # while the artefact is being built
        return
    tokenise = Tokeniser(artefact)
    for item in known:
        expected, found = softmax(np.array(item["fp32_logits"])), softmax(backend.logits(tokenise([item["text"]]))[0])
        if expected.argmax() != found.argmax() or np.abs(found - expected).max() > MAX_KNOWN_CHANGE:
            raise LabError(
                f"{artefact.folder} gives wrong answers on this processor ({platform.machine()}, its own check "
                f"headlines differ from FP32): run {artefact.rebuild_command} here"
            )


def quantised_engine(supported: list[str], machine: str) -> str:
    """PyTorch's kernel library for a processor, of those this PyTorch supports. Never `onednn`: wrong labels on ARM.

    machine: as `platform.machine()` says. Raises LabError if there is none.
    """
    wanted = ("x86", "fbgemm") if machine.lower() in X86 else ("qnnpack",)
    for name in wanted:
        if name in supported:
            return name
    raise LabError(
        f"this PyTorch has no quantised kernels for {machine} ({' or '.join(wanted)}): "
        "use the ONNX artefact, lab04-optimum.py"
    )


def open_fp16_check(artefact: Artefact, threads: int = DEFAULT_THREADS):
    """A TensorRT artefact's FP16 graph on ONNX Runtime, where its engine cannot run: a check of its labels.

    ONNX Runtime computes in FP32 between FP16 weights here: this says nothing about a GPU's speed or arithmetic.
    """
    return OnnxRuntimeBackend(artefact, threads, artefact.folder / artefact.manifest["graph"])


class TorchBackend(Backend):
    """Frozen TorchScript with dynamic INT8 Linear and 8-bit Embedding, on the CPU."""

    device = "CPU"

    def __init__(self, artefact: Artefact, threads: int):
        import torch

        self._torch = torch
        torch.set_num_threads(threads)
        # By where it is opened, not by where it was built: the packed weights are the same for every engine.
        supported = torch.backends.quantized.supported_engines
        torch.backends.quantized.engine = quantised_engine(supported, platform.machine())
        with quiet_stderr():
            self._module = torch.jit.load(str(artefact.model_file), map_location="cpu")
        self._names = artefact.manifest["tokenizer"]["inputs"]
        self._check = OutputCheck(artefact)

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        return self._check(in_parts(self._run, tokens))

    def _run(self, tokens: Tokens) -> np.ndarray:
        with self._torch.inference_mode():
            return self._module(*(self._torch.from_numpy(tokens[name]) for name in self._names)).numpy()


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU; runs the INT8 artefact, or another `graph` when a check needs it."""

    device = "CPU"

    def __init__(self, artefact: Artefact, threads: int, graph: Path | None = None):
        import onnxruntime

        self._session = onnxruntime.InferenceSession(
            str(graph or artefact.model_file), session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._names = [item.name for item in self._session.get_inputs()]
        self._check = OutputCheck(artefact)

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        return self._check(in_parts(self._run, tokens))

    def _run(self, tokens: Tokens) -> np.ndarray:
        return self._session.run(None, {name: tokens[name] for name in self._names})[0]


def session_options(threads: int):
    """How the lab opens an ONNX graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool takes the core of whoever runs next (onnxruntime#13808).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def in_parts(run: Callable[[Tokens], np.ndarray], tokens: Tokens) -> np.ndarray:
    """Logits of a batch of any size, PART headlines at a time, those of like length together and padded no further.

    Padding past the longest of a part goes, on the right alone: on the left it moves a headline's positions.
    """
    if len(tokens["input_ids"]) <= PART:
        return run(tokens)
    lengths = tokens["attention_mask"].shape[1] - tokens["attention_mask"][:, ::-1].argmax(axis=1)
    order = np.argsort(lengths, kind="stable")
    parts = []
    for start in range(0, len(order), PART):
        rows = order[start : start + PART]
        longest = lengths[rows].max()
        parts.append(run({name: np.ascontiguousarray(ids[rows, :longest]) for name, ids in tokens.items()}))
    return np.concatenate(parts)[np.argsort(order)]


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
    from lab04.run.tensorrt_engine import TensorRTBackend

    return TensorRTBackend(artefact, threads)


BACKENDS: dict[str, Callable[[Artefact, int], Backend]] = {
    "torch": TorchBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "tensorrt": open_tensorrt,
}
