"""PyTorch INT8 compiled for the processor it stands on, `lab04-torch.py --this-cpu`: build it, and open it.

torch.export and AOTInductor, which PyTorch recommends in TorchScript's place (pytorch/pytorch#184982), turn the network
into C++ around this processor's INT8 instructions: the same rounded weights, the same activations.
"""

import shutil
import tempfile
from pathlib import Path

from lab04 import LabError
from lab04.quantise import preparation
from lab04.quantise.torch_int8 import give_logits, looked_up
from lab04.read.classifier import Classifier
from lab04.run.this_cpu import describe

MODEL_FILE = "model_int8.pt2"
INSTRUCTIONS = {"avx512_vnni", "amx_int8"}  # without either, the portable artefact is the faster one
SETTINGS = {
    "freezing": True,  # packs the weights while compiling
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",  # oneDNN's products take twice as long for one headline
    "realize_opcount_threshold": 4,  # GELU is else computed twice: to find its range, and to quantise it
    "aot_inductor.precompile_headers": False,  # else they stay behind in the temporary folder
    "cpp.dynamic_threads": True,  # as many threads as whoever opens it asks for
}


def check_here() -> None:
    """Raise LabError unless this machine can compile code that is worth it."""
    if not INSTRUCTIONS & set(describe()["flags"]):
        raise LabError("--this-cpu needs a processor with AVX512-VNNI or AMX: on others the plain artefact is faster")
    if not shutil.which("g++"):
        raise LabError("--this-cpu needs a C++ compiler: sudo apt install g++")


def compile_network(prepared, fp32: Classifier) -> bytes:
    """The archive of a prepared network, right for any batch and length."""
    import torch
    from torch._inductor.utils import fresh_cache

    network, inputs = give_logits(rewrite(prepared, looked_up(prepared), preparation.STEPS), fp32)
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with torch.no_grad(), fresh_cache(), tempfile.TemporaryDirectory() as scratch:
        exported = torch.export.export(network, inputs, dynamic_shapes=((free,) * len(inputs),))
        archive = Path(scratch) / MODEL_FILE
        torch._inductor.aoti_compile_and_package(exported, package_path=str(archive), inductor_configs=SETTINGS)
        return archive.read_bytes()


def rewrite(network, embeddings: list[str], steps: int):
    """Write products, `embeddings` and GELU of a network in the forms that AOTInductor makes INT8 code of.

    A row's largest weight is `steps` steps, as `preparation` rounded it; embeddings get 8 bits a row.
    """
    import torch
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers the operators below
    from transformers.activations import GELUActivation

    decomposed = torch.ops.quantized_decomposed

    class Product(torch.nn.Module):
        def __init__(self, exact):
            super().__init__()
            self.scale = exact.weight.detach().abs().amax(1).clamp(min=1e-12) / steps
            self.weight = torch.round(exact.weight.detach() / self.scale[:, None]).to(torch.int8)
            self.zero, self.bias = torch.zeros_like(self.scale, dtype=torch.int64), exact.bias

        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])  # with more dimensions it would be oneDNN's slow path
            low, high = rows.amin().clamp(max=0), rows.amax().clamp(min=0)
            # By hand: choose_qparams gives a double, which the compiled product would store into a float.
            scale = ((high - low) / 255).clamp(min=1e-8)
            given = (scale, torch.round(-low / scale).clamp(0, 255).to(torch.int64), 0, 255, torch.uint8)
            rows = decomposed.dequantize_per_tensor.tensor(decomposed.quantize_per_tensor.tensor(rows, *given), *given)
            weight = decomposed.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
            return torch.nn.functional.linear(rows, weight, self.bias).reshape(*x.shape[:-1], -1)

    class Lookup(torch.nn.Module):
        def __init__(self, exact):
            super().__init__()
            self.scale = exact.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            self.rows = torch.round(exact.weight.detach() / self.scale).to(torch.int8)

        def forward(self, ids):
            return self.rows[ids] * self.scale[ids]

    class TanhGelu(torch.nn.Module):  # by way of the sigmoid, whose vector code is quicker than erf's
        def __init__(self, _exact):
            super().__init__()

        def forward(self, x):
            return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))

    for name, module in list(network.named_modules()):
        kind = Lookup if name in embeddings else {torch.nn.Linear: Product, GELUActivation: TanhGelu}.get(type(module))
        if kind:
            network.set_submodule(name, kind(module))
    return network
