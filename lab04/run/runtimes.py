"""The runtimes behind one call: `logits(tokens) -> float32 [batch, labels]`.

All knowledge of *running* an artefact is here. Every backend takes the same token ids and the same number of
CPU threads; each imports its library only when it is opened. A backend on the CPU may be called by several threads.
"""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lab04 import LabError
from lab04.artefact import Artefact, Tokeniser, Tokens
from lab04.run.backend import Backend, OutputCheck
from lab04.run.recheck import RecheckedBackend

# One thread: a second one gains less than half again for one headline of a small model, and its latency then
# depends on whoever else wants that core (docs/measuring.md, "Threads").
DEFAULT_THREADS = 1
# Headlines of one call. Between the layers, 64 of 16 tokens are 6 MB in FP32, more than a core's own cache holds:
# larger parts were slower on every CPU tried (docs/int8.md).
PART = 8
# From this width on ONNX Runtime's products are worth splitting: with two threads within, a headline of BERT-base, 768
# wide, took 14 ms in place of 26 (AMD Zen 4, the fastest of 181), one of MiniLM, 384 wide, 1.58 in place of 1.41.
WIDE = 768
X86 = ("x86_64", "amd64", "i386", "i686", "x86")
# How much another processor may move the known headlines' logits, as a share of what rounding moved them by. Seen of
# our ONNX artefact: up to 0.24 on x86 with and without VNNI, on ARM and with ONNX Runtime 1.15 to 1.32; 0.72 with the
# kernels for ARM's SME that change labels. PyTorch's engines: up to 0.14 (docs/int8.md).
MAX_KNOWN_CHANGE = 0.4
MIN_KNOWN_CHANGE = 0.01  # logits: where a second graph decided all of them, floating-point arithmetic is all that moves


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
    """Run the headlines that the artefact knows its logits of: the lab's word on processors nobody tried.

    Raises LabError if their largest changes are on average more than a share of what the rounding itself changed. An
    artefact of format 1 knows clear headlines and their FP32 logits alone: there a label must not change.
    """
    known = artefact.manifest.get("check", {}).get("known_headlines", [])
    if not known:  # while the artefact is being built
        return
    tokenise = Tokeniser(artefact)
    fp32 = np.array([item["fp32_logits"] for item in known])
    built = np.array([item.get("logits", item["fp32_logits"]) for item in known])
    here = np.concatenate([backend.logits(tokenise([item["text"]])) for item in known])
    rounding, change = (float(np.abs(logits - built).max(axis=1).mean()) for logits in (fp32, here))
    if artefact.manifest["format"] == 1:
        right = bool((here.argmax(axis=1) == fp32.argmax(axis=1)).all())
    else:
        right = change <= max(MAX_KNOWN_CHANGE * rounding, MIN_KNOWN_CHANGE)  # NaN is no right answer either
    if not right:
        raise LabError(
            f"{artefact.folder} gives wrong answers on this processor ({platform.machine()}): the logits of its own "
            f"check headlines move by {change:.3f}, rounding itself by {rounding:.3f}: run "
            f"{artefact.rebuild_command} here"
        )


def quantised_engine(supported: list[str], machine: str, static: bool = False) -> str:
    """PyTorch's kernel library for a processor, of those this PyTorch supports. Never `onednn`: wrong labels on ARM.

    machine: as `platform.machine()` says. Raises LabError if there is none; for `static` products only x86 has one.
    """
    wanted = ("x86", "fbgemm") if machine.lower() in X86 else () if static else ("qnnpack",)
    for name in wanted:
        if name in supported:
            return name
    raise LabError(
        f"this PyTorch has no {'static ' * static}quantised kernels for {machine} ({' or '.join(wanted) or 'x86'}): "
        "use the ONNX artefact, lab04-optimum.py"
    )


def open_fp16_check(artefact: Artefact, threads: int = DEFAULT_THREADS):
    """A TensorRT artefact's FP16 graph on ONNX Runtime, where its engine cannot run: a check of its labels.

    ONNX Runtime computes in FP32 between FP16 weights here: this says nothing about a GPU's speed or arithmetic.
    """
    return OnnxRuntimeBackend(artefact, threads, artefact.folder / artefact.manifest["graph"])


