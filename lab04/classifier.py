"""The trained weights: find them, load them, merge them, name their labels. Nothing missing, nothing random.

Only the scripts that train or build import this module; running an artefact needs neither
`transformers` nor `peft`.
"""

import copy
import functools
import hashlib
import inspect
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab04 import ROOT, LabError, artefact, in_one_line
from lab04.model_files import Source, check_weights, find, one_line, read_json, stored_shapes

DEFAULT_MODEL = str(ROOT / "lora-news" / "adapter")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IN_BASE = "base_model.model."  # what peft writes before the name of a tensor
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
WRAPPERS = "_orig_mod.", "module."  # before each name in what torch.compile or DataParallel saved
PADDING_TOLERANCE = 1e-3  # what padding may move an FP32 logit by, as a share of the largest


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
        """The longest sequence, in tokens, that the lab gives it."""
        return artefact.max_length(self)

    @property
    def pad_id(self) -> int:
        """The id a batch is filled up with: the tokeniser's, the model's, or any, since the mask hides it."""
        ids = self.tokenizer.pad_token_id, getattr(self.model.config, "pad_token_id", None)
        return next((number for number in ids if number is not None), 0)

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
    config = read_config(source, saved)
    names = name_classes(config, labels, model)
    tokenizer = load_tokenizer(source, config)
    network = load_network(source, config, saved)
    if source.adapter:
        network = merge_adapter(network, source, saved)
    network.eval()
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: index for index, name in enumerate(names)}
    check_finite(network, model)
    loaded = Classifier(network, tokenizer, names, hash_weights(network))
    check_tokens(loaded, model)
    return loaded


# --- What they say ----------------------------------------------------------------------------------------


def read_config(source: Source, saved: dict):
    """The `transformers` configuration, with as many classes as the adapter's head has, in `saved`, if it has one."""
    from transformers import AutoConfig

    model = source.name
    place = next((place for place in source.places if (place / "config.json").exists()), None)
    if place is None:
        raise LabError(f"cannot load the model {model}: {source.folder} has no config.json")
    written = read_json(place / "config.json", model)
    if "model_type" not in written:  # transformers would guess it from the folder's name
        raise LabError(f"{model} has a config.json without model_type: it does not say which network it is")
    counted = written.get("id2label")
    if isinstance(counted, dict) and sorted(counted) != sorted(map(str, range(len(counted)))):
        raise LabError(
            f"{model} does not number its labels 0 to {len(counted) - 1} in id2label: correct its config.json"
        )
    with in_one_line(f"cannot load the model {model}"):
        # A model is data: no code from its folder or from the hub.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    check_config(config, model)
    # How the network hands over its results is the lab's business, whatever it was saved with.
    config.torchscript = config.output_hidden_states = config.output_attentions = False
    config.return_dict = True
    # The head and the embeddings that an adapter brings along may be of another size than its base's.
    known = {name: tensor.shape for name, tensor in saved.items()}
    if counted is None and not source.adapter:  # transformers would take it for two classes
        known = stored_shapes(source.base, model)
    for size in ("num_labels", "vocab_size") if known else ():
        for rows in known_sizes(config, size, known):
            if rows != getattr(config, size):
                setattr(config, size, rows)
    if config.num_labels < 2:
        raise LabError(f"{model} has {config.num_labels} label: a classifier needs at least 2")
    return config


def check_config(config, model: str) -> None:
    """Raise LabError unless the configuration is one of a classifier with one label per text, in floating point."""
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise LabError(f"{model} is of type {config.model_type!r}, for which there is no sequence classifier")
    if getattr(config, "is_encoder_decoder", False):
        raise LabError(f"{model} is of type {config.model_type!r}, an encoder with a decoder: the lab takes no such")
    if config.problem_type == "multi_label_classification":
        raise LabError(f"{model} is a multi-label classifier: its scores are no softmax, the lab cannot compare them")
    if config.problem_type == "regression":
        raise LabError(f"{model} is a regression model: its scores are no softmax, the lab cannot compare them")
    if getattr(config, "quantization_config", None):
        raise LabError(f"{model} is quantised already: give the lab the FP32 or FP16 weights it was made from")


def known_sizes(config, size: str, known: dict) -> set[int]:
    """What tensors of `known` shapes say of a size in the configuration, such as num_labels, whatever their names."""
    import torch
    from transformers import AutoModelForSequenceClassification

    probe, nothing_else_has = copy.deepcopy(config), 7919
    setattr(probe, size, nothing_else_has)
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(probe)
    sized = [name for name, tensor in network.state_dict().items() if tensor.shape[:1] == (nothing_else_has,)]
    return {known[name][0] for name in sized if name in known}


