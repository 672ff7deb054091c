"""Train the nine-label LoRA adapter that the lab quantises.

    python lora-news/train.py                          # AG News from the hub
    python lora-news/train.py --ag-news ag_news.csv    # or from a CSV: label,title[,description], or as published

Reads AG News (four labels, 2004-05) and headlines/{train,test}.csv (nine labels, ours). Trains the network with each
of `--seeds` seeds and takes the mean of their weights. Writes trained/, whole or not at all: the LoRA weights with the
classification head, tokeniser, label names, confusion-matrix.png and the figures in README.md. The shipped adapter/ is
replaced only if --output says so. `--resume` goes on from the last finished epochs, kept in trained-checkpoints/.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this script lives one folder below the package it shares with the labs

from lab04 import LabError, charts, classifier, headlines, lab, model_files, this_cpu  # noqa: E402

# The hub data set's integers, in order; the published file counts from 1.
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_DEV = 1500  # AG News titles held out of training
AG_NEWS_LEAST = 2 * AG_NEWS_DEV  # as many again to train on, or the four labels are hardly learnt
OWN_DEV_SHARE = 0.05  # of our own headlines, held out likewise
WITH_DESCRIPTION = 12  # every twelfth AG News row keeps its description: the rest are titles, as headlines are
MAX_LENGTH = 64  # tokens; the longest headline of our files has fewer than 50

# --- What is trained --------------------------------------------------------------------------------------
RANK = 16
LINEAR = r".*encoder.*\.(query|key|value|dense)|.*transformer\.layer.*\.(q_lin|k_lin|v_lin|out_lin|lin1|lin2)"
HEADS = ("pooler", "pre_classifier", "classifier")  # trained whole and saved with the adapter
SHOWN = {"loss": "loss", "eval_macro_f1": "dev macro-F1"}  # of what the Trainer logs
LAST_LAYER = tuple(
    f"classifier.modules_to_save.default.{name}" for name in ("weight", "bias", "out_proj.weight", "out_proj.bias")
)
SEED_WEIGHTS, SEED_RECORD = "weights.safetensors", "record.json"  # what a finished seed leaves in its folder


def main() -> None:
    arguments = parse_arguments()
    import torch

    torch.set_num_threads(1)  # results repeat, and the seeds share the cores
    data = Data(arguments)
    if arguments.one_seed:
        train_seed(arguments, data, arguments.one_seed)
        return
    check_output(arguments.output)
    prepare_checkpoints(arguments)
    print(f"{len(data.train)} training texts, {len(data.labels)} labels, base {arguments.base}")
    records = train_seeds(arguments, data)
    network, tokenizer = build_network(arguments.base, data.labels, RANK * len(records))
    average(network, [seed_folder(arguments, record["seed"]) / SEED_WEIGHTS for record in records])
    scored = build_trainer(arguments, network, tokenizer, data, 0).predict(encode(data.dev, tokenizer, data.labels))
    calibrate(network, scored.predictions, scored.label_ids)
    with tempfile.TemporaryDirectory(prefix=f".{arguments.output.name}.new-", dir=arguments.output.parent) as folder:
        save_adapter(network, tokenizer, arguments.base, Path(folder))
        report(arguments, Path(folder), data, records, scored.metrics["test_macro_f1"])
        step_in(Path(folder), arguments.output)
    print(f"Wrote {arguments.output}\nNext: python lab04-torch.py --model {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=lab.first_line(__doc__))
    add = parser.add_argument
    add("--ag-news", default="fancyzhx/ag_news", help="hub id, or a CSV with label,title[,description]")
    add("--headlines", type=Path, default=HERE / "headlines" / "train.csv", help="our training headlines, text,label")
    add("--test", type=Path, default=HERE / "headlines" / "test.csv", help="our test headlines, text,label")
    add("--base", default=model_files.DEFAULT_BASE, help="encoder: hub id or folder (default: %(default)s)")
    add("--output", type=Path, default=HERE / "trained", help="adapter folder (default: lora-news/trained)")
    add("--epochs", type=float, default=2, help="passes over the data (default: %(default)s)")
    add("--ag-rows", type=lab.positive, default=18500, help="AG News rows to train on (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="peak of the cosine schedule (default: %(default)s)")
    add("--batch-size", type=lab.positive, default=32, help="texts a step (default: %(default)s)")
    add("--seeds", type=lab.positive, default=2, help="networks trained, a core each (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last finished epochs")
    add("--one-seed", type=lab.positive, help=argparse.SUPPRESS)  # what train_seeds gives its processes
    return parser.parse_args()


# --- Data -------------------------------------------------------------------------------------------------


class Data:
    """The rows of a run, dicts of `text`, `label` and `ag_news`: to train on, held out, and our test headlines.

    The split depends neither on the training seed nor on the other file, so that runs compare on the same dev rows.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        ours = read_headlines(arguments.headlines)
        ag_news = read_ag_news(arguments.ag_news)
        random.Random(0).shuffle(ours)
        random.Random(0).shuffle(ag_news)
        own_dev = int(len(ours) * OWN_DEV_SHARE)
        rest = ag_news[AG_NEWS_DEV : AG_NEWS_DEV + arguments.ag_rows]
        self.dev = ours[:own_dev]
        self.ag_dev = [ag_row(row, row["title"]) for row in ag_news[:AG_NEWS_DEV]]
        self.train = ours[own_dev:] + [
            ag_row(row, row["title"] if index % WITH_DESCRIPTION else row["full"]) for index, row in enumerate(rest)
        ]
        self.test = read_headlines(arguments.test)
        # AG News' four come first, so that they are the first four columns of the logits.
        self.labels = sorted(AG_NEWS_LABELS) + sorted({row["label"] for row in ours}.difference(AG_NEWS_LABELS))
        unknown = {row["label"] for row in self.test} - set(self.labels)
        if unknown:
            raise LabError(f"{arguments.test} has labels that are not trained: {', '.join(sorted(unknown))}")


