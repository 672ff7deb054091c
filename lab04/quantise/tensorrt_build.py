"""The TensorRT builder: an FP16 ONNX graph to an engine. One code path for TensorRT 10 and 11.

Only `lab04-nvidia.py` imports this module; `tensorrt_engine.py` runs what it builds.
"""

import sys
from pathlib import Path

from lab04 import LabError, one_line
from lab04.run.tensorrt_engine import (
    create,
    describe_machine,
    import_pycuda,
    import_tensorrt,
    make_logger,
    reason,
)

Profile = dict[str, tuple[int, int]]  # min, opt and max shape of every input: [batch, sequence]


def build(
    graph: Path, output: Path, inputs: list[str], profile: Profile, cache: Path, workspace_mb: int | None
) -> dict:
    """Build the engine of an FP16 ONNX graph. Returns what it is tied to, for the manifest.

    cache: TensorRT's timing cache, read and written; workspace_mb: GPU memory the build may use, None for all.
    Raises Unavailable if TensorRT, PyCUDA or a GPU is missing, LabError if the build fails.
    """
    trt, cuda = import_tensorrt(), import_pycuda()
    machine = describe_machine(trt, cuda)
    log = make_logger(trt)
    builder = create(trt.Builder, log)
    network, _parser = parse(trt, builder, graph, log)  # the parser owns the network's weights
    check_network(trt, network, inputs)
    config = configure(builder, profile, inputs)
    if workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb * 10**6)
    load_timing_cache(config, cache)
    config.progress_monitor = monitor = make_monitor(trt)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise LabError(f"TensorRT built no engine: {reason(log)}")
    output.write_bytes(plan)
    cache.write_bytes(config.get_timing_cache().serialize())
    return {**machine, "profile": profile}


def parse(trt, builder, graph: Path, log):
    """A strongly typed network of an ONNX graph, and the parser that must outlive it. Prints all parser errors."""
    # The member, not its number: TensorRT 11 counts these flags anew.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        print(*errors, sep="\n", file=sys.stderr)
        cause = one_line(errors[0].desc()) if errors else reason(log)
        raise LabError(f"TensorRT {trt.__version__} cannot read the graph ({cause}): install a newer TensorRT")
    return network, parser


def check_network(trt, network, inputs: list[str]) -> None:
    """Raise LabError unless the inputs are the tokeniser's, every matrix product is FP16 and every LayerNorm FP32.

    Without this an FP32 graph would build an FP32 engine, and nobody would notice (roboflow/rf-detr#1453).
    """
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != set(inputs):
        raise LabError(f"the graph has inputs {sorted(names)}, the tokeniser gives {sorted(inputs)}")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for kind, dtype, what in (
        (trt.LayerType.MATRIX_MULTIPLY, trt.DataType.HALF, "matrix products in FP16"),
        (trt.LayerType.NORMALIZATION, trt.DataType.FLOAT, "LayerNorms in FP32"),
    ):
        found = [layer.get_output(0).dtype == dtype for layer in layers if layer.type == kind]
        if not found or not all(found):
            raise LabError(f"the network has {sum(found)} of {len(found)} {what}: the FP16 conversion failed")
        print(f"   {len(found)} {what}")


def configure(builder, profile: Profile, inputs: list[str]):
    """A builder configuration with one optimisation profile, the same for every input."""
    config = builder.create_builder_config()
    optimisation = builder.create_optimization_profile()
    for name in inputs:
        optimisation.set_shape(name, profile["min"], profile["opt"], profile["max"])
    if config.add_optimization_profile(optimisation) < 0:
        raise LabError(f"TensorRT refuses the optimisation profile {profile}")
    return config


def load_timing_cache(config, path: Path) -> None:
    """Give a build what earlier builds measured; an empty cache if there is none, or if it is another machine's."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def make_monitor(trt):
    """A progress monitor that shows the build's phase on a terminal and lets Ctrl-C stop the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.interrupted = False
            self.steps = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name, step):
            try:
                if sys.stdout.isatty():
                    print(f"\r   {phase_name} {step}/{self.steps.get(phase_name, '?')}\033[K", end="", flush=True)
            except KeyboardInterrupt:  # an exception must not pass through TensorRT; False makes it stop
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name):
            if self.steps.pop(phase_name, None) and not self.steps and sys.stdout.isatty():
                print("\r\033[K", end="")

    return Monitor()
