"""What both INT8 labs do to the network before they quantise it; figures in docs/int8.md.

1. `trim_last_layer` leaves out what the classifier never reads: faster, same logits.
2. `scale_inputs` evens out the columns of every product's input: one INT8 scale has to span them.
3. `round_weights` rounds weights so that their errors cancel, in place of each to its nearest.

None needs a calibration step of the user's: 2 and 3 look at some of our own *training* headlines, or at `--texts`.
On the way it notes from where to where the input of every product reaches, which `--static` makes constants of.
"""

import copy
import math

from lab04 import LabError
from lab04.read import texts
from lab04.read.classifier import Classifier, by_length

# 7-bit weights: two products with 8-bit activations still fit the 16-bit sums of CPUs without VNNI, so one artefact
# is right on all of them. PyTorch and ONNX Runtime both take scale = row maximum / STEPS for such weights.
STEPS = 64
EVERY = 10  # every tenth training headline, some 900 of all labels, is enough to know typical inputs
LARGE = 4.0  # inputs below it are left as they are: scaling them gains nothing and takes time
# How much of the inputs' unevenness goes over to the weights, 0 to 1. The paper takes a half; two thirds gain more for
# inputs rounded with one scale than they cost in the weights (docs/int8.md).
EXPONENT = 0.65
# An attention's output and its values, in BERT, RoBERTa and ELECTRA (the second: the trimmed layer) and DistilBERT.
VALUES = {
    "attention.output.dense": "attention.self.value",
    "attention.output.module.dense": "attention.self.value",
    "attention.out_lin": "attention.v_lin",
}
DAMPING = 0.01  # share of the mean diagonal added to it, as in the paper: inputs of headlines do not span all columns


def prepare(fp32: Classifier, given: list[str] | None = None):
    """A copy of the network as both INT8 labs quantise it; in FP32 its logits are those of 7-bit weights.

    `given` texts are typical of what it will read; without them some of our own training headlines stand in.
    """
    batches = typical_inputs(fp32, given)
    network = trimmed(fp32.model, batches[0])
    scale_inputs(network, batches)
    round_weights(network, batches)
    return network


def typical_inputs(fp32: Classifier, given: list[str] | None = None) -> list[dict]:
    """Token tensors of `given` texts, or of some of our training headlines, those of one length together."""
    return [batch for _, batch in by_length(fp32, given or texts.training_headlines()[::EVERY])]


def trimmed(model, batch: dict):
    """A copy of a network with its last layer trimmed if it is one whose logits then stay the same, else untrimmed."""
    import torch

    network = copy.deepcopy(model)
    try:
        trim_last_layer(network)
        with torch.inference_mode():
            same = torch.allclose(network(**batch).logits, model(**batch).logits, atol=1e-4)
    except Exception:  # its layers have other parts, or hand over other shapes, each network in its own way
        same = False
    return network if same else copy.deepcopy(model)


def trim_last_layer(network) -> None:
    """Let the last layer go on with the first token alone after its attention; the logits stay the same.

    A BERT classifier reads nothing but that token. Saves two thirds of one layer: ONNX INT8 of the six-layer MiniLM
    becomes 1.1 times as fast.
    """
    import torch

    class FirstToken(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return self.module(*inputs)[:, :1]

    body = network.base_model
    if hasattr(body, "encoder"):  # BERT, RoBERTa, ELECTRA
        attention = body.encoder.layer[-1].attention
        attention.output = FirstToken(attention.output)
    elif hasattr(body, "transformer"):  # DistilBERT
        layer = body.transformer.layer[-1]
        layer.sa_layer_norm = FirstToken(layer.sa_layer_norm)


def scale_inputs(network, batches: list[dict]) -> None:
    """Divide large input columns of a Linear by a power of their largest entry, and multiply its weights by it.

    One INT8 scale has to span all columns, and a few of [CLS] are thirty times as large as the rest. In FP32 nothing
    changes. Method: Xiao et al., "SmoothQuant", arXiv:2211.10438; there the layer norm before does the division, but
    in BERT it feeds the residual too.
    """
    import torch

    class ScaledLinear(torch.nn.Module):
        """A Linear whose input columns are divided by a scale that its weights are multiplied by."""

        def __init__(self, linear, scale):
            super().__init__()
            self.register_buffer("inverse_scale", 1 / scale)
            self.linear = linear
            linear.weight.data *= scale

        def forward(self, x):
            return self.linear(x * self.inverse_scale)

    largest: dict = {}

    def find_largest(module, inputs):
        columns = inputs[0].flatten(0, -2).abs().amax(0)
        largest[module] = torch.maximum(largest.get(module, columns), columns)

    observe(network, batches, find_largest)
    for name, module in list(network.named_modules()):
        if module in largest and largest[module].max() > LARGE:
            scale = largest[module].clamp(min=1).pow(EXPONENT)
            if not scale_values(network, name, scale, batches[0]):
                network.set_submodule(name, ScaledLinear(module, scale))


def scale_values(network, name: str, scale, batch: dict) -> bool:
    """Scale the input of an attention's output, Linear `name`, in the weights of its values; whether that can be done.

    An attention averages its values, so it is exact, in INT8 too, as each row has its own scale, and costs no
    multiplication. Where one does more to them, as RoFormer may, the logits of `batch` move and all is as before.
    """
    import torch

    value, module = find_value(network, name), network.get_submodule(name)
    if value is None:
        return False
    before = value.weight.data, value.bias.data, module.weight.data
    with torch.no_grad():
        wanted = network(**batch).logits
        value.weight.data, value.bias.data = value.weight / scale[:, None], value.bias / scale
        module.weight.data = module.weight * scale
        same = torch.allclose(network(**batch).logits, wanted, atol=1e-4)
    if not same:
        value.weight.data, value.bias.data, module.weight.data = before
    return same


def find_value(network, name: str):
    """The Linear that makes the values of an attention whose output is Linear `name`; None if it is no such output."""
    for output, value in VALUES.items():
        if name.endswith(output):
            module = dict(network.named_modules()).get(name.removesuffix(output) + value)
            linear = getattr(module, "linear", module)  # its own input may have been scaled
            if linear and linear.bias is not None and len(linear.bias) == network.get_submodule(name).in_features:
                return linear
    return None


def observe(network, batches: list[dict], look) -> None:
    """Run the batches, with `look(module, inputs)` called before every Linear."""
    import torch

    linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(look) for module in linears]
    with torch.inference_mode():
        for batch in batches:
            network(**batch)
    for hook in hooks:
        hook.remove()