def ag_row(row: dict, text: str) -> dict:
    return {"text": text, "label": row["label"], "ag_news": True}


def read_headlines(path: Path) -> list[dict]:
    """Rows of our own, as `Data` says. Raises LabError if one has no label."""
    rows = list(headlines.read(path))
    if unlabelled := [row.line for row in rows if row.label is None]:
        raise LabError(f"{path}, line {unlabelled[0]} has no label")
    return [{"text": row.text, "label": row.label, "ag_news": False} for row in rows]


def read_ag_news(source: str) -> list[dict]:
    """AG News rows from a CSV or the hub: dicts of `title`, `full` (title and description) and `label`.

    The hub's rows have title and description in one text; it then serves as both.
    """
    rows = read_ag_news_file(Path(source)) if Path(source).suffix.lower() == ".csv" else read_hub(source)
    missing = sorted(set(AG_NEWS_LABELS) - {row["label"] for row in rows})
    if missing or len(rows) < AG_NEWS_LEAST:
        lacks = f", none under {' or '.join(missing)}" if missing else ""
        raise LabError(
            f"{source} has {len(rows)} rows{lacks}: at least {AG_NEWS_LEAST} rows of all four AG News labels are needed"
        )
    return rows


def read_ag_news_file(path: Path) -> list[dict]:
    """Rows of a CSV with the columns label,title[,description], or as AG News is published: 1-4,title,description.

    Raises LabError, naming the line, for what is neither.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, strict=True)
            lines = [(table.line_num, cells) for cells in table if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    numbers = {str(number): label for number, label in enumerate(AG_NEWS_LABELS, start=1)}
    names = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    if names and names[0] in numbers:
        names = ["label", "title", "description"]
    else:
        lines, numbers = lines[1:], {}
    if not {"label", "title"} <= set(names):
        raise LabError(f"{path} has no columns label and title, but {', '.join(names) or 'nothing'}")
    rows = []
    for line, cells in lines:
        row = dict(zip(names, cells, strict=False))
        label, title = numbers.get(row["label"], row["label"]), row.get("title")
        if not title or label not in AG_NEWS_LABELS:
            raise LabError(f"{path}, line {line}: {label!r}, {title!r} is no label of AG News and its title")
        description = row.get("description")
        rows.append({"title": title, "full": f"{title}. {description}" if description else title, "label": label})
    return rows


def read_hub(name: str) -> list[dict]:
    """The training split of AG News on the hub. Raises LabError if it cannot be had."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train").to_list()
        return [{"title": row["text"], "full": row["text"], "label": AG_NEWS_LABELS[row["label"]]} for row in rows]
    except Exception as error:  # the library raises a different class for every way a source can be missing
        raise LabError(
            f"cannot read {name}: {model_files.one_line(error)}. Without network, give a CSV: --ag-news FILE.csv"
        ) from error


