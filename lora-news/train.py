"""Train the nine-label LoRA adapter that the lab quantises.

    python lora-news/train.py                          # AG News from the hub
    python lora-news/train.py --ag-news ag_news.csv    # or from a CSV: label,title[,description]

Reads AG News (four labels, 2004-05) and headlines/{train,test}.csv (nine labels, ours). Writes adapter/: the LoRA
weights with the classification head, tokeniser, label names, confusion-matrix.png and the figures in README.md.
`--resume` goes on from the last finished epoch. The time of the shipped run is in adapter/README.md.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this script lives one folder below the package it shares with the labs

from lab04 import LabError, console, options, said  # noqa: E402
from lab04.compare import charts  # noqa: E402
from lab04.console import quiet_logging  # noqa: E402
from lab04.read import classifier, headlines, model_files  # noqa: E402

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")  # the hub data set's integers, in order
AG_NEWS_DEV = 1500  # AG News titles held out of training
OWN_DEV_SHARE = 0.05  # of our own headlines, likewise
WITH_DESCRIPTION = 12  # every twelfth AG News row keeps its description: the rest are titles, as headlines are
MAX_LENGTH = 64  # tokens; the longest headline of our files has fewer than 50

# --- What is trained --------------------------------------------------------------------------------------
RANK = 16
LINEAR = r".*encoder.*\.(query|key|value|dense)|.*transformer\.layer.*\.(q_lin|k_lin|v_lin|out_lin|lin1|lin2)"
HEADS = ("pooler", "pre_classifier", "classifier")  # trained whole and saved with the adapter
LAST_LAYER = tuple(
    f"classifier.modules_to_save.default.{name}" for name in ("weight", "bias", "out_proj.weight", "out_proj.bias")
)


def main() -> None:
    arguments = parse_arguments()
    from transformers import set_seed

    set_seed(0)  # all runs start from the same weights; --seed is the Trainer's
    started = time.perf_counter()
    train_rows, dev_rows, ag_dev_rows = load_rows(arguments)
    test_rows = read_headlines(arguments.test)
    # AG News' four come first, so that they are the first four columns of the logits.
    labels = sorted(AG_NEWS_LABELS) + sorted({row["label"] for row in train_rows}.difference(AG_NEWS_LABELS))
    unknown = {row["label"] for row in test_rows} - set(labels)
    if unknown:
        raise LabError(f"{arguments.test} has labels that are not trained: {', '.join(sorted(unknown))}")
    network, tokenizer = build_network(arguments.base, labels)
    print(f"{len(train_rows)} training texts, {len(labels)} labels, base {arguments.base}")
    trainer = build_trainer(arguments, network, tokenizer, labels, train_rows, dev_rows)
    trainer.train(resume_from_checkpoint=arguments.resume)
    minutes = (time.perf_counter() - started) / 60
    calibrate(trainer, labels, dev_rows, tokenizer)
    save_adapter(trainer.model, tokenizer, arguments)
    test_sets = {"headlines/test.csv": test_rows, "AG News titles, its four labels to choose from": ag_dev_rows}
    report(arguments, trainer, labels, test_sets, minutes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=console.first_line(__doc__))
    add = parser.add_argument
    add("--ag-news", default="fancyzhx/ag_news", help="hub id, or a file with label,title[,description]")
    add("--headlines", type=Path, default=HERE / "headlines" / "train.csv", help="our training headlines, text,label")
    add("--test", type=Path, default=HERE / "headlines" / "test.csv", help="our test headlines, text,label")
    add("--base", default=model_files.DEFAULT_BASE, help="encoder: hub id or folder (default: %(default)s)")
    add("--output", type=Path, default=HERE / "adapter", help="adapter folder (default: lora-news/adapter)")
    add("--epochs", type=float, default=3, help="passes over the data (default: %(default)s)")
    add("--ag-rows", type=options.positive, default=18500, help="AG News rows to train on (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="peak of the cosine schedule (default: %(default)s)")
    add("--batch-size", type=options.positive, default=32, help="texts a step (default: %(default)s)")
    add("--seed", type=int, default=1, help="of dropout and the order of rows (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last finished epoch")
    return parser.parse_args()


# --- Data -------------------------------------------------------------------------------------------------


def load_rows(arguments: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """Training rows, and dev rows of our headlines and of AG News titles: dicts of `text`, `label` and `ag_news`.

    The split depends neither on the training seed nor on the other file, so that runs compare on the same dev rows.
    """
    ours = read_headlines(arguments.headlines)
    ag_news = read_ag_news(arguments.ag_news)
    random.Random(0).shuffle(ours)
    random.Random(0).shuffle(ag_news)
    own_dev = int(len(ours) * OWN_DEV_SHARE)
    train = ours[own_dev:] + [
        {"text": row["title"] if index % WITH_DESCRIPTION else row["full"], "label": row["label"], "ag_news": True}
        for index, row in enumerate(ag_news[AG_NEWS_DEV : AG_NEWS_DEV + arguments.ag_rows])
    ]
    held_out = [{"text": row["title"], "label": row["label"], "ag_news": True} for row in ag_news[:AG_NEWS_DEV]]
    return train, ours[:own_dev], held_out


def read_headlines(path: Path) -> list[dict]:
    """Rows of our own, as `load_rows` says."""
    return [{"text": row.text, "label": row.label, "ag_news": False} for row in read_file(path)]


def read_file(path: str | Path, labels: tuple[str, ...] | None = None) -> list[headlines.Row]:
    """All rows of a file. Raises LabError if one has no label."""
    rows = list(headlines.read(path, labels))
    if unlabelled := [row.line for row in rows if row.label is None]:
        raise LabError(f"{path}, line {unlabelled[0]} has no label")
    return rows


def read_ag_news(source: str) -> list[dict]:
    """AG News rows from a file or the hub: dicts of `title`, `full` (title and description) and `label`.

    The hub's rows have title and description in one text; it then serves as both.
    """
    if Path(source).suffix.lower().lstrip(".") in headlines.FORMATS:
        rows: list[dict] = [
            {"title": row.text, "full": f"{row.text}. {row.description}" if row.description else row.text}
            | {"label": row.label}
            for row in read_file(source, AG_NEWS_LABELS)
        ]
    else:
        rows = read_hub(source)
    missing = set(AG_NEWS_LABELS) - {row["label"] for row in rows}
    if missing or len(rows) < 2 * AG_NEWS_DEV:
        raise LabError(f"{source} has {len(rows)} rows and none of {sorted(missing)}: all four labels are needed")
    return rows


def read_hub(name: str) -> list[dict]:
    """The training split of AG News on the hub. Raises LabError if it cannot be had."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train").to_list()
        return [{"title": row["text"], "full": row["text"], "label": AG_NEWS_LABELS[row["label"]]} for row in rows]
    except Exception as error:  # the library raises a different class for every way a source can be missing
        raise LabError(f"cannot read {name}: {said(error)}. Without network, give a CSV: --ag-news FILE.csv") from error