def round_weights(network, batches: list[dict]) -> None:
    """Make every Linear weight a multiple of its row's maximum / STEPS, so that the errors of a row cancel.

    Rounding to the nearest changes a layer's output by the sum of all the errors. Rounding column by column, and
    letting the columns still to come make good what was lost, halves the change for inputs like those of `batches`,
    of which only the second moments are used. Method: Frantar et al., "GPTQ", arXiv:2210.17323, here with 7 bits and
    one scale a row. Raises LabError if an input is infinite or no number.

    Every Linear keeps as `input_range` the smallest and the largest entry that its input had, 0 always among them.
    """
    from tqdm import tqdm

    moments: dict = {}

    def look(module, inputs):
        rows = inputs[0].flatten(0, -2)
        moments[module] = moments.get(module, 0) + rows.T @ rows
        low, high = getattr(module, "input_range", (0.0, 0.0))
        module.input_range = min(low, float(rows.min())), max(high, float(rows.max()))

    observe(network, batches, look)
    if not all(moment.isfinite().all() for moment in moments.values()):
        raise LabError("this model's activations are infinite or no numbers on typical texts: no INT8 scale spans them")
    # A BERT-base takes minutes: a bar on a terminal, nothing elsewhere.
    for module, moment in tqdm(moments.items(), "   rounding", unit=" matrices", disable=None, leave=False):
        module.weight.data = round_matrix(module.weight.data, moment)


def round_matrix(weight, moment):
    """Round a weight [out, in] given the second moments [in, in] of its inputs; returns float32 [out, in].

    Every row keeps its largest entry, so that whoever quantises the result finds the same scale and loses nothing.
    """
    import torch

    count = moment.shape[0]
    moment = moment + torch.eye(count) * (DAMPING * moment.diagonal().mean() + 1e-8)
    # Columns with the largest inputs go first, while there are still others to make good their errors.
    order = moment.diagonal().argsort(descending=True)
    columns, moment = weight.T[order].contiguous(), moment[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)

    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / STEPS
    largest = columns.abs().argmax(dim=0)
    largest_value = columns.gather(0, largest[None])[0]
    rounded = torch.empty_like(columns)
    block = 128  # errors reach the columns of the own block at once and the later ones in one product
    for start in range(0, count, block):
        end = min(start + block, count)
        errors = torch.empty(end - start, len(weight))
        for column in range(start, end):
            steps = torch.round(columns[column] / scale).clamp(-STEPS, STEPS)
            rounded[column] = torch.where(largest == column, largest_value, steps * scale)
            error = (columns[column] - rounded[column]) / inverse[column, column]
            columns[column:end].addr_(inverse[column, column:end], error, alpha=-1)
            errors[column - start] = error
        columns[end:] -= inverse[start:end, end:].T @ errors
    return rounded[order.argsort()].T.contiguous()


def scale_and_zero_point(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of an input of 0..255 that reaches from `low` to `high`: value = scale * (number - zero).

    No margin: wider and narrower ranges both made the error larger (docs/int8.md). Raises LabError if there is no such
    range, as where all typical inputs were 0.
    """
    scale = (high - low) / 255
    if not 0 < scale < math.inf:
        raise LabError(f"an input of this model reaches from {low} to {high} on typical texts: build without --static")
    return scale, round(-low / scale)


def input_ranges(network) -> dict[str, list[float]]:
    """The smallest and the largest entry of the input of every Linear by its name, for the manifest."""
    return {name: list(part.input_range) for name, part in network.named_modules() if hasattr(part, "input_range")}
