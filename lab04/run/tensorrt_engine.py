"""The TensorRT runtime: an engine behind `logits(tokens)`, on PyCUDA.

Importing this module needs neither library; opening an engine does. What is not here (driver, TensorRT, PyCUDA, the
GPU an engine was built for) is `Unavailable`, in one line.
"""

import contextlib
import time
import weakref

import numpy as np

from lab04 import LabError, one_line, said
from lab04.artefact import Artefact, Tokens
from lab04.run.backend import Backend, OutputCheck, Unavailable

INSTALL = "pip install -r requirements/gpu.txt"
REBUILD = "run python lab04-nvidia.py"


class TensorRTBackend(Backend):
    """A TensorRT engine on the first CUDA device. Open and close it in one thread; a call, one at a time, may come from
    any, as it makes the context current for its own.

    After each call `compute_ms` is the GPU time of the network alone (CUDA events) and `end_to_end_ms` the time of the
    whole call with its copies. Replaying a CUDA graph per shape is left out: whether it pays was never measured.
    """

    def __init__(self, artefact: Artefact, threads: int = 1):
        facts = artefact.manifest["engine"]
        if facts is None:
            raise Unavailable(f"no engine in {artefact.folder.name}: on a machine with an NVIDIA GPU {REBUILD}")
        trt, cuda = import_tensorrt(), import_pycuda()
        machine = describe_machine(trt, cuda)
        if any(facts[key] != machine[key] for key in machine):
            raise Unavailable(
                f"the engine is for {facts['gpu']} and TensorRT {facts['tensorrt']}, this is {machine['gpu']} "
                f"and TensorRT {machine['tensorrt']}: {REBUILD}"
            )
        self._trt, self._artefact = trt, artefact
        self._check = OutputCheck(artefact)
        self.device = machine["gpu"]
        self.compute_ms = self.end_to_end_ms = float("nan")
        self._gpu = Holdings(cuda)
        # Called by close() or by the garbage collector, and at the latest when Python ends.
        self._close = weakref.finalize(self, self._gpu.close)
        try:
            with self._gpu.active():
                self._load()
        except BaseException:
            with contextlib.suppress(LabError):  # the first error is the one to report
                self.close()
            raise

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Logits [batch, labels] float32 of int64 tokens [batch, sequence].

        A batch beyond the engine's maximum runs in parts. Raises LabError for a length outside its profile.
        """
        if not self._close.alive:
            raise LabError("this TensorRT engine is closed")
        shape = self._request_shape(tokens)
        started, self.compute_ms = time.perf_counter(), 0.0
        most = self._largest[0]
        with self._gpu.active():
            parts = [
                self._run({name: tokens[name][first : first + most] for name in self._inputs})
                for first in range(0, shape[0], most)
            ]
        self.end_to_end_ms = (time.perf_counter() - started) * 1e3
        return self._check(np.concatenate(parts))

    def close(self) -> None:
        """Free engine, buffers and stream, and give the CUDA context back. May be called twice."""
        self._close()

    def _load(self) -> None:
        """Deserialise the engine and allocate every tensor once, for the largest shape of its profile."""
        trt, gpu = self._trt, self._gpu
        gpu.log = make_logger(trt)
        gpu.runtime = create(trt.Runtime, gpu.log)
        gpu.engine = gpu.runtime.deserialize_cuda_engine(self._artefact.model_file.read_bytes())
        if gpu.engine is None:
            raise Unavailable(f"TensorRT refuses the engine ({reason(gpu.log)}): {REBUILD}")
        gpu.context = gpu.engine.create_execution_context()
        if gpu.context is None:
            raise Unavailable(f"TensorRT cannot run the engine: {reason(gpu.log)}")

        names = [gpu.engine.get_tensor_name(index) for index in range(gpu.engine.num_io_tensors)]
        self._inputs = [name for name in names if gpu.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in self._inputs]
        wanted = self._artefact.manifest["tokenizer"]["inputs"]
        if set(self._inputs) != set(wanted) or len(outputs) != 1:
            raise LabError(f"the engine has tensors {names}, the tokeniser gives {wanted}: {REBUILD}")
        self._output = outputs[0]
        shapes = gpu.engine.get_tensor_profile_shape(self._inputs[0], 0)
        self._smallest, _, self._largest = (tuple(shape) for shape in shapes)

        self._set_shapes(self._largest)
        width = tuple(gpu.context.get_tensor_shape(self._output))[-1]
        if width != len(self._artefact.labels):
            raise LabError(f"the engine gives {width} scores for {len(self._artefact.labels)} labels: {REBUILD}")
        for name in names:
            # int64 or int32, float32 or float16: the engine says, and the buffer has to be of exactly that.
            dtype = np.dtype(trt.nptype(gpu.engine.get_tensor_dtype(name)))
            gpu.allocate(name, int(np.prod(tuple(gpu.context.get_tensor_shape(name)))), dtype)
            gpu.context.set_tensor_address(name, int(gpu.device[name]))

    def _request_shape(self, tokens: Tokens) -> tuple[int, int]:
        """The common shape of a request; LabError if an input is missing, shapes differ or the profile forbids it."""
        missing = [name for name in self._inputs if name not in tokens]
        if missing:
            raise LabError(f"the request lacks {', '.join(missing)}, which the engine needs")
        # Compared here because TensorRT before 10.13 crashes the process when inputs disagree.
        shapes = {tokens[name].shape for name in self._inputs}
        if len(shapes) > 1 or len(shape := shapes.pop()) != 2:
            raise LabError("the request's inputs are not all of one shape [batch, sequence]")
        least, most = self._smallest, self._largest
        last_part = shape[0] % most[0] or most[0]
        if not (shape[0] and least[0] <= last_part and least[1] <= shape[1] <= most[1]):
            raise LabError(
                f"a request of {shape[0]}x{shape[1]} (batch x tokens) is outside the engine's "
                f"{least[0]}x{least[1]} to {most[0]}x{most[1]}: build it with another --min or --max"
            )
        return shape

    def _set_shapes(self, shape: tuple[int, ...]) -> None:
        """Tell TensorRT the shape of every input, and make sure that it needs to know nothing more."""
        accepted = [self._gpu.context.set_input_shape(name, shape) for name in self._inputs]
        if not all(accepted) or self._gpu.context.infer_shapes():
            raise LabError(f"TensorRT refuses inputs of shape {shape}: {reason(self._gpu.log)}")

    def _run(self, inputs: Tokens) -> np.ndarray:
        """One launch within the profile: copy in, compute, copy out, wait; a float32 copy of the result."""
        gpu, stream = self._gpu, self._gpu.stream
        self._set_shapes(inputs[self._inputs[0]].shape)
        for name, rows in inputs.items():
            # The start of the flat buffer: a corner of a two-dimensional one would not be contiguous.
            staged = gpu.host[name][: rows.size].reshape(rows.shape)
            np.copyto(staged, rows, casting="same_kind")
            gpu.cuda.memcpy_htod_async(gpu.device[name], staged, stream)
        gpu.start.record(stream)
        if not gpu.context.execute_async_v3(stream.handle):
            raise LabError(f"TensorRT could not run the engine: {reason(gpu.log)}")
        gpu.end.record(stream)
        shape = tuple(gpu.context.get_tensor_shape(self._output))
        result = gpu.host[self._output][: int(np.prod(shape))].reshape(shape)
        gpu.cuda.memcpy_dtoh_async(result, gpu.device[self._output], stream)
        stream.synchronize()
        self.compute_ms += gpu.end.time_since(gpu.start)
        return result.astype(np.float32)  # a copy: the next launch overwrites the buffer


class Holdings:
    """All that one engine holds on the GPU, in the device's primary context: the one PyTorch in this process uses too.

    The context is current only inside `active()`, so the caller's thread keeps whatever context it had.
    """

    def __init__(self, cuda):
        self.cuda = cuda
        self.log = self.runtime = self.engine = self.context = None
        self.host, self.device = {}, {}  # a page-locked and a device buffer for every tensor
        with cuda_errors(cuda):
            self._primary = cuda.Device(0).retain_primary_context()
        try:
            with self.active():
                self.stream = cuda.Stream()  # on the default one TensorRT would synchronise the whole device
                self.start, self.end = cuda.Event(), cuda.Event()
        except BaseException:
            self._primary.detach()
            raise

    @contextlib.contextmanager
    def active(self):
        """Make the context current for a block, and the former one again after it, whatever happens."""
        with cuda_errors(self.cuda):
            self._primary.push()
            try:
                yield
            finally:
                self._primary.pop()

    def allocate(self, name: str, elements: int, dtype: np.dtype) -> None:
        """Make the two buffers of a tensor. Copies are asynchronous from page-locked memory only."""
        self.host[name] = self.cuda.pagelocked_empty(elements, dtype)
        self.device[name] = self.cuda.mem_alloc(elements * dtype.itemsize)

    def close(self) -> None:
        """Free everything, dependants before what they depend on, and release the primary context."""
        try:
            with self.active():
                self.context = self.engine = self.runtime = self.log = None
                for buffer in [*self.device.values(), *(array.base for array in self.host.values())]:
                    buffer.free()
                self.host, self.device = {}, {}
                self.stream = self.start = self.end = None
        finally:
            # Left to its destructor, PyCUDA would take the primary context for one of its own and not release it.
            # (PyCUDA 2026.1 leaves the driver's stack one deeper here: with the primary context, as PyTorch has it.)
            self._primary.detach()


def import_tensorrt():
    """The `tensorrt` module. Raises Unavailable if it is not installed or its libraries do not load."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        raise Unavailable(f"TensorRT is not installed ({INSTALL})") from error
    except (ImportError, OSError) as error:
        raise Unavailable(f"TensorRT does not load ({said(error)})") from error
    return tensorrt


