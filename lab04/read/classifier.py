"""The trained weights: find them, load them, merge them, name their labels. Nothing missing, nothing random.

Only the scripts that train or build import this module; running an artefact needs neither
`transformers` nor `peft`.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab04 import ROOT, LabError, in_one_line
from lab04.read.adapters import merge_adapter, read_adapter
from lab04.read.model_checks import PROBES, check_finite, check_tokens
from lab04.read.model_config import name_classes, read_config
from lab04.read.model_files import Source, find, listed, read_json, stored_shapes

MAX_TOKENS = 128  # longer than any headline; also the longest sequence the TensorRT engine is built for
DEFAULT_MODEL = str(ROOT / "lora-news" / "adapter")
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
WRAPPERS = "_orig_mod.", "module."  # before each name in what torch.compile or DataParallel saved


@dataclass(frozen=True)
class Classifier:
    """A merged FP32 sequence classifier.

    model: `transformers` module in eval mode, float32, `model(**tokens).logits` is [batch, labels]
    tokenizer: the fast tokenizer that belongs to it
    labels: label names in logit order
    weights_sha256: hash over the merged FP32 weights, names and values
    """

    model: Any
    tokenizer: Any
    labels: list[str]
    weights_sha256: str

    @functools.cached_property
    def input_names(self) -> list[str]:
        """Names of the model's inputs, in the order of its forward signature."""
        types = getattr(self.model.config, "type_vocab_size", None)
        # A table of one type, or none, says the same for every token. Without a word on it the tokeniser knows.
        typed = types > 1 if types is not None else "token_type_ids" in self.tokenizer.model_input_names
        wanted = {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
        return [name for name in inspect.signature(self.model.forward).parameters if name in wanted]

    @functools.cached_property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the lab gives it: its own limit, the tokeniser's or the lab's."""
        limits = [MAX_TOKENS, self.tokenizer.model_max_length]
        if positions := getattr(self.model.config, "max_position_embeddings", None):
            limits.append(positions)
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                # RoBERTa and its kin count positions from the padding id on.
                limits.append(module.num_embeddings - module.padding_idx - 1)
        return min(limits)

    @property
    def pad_id(self) -> int:
        """The id a batch is filled up with: the tokeniser's, the model's, or any, since the mask hides it."""
        ids = self.tokenizer.pad_token_id, getattr(self.model.config, "pad_token_id", None)
        return next((number for number in ids if number is not None), 0)

    def logits(self, texts: list[str]) -> np.ndarray:
        """FP32 logits [texts, labels], each text for itself: none is padded."""
        import torch

        rows = np.empty((len(texts), len(self.labels)), np.float32)
        with torch.inference_mode():
            for places, batch in by_length(self, texts):
                rows[places] = self.model(**batch).logits.numpy()
        return rows

    def encode(self, texts: list[str]) -> dict:
        """The model's inputs for a batch of texts, padded to its longest: int64 tensors [batch, sequence]."""
        import torch

        rows = [self.tokenizer(text, truncation=True, max_length=self.max_length) for text in texts]
        fill = {"input_ids": self.pad_id}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row.get(name) or [int(name == "attention_mask")] * len(row.input_ids)) for row in rows],
                batch_first=True,
                padding_value=fill.get(name, 0),
                padding_side=self.tokenizer.padding_side,
            )
            for name in self.input_names
        }


