"""The INT8 engine that is built on the machine it runs on: lab04/run/int8_engine.cpp behind `logits(tokens)`.

Loads neither PyTorch nor ONNX Runtime. The weights file is safetensors: `layout` says what is in it.
"""

import ctypes
import json
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lab04 import LabError
from lab04.artefact import Artefact, Tokens
from lab04.run.backend import Backend, OutputCheck

SOURCE = Path(__file__).with_suffix(".cpp")
WEIGHTS_FILE, LIBRARY_FILE = "model_int8.safetensors", "int8_engine.so"
# Tokens of one call: what lies between the layers stays in the core's own cache, and each weight that comes from the
# shared one serves as many tokens. From 96 to 256 times differed by one per cent (Zen 4).
PART = 96
LENGTH = 1  # of the C++ file's reasons to refuse a call
INTERFACE = 2  # of the library, raised when a call takes other things: an older one would read them as its own


class Shape(ctypes.Structure):
    """The struct of this name in the C++ file. Activations: 1 GELU by erf, 2 GELU by tanh, 3 tanh, 4 ReLU."""

    WHOLE = "layers hidden heads intermediate labels embedding words positions types first_position"
    _fields_ = [(name, ctypes.c_int32) for name in f"{WHOLE} activation head_activation".split()]
    _fields_ += [("epsilon", ctypes.c_float)]


def layout(shape: Shape) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a weights file, in the order in which the engine takes them.

    A Linear's weights are int8 from -64 to 64, `scale` one for each output; inputs are multiplied by `input_scale`
    before they are rounded to 8 bits. Row i of a table is `rows[i] * scales[i]`.
    """
    tensors: dict[str, tuple[type, tuple[int, ...]]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        tensors[f"{name}.weight"] = np.int8, (outputs, inputs)
        tensors[f"{name}.scale"] = tensors[f"{name}.bias"] = np.float32, (outputs,)
        tensors[f"{name}.input_scale"] = np.float32, (inputs,)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.bias"] = np.float32, (width,)

    for name, count in (("words", shape.words), ("positions", shape.positions), ("types", shape.types)):
        tensors[f"{name}.rows"], tensors[f"{name}.scales"] = (np.int8, (count, shape.embedding)), (np.float32, (count,))
    norm("norm", shape.embedding)
    if shape.embedding != shape.hidden:
        linear("project", shape.embedding, shape.hidden)
    for layer in range(shape.layers):
        linear(f"layers.{layer}.key_value", shape.hidden, 2 * shape.hidden)
        linear(f"layers.{layer}.query", shape.hidden, shape.hidden)
        linear(f"layers.{layer}.output", shape.hidden, shape.hidden)
        norm(f"layers.{layer}.attention_norm", shape.hidden)
        linear(f"layers.{layer}.up", shape.hidden, shape.intermediate)
        linear(f"layers.{layer}.down", shape.intermediate, shape.hidden)
        norm(f"layers.{layer}.norm", shape.hidden)
    linear("head", shape.hidden, shape.hidden)
    linear("classifier", shape.hidden, shape.labels)
    return tensors


def processor_flags() -> list[str]:
    """What this processor can do, as Linux names it; empty elsewhere. (py-cpuinfo takes a second for it.)"""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    return sorted(found[1].split()) if found else []


def read_weights(file: Path) -> tuple[Shape, list[np.ndarray]]:
    """Shape and tensors of a weights file. Raises ValueError unless it holds exactly what its shape asks for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            shape = Shape(**json.loads(weights.metadata()["shape"]))
            wanted = layout(shape)
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{file.name} is no weights file: {error}") from error
    if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise ValueError(f"{file.name} does not hold the tensors of its shape")
    return shape, [np.ascontiguousarray(tensors[name]) for name in wanted]


