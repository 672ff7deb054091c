"""A BERT-base of the original lab's shape with random weights: `python -m benchmark.studies.bert_base FOLDER`.

Speed and size depend on the shape, not on the values, so they can be measured where no model hub is reached;
accuracy cannot, and none is shown. The tokeniser is the packaged MiniLM's, which is bert-base-uncased's.
"""

import argparse
from pathlib import Path

from lab04 import console
from lab04.read import model_files

LABELS = ["Business", "Sci/Tech", "Sports", "World", "climate", "education", "health", "security", "tech-policy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.bert_base", description=console.first_line(__doc__)
    )
    parser.add_argument("folder", type=Path, help="where to write the model")
    folder = parser.parse_args().folder
    build(folder)
    print(f"Wrote {folder}")
    console.suggest(f"python lab04-torch.py --model {folder} --output quantised-model-bert-base-torch")


def build(folder: Path) -> None:
    """Write a 12-layer, 768-wide BERT classifier of nine labels, 109 M random parameters, and its tokeniser."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(id2label=dict(enumerate(LABELS)), label2id={label: index for index, label in enumerate(LABELS)})
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_files.find_base(model_files.DEFAULT_BASE)).save_pretrained(folder)


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
