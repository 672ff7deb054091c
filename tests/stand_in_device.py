"""A stand-in for a CUDA device with TensorRT and PyCUDA: it runs engines with ONNX Runtime, on the CPU.

It exists to refuse what the real ones refuse and to be as lazy as they are: copies and launches happen when the stream
is synchronised, device memory starts as junk, shapes and addresses must be set, contexts must be current. Classes and
methods have the real names and argument names (tests/tensorrt_names.json); what begins with an underscore is ours.
It knows nothing of FP16 arithmetic on a GPU, of kernels or of speed.
"""

import enum
import importlib.machinery
import json
import random
import struct
import sys
import threading
import time
import types
from dataclasses import dataclass, field

import numpy as np

FIRST_ADDRESS = 0x7F00_0000_0000  # no address of this process: following it would crash, as on a GPU
PLAN = b"stand-in plan"


@dataclass
class Machine:
    """What the stand-in is, and what is allocated on it at the moment."""

    gpu: str = "Stand-in GPU"
    capability: tuple[int, int] = (8, 9)
    version: str = "11.4.0"
    memory_bytes: int = 1 << 32
    scratch_bytes: int = 1 << 20  # what an execution context takes of it
    devices: int = 1
    driver_too_old: bool = False  # for TensorRT's CUDA: its factories then return nothing
    newest_opset: int = 25
    build_error: str = ""  # what the builder logs instead of building
    input_order: tuple[str, ...] = ()  # the order in which engines list their inputs; the graph's if empty
    memory: dict[int, bytearray] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    stacks: threading.local = field(default_factory=threading.local)
    retained: int = 0
    builds: int = 0
    cache_hits: int = 0
    launches: list[tuple[int, int]] = field(default_factory=list)
    streams: dict = field(default_factory=dict)

    @property
    def current(self) -> list:
        """The stack of CUDA contexts of the thread that asks, as PyCUDA keeps one for each."""
        return vars(self.stacks).setdefault("contexts", [])

    def everything_freed(self) -> bool:
        return not (self.memory or self.pinned or self.current or self.retained)


machine = Machine()


def install(monkeypatch, **settings) -> Machine:
    """Put the stand-in in the place of `tensorrt` and `pycuda` for one test; returns its state."""
    global machine
    machine = Machine(**settings)
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__version__ = machine.version
    tensorrt.NetworkDefinitionCreationFlag = network_flags(machine.version)
    for item in TENSORRT:
        setattr(tensorrt, item.__name__, item)
    pycuda, driver = types.ModuleType("pycuda"), types.ModuleType("pycuda.driver")
    pycuda.VERSION_TEXT, pycuda.driver, pycuda.__path__ = "2026.1", driver, []
    for item in PYCUDA:
        setattr(driver, item.__name__, item)
    for module in (tensorrt, pycuda, driver):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)  # others look for installed libraries
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return machine


# --- TensorRT: enumerations -------------------------------------------------------------------------------


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64 = range(4)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class LayerType(enum.Enum):
    MATRIX_MULTIPLY, NORMALIZATION, ELEMENTWISE = range(3)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


def network_flags(version: str):
    """The flags' numbers moved between TensorRT 10 and 11."""
    return enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1 if version.startswith("10.") else 0})


ONNX_TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 6: DataType.INT32, 7: DataType.INT64}


def nptype(trt_type):
    return {
        DataType.FLOAT: np.float32,
        DataType.HALF: np.float16,
        DataType.INT32: np.int32,
        DataType.INT64: np.int64,
    }[trt_type]


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity, msg): ...


class IProgressMonitor:
    def phase_start(self, phase_name, parent_phase, num_steps): ...
    def step_complete(self, phase_name, step): ...
    def phase_finish(self, phase_name): ...


# --- TensorRT: building -----------------------------------------------------------------------------------