# --- Model ------------------------------------------------------------------------------------------------


def build_network(base: str, labels: list[str]):
    """The base encoder with a new head for `labels` and untrained LoRA adapters, and its tokeniser."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = model_files.find_base(base)
    names = dict(enumerate(labels))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
        with quiet_logging():
            network = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=len(labels), id2label=names, label2id={name: index for index, name in names.items()}
            )
    except (OSError, ValueError) as error:
        raise LabError(f"cannot load the base {base}: {said(error)}") from error
    modules = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=LINEAR,
        modules_to_save=[name for name in HEADS if name in modules],
    )
    return get_peft_model(network, lora), tokenizer


# --- Training ---------------------------------------------------------------------------------------------


def build_trainer(arguments, network, tokenizer, labels: list[str], train_rows: list[dict], dev_rows: list[dict]):
    """A `transformers` Trainer with the lab's loss; prints macro-F1 on the dev rows after each epoch."""
    import torch
    from sklearn.metrics import f1_score
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    def label_loss(logits, truth):
        # Smoothing: where two labels touch, the one in the file is not the only right one.
        return torch.nn.functional.cross_entropy(logits, truth, reduction="sum", label_smoothing=0.05)

    class HeadlineTrainer(Trainer):
        """A Trainer whose loss depends on where a row is from."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            ag_news, truth = inputs.pop("ag_news"), inputs.pop("labels")
            outputs = model(**inputs)
            # AG News had four labels to choose from: a row under Sci/Tech may well be security by our guidelines, so
            # its rows say nothing about our other labels.
            four = len(AG_NEWS_LABELS)
            loss = label_loss(outputs.logits[ag_news, :four], truth[ag_news])
            loss = (loss + label_loss(outputs.logits[~ag_news], truth[~ag_news])) / len(truth)
            return (loss, outputs) if return_outputs else loss

    settings = TrainingArguments(
        output_dir=str(checkpoints(arguments.output)),
        seed=arguments.seed,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_ratio=0.06,
        weight_decay=0.01,
        group_by_length=True,  # headlines of like length share a batch, so that little of it is padding
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        label_names=["labels"],
        remove_unused_columns=False,  # where a row is from is no argument of the model's
        logging_steps=100,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return HeadlineTrainer(
        model=network,
        args=settings,
        train_dataset=encode(train_rows, tokenizer, labels),
        eval_dataset=encode(dev_rows, tokenizer, labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda scored: {
            "macro_f1": f1_score(scored.label_ids, scored.predictions.argmax(-1), average="macro")
        },
    )


def encode(rows: list[dict], tokenizer, labels: list[str]):
    """Tokens and label ids of rows as a `datasets.Dataset`."""
    from datasets import Dataset

    columns = {
        "text": [row["text"] for row in rows],
        "label": [labels.index(row["label"]) for row in rows],
        "ag_news": [row["ag_news"] for row in rows],
    }
    return Dataset.from_dict(columns).map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH),
        batched=True,
        remove_columns="text",
        desc="Tokenise",
    )


def checkpoints(output: Path) -> Path:
    """Where unfinished training is kept, beside the adapter folder."""
    return output.with_name(output.name + "-checkpoints")


# --- Results ----------------------------------------------------------------------------------------------


def calibrate(trainer, labels: list[str], dev_rows: list[dict], tokenizer) -> None:
    """Scale all logits by the one factor that makes our dev headlines likeliest; no label changes.

    Method: temperature scaling, Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    import torch
    from scipy.optimize import minimize_scalar

    scored = trainer.predict(encode(dev_rows, tokenizer, labels))
    logits, truth = torch.tensor(scored.predictions), torch.tensor(scored.label_ids)
    scale = minimize_scalar(
        lambda factor: torch.nn.functional.cross_entropy(logits * factor, truth).item(), bounds=(0.2, 5)
    ).x
    for name, parameter in trainer.model.named_parameters():
        if "original" not in name and name.endswith(LAST_LAYER):
            parameter.data *= scale
    print(f"Logits scaled by {scale:.2f}, so that confidence is calibrated on our dev headlines")


