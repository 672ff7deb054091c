"""PyTorch INT8, dynamic or static: quantise a prepared network, and freeze it to TorchScript."""

import copy
import platform
import warnings

from lab04 import LabError
from lab04.quantise import preparation
from lab04.read.classifier import Classifier
from lab04.run import runtimes

MODEL_FILE = "model_int8.pt"


def choose_engine(static: bool = False) -> str:
    """Select the kernel library as opening the artefact does. Raises LabError if this PyTorch has none."""
    import torch

    engine = runtimes.quantised_engine(torch.backends.quantized.supported_engines, platform.machine(), static)
    torch.backends.quantized.engine = engine
    return engine


def quantise(network, static: bool = False):
    """A copy of a classifier with rounded weights (`lab04.preparation`) in INT8 Linear and 8-bit Embedding.

    `static`: with the `input_range` that preparation noted, else with each call's own.

    PyTorch's own dynamic Linear keeps 8-bit weights from saturating on CPUs without VNNI by giving the activations
    7 bits. They carry most of the error, so here the weights have the 7 and the activations all 8.
    """
    import torch
    from torch.ao import quantization

    class DynamicLinear(torch.ao.nn.quantized.dynamic.Linear):
        """Dynamic INT8 Linear with 8-bit activations."""

        def forward(self, x):
            return torch.ops.quantized.linear_dynamic(x, self._packed_params._packed_params, reduce_range=False)

    class StaticLinear(torch.ao.nn.quantized.dynamic.Linear):
        """INT8 Linear whose input has a constant scale and zero point."""

        def forward(self, x):
            product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            return product(x, self.scale, self.zero_point, self._packed_params._packed_params)

    class ByteEmbedding(torch.ao.nn.quantized.Embedding):
        """8-bit Embedding that also takes expanded indices, such as the token types RoBERTa fills in by itself."""

        def forward(self, indices):
            return super().forward(indices.contiguous())

    weights = quantization.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-preparation.STEPS,
        quant_max=preparation.STEPS,
    )
    recipe: dict = {
        torch.nn.Linear: quantization.QConfig(activation=quantization.default_dynamic_quant_observer, weight=weights),
        **dict.fromkeys(looked_up(network), quantization.float_qparams_weight_only_qconfig),
    }
    with warnings.catch_warnings():
        # torch.ao is deprecated for torchao, whose dynamic INT8 is slower than FP32 on a CPU (pytorch/ao#4365).
        warnings.simplefilter("ignore")
        quantised = quantization.quantize_dynamic(copy.deepcopy(network), recipe)
    replacements = {torch.ao.nn.quantized.dynamic.Linear: DynamicLinear, torch.ao.nn.quantized.Embedding: ByteEmbedding}
    prepared = dict(network.named_modules())
    for name, module in quantised.named_modules():
        module.__class__ = replacements.get(type(module), type(module))
        given = getattr(prepared.get(name), "input_range", None)
        if static and given:  # a Linear that no headline reaches has none, and is in no trace
            module.__class__ = StaticLinear
            module.scale, module.zero_point = preparation.scale_and_zero_point(*given)
    return quantised


def looked_up(network) -> list[str]:
    """Names of the embeddings that a network only looks rows up in; DeBERTa also multiplies a whole table."""
    import torch

    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Embedding)
    ]
    with torch.inference_mode():
        network(input_ids=torch.tensor([[0, 1]]))
    for hook in hooks:
        hook.remove()
    return names


def give_logits(quantised, fp32: Classifier) -> tuple:
    """The network as token tensors in, logits out, and an example of them.

    The example has two rows of different length: a single row would fix the batch size and drop the mask.
    """
    import torch

    class Logits(torch.nn.Module):
        """Neither TorchScript nor compiled code knows `transformers` output classes."""

        def __init__(self):
            super().__init__()
            self.network = quantised

        def forward(self, *inputs):
            return self.network(**dict(zip(fp32.input_names, inputs, strict=True))).logits

    example = fp32.encode(["A headline", "Another and longer headline"])
    return Logits().eval(), tuple(example[name] for name in fp32.input_names)


def freeze(quantised, fp32: Classifier) -> bytes:
    """The archive of a quantised network in frozen TorchScript, right for any batch size and length.

    Raises LabError if its code takes another way the second time it is run, as no recording can.
    """
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer notices about shapes; the closing check covers other shapes
        try:
            return torch.jit.freeze(torch.jit.trace(*give_logits(quantised, fp32))).save_to_buffer()
        except torch.jit.TracingCheckError as error:
            kind = fp32.model.config.model_type
            raise LabError(f"PyTorch cannot record a {kind!r} network: try python lab04-optimum.py") from error
