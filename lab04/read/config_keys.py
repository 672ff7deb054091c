"""What config.json asks for beside what `transformers` builds of it: the class, code of its own, and every setting.

Tensors that fit say nothing of what is done with them. A network of the same tensors and other arithmetic answers
otherwise, and a check against itself would vouch for it.
"""

import inspect
import re
import sys

from lab04 import LabError
from lab04.read.model_files import listed

# One network under three names: files carry either.
ROBERTA = {f"{name}ForSequenceClassification" for name in ("Roberta", "XLMRoberta", "Camembert")}
# Keys that published models carry and that change no answer: what a model was made from and with, who made it, and
# what counts in training only. A key is told by its words.
BOOKKEEPING = """
accuracy adapters author base batch bf16 cache case checkpoint checkpointing class classes commit compile created data
dataset datasets date decay description device drop dropout epoch epochs f1 finetuned finetuning flash fp16 framework
hash id ids init initializer label label2id labels lang language languages layerdrop learning len length license loss lr
metric metrics model name names onnx optimizer padding path pipeline pipelines revision seed smoothing source task tasks
timestamp tokenizer torch train trained trainer training transformers unsloth url version wandb warmup xla
"""
# Settings that published models carry for nothing, with the only value at which their absence says the same.
WITHOUT_EFFECT = {
    "directionality": "bidi",  # these two: the first multilingual BERTs
    "pooler_type": "first_token_transform",
    "down_scale_factor": 1,  # these four: the published ALBERTs
    "gap_size": 0,
    "net_structure_type": 0,
    "num_memory_blocks": 0,
    "position_embedding_type": "absolute",  # the published ModernBERT, as the next
    "layer_norm_eps": 1e-05,
}
# Read by nobody, or told by the tensors: sizes of a pooler that there is not, what was tied when it was trained.
UNREAD = ("output_past", "tie_weights_", "type_vocab_size", "embedding_size")


def check_asked_for(written: dict, model: str, is_base: bool) -> None:
    """Raise LabError if config.json asks for a network that is not `transformers`' own sequence classifier.

    `is_base`: an adapter's base, which may have any head that `transformers` knows, as the adapter brings its own.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    if written.get("auto_map"):
        raise LabError(
            f"{model} brings code of its own (auto_map in config.json), which is not run: without it the same weights "
            "would answer otherwise. Export it to a network of transformers' own first"
        )
    own = CLASSIFIERS.get(str(written.get("model_type")))
    asked = written.get("architectures") or []
    plain = {re.sub("^(TF|Flax)", "", str(name)) for name in asked}  # the same network in another framework
    if own is None or not plain or own in plain or (own in ROBERTA and plain & ROBERTA):
        return
    if is_base and all(hasattr(transformers, name) for name in plain):
        return
    raise LabError(
        f"{model} is a {listed(sorted(map(str, asked)))} by its config.json, not a {own}: the same weights would "
        f"answer otherwise in that. Give the lab a classifier saved from {own}"
    )


def of_this_version(written: dict, model: str) -> dict:
    """config.json with what transformers 5 calls otherwise under the names of the transformers that runs here."""
    written = dict(written)
    if written.get("model_type") != "modernbert":
        return written
    if layers := written.pop("layer_types", None):
        written["global_attn_every_n_layers"] = every_nth(layers, model)
    if rope := written.pop("rope_parameters", None):
        for kind, name in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
            settings = dict(rope.get(kind) or {}) if isinstance(rope, dict) else {}
            theta = settings.pop("rope_theta", None)
            if theta is None or settings.pop("rope_type", "default") != "default" or settings:
                raise LabError(f"{model} has rope_parameters in config.json that this transformers cannot compute")
            written[name] = theta
    return written


def every_nth(layers: list, model: str) -> int:
    """The n of which every nth layer, from the first on, attends to all tokens. Raises LabError if there is none."""
    for n in range(1, len(layers) + 1):
        if layers == ["sliding_attention" if place % n else "full_attention" for place in range(len(layers))]:
            return n
    raise LabError(f"{model} has layer_types in config.json that this transformers cannot compute")


def check_keys(written: dict, config, model: str) -> None:
    """Raise LabError if config.json has a setting that neither its configuration class nor its network's code knows."""
    strange = sorted(key for key in written.keys() - known_keys(config) if not harmless(key, written[key]))
    if strange:
        code = source(config)
        strange = [key for key in strange if not re.search(rf"(config\.|[\"']){re.escape(key)}\b", code)]
    if strange:
        raise LabError(
            f"{model} has {listed(strange)} in its config.json, which this transformers does not know for "
            f"{config.model_type!r} and would leave out of account: if it changes no answer, delete it there"
        )


def known_keys(config) -> set[str]:
    """The keys that a configuration class, or one it is made from, takes by name."""
    from transformers import PretrainedConfig

    classes = [each for each in type(config).__mro__ if issubclass(each, PretrainedConfig) and "__init__" in vars(each)]
    taken = {name for each in classes for name in inspect.signature(each.__init__).parameters}
    unnamed = {"model_type", "attn_implementation", "use_bfloat16", "tf_legacy_loss"}  # popped from what is left over
    return taken | set(config.attribute_map) | set(vars(PretrainedConfig())) | unnamed


def harmless(key: str, value) -> bool:
    """Whether a key that nothing here reads says nothing that changes an answer."""
    if value is None or key.startswith("_") or key in UNREAD or key.startswith("pooler_") and key != "pooler_type":
        return True
    if key in WITHOUT_EFFECT:
        return value == WITHOUT_EFFECT[key]
    return bool(set(key.lower().split("_")) & set(BOOKKEEPING.split()))


def source(config) -> str:
    """The code of a configuration and of its network, which looks some settings up by name."""
    from transformers import AutoModelForSequenceClassification

    classes = type(config), AutoModelForSequenceClassification._model_mapping[type(config)]
    return "".join(inspect.getsource(sys.modules[each.__module__]) for each in classes)
