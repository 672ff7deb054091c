"""Train the nine-label LoRA adapter the lab quantises.

    python lora-news/train.py --ag-news path/to/ag_news.csv      # or a hub id; about 20 minutes on two cores

Reads AG News (four labels, 2004-05) and headlines/train.csv (nine labels, ours); writes adapter/
(LoRA weights, classification head, tokenizer, label names), confusion-matrix.png and training.json.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this script lives one folder below the package it shares with the labs

from lab04 import LabError, classifier  # noqa: E402

AG_NEWS_LABELS = ["World", "Sports", "Business", "Sci/Tech"]  # the hub data set's integer order
MAX_LENGTH = 64  # tokens; the longest headline of the lab's files has fewer than 50

# --- LoRA -------------------------------------------------------------------------------------------------
RANK = 16
TARGETS = r".*encoder.*\.(query|key|value|dense|q_lin|k_lin|v_lin|out_lin|lin1|lin2)"  # every encoder Linear
HEAD = ["pooler", "classifier", "pre_classifier"]  # trained whole and saved with the adapter

# --- Range penalty ----------------------------------------------------------------------------------------
RANGE_LIMIT = 4.0  # an activation beyond this is penalised; all but a handful of columns stay below it anyway
RANGE_WEIGHT = 1e-3


def main() -> None:
    arguments = parse_arguments()
    from transformers import set_seed

    set_seed(arguments.seed)
    train_rows, dev_rows = load_rows(arguments)
    labels = sorted({row["label"] for row in train_rows})
    model, tokenizer = build_model(arguments, labels)
    started = time.perf_counter()
    trainer = build_trainer(arguments, model, tokenizer, labels, train_rows, dev_rows)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    minutes = (time.perf_counter() - started) / 60
    save(arguments, trainer, tokenizer, labels, train_rows, dev_rows, minutes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the LoRA adapter of the lab.")
    parser.add_argument("--ag-news", default="fancyzhx/ag_news", help="hub id, or CSV with label,title[,description]")
    parser.add_argument("--headlines", type=Path, default=HERE / "headlines" / "train.csv", help="CSV with text,label")
    parser.add_argument(
        "--base", default=classifier.DEFAULT_BASE, help="encoder: hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=HERE / "adapter", help="adapter folder (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=4, help="at most this many passes (default: %(default)s)")
    parser.add_argument("--ag-rows", type=int, default=8000, help="AG News rows to train on (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoothing", type=float, default=0.05)
    parser.add_argument("--range-weight", type=float, default=RANGE_WEIGHT)
    parser.add_argument("--range-limit", type=float, default=RANGE_LIMIT)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--copies", type=int, default=1)
    return parser.parse_args()


def load_rows(arguments):
    from datasets import load_dataset
    import random

    ours = load_dataset("csv", data_files=str(arguments.headlines), split="train").to_list()
    ag = load_dataset("csv", data_files=str(arguments.ag_news), split="train").to_list()
    ag = [
        {"text": r["title"] if i % 3 else f"{r['title']}. {r['description']}", "label": r["label"], "title": r["title"]}
        for i, r in enumerate(ag)
    ]
    rng = random.Random(0)
    rng.shuffle(ours)
    rng.shuffle(ag)
    n = len(ours) // 10
    dev = ours[:n] + [{"text": r["title"], "label": r["label"]} for r in ag[:1000]]
    train = ours[n:] * arguments.copies + ag[1000 : 1000 + arguments.ag_rows]
    return [{"text": r["text"], "label": r["label"]} for r in train], dev


def build_model(arguments, labels):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = classifier.find_base(arguments.base)
    tokenizer = AutoTokenizer.from_pretrained(base, use_fast=True)
    network = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
    )
    network.config._name_or_path = network.name_or_path = arguments.base
    names = {n.split(".")[-1] for n, _ in network.named_modules()}
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=arguments.dropout,
        target_modules=TARGETS,
        modules_to_save=[n for n in HEAD if n in names],
    )
    return get_peft_model(network, config), tokenizer


def build_trainer(arguments, model, tokenizer, labels, train_rows, dev_rows):
    from datasets import Dataset
    from sklearn.metrics import f1_score
    from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainingArguments
    import torch

    def encode(rows):
        ds = Dataset.from_list([{"text": r["text"], "label": labels.index(r["label"])} for r in rows])
        return ds.map(
            lambda b: tokenizer(b["text"], truncation=True, max_length=MAX_LENGTH),
            batched=True,
            remove_columns=["text"],
        )

    class RangePenaltyTrainer(Trainer):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.beyond = []
            for name, module in self.model.named_modules():
                if hasattr(module, "lora_A"):
                    module.register_forward_pre_hook(self.collect)

        def collect(self, module, inputs):
            if module.training and torch.is_grad_enabled():
                x = inputs[0]
                self.beyond.append(torch.relu(x.abs() - arguments.range_limit).square().sum() / x.shape[0])

        def compute_loss(self, model, inputs, return_outputs=False, **k):
            self.beyond.clear()
            loss, out = super().compute_loss(model, inputs, return_outputs=True, **k)
            if self.beyond and arguments.range_weight:
                loss = loss + arguments.range_weight * torch.stack(self.beyond).mean()
            return (loss, out) if return_outputs else loss

    settings = TrainingArguments(
        output_dir=str(arguments.output) + "-checkpoints",
        seed=arguments.seed,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_ratio=0.06,
        weight_decay=0.01,
        label_smoothing_factor=arguments.smoothing,
        group_by_length=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        logging_steps=100,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    metrics = lambda p: {
        "macro_f1": f1_score(p.label_ids, p.predictions.argmax(-1), average="macro"),
        "acc": float((p.label_ids == p.predictions.argmax(-1)).mean()),
    }
    return RangePenaltyTrainer(
        model=model,
        args=settings,
        train_dataset=encode(train_rows),
        eval_dataset=encode(dev_rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(2)],
    )


def save(arguments, trainer, tokenizer, labels, train_rows, dev_rows, minutes):
    trainer.model.save_pretrained(arguments.output)
    trainer.model.base_model.model.config.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print("minutes", minutes)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"train.py: {error}")
