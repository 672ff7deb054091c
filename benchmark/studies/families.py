"""Which families of networks the INT8 labs serve, how fast and how faithfully: `python -m benchmark.studies.families`.

Each family gets a network in MiniLM's shape with random weights, for which no model hub is needed: speed depends on the
shape alone. Its head is set so that labels differ from headline to headline. Both labs quantise it, and their own
closing checks say the rest. Writes results/HARDWARE-families/results.json, which docs/measuring.md shows. Half an hour.
"""

import argparse
import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark import environment, results, study_tables
from benchmark.studies.bert_base import LABELS
from lab04 import ROOT, artefact, console
from lab04.read import classifier, model_files
from lab04.read.texts import held_out_headlines

MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
# As each is published where it differs from its configuration's defaults.
DEBERTA_V3 = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 256, "share_att_key": True}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
FAMILIES: dict[str, dict] = {
    "bert": {},
    "distilbert": {"hidden_dim": 1536, "intermediate_size": None},  # None: it knows no such setting
    "electra": {"embedding_size": 128},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "mpnet": {"max_position_embeddings": 514},
    "albert": {"embedding_size": 128},
    "deberta": {"relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0},
    "deberta-v2": DEBERTA_V3 | {"type_vocab_size": 0, "position_biased_input": False, "norm_rel_ebd": "layer_norm"},
    "roformer": {},
    "rembert": {"input_embedding_size": 128, "output_embedding_size": 128},
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 128, "intra_bottleneck_size": 96, "intermediate_size": 384},
    "squeezebert": {"embedding_size": 384},
    "big_bird": {},
    "modernbert": {"intermediate_size": 576},
}
INT8_LABS = {"torch": "lab04-torch.py", "onnxruntime": "lab04-optimum.py"}
LOGIT_SPREAD = 2.0  # standard deviation of the logits: most labels are decided, none beyond doubt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.families", description=console.first_line(__doc__)
    )
    given = "these alone, beside what was measured of the others (default: all)"
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help=given)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()
    from tqdm import tqdm

    here = environment.describe()
    folder = arguments.output / environment.folder_name(here, "families")
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / results.RESULTS
    rows = {row["family"]: row for row in (results.load(folder)["families"] if written.exists() else ())}
    for family in tqdm(arguments.families, "Families", disable=None):
        with tempfile.TemporaryDirectory() as scratch:
            rows[family] = measure(family, Path(scratch))
        kept = [rows[name] for name in FAMILIES if name in rows]
        measured = {"format": results.FORMAT, "environment": here, "families": kept}
        results.save_json(written, measured)  # after each: they take half an hour
    print(study_tables.families(measured))
    print(f"Wrote {folder}")
    console.suggest("make readme")


def measure(family: str, scratch: Path) -> dict:
    """A family's row: its size, and for each lab the figures of its closing check, or the line in which it refused."""
    row: dict = {"family": family, "parameters_m": build(family, scratch / "model")}
    for name, script in INT8_LABS.items():
        arguments = (ROOT / script, "--model", scratch / "model", "--output", scratch / name)
        ended = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
        if ended.returncode:
            row[name] = {"refused": ended.stderr.strip().splitlines()[-1]}
        else:
            check = artefact.load(scratch / name).manifest["check"]
            row[name] = {key: check[key] for key in ("headlines", "agreement", "fp32_ms", "ms", "speed_up")}
    return row


def build(family: str, folder: Path) -> float:
    """Write a classifier of nine labels and a tokeniser; returns its parameters in millions."""
    import torch
    import transformers

    base = model_files.find_base(model_files.DEFAULT_BASE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = describe(family, tokenizer)
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    known = [name for name in tokenizer.model_input_names if name in inspect.signature(network.forward).parameters]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_input_names=known)
    decide_labels(network.eval(), tokenizer, held_out_headlines(), classifier.MAX_TOKENS)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return round(network.num_parameters() / 1e6, 1)


def describe(family: str, tokenizer):
    """The `transformers` configuration of a family in MiniLM's shape, for a tokeniser and nine labels."""
    import transformers

    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    shape = {name: value for name, value in (MINILM | FAMILIES[family]).items() if value is not None}
    return transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **names, **tokens, **shape)


def decide_labels(network, tokenizer, texts: list[str], max_length: int) -> None:
    """Set a random network's head so that the labels of texts spread over all classes, most with a clear margin."""
    import torch

    # An empty first token holds only what attention reads from the others. A random one is nearly the same for every
    # text, and a head that tells such small differences apart also tells apart the differences rounding makes.
    first = dict.fromkeys(("word_embeddings", "tok_embeddings"), tokenizer.cls_token_id)
    first |= {"position_embeddings": slice(0, 3), "token_type": 0}
    for name, table in network.named_parameters():
        for kind, rows in first.items():
            if kind in name:
                table.data[rows] = 0
    head = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    features = []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.inference_mode():
        network(**tokens)
    hook.remove()
    [features] = features
    mean = features.mean(0)
    with torch.no_grad():
        anchors = features[: head.out_features] - mean  # each class is "like this headline, not like the average"
        weight = torch.nn.functional.normalize(anchors, dim=1)
        weight *= LOGIT_SPREAD / ((features - mean) @ weight.T).std()
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
