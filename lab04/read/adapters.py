"""A PEFT adapter: read whole, merged into plain weights that answer as it did unmerged, or refused."""

import copy
import logging
import warnings
from collections.abc import Callable

import numpy as np

from lab04 import LabError, in_one_line
from lab04.read.model_files import ADAPTER_CONFIG, Source, check_weights, listed, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
IN_BASE = "base_model.model."  # what peft writes before the name of a tensor
OTHER_TASKS = ("TOKEN_CLS", "QUESTION_ANS")  # their heads have a classifier's tensors: one label a token, not a text
MERGE_TOLERANCE = 1e-3  # what merging may move an FP32 logit by, as a share of the largest


def read_adapter(source: Source) -> dict:
    """The tensors of an adapter's file, by the name they have in the network for those that replace the network's.

    Raises LabError if the file cannot be used, or the adapter is of a kind that has no place in the weights.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    assert source.adapter
    check_trained_on(read_json(source.adapter / ADAPTER_CONFIG, source.name), source.name)
    with in_one_line(f"cannot load the model {source.name}"):
        kind = PeftConfig.from_pretrained(str(source.adapter))
    if kind.is_prompt_learning:
        raise LabError(
            f"{source.name} is a {kind.peft_type.value} adapter: it lengthens the input and cannot be merged into the "
            "weights; train LoRA instead"
        )
    check_weights(source.adapter, ADAPTER_WEIGHTS, source.name)
    with in_one_line(f"cannot load the model {source.name}"):
        saved = load_file(source.adapter / ADAPTER_WEIGHTS)
    return {in_network(name): tensor for name, tensor in saved.items()}


def check_trained_on(written: dict, model: str) -> None:
    """Raise LabError if an adapter was trained for another task, or on a class that is not `transformers`'."""
    if written.get("task_type") in OTHER_TASKS:
        raise LabError(f"{model} is an adapter for {written['task_type']}, not for one label per text (SEQ_CLS)")
    trained_on = written.get("auto_mapping") or {}
    parent, name = (str(trained_on.get(key) or "") for key in ("parent_library", "base_model_class"))
    if name and not (parent.startswith("transformers.") and name.endswith("ForSequenceClassification")):
        raise LabError(
            f"{model} was trained on a {name} of {parent}: in transformers' own classifier the same weights would "
            "answer otherwise"
        )


def merge_adapter(network, source: Source, saved: dict, answer: Callable[..., np.ndarray]):
    """The base network with the adapter and its saved head merged into plain weights.

    `answer(network)` is what a network says of a few texts: float32 logits [texts, labels]. Raises LabError unless
    every tensor of the adapter's file has a place in the network, every place is filled, and the merged network
    answers as the adapter did before, which must be the same each time it is loaded.
    """
    again = wrap(copy.deepcopy(network), source, saved).get_base_model().state_dict()
    wrapped = wrap(network, source, saved)
    differing = [
        name for name, tensor in wrapped.get_base_model().state_dict().items() if not tensor.equal(again[name])
    ]
    if differing:
        start = getattr(wrapped.active_peft_config, "init_lora_weights", None)
        begun = f" (init_lora_weights {start!r})" if isinstance(start, str) else ""
        raise LabError(
            f"{source.name} changes its base by chance each time it is loaded{begun}: {listed(differing)} differ. Save "
            "it as a plain LoRA adapter, or merged, where it was trained"
        )
    del again
    unmerged = answer(wrapped.get_base_model().eval())
    kind = wrapped.active_peft_config.peft_type.value
    try:
        merged = wrapped.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise LabError(f"{source.name} is a {kind} adapter, which cannot be merged into the weights") from error
    change = np.abs(answer(merged.eval()) - unmerged).max()
    if not change <= MERGE_TOLERANCE * np.abs(unmerged).max():
        raise LabError(
            f"{source.name} answers otherwise when it is merged: logits move by {change:.2g}. Its {kind} adapter "
            "has no equal in plain weights, as where layers share theirs"
        )
    return merged


def wrap(network, source: Source, saved: dict):
    """The network inside peft's, with the adapter loaded. Raises LabError unless its file and its places agree."""
    from peft import PeftModel, get_peft_model_state_dict

    own = set(network.state_dict())
    with in_one_line(f"cannot load the model {source.name}"), warnings.catch_warnings():
        # peft warns of keys that fit nothing, which are compared here, and of the base's path, which was resolved.
        warnings.simplefilter("ignore", UserWarning)
        logging.getLogger("peft").setLevel(logging.ERROR)
        wrapped = PeftModel.from_pretrained(network, str(source.adapter))
        # The adapter as peft would save it again: the names it has to be complete.
        places = {in_network(name) for name in get_peft_model_state_dict(wrapped, save_embedding_layers=False)}
    unplaced = sorted(saved.keys() - places - own)
    if unplaced:
        raise LabError(
            f"{source.name} holds {listed(unplaced)}, which fit nothing in its base: was it trained on the bare "
            "encoder, or on a compiled or wrapped model? Save it from the classifier itself"
        )
    unfilled = sorted(places - saved.keys())
    if unfilled:
        raise LabError(f"{source.name} lacks {listed(unfilled)}, which would be random: save the whole adapter")
    return wrapped


def in_network(name: str) -> str:
    """The name in the plain network of a tensor that peft saved: for a head or an embedding, the network's own."""
    return name.removeprefix(IN_BASE).replace(".base_layer.", ".")
