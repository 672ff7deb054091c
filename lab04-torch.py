"""Lab 1 of 3: PyTorch dynamic INT8 on the CPU.

    python lab04-torch.py                        # about 15 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-torch/: a frozen TorchScript archive that
loads with `torch.jit.load` alone, without `transformers`, `peft` or any pickled class. With --this-cpu it is code
compiled for this processor instead: faster, and good for no other kind.
"""

import copy
import platform
import warnings

import numpy as np

from lab04 import artefact, backends, classifier, consistency, in_one_line, lab, preparation, this_cpu

MODEL_FILE = "model_int8.pt"


def main() -> None:
    parser = lab.int8_argument_parser(__doc__, output="quantised-model-torch")
    parser.add_argument(
        "--this-cpu", action="store_true", help="compile for this processor (AVX512-VNNI or AMX, g++): about a minute"
    )
    arguments = parser.parse_args()

    texts = lab.choose_texts(arguments)
    artefact.check_output(arguments.output)
    if arguments.this_cpu:
        this_cpu.check_here()
    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)

    print("2. Prepare: trim the last layer, even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32, texts.prepare)

    print("3. Quantise: Linear to INT8 per channel, Embedding to 8 bits per row")
    details: dict
    with in_one_line("cannot quantise this model with PyTorch"):
        if arguments.this_cpu:
            rewritten = this_cpu.rewrite(prepared, looked_up(prepared), preparation.STEPS)
            print("4. Compile with AOTInductor for this processor")
            with lab.quiet_logging():
                archive = this_cpu.compile_network(*give_logits(rewritten, fp32))
            model_file, details = this_cpu.MODEL_FILE, {"compiled_for": this_cpu.describe()}
        else:
            details = {"engine": choose_engine()}
            quantised = quantise(prepared)
            print("4. Trace and freeze to TorchScript")
            archive = trace(*give_logits(quantised, fp32)).save_to_buffer()
            model_file = MODEL_FILE

    with artefact.building(arguments.output) as folder:
        # Written by Python: on a full disk PyTorch's own writer ends the whole process.
        (folder / model_file).write_bytes(archive)

        print("5. Check against FP32")
        artefact.seal(folder, fp32, "torch", "INT8", model_file, texts=texts.record, **details)
        if arguments.this_cpu:
            check_shapes(folder, fp32, arguments.threads, texts.check)
        built = artefact.record_check(folder, lab.check_against_fp32(folder, fp32, arguments.threads, texts))
    lab.report(fp32, built, arguments.output, "python lab04-optimum.py")


def check_shapes(folder, fp32: classifier.Classifier, threads: int, texts: list[str]) -> None:
    """Compare batches of 8 and 32, and texts as long as the model reads, with FP32: compiled code may take other paths.

    Raises LabError if they are out of the bounds that the closing check keeps for single headlines.
    """
    built = artefact.load(folder)
    tokenise = artefact.Tokeniser(built)
    long_texts = [" ".join(texts[start:] + texts[:start]) for start in range(0, len(texts), max(1, len(texts) // 64))]
    with backends.open_backend(built, threads) as backend:
        for batch, some in ((8, texts), (32, texts), (1, long_texts)):
            starts = range(0, len(some), batch)
            logits = np.concatenate([backend.logits(tokenise(some[start : start + batch])) for start in starts])
            consistency.check(lab.fp32_logits(fp32, some), logits)


def choose_engine() -> str:
    """Select the kernel library as opening the artefact does. Raises LabError if this PyTorch has none."""
    import torch

    engine = backends.quantised_engine(torch.backends.quantized.supported_engines, platform.machine())
    torch.backends.quantized.engine = engine
    return engine


def quantise(network):
    """A copy of a classifier with rounded weights (`lab04.preparation`) in dynamic INT8 Linear and 8-bit Embedding.

    PyTorch's own dynamic Linear keeps 8-bit weights from saturating on CPUs without VNNI by giving the activations
    7 bits. They carry most of the error, so here the weights have the 7 and the activations all 8.
    """
    import torch
    from torch.ao import quantization

    class DynamicLinear(torch.ao.nn.quantized.dynamic.Linear):
        """Dynamic INT8 Linear with 8-bit activations."""

        def forward(self, x):
            return torch.ops.quantized.linear_dynamic(x, self._packed_params._packed_params, reduce_range=False)

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
    recipe = {
        torch.nn.Linear: quantization.QConfig(activation=quantization.default_dynamic_quant_observer, weight=weights),
        **dict.fromkeys(looked_up(network), quantization.float_qparams_weight_only_qconfig),
    }
    with warnings.catch_warnings():
        # torch.ao is deprecated for torchao, whose dynamic INT8 is slower than FP32 on a CPU (pytorch/ao#4365).
        warnings.simplefilter("ignore")
        quantised = quantization.quantize_dynamic(copy.deepcopy(network), recipe)
    replacements = {torch.ao.nn.quantized.dynamic.Linear: DynamicLinear, torch.ao.nn.quantized.Embedding: ByteEmbedding}
    for module in quantised.modules():
        module.__class__ = replacements.get(type(module), type(module))
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


def give_logits(quantised, fp32: classifier.Classifier) -> tuple:
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


def trace(network, example: tuple):
    """Frozen TorchScript of a quantised network, right for any batch size and length."""
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer notices about shapes; the check below covers other shapes
        return torch.jit.freeze(torch.jit.trace(network, example))


if __name__ == "__main__":
    lab.run(main)