class Engine:
    """A compiled engine and its weights: logits of token ids that lie end to end, for any number of threads at once.

    Raises OSError for a library that cannot be opened, ValueError for weights that are no such file or not its own.
    """

    def __init__(self, library: Path, weights: Path):
        self.shape, tensors = read_weights(weights)
        self._library = ctypes.CDLL(str(library.resolve()))
        self._library.engine_load.restype = self._library.engine_new_workspace.restype = ctypes.c_void_p
        self._library.engine_new_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.engine_free_workspace.argtypes = self._library.engine_unload.argtypes = [ctypes.c_void_p]
        self._run = self._library.engine_logits
        self._run.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 2 + [ctypes.c_void_p]
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.ctypes.data for tensor in tensors))
        self._model = self._library.engine_load(ctypes.byref(self.shape), pointers)
        if not self._model:
            raise ValueError(f"{weights.name} is none that the engine can run")
        self._tables = tensors[:6]  # used where they lie
        self.longest = self.shape.positions - self.shape.first_position
        self._room = max(PART, self.longest)
        self._workspaces: queue.SimpleQueue = queue.SimpleQueue()

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [headlines, labels] float32 of int64 tokens [headlines, width].

        Without padding they are at most PART tokens, or one text.
        Raises LabError for ids the model does not know, and for texts without a token or with more than it can read.
        """
        ids, mask = (np.ascontiguousarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask"))
        types = np.ascontiguousarray(tokens["token_type_ids"], np.int64) if "token_type_ids" in tokens else None
        try:
            workspace = self._workspaces.get_nowait()
        except queue.Empty:
            workspace = self._library.engine_new_workspace(self._model, self._room)
            if not workspace:
                raise MemoryError from None
        logits = np.empty((len(ids), self.shape.labels), np.float32)
        pointers = [None if array is None else array.ctypes.data for array in (ids, types, mask)]
        refusal = self._run(self._model, workspace, *pointers, *ids.shape, logits.ctypes.data)
        self._workspaces.put(workspace)
        if refusal == LENGTH:
            lengths = np.count_nonzero(mask, axis=1)
            raise LabError(f"a text has {lengths.min()} or {lengths.max()} tokens, not 1 to {self.longest}")
        if refusal:
            words, kinds = self.shape.words, self.shape.types
            raise LabError(f"a token's id or type is not below {words} or {kinds}: another tokeniser's?")
        return logits

    def close(self) -> None:
        """Give back weights and workspaces; no call may be under way, and none may follow."""
        while not self._workspaces.empty():
            self._library.engine_free_workspace(self._workspaces.get())
        self._library.engine_unload(self._model)
        self._model = None


class Int8EngineBackend(Backend):
    """INT8 by code for this one processor."""

    device = "CPU"

    def __init__(self, artefact: Artefact, threads: int):
        check_processor(artefact)
        manifest = artefact.manifest
        try:
            self._engine = Engine(artefact.folder / manifest["compiled_for"]["library"], artefact.model_file)
        except (ValueError, OSError) as error:
            raise LabError(f"cannot open {artefact.folder} ({error}): run {artefact.rebuild_command}") from error
        self._check = OutputCheck(artefact)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence]: the same alone and in any batch."""
        if len(tokens["input_ids"]) == 1:
            return self._check(self._engine.logits(tokens))
        parts = in_parts(np.count_nonzero(tokens["attention_mask"], axis=1), self._threads)

        def run(part: slice) -> np.ndarray:
            return self._engine.logits({name: ids[part] for name, ids in tokens.items()})

        return self._check(np.concatenate(list(self._pool.map(run, parts) if self._pool else map(run, parts))))

    def close(self) -> None:
        """Give back the weights."""
        if self._pool:
            self._pool.shutdown()
        self._engine.close()


def in_parts(lengths: np.ndarray, threads: int) -> list[slice]:
    """Cut a batch into parts of at most PART tokens, or one text: as many for each thread, and about even."""
    total = int(lengths.sum())
    usual = max(PART - int(lengths.max()), PART // 2)  # a part may be a text longer than its share
    rounds = max(1, -(-total // (usual * threads)))
    share = total / (rounds * threads)
    parts: list[slice] = []
    start = held = seen = 0
    for index, length in enumerate(lengths.tolist()):
        full = held + length > PART or seen + length / 2 > share * (len(parts) + 1)
        if held and full:
            parts.append(slice(start, index))
            start, held = index, 0
        held += length
        seen += length
    return [*parts, slice(start, len(lengths))]


def check_processor(artefact: Artefact) -> None:
    """Raise LabError, before any compiled code is opened, unless this processor has all the flags it was built for."""
    wanted = artefact.manifest["compiled_for"]
    if wanted.get("interface") != INTERFACE:
        unrecorded = f"python lab04-torch.py --this-cpu --output {artefact.folder}"
        command = artefact.rebuild_command if "command" in artefact.manifest else unrecorded
        raise LabError(f"{artefact.folder} is of an older lab, which called its compiled code otherwise: run {command}")
    if missing := sorted(set(wanted["flags"]) - set(processor_flags())):
        needs = f"a processor with {' '.join(missing[:3])}"
        raise LabError(f"{artefact.folder} is compiled code that needs {needs}: run {artefact.rebuild_command} here")