def refuse_old_driver(logger) -> None:
    if machine.driver_too_old:
        logger.log(ILogger.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Builder:
    def __init__(self, logger):
        refuse_old_driver(logger)
        self._logger = logger

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        machine.builds += 1
        if machine.build_error or not network._strongly_typed or len(config._profiles) != 1:
            self._logger.log(ILogger.ERROR, machine.build_error or "no strongly typed network with a profile")
            return None
        if set(config._profiles[0]._shapes) != {tensor.name for tensor in network._inputs}:
            self._logger.log(ILogger.ERROR, "an input has no profile")
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        if not all(monitor.step_complete("Building", step) for step in range(2)):
            return None
        monitor.phase_finish("Building")
        config._cache._data = b"timings of " + machine.gpu.encode()
        header = {
            "machine": [machine.gpu, machine.capability, machine.version],
            "profile": config._profiles[0]._shapes,
            "graph_bytes": len(network._graph),
        }
        text = json.dumps(header).encode()
        return IHostMemory(PLAN + struct.pack("<I", len(text)) + text + network._graph)


class IHostMemory(bytes):
    """The real one gives its bytes by the buffer protocol only."""


class INetworkDefinition:
    def __init__(self, flags):
        strongly_typed = network_flags(machine.version).STRONGLY_TYPED
        # TensorRT 11 knows no other networks.
        self._strongly_typed = bool(flags & 1 << strongly_typed) or not machine.version.startswith("10.")
        self._inputs, self._layers, self._graph = [], [], b""

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_layers(self):
        return len(self._layers)

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]


class ITensor:
    def __init__(self, name, dtype):
        self._name, self._dtype = name, dtype

    name = property(lambda self: self._name)
    dtype = property(lambda self: self._dtype)


class ILayer:
    def __init__(self, type, dtype):
        self._type, self._dtype = type, dtype

    type = property(lambda self: self._type)

    def get_output(self, index):
        return ITensor("", self._dtype)


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def parse_from_file(self, model):
        import onnx

        graph = onnx.load(model)
        opset = max(item.version for item in graph.opset_import if item.domain in ("", "ai.onnx"))
        if opset > machine.newest_opset:
            self._errors = [ParserError(f"opset {opset} is not supported"), ParserError("and neither is its node 7")]
            return False
        inferred = onnx.shape_inference.infer_shapes(graph).graph
        types_of = {item.name: item.type.tensor_type.elem_type for item in [*inferred.value_info, *inferred.output]}
        kinds = {
            "MatMul": LayerType.MATRIX_MULTIPLY,
            "Gemm": LayerType.MATRIX_MULTIPLY,
            "LayerNormalization": LayerType.NORMALIZATION,
        }
        self._network._layers = [
            ILayer(kinds.get(node.op_type, LayerType.ELEMENTWISE), ONNX_TYPES.get(types_of.get(node.output[0])))
            for node in graph.graph.node
        ]
        self._network._inputs = [
            ITensor(item.name, ONNX_TYPES[item.type.tensor_type.elem_type]) for item in graph.graph.input
        ]
        self._network._graph = graph.SerializeToString()
        return True


class ParserError:
    def __init__(self, text):
        self._text = text

    def desc(self):
        return self._text

    def __str__(self):
        return f"In node 3 (importModel): {self._text}"


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self):
        self._profiles, self._cache, self._pools, self._monitor = [], ITimingCache(b""), {}, None

    def _set_monitor(self, monitor):
        self._monitor = monitor

    progress_monitor = property(lambda self: self._monitor, _set_monitor)

    def set_memory_pool_limit(self, pool, pool_size):
        self._pools[pool] = pool_size

    def add_optimization_profile(self, profile):
        for least, best, most in profile._shapes.values():
            if not all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        fits = cache._data in (b"", b"timings of " + machine.gpu.encode())
        if fits or ignore_mismatch:
            self._cache = cache
            machine.cache_hits += bool(cache._data)
        return fits

    def get_timing_cache(self):
        return self._cache


class ITimingCache:
    def __init__(self, data):
        self._data = data

    def serialize(self):
        return IHostMemory(self._data)


# --- TensorRT: running ------------------------------------------------------------------------------------


