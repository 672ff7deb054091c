"""What a model says of itself: its configuration, its number of classes and their names."""

import copy
from pathlib import Path

from lab04 import LabError, in_one_line, said
from lab04.read.config_keys import check_asked_for, check_keys, of_this_version
from lab04.read.model_checks import check_config, check_family
from lab04.read.model_files import Source, read_json, stored_shapes


def read_config(source: Source, saved: dict, named: bool = False):
    """The `transformers` configuration, with as many classes as the adapter's head has, in `saved`, if it has one.

    `named`: the user names the classes, so the names that config.json gives them need not be whole.
    """
    model = source.name
    place = next((place for place in source.places if (place / "config.json").exists()), None)
    if place is None:
        raise LabError(f"cannot load the model {model}: {source.folder} has no config.json")
    written = read_json(place / "config.json", model)
    if "model_type" not in written:  # transformers would guess it from the folder's name
        raise LabError(f"{model} has a config.json without model_type: it does not say which network it is")
    check_asked_for(written, model, is_base=source.adapter is not None)
    if source.adapter and (source.base / "config.json").exists():
        check_asked_for(read_json(source.base / "config.json", model), model, is_base=True)
    counted = written.get("id2label")
    if isinstance(counted, dict) and sorted(counted) != sorted(map(str, range(len(counted)))):
        if not named:
            raise LabError(
                f"{model} does not number its labels 0 to {len(counted) - 1} in id2label: correct its config.json, "
                "or name all classes in order with --labels a,b,…"
            )
        counted = written["id2label"] = written["label2id"] = None
    config = build_config(written, model)
    check_config(config, model)
    check_keys(of_this_version(written, model), config, model)
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


def build_config(written: dict, model: str):
    """The configuration of a config.json's content. No code from its folder or the hub: a model is data."""
    import transformers

    kind = str(written["model_type"])
    if kind not in transformers.CONFIG_MAPPING:
        raise LabError(
            f"cannot load the model {model}: transformers {transformers.__version__} knows no network of type {kind!r}"
        )
    check_family(transformers.CONFIG_MAPPING[kind], model)
    with in_one_line(f"cannot load the model {model}"):
        return transformers.CONFIG_MAPPING[kind].from_dict(of_this_version(written, model))


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
        raise LabError(f"cannot read {labels}: {said(error)}") from error
    names = [name.strip() for name in names]
    while from_file and names and not names[-1]:
        names.pop()
    if not all(names):
        raise LabError("--labels has an empty name: give a,b,c or a file with one name a line")
    return names