def import_pycuda():
    """`pycuda.driver`, initialised. Raises Unavailable without PyCUDA, a driver or a CUDA device."""
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError as error:
        raise Unavailable(f"PyCUDA is not installed ({INSTALL})") from error
    except (ImportError, OSError) as error:
        if "libcuda" in str(error) or "nvcuda" in str(error):
            raise Unavailable("no NVIDIA driver on this machine (libcuda does not load)") from error
        raise Unavailable(f"PyCUDA does not load ({said(error)}): build it again, see docs/tensorrt.md") from error
    try:
        cuda.init()
        devices = cuda.Device.count()
    except cuda.Error as error:
        raise Unavailable(f"the NVIDIA driver finds no usable GPU ({said(error)})") from error
    if not devices:
        raise Unavailable("the NVIDIA driver finds no GPU")
    return cuda


def describe_machine(trt, cuda) -> dict[str, str]:
    """What an engine is tied to: GPU name, its compute capability, TensorRT's version."""
    device = cuda.Device(0)
    major, minor = device.compute_capability()
    return {"gpu": device.name(), "compute_capability": f"{major}.{minor}", "tensorrt": trt.__version__}


def make_logger(trt):
    """A TensorRT logger that keeps the errors, for our one line, and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = []

        def log(self, severity, msg):
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)

    return Log()


def create(kind, log):
    """A `trt.Builder` or `trt.Runtime`. Raises Unavailable if TensorRT cannot start on this machine."""
    try:
        return kind(log)
    except TypeError as error:  # what the bindings make of a factory that returned nothing
        raise Unavailable(f"TensorRT cannot start: {reason(log)}") from error


def reason(log) -> str:
    """One line on why TensorRT failed, from the errors it logged."""
    text = " ".join(log.errors)
    if "error: 35" in text or "driver version is insufficient" in text:  # cudaErrorInsufficientDriver
        return "the NVIDIA driver is older than TensorRT's CUDA: update the driver, or install tensorrt-cu12"
    if "out of memory" in text.lower() or "outofmemory" in text.lower():
        return "out of GPU memory: give a smaller --max or --workspace-mb, or close other programs"
    return one_line(log.errors[-1]) if log.errors else "it gave no reason"


@contextlib.contextmanager
def cuda_errors(cuda):
    """Turn PyCUDA's exceptions into one line. Its classes are its own: its RuntimeError is not the built-in one."""
    try:
        yield
    except cuda.MemoryError as error:
        raise Unavailable("out of GPU memory: give a smaller --max, or close other programs") from error
    except cuda.Error as error:
        raise LabError(f"CUDA failed ({said(error)}): run python lab04-nvidia.py --check") from error