def save_adapter(network, tokenizer, arguments: argparse.Namespace) -> None:
    """Write the LoRA weights, head, tokeniser and label names, naming the base by its public name."""
    network.peft_config["default"].base_model_name_or_path = arguments.base
    network.save_pretrained(arguments.output, save_embedding_layers=False)
    network.config._name_or_path = arguments.base
    network.config.save_pretrained(arguments.output)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "vocab.txt").unlink(missing_ok=True)  # tokenizer.json holds the same vocabulary


def report(arguments, trainer, labels: list[str], test_sets: dict[str, list[dict]], minutes: float) -> None:
    """Score the merged model on every test set; print, and write the chart, training.json and the model card."""
    from sklearn.metrics import classification_report, confusion_matrix

    merged = classifier.load(str(arguments.output))
    record = {
        "base": arguments.base,
        "weights_sha256": merged.weights_sha256,
        "seed": arguments.seed,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "minutes": round(minutes, 1),
        "training_texts": len(trainer.train_dataset),
        "results": {},
    }
    tables = {}
    for name, rows in test_sets.items():
        choice = labels[: len(AG_NEWS_LABELS)] if rows[0]["ag_news"] else labels
        truth = [row["label"] for row in rows]
        columns = merged.logits([row["text"] for row in rows])[:, : len(choice)].argmax(axis=1)
        predicted = [choice[column] for column in columns]
        record["results"][name] = classification_report(truth, predicted, output_dict=True, zero_division=0)
        tables[name] = classification_report(truth, predicted, digits=3, zero_division=0)
        print(f"\n{name}\n{tables[name]}")
        if choice == labels:
            counts = confusion_matrix(truth, predicted, labels=labels)
            charts.save_confusion_matrix(arguments.output / "confusion-matrix.png", counts, labels, name)
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "README.md").write_text(model_card(record, tables, arguments), encoding="utf-8")
    print(f"Wrote {arguments.output}\nNext: make lab")


def model_card(record: dict, tables: dict[str, str], arguments: argparse.Namespace) -> str:
    """The adapter's README.md, all of it from the record of its training."""
    lines = [
        "---",
        f"base_model: {record['base']}",
        "library_name: peft",
        "license: apache-2.0",
        "---",
        "# News headline classifier, LoRA adapter",
        "",
        "Written by `lora-news/train.py`; guidelines, data and what was tried are in [../README.md](../README.md).",
        "",
        f"- Base: `{record['base']}`; LoRA of rank {RANK} on every encoder Linear, head trained whole.",
        f"- Data: {record['training_texts']} texts an epoch, AG News and ours.",
        f"- Seed {record['seed']}, {record['steps']} steps of {arguments.batch_size}, {record['epochs']} epochs, "
        f"peak learning rate {arguments.learning_rate}, {record['minutes']} minutes.",
        f"- Merged weights `{record['weights_sha256'][:16]}…`.",
    ]
    for name, table in tables.items():
        lines += ["", f"## {name}", "", "```", table.strip("\n"), "```"]
    return "\n".join([*lines, "", "![Confusion matrix on our test headlines](confusion-matrix.png)", ""])


if __name__ == "__main__":
    console.run(main, "requirements/train.txt")