class CpuBackend(Backend):
    """A runtime on the CPU: `at_once` parts of a call run side by side, each in one thread, over one copy of weights.

    The parts are the same for any number of threads, and so is what they give.
    """

    device = "CPU"

    def __init__(self, artefact: Artefact, at_once: int, prepare_thread: Callable[[], object] | None = None):
        self._check = OutputCheck(artefact)
        self._pool = ThreadPoolExecutor(at_once, "parts", prepare_thread)  # its threads start with the first batch
        self._map = self._pool.map if at_once > 1 else map

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]."""
        return self._check(in_parts(self._run, tokens, self._map))

    def _run(self, tokens: Tokens) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """End the threads of the parts."""
        self._pool.shutdown()


class TorchBackend(CpuBackend):
    """Frozen TorchScript with dynamic INT8 Linear and 8-bit Embedding, on the CPU.

    A call of one part has all `threads` to itself: on a quiet machine PyTorch was faster with two (docs/measuring.md).
    """

    def __init__(self, artefact: Artefact, threads: int):
        import torch

        self._torch = torch
        torch.set_num_threads(threads)  # holds for this thread; those of the parts have one each
        super().__init__(artefact, threads, lambda: torch.set_num_threads(1))
        # By where it is opened, not by where it was built: the packed weights are the same for every engine.
        supported = torch.backends.quantized.supported_engines
        torch.backends.quantized.engine = quantised_engine(supported, platform.machine(), "static" in artefact.options)
        with quiet_stderr():
            self._module = torch.jit.load(str(artefact.model_file), map_location="cpu")
        self._names = artefact.manifest["tokenizer"]["inputs"]

    def _run(self, tokens: Tokens) -> np.ndarray:
        with self._torch.inference_mode():
            return self._module(*(self._torch.from_numpy(tokens[name]) for name in self._names)).numpy()


class OnnxRuntimeBackend(CpuBackend):
    """ONNX Runtime on the CPU; runs the INT8 artefact, or another `graph` when a check needs it.

    The parts of a wide network run one after another, each in all threads.
    """

    def __init__(self, artefact: Artefact, threads: int, graph: Path | None = None):
        import onnxruntime

        within = threads if is_wide(artefact) else 1  # a session has one number for all its calls
        super().__init__(artefact, threads // within)
        self._session = onnxruntime.InferenceSession(
            str(graph or artefact.model_file), session_options(within), providers=["CPUExecutionProvider"]
        )
        self._names = [item.name for item in self._session.get_inputs()]

    def _run(self, tokens: Tokens) -> np.ndarray:
        return self._session.run(None, {name: tokens[name] for name in self._names})[0]


def is_wide(artefact: Artefact) -> bool:
    """Whether an artefact's network is as wide as BERT-base, by its config.json."""
    config = json.loads((artefact.folder / "config.json").read_text(encoding="utf-8"))
    return config.get("hidden_size", config.get("dim", 0)) >= WIDE  # DistilBERT says dim


def session_options(threads: int):
    """How the lab opens an ONNX graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # On ARM with SME these kernels change labels, seen in emulation with 1.24 to 1.32 (docs/int8.md).
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    # A spinning pool takes the core of whoever runs next (onnxruntime#13808).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def in_parts(
    run: Callable[[Tokens], np.ndarray], tokens: Tokens, each: Callable[..., Iterable[np.ndarray]] = map
) -> np.ndarray:
    """Logits of a batch of any size, PART headlines at a time, those of like length together and padded no further.

    each: calls `run` on every part and keeps their order, as `map` does. The longest go first, so that none is left to
    run alone at the end. Padding past the longest of a part goes.
    """
    tokens = from_the_left(tokens)
    if len(tokens["input_ids"]) <= PART:
        return run(tokens)
    lengths = tokens["attention_mask"].shape[1] - tokens["attention_mask"][:, ::-1].argmax(axis=1)
    order = np.argsort(-lengths, kind="stable")
    parts = []
    for start in range(0, len(order), PART):
        rows = order[start : start + PART]
        longest = lengths[rows].max()
        parts.append({name: np.ascontiguousarray(ids[rows, :longest]) for name, ids in tokens.items()})
    return np.concatenate(list(each(run, parts)))[np.argsort(order)]


def from_the_left(tokens: Tokens) -> Tokens:
    """Rows that were filled up on the left, moved to where they stand alone: a padded position would move theirs."""
    first = tokens["attention_mask"].argmax(axis=1)
    if not first.any():
        return tokens
    width = tokens["attention_mask"].shape[1]
    places = (np.arange(width) + first[:, None]) % width
    return {name: np.take_along_axis(ids, places, axis=1) for name, ids in tokens.items()}


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