# --- Model ------------------------------------------------------------------------------------------------


def build_network(base: str, labels: list[str], rank: int = RANK):
    """The base encoder with a new head for `labels` and untrained LoRA adapters, and its tokeniser.

    All networks start from the same weights: only dropout and the order of rows depend on a run's seed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(0)
    folder = model_files.find_base(base)
    names = dict(enumerate(labels))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
        with lab.quiet_logging():
            network = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=len(labels), id2label=names, label2id={name: index for index, name in names.items()}
            )
    except (OSError, ValueError) as error:
        raise LabError(f"cannot load the base {base}: {model_files.one_line(error)}") from error
    modules = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=LINEAR,
        modules_to_save=[name for name in HEADS if name in modules],
    )
    return get_peft_model(network, lora), tokenizer


# --- Seeds ------------------------------------------------------------------------------------------------


def seed_folder(arguments: argparse.Namespace, seed: int) -> Path:
    """Where a seed's unfinished training and its weights are kept, beside the adapter folder."""
    return arguments.output.with_name(arguments.output.name + "-checkpoints") / f"seed-{seed}"


def prepare_checkpoints(arguments: argparse.Namespace) -> None:
    """Empty the checkpoints' folder, or with --resume check that it holds some of a run with the same options."""
    folder = seed_folder(arguments, 1).parent
    options = {name: str(value) for name, value in vars(arguments).items() if name not in ("resume", "seeds")}
    record = folder / "options.json"
    if arguments.resume:
        if not any(folder.glob("seed-*/*")):
            raise LabError(f"nothing to resume: {folder} holds no finished epoch. Run it without --resume")
        if json.loads(record.read_text(encoding="utf-8")) != options:
            raise LabError(f"{folder} is of a run with other options: {record} has them. Run it without --resume")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def train_seeds(arguments: argparse.Namespace, data: "Data") -> list[dict]:
    """Train seeds 1, 2, … and return their records. Several have a process each, as many at once as there are cores."""
    seeds = range(1, arguments.seeds + 1)
    wanted = [seed for seed in seeds if not (seed_folder(arguments, seed) / SEED_RECORD).exists()]
    if arguments.seeds == 1 and wanted:
        train_seed(arguments, data, 1)
    elif wanted:
        command = [sys.executable, str(HERE / "train.py"), *sys.argv[1:], "--one-seed"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(lambda seed: subprocess.run([*command, str(seed)]).returncode, wanted))
        if any(codes):
            raise LabError("not all seeds were trained, as said above. Go on with --resume")
    records = [json.loads((seed_folder(arguments, seed) / SEED_RECORD).read_text(encoding="utf-8")) for seed in seeds]
    for record in records:
        print(
            f"Seed {record['seed']}: dev macro-F1 {record['dev_macro_f1']:.3f}, "
            f"AG News {record['ag_news_accuracy']:.3f}, {record['minutes']} minutes"
        )
    return records