class Runtime:
    def __init__(self, logger):
        refuse_old_driver(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        plan = bytes(serialized_engine)
        try:
            assert plan.startswith(PLAN), "the plan has no magic number"
            start = len(PLAN) + 4
            (length,) = struct.unpack("<I", plan[len(PLAN) : start])
            header, graph = json.loads(plan[start : start + length]), plan[start + length :]
            assert len(graph) == header["graph_bytes"], "the plan is truncated"
            assert header["machine"] == [machine.gpu, list(machine.capability), machine.version], "another machine's"
        except (AssertionError, ValueError, struct.error) as error:
            self._logger.log(ILogger.ERROR, f"deserialisation failed: {error}")
            return None
        return ICudaEngine(graph, header["profile"], self._logger)


class ICudaEngine:
    def __init__(self, graph, profile, logger):
        import onnx
        import onnxruntime

        self._logger, self._profile = logger, profile
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        loaded = onnx.load_model_from_string(graph).graph
        items = {item.name: item.type.tensor_type for item in [*loaded.input, *loaded.output]}
        order = [*machine.input_order, *(name for name in items if name not in machine.input_order)]
        self._types = {name: ONNX_TYPES[items[name].elem_type] for name in order}
        self._outputs = [item.name for item in loaded.output]
        self._width = items[self._outputs[0]].shape.dim[-1].dim_value

    @property
    def num_io_tensors(self):
        return len(self._types)

    def get_tensor_name(self, index):
        return list(self._types)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name in self._outputs else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return self._types[name]

    def get_tensor_profile_shape(self, name, profile_index):
        return self._profile[name]

    def create_execution_context(self):
        if not machine.current:
            self._logger.log(ILogger.ERROR, "no CUDA context is current")
            return None
        if machine.scratch_bytes > machine.memory_bytes:
            self._logger.log(ILogger.ERROR, "Requested amount of GPU memory could not be allocated: out of memory")
            return None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        least, _, most = self._engine._profile[name]
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self):
        if len(set(self._shapes.values())) > 1:
            raise SystemError("TensorRT before 10.13 ends the process here")
        return [name for name in self._engine._profile if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._engine._outputs:
            batch = next(iter(self._shapes.values()), (-1,))[0]
            return (batch, self._engine._width)
        return self._shapes.get(name, (-1, -1))

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return name in self._engine._types

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        if set(self._addresses) != set(engine._types) or self.infer_shapes():
            engine._logger.log(ILogger.ERROR, "not every tensor has an address and a shape")
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)

        def run():
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(nptype(engine._types[name]))
                size = int(np.prod(shape)) * dtype.itemsize
                feeds[name] = np.frombuffer(read(addresses[name], size), dtype).reshape(shape)
            try:
                [result] = engine._session.run(None, feeds)
            except Exception as error:  # ids outside the vocabulary read beyond the embedding table
                raise LaunchError(f"an illegal memory access was encountered: {error}") from error
            write(addresses[engine._outputs[0]], result.tobytes())
            machine.launches.append(result.shape)

        machine.streams[stream_handle]._queue.append(run)
        return True


# --- PyCUDA -----------------------------------------------------------------------------------------------


class Error(Exception):
    """PyCUDA's exceptions are no built-in ones, whatever they are called."""


class MemoryError(Error):  # noqa: A001
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


def need_context() -> None:
    if not machine.current:
        raise LogicError("no currently active context?")


def block_of(address: int, size: int) -> bytearray:
    block = machine.memory.get(address)
    if block is None or size > len(block):
        raise LaunchError("an illegal memory access was encountered")
    return block


def read(address: int, size: int) -> bytes:
    return bytes(block_of(address, size)[:size])


def write(address: int, data: bytes) -> None:
    block_of(address, len(data))[: len(data)] = data


def init(flags=0):
    if machine.devices < 0:
        raise Error("cuInit failed: no CUDA-capable device is detected")


def get_driver_version():
    return 13000