def by_length(fp32: Classifier, texts: list[str]) -> Iterator[tuple[list[int], dict]]:
    """Token tensors of texts of one length together, so that none is padded, and their places among `texts`."""
    import torch

    together: dict[int, list[tuple[int, dict]]] = {}
    for place, text in enumerate(texts):
        row = fp32.encode([text])
        together.setdefault(row["input_ids"].shape[1], []).append((place, row))
    for found in together.values():
        places, rows = zip(*found, strict=True)
        yield list(places), {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def load(model: str = DEFAULT_MODEL, labels: str | None = None) -> Classifier:
    """Load a PEFT adapter, a merged model or a hub id, and merge the adapter if there is one.

    `labels` names the classes in logit order, in place of the configuration: names with commas between, or a file
    with one a line. Raises LabError if weights are missing, damaged or without a place in the network, if classes
    have no distinct names, or if the tokeniser does not fit.
    """
    source = find(model)  # before the imports, which take seconds: a mistyped path is told at once
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what they would say is in the loading report, which is read
    transformers_logging.disable_progress_bar()
    saved = read_adapter(source) if source.adapter else {}
    config = read_config(source, saved, named=labels is not None)
    names = name_classes(config, labels, model)
    tokenizer = load_tokenizer(source, config)
    network = load_network(source, config, saved)
    if source.adapter:
        network = merge_adapter(network, source, saved, lambda it: Classifier(it, tokenizer, names, "").logits(PROBES))
    network.eval()
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: index for index, name in enumerate(names)}
    check_finite(network, model)
    loaded = Classifier(network, tokenizer, names, hash_weights(network))
    check_tokens(loaded, model)
    return loaded


# --- The weights ------------------------------------------------------------------------------------------


def load_network(source: Source, config, saved: dict):
    """The FP32 network. Raises LabError if one of its tensors is in no file, or one of the file has no place in it."""
    from transformers import AutoModelForSequenceClassification

    wrapped = sorted(name for name in stored_shapes(source.base, source.name) if name.startswith(WRAPPERS))
    if wrapped:
        raise LabError(
            f"cannot load the model {source.name}: its tensors are named as in a compiled or parallel wrapper "
            f"({listed(wrapped)}): save the network inside it (model._orig_mod or model.module)"
        )
    with in_one_line(f"cannot load the model {source.name}"):
        network, report = AutoModelForSequenceClassification.from_pretrained(
            source.base,
            config=config,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
    absent = sorted({*report["missing_keys"], *mismatched} - saved.keys())
    surplus = [name for name in report["unexpected_keys"] if not harmless(name, network, source)]
    if absent:
        sizes = "missing, or of another size than config.json says," if mismatched else "missing"
        surplus_too = f", while it has {listed(surplus)}, which the network has not" if surplus else ""
        raise LabError(
            f"cannot load the model {source.name}: {listed(absent)} {sizes} in its weights{surplus_too}; "
            "such tensors would be random. Save the whole classifier, head included"
        )
    if surplus:
        raise LabError(
            f"cannot load the model {source.name}: its weights have {listed(surplus)}, for which the network that "
            "config.json describes has no place"
        )
    return network


def harmless(name: str, network, source: Source) -> bool:
    """Whether a tensor that the network has no place for changes no answer: old buffers, a base's other head."""
    parts = name.split(".")
    if parts[-1] == "position_ids" or "pooler" in parts:
        return True
    encoder = {network.base_model_prefix, *(child for child, _ in network.base_model.named_children())}
    return source.adapter is not None and parts[0] not in encoder


# --- The tokeniser ----------------------------------------------------------------------------------------


def load_tokenizer(source: Source, config):
    """The fast tokenizer. Raises LabError if there is none, or only one written in Python."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = next((place for place in source.places if any((place / name).exists() for name in TOKENISER_FILES)), None)
    if place is None:
        raise LabError(f"{source.name} has no tokenizer (no tokenizer.json): save it with tokenizer.save_pretrained")
    settings = place / "tokenizer_config.json"
    written = read_json(settings, source.name) if settings.exists() else {}
    if written.get("auto_map"):
        raise LabError(f"{source.name} has a tokenizer with code of its own (auto_map), which is not run")
    kind = written.get("tokenizer_class")
    with in_one_line(f"cannot load the model {source.name}"):
        if kind == "TokenizersBackend" and (place / "tokenizer.json").exists():  # transformers 5; the file says it all
            tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, config=config, use_fast=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise LabError(
            f"{source.name} has no fast tokenizer: the lab needs a tokenizer.json, which an artefact carries"
        )
    return tokenizer


def hash_weights(network) -> str:
    """SHA-256 over every parameter of a network, in name order: name, shape and float32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