def train_seed(arguments: argparse.Namespace, data: "Data", seed: int) -> None:
    """Train one network and leave its weights and record in its folder."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    started = time.perf_counter()
    network, tokenizer = build_network(arguments.base, data.labels)
    trainer = build_trainer(arguments, network, tokenizer, data, seed)
    folder = seed_folder(arguments, seed)
    trainer.train(resume_from_checkpoint=arguments.resume and any(folder.glob("checkpoint-*")))
    minutes = (time.perf_counter() - started) / 60
    ag_news = trainer.predict(encode(data.ag_dev, tokenizer, data.labels))
    right = ag_news.predictions[:, : len(AG_NEWS_LABELS)].argmax(-1) == ag_news.label_ids
    save_file(get_peft_model_state_dict(network, save_embedding_layers=False), folder / SEED_WEIGHTS)
    record = {
        "seed": seed,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "minutes": round(minutes, 1),
        "dev_macro_f1": trainer.evaluate()["eval_macro_f1"],
        "ag_news_accuracy": float(right.mean()),
    }
    (folder / SEED_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def average(network, files: list[Path]) -> None:
    """Give a network whose LoRA rank is the sum of theirs the mean of several networks' weights.

    The mean of products is no product of means: with the A of all networks below one another, and their B side by side
    and divided by their number, B @ A is the mean exactly. Heads are averaged. Method: "model soups", arXiv:2203.05482.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    states = [load_file(file) for file in files]
    mean = {}
    for name in states[0]:
        tensors = [state[name] for state in states]
        if ".lora_A." in name:
            mean[name] = torch.cat(tensors, dim=0)
        elif ".lora_B." in name:
            mean[name] = torch.cat(tensors, dim=1) / len(tensors)
        else:
            mean[name] = torch.stack(tensors).mean(dim=0)
    set_peft_model_state_dict(network, mean)


# --- Training ---------------------------------------------------------------------------------------------


def build_trainer(arguments, network, tokenizer, data: "Data", seed: int):
    """A `transformers` Trainer with the lab's loss; prints how far it is, and macro-F1 on the dev rows each epoch."""
    import torch
    from sklearn.metrics import f1_score
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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

    class Progress(TrainerCallback):
        """A line now and then: several seeds train at once, and a bar each would overwrite the others."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            said = [f"{name} {logs[key]:.3f}" for key, name in SHOWN.items() if key in logs]
            if said:
                print(f"Seed {seed}, step {state.global_step} of {state.max_steps}: {', '.join(said)}", flush=True)

    gpu = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(seed_folder(arguments, seed)),
        seed=seed,
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
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
        # Where the processor multiplies them in half the time; weights and their updates stay FP32.
        bf16=not gpu and "avx512_bf16" in this_cpu.describe()["flags"],
    )
    trainer = HeadlineTrainer(
        model=network,
        args=settings,
        train_dataset=encode(data.train, tokenizer, data.labels),
        eval_dataset=encode(data.dev, tokenizer, data.labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda scored: {
            "macro_f1": f1_score(scored.label_ids, scored.predictions.argmax(-1), average="macro")
        },
        callbacks=[Progress],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def encode(rows: list[dict], tokenizer, labels: list[str]) -> list[dict]:
    """Tokens and label ids of rows, as the Trainer takes them."""
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
    return [
        {name: encoded[name][index] for name in encoded}
        | {"label": labels.index(row["label"]), "ag_news": row["ag_news"]}
        for index, row in enumerate(rows)
    ]


# --- Results ----------------------------------------------------------------------------------------------


def calibrate(network, predictions, label_ids) -> None:
    """Scale all logits by the one factor that makes our dev headlines likeliest; no label changes.

    predictions: [headlines, labels], FP32; label_ids: [headlines]
    Method: temperature scaling, Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    import torch
    from scipy.optimize import minimize_scalar

    logits, truth = torch.tensor(predictions), torch.tensor(label_ids)
    scale = minimize_scalar(
        lambda factor: torch.nn.functional.cross_entropy(logits * factor, truth).item(), bounds=(0.2, 5)
    ).x
    for name, parameter in network.named_parameters():
        if "original" not in name and name.endswith(LAST_LAYER):
            parameter.data *= scale
    print(f"Logits scaled by {scale:.2f}, so that confidence is calibrated on our dev headlines")