class Device:
    def __init__(self, arg2):
        if arg2 >= machine.devices:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")

    @staticmethod
    def count():
        return machine.devices

    def name(self):
        return machine.gpu

    def compute_capability(self):
        return machine.capability

    def retain_primary_context(self):
        machine.retained += 1
        return Context()


class Context:
    def __init__(self):
        self._valid = True

    def push(self):
        if not self._valid:
            raise LogicError("cuCtxPushCurrent failed: context is destroyed")
        machine.current.append(self)

    @staticmethod
    def pop():
        if not machine.current:
            raise LogicError("cannot pop context from empty stack")
        machine.current.pop()

    @staticmethod
    def get_current():
        return machine.current[-1] if machine.current else None

    def detach(self):
        if not self._valid:
            raise LogicError("cannot detach from invalid context")
        self._valid = False
        machine.retained -= 1


class Stream:
    def __init__(self):
        need_context()
        self._queue = []
        self._handle = FIRST_ADDRESS - 1 - len(machine.streams)
        machine.streams[self._handle] = self

    handle = property(lambda self: self._handle)

    def synchronize(self):
        need_context()
        queue, self._queue = self._queue, []
        for work in queue:
            work()


class Event:
    def __init__(self):
        need_context()
        self._time = None

    def record(self, stream):
        def note():
            self._time = time.perf_counter()

        stream._queue.append(note)

    def time_since(self, arg2):
        if self._time is None or arg2._time is None:
            raise LogicError("cuEventElapsedTime failed: device not ready")
        return (self._time - arg2._time) * 1e3


class DeviceAllocation:
    def __init__(self, address):
        self._address = address

    def __int__(self):
        return self._address

    def free(self):
        need_context()
        if self._address not in machine.memory:
            raise LogicError("cuMemFree failed: invalid argument")
        del machine.memory[self._address]


def mem_alloc(arg1):
    need_context()
    if sum(map(len, machine.memory.values())) + arg1 > machine.memory_bytes:
        raise MemoryError("cuMemAlloc failed: out of memory")
    address = FIRST_ADDRESS + random.randrange(1 << 20) * (1 << 20)
    while address in machine.memory:
        address += 1 << 20
    machine.memory[address] = bytearray(random.randbytes(arg1))
    return DeviceAllocation(address)


class PagelockedHostAllocation:
    def __init__(self, size, dtype):
        self._bytes = bytearray(random.randbytes(size * dtype.itemsize))
        address = np.frombuffer(self._bytes, np.uint8).__array_interface__["data"]
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": dtype.str, "data": address}
        machine.pinned.add(id(self))

    def free(self):
        need_context()
        machine.pinned.remove(id(self))


def pagelocked_empty(shape, dtype):
    need_context()
    return np.asarray(PagelockedHostAllocation(shape, np.dtype(dtype)))


def contiguous(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise ValueError("ndarray is not contiguous")
    return array


def memcpy_htod_async(dest, src, stream):
    need_context()
    contiguous(src)
    # What the host buffer holds when the copy happens, not when it is asked for.
    stream._queue.append(lambda: write(int(dest), src.tobytes()))


def memcpy_dtoh_async(dest, src, stream):
    need_context()
    contiguous(dest)

    def copy():
        dest[...] = np.frombuffer(read(int(src), dest.nbytes), dest.dtype).reshape(dest.shape)

    stream._queue.append(copy)


TENSORRT = [
    DataType, TensorIOMode, LayerType, MemoryPoolType, nptype, ILogger, IProgressMonitor, Builder, IHostMemory,
    INetworkDefinition, ITensor, ILayer, OnnxParser, ParserError, IOptimizationProfile, IBuilderConfig, ITimingCache,
    Runtime, ICudaEngine, IExecutionContext,
]  # fmt: skip
PYCUDA = [
    Error, MemoryError, LogicError, LaunchError, init, get_driver_version, Device, Context, Stream, Event,
    DeviceAllocation, mem_alloc, PagelockedHostAllocation, pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async,
]  # fmt: skip