def name_classes(config, labels: str | None, model: str) -> list[str]:
    """The names of the classes in logit order: `labels` if given, else the configuration's."""
    if labels is None:
        names = [config.id2label[index] for index in range(config.num_labels)]
        # `LABEL_0` is what transformers writes for an unnamed class; shipping it is how labels get mixed up unseen.
        unnamed = [name for name in names if name is None or not str(name).strip() or str(name).startswith("LABEL_")]
        if unnamed:
            raise LabError(
                f"{model} has unnamed labels ({unnamed[0]} …): name its {len(names)} classes in order with "
                "--labels a,b,… or set id2label in its config.json"
            )
        names = [str(name) for name in names]
    else:
        names = read_names(labels)
        if len(names) != config.num_labels:
            raise LabError(f"--labels gives {len(names)} names, {model} has {config.num_labels} classes")
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise LabError(f"{model} has two classes called {twice[0]!r}: give each a name of its own with --labels a,b,…")
    return names


def read_names(labels: str) -> list[str]:
    """Names from `a,b,c`, or from a file with one a line."""
    try:
        from_file = Path(labels).is_file()
        names = Path(labels).read_text(encoding="utf-8-sig").splitlines() if from_file else labels.split(",")
    except (OSError, ValueError) as error:
        raise LabError(f"cannot read {labels}: {one_line(error)}") from error
    names = [name.strip() for name in names]
    while from_file and names and not names[-1]:
        names.pop()
    if not all(names):
        raise LabError("--labels has an empty name: give a,b,c or a file with one name a line")
    return names


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


def read_adapter(source: Source) -> dict:
    """The tensors of an adapter's file, by the name they have in the network for those that replace the network's.

    Raises LabError if the file cannot be used, or the adapter is of a kind that has no place in the weights.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    assert source.adapter
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


def merge_adapter(network, source: Source, saved: dict):
    """The base network with the adapter and its saved head merged into plain weights.

    Raises LabError unless every tensor of the adapter's file has a place in the network and every place is filled.
    """
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
    try:
        return wrapped.merge_and_unload()
    except (NotImplementedError, AttributeError) as error:
        kind = wrapped.active_peft_config.peft_type.value
        raise LabError(f"{source.name} is a {kind} adapter, which cannot be merged into the weights") from error


def in_network(name: str) -> str:
    """The name in the plain network of a tensor that peft saved: for a head or an embedding, the network's own."""
    return name.removeprefix(IN_BASE).replace(".base_layer.", ".")


def check_finite(network, model: str) -> None:
    """Raise LabError if a weight is infinite or not a number."""
    damaged = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        raise LabError(
            f"{model} has weights that are infinite or no numbers, in {listed(damaged)}: its training failed"
        )


def listed(names: list[str]) -> str:
    """Names of tensors in one line: the first three and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- The tokeniser ----------------------------------------------------------------------------------------


def load_tokenizer(source: Source, config):
    """The fast tokenizer. Raises LabError if there is none, or only one written in Python."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = next((place for place in source.places if any((place / name).exists() for name in TOKENISER_FILES)), None)
    if place is None:
        raise LabError(f"{source.name} has no tokenizer (no tokenizer.json): save it with tokenizer.save_pretrained")
    settings = place / "tokenizer_config.json"
    kind = read_json(settings, source.name).get("tokenizer_class") if settings.exists() else None
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


def check_tokens(loaded: Classifier, model: str) -> None:
    """Raise LabError if a token has no row in the embedding table, or if padding on either side changes answers."""
    rows = loaded.model.get_input_embeddings().num_embeddings
    beyond = [token for token, number in loaded.tokenizer.get_vocab().items() if number >= rows]
    if beyond:
        raise LabError(
            f"the tokenizer of {model} has {len(beyond)} tokens ({beyond[0]!r} …) beyond the {rows} rows of its "
            "embedding table: resize the embeddings before training, or save the tokenizer it was trained with"
        )
    own = loaded.tokenizer.padding_side
    for side in (own, "right" if own == "left" else "left"):
        # Filling up is the lab's doing, for batches: on the side where it changes no answer.
        loaded.tokenizer.padding_side = side
        if padding_keeps_answers(loaded, model):
            return
    raise LabError(f"{model} answers otherwise when a text is padded: set the padding token it was trained with")


def padding_keeps_answers(loaded: Classifier, model: str) -> bool:
    """Whether a short text has the same FP32 logits alone and beside a longer one."""
    import torch

    texts = ["A headline", "Another and longer headline, of rather more words"]
    with in_one_line(f"cannot load the model {model}"), torch.inference_mode():
        padded = loaded.model(**loaded.encode(texts)).logits
        alone = torch.cat([loaded.model(**loaded.encode([text])).logits for text in texts])
        return bool((padded - alone).abs().max() <= PADDING_TOLERANCE * alone.abs().max())


def hash_weights(network) -> str:
    """SHA-256 over every parameter of a network, in name order: name, shape and float32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
