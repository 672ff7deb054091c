"""What both INT8 labs do to the network before they quantise it: trim the last layer, round the weights.

Rounding every weight to the nearest step changes a layer's output by the sum of all the errors. Rounding column by
column, and letting the columns still to come make good what was lost, halves the change for headlines (README,
"What it costs"). Method: Frantar et al., "GPTQ", arXiv:2210.17323, here with 7 bits and one scale a row.
"""

# 7-bit weights: two products with 8-bit activations still fit the 16-bit sums of CPUs without VNNI, so one artefact
# is right on all of them. PyTorch and ONNX Runtime both take scale = row maximum / STEPS for such weights.
STEPS = 64
DAMPING = 0.01  # share of the mean diagonal added to it, as in the paper: inputs of headlines do not span all columns


def trim_last_layer(network) -> None:
    """Let the last layer go on with the first token alone after its attention; the logits stay the same.

    A BERT classifier reads nothing but that token. Saves two thirds of one layer: ONNX INT8 of the six-layer MiniLM
    becomes 1.1 times as fast. Families built otherwise are left as they are.
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


def round_weights(network, batches: list[dict]) -> None:
    """Make the Linear weights of a `transformers` classifier multiples of their row's maximum / STEPS.

    batches: token tensors of some hundred typical texts; only their second moments at each Linear are used.
    """
    import torch

    linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    moments = {module: torch.zeros(module.in_features, module.in_features) for module in linears}

    def add_moments(module, inputs):
        rows = inputs[0].reshape(-1, module.in_features)
        moments[module] += rows.T @ rows

    hooks = [module.register_forward_pre_hook(add_moments) for module in linears]
    with torch.inference_mode():
        for batch in batches:
            network(**batch)
    for hook in hooks:
        hook.remove()
    for module, moment in moments.items():
        module.weight.data = round_matrix(module.weight.data, moment)


def round_matrix(weight, moment):
    """Round a weight [out, in] given the second moments [in, in] of its inputs; returns float32 [out, in].

    Every row keeps its largest entry, so that whoever quantises the result finds the same scale and loses nothing.
    """
    import torch

    columns = moment.shape[0]
    moment = moment + torch.eye(columns) * (DAMPING * moment.diagonal().mean() + 1e-8)
    # Columns with the largest inputs go first, while there are still others to make good their errors.
    order = moment.diagonal().argsort(descending=True)
    weight, moment = weight[:, order].clone(), moment[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)

    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / STEPS
    largest = weight.abs().argmax(dim=1)
    largest_value = weight.gather(1, largest[:, None])[:, 0]
    rounded = torch.empty_like(weight)
    block = 128  # errors reach the columns of the own block at once and the later ones in one product
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            steps = torch.round(weight[:, column] / scale).clamp(-STEPS, STEPS)
            rounded[:, column] = torch.where(largest == column, largest_value, steps * scale)
            error = (weight[:, column] - rounded[:, column]) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return rounded[:, order.argsort()]