def check_output(output: Path) -> None:
    """Raise LabError unless the adapter folder can be written when training is over."""
    if output.exists() and any(output.iterdir()) and not (output / model_files.ADAPTER_CONFIG).exists():
        raise LabError(f"{output} exists and is no adapter folder: choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.new-", dir=output.parent):
            pass
    except OSError as error:
        raise LabError(f"cannot write {output}: {error.strerror}") from error


def step_in(folder: Path, output: Path) -> None:
    """Put a finished folder in the place of `output`, whole: weights are never without their report."""
    old = folder.with_name(folder.name.replace(".new-", ".old-"))
    if output.exists():
        output.rename(old)
    folder.rename(output)
    folder.mkdir()  # the temporary folder's owner removes it
    output.chmod(0o755)  # temporary folders are for their owner alone
    shutil.rmtree(old, ignore_errors=True)


def save_adapter(network, tokenizer, base: str, folder: Path) -> None:
    """Write the LoRA weights, head, tokeniser and label names, naming the base by its public name."""
    network.peft_config["default"].base_model_name_or_path = base
    network.save_pretrained(folder, save_embedding_layers=False)
    network.config._name_or_path = base
    network.config.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)  # tokenizer.json holds the same vocabulary


def report(arguments, folder: Path, data: "Data", records: list[dict], dev_macro_f1: float) -> None:
    """Score the merged model on every test set; print, and write the chart, training.json and the model card."""
    from sklearn.metrics import classification_report, confusion_matrix

    merged, labels = classifier.load(str(folder)), data.labels
    record = {
        "base": arguments.base,
        "weights_sha256": merged.weights_sha256,
        "training_texts": len(data.train),
        "seeds": records,
        "dev_macro_f1": dev_macro_f1,
        "results": {},
    }
    tables = {}
    test_sets = {"headlines/test.csv": data.test, "AG News titles, its four labels to choose from": data.ag_dev}
    for name, rows in test_sets.items():
        choice = labels[: len(AG_NEWS_LABELS)] if rows[0]["ag_news"] else labels
        truth = [row["label"] for row in rows]
        columns = lab.fp32_logits(merged, [row["text"] for row in rows])[:, : len(choice)].argmax(axis=1)
        predicted = [choice[column] for column in columns]
        record["results"][name] = classification_report(truth, predicted, output_dict=True, zero_division=0)
        tables[name] = classification_report(truth, predicted, digits=3, zero_division=0)
        print(f"\n{name}\n{tables[name]}")
        if choice == labels:
            counts = confusion_matrix(truth, predicted, labels=labels)
            charts.save_confusion_matrix(folder / "confusion-matrix.png", counts, labels, name)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(record, tables, arguments), encoding="utf-8")


def model_card(record: dict, tables: dict[str, str], arguments: argparse.Namespace) -> str:
    """The adapter's README.md, all of it from the record of its training."""
    steps, epochs = record["seeds"][0]["steps"], record["seeds"][0]["epochs"]
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
        f"- {steps} steps of {arguments.batch_size}, {epochs} epochs, peak learning rate {arguments.learning_rate}; "
        f"{len(record['seeds'])} seeds, the weights are their mean.",
        f"- Merged weights `{record['weights_sha256'][:16]}…`.",
        "",
        "| seed | dev macro-F1 | AG News titles | minutes, one thread |",
        "|---|---|---|---|",
    ]
    for seed in record["seeds"]:
        figures = f"{seed['dev_macro_f1']:.3f} | {seed['ag_news_accuracy']:.3f} | {seed['minutes']}"
        lines.append(f"| {seed['seed']} | {figures} |")
    ag_news = record["results"]["AG News titles, its four labels to choose from"]["accuracy"]
    lines.append(f"| mean of weights | {record['dev_macro_f1']:.3f} | {ag_news:.3f} | |")
    for name, table in tables.items():
        lines += ["", f"## {name}", "", "```", table.strip("\n"), "```"]
    return "\n".join([*lines, "", "![Confusion matrix on our test headlines](confusion-matrix.png)", ""])


if __name__ == "__main__":
    lab.run(main)
