"""Train the nine-label LoRA adapter that the lab quantises.

    python lora-news/train.py                          # AG News from the hub
    python lora-news/train.py --ag-news ag_news.csv    # or from a CSV: label,title[,description], or as published

Reads AG News (four labels, 2004-05) and headlines/{train,test}.csv (nine labels, ours). Trains the network with each
of `--seeds` seeds and takes the mean of their weights. Writes trained/, whole or not at all: the LoRA weights with the
classification head, tokeniser, label names, confusion-matrix.png and the figures in README.md. The shipped adapter/ is
replaced only if --output says so. `--resume` goes on from the last finished epochs, kept in trained-checkpoints/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # its own modules, and the package it shares with the labs

import adapter_report  # noqa: E402
from training_data import AG_NEWS_LABELS, Data  # noqa: E402

from lab04 import LabError, console, options, said  # noqa: E402
from lab04.artefact import folder  # noqa: E402
from lab04.console import quiet_logging  # noqa: E402
from lab04.read import classifier, model_files  # noqa: E402
from lab04.run import int8_engine  # noqa: E402

MAX_LENGTH = 64  # tokens; the longest headline of our files has fewer than 50

# --- What is trained --------------------------------------------------------------------------------------
RANK = 16
LINEAR = r".*encoder.*\.(query|key|value|dense)|.*transformer\.layer.*\.(q_lin|k_lin|v_lin|out_lin|lin1|lin2)"
HEADS = ("pooler", "pre_classifier", "classifier")  # trained whole and saved with the adapter
SHOWN = {"loss": "loss", "eval_macro_f1": "dev macro-F1"}  # of what the Trainer logs
LAST_LAYER = tuple(
    f"classifier.modules_to_save.default.{name}" for name in ("weight", "bias", "out_proj.weight", "out_proj.bias")
)
OF_NO_SEED = ("resume", "seeds", "one_seed")  # options that a seed's weights do not depend on
SEED_WEIGHTS, SEED_RECORD = "weights.safetensors", "record.json"  # what a finished seed leaves in its folder


def main() -> None:
    import torch

    arguments = parse_arguments()
    torch.set_num_threads(1)  # so results repeat, and several seeds share the cores
    if arguments.one_seed:
        train_seed(arguments, Data(arguments), arguments.one_seed)
        return
    folder.check_output(arguments.output, model_files.ADAPTER_CONFIG)
    data = Data(arguments)
    prepare_checkpoints(arguments)
    print(f"{len(data.train)} training texts, {len(data.labels)} labels, base {arguments.base}")
    records = train_seeds(arguments, data)
    network, tokenizer = build_network(arguments.base, data.labels, RANK * len(records))
    average(network, [seed_folder(arguments, record["seed"]) / SEED_WEIGHTS for record in records])
    run = {
        "base": arguments.base,
        "training_texts": len(data.train),
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "rank": RANK,
        "seeds": records,
    }
    with folder.building(arguments.output, model_files.ADAPTER_CONFIG) as place:
        adapter_report.save(network, tokenizer, arguments.base, place)
        calibrate(network, classifier.load(str(place)), data.dev)
        adapter_report.save(network, tokenizer, arguments.base, place)
        adapter_report.describe(place, data, run)
    print(f"Wrote {arguments.output}\nNext: python lab04-torch.py --model {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=console.first_line(__doc__))
    add = parser.add_argument
    add("--ag-news", default="fancyzhx/ag_news", help="hub id, or a CSV with label,title[,description]")
    add("--headlines", type=Path, default=HERE / "headlines" / "train.csv", help="our training headlines, text,label")
    add("--test", type=Path, default=HERE / "headlines" / "test.csv", help="our test headlines, text,label")
    add("--base", default=model_files.DEFAULT_BASE, help="encoder: hub id or folder (default: %(default)s)")
    add("--output", type=Path, default=HERE / "trained", help="adapter folder (default: lora-news/trained)")
    add("--epochs", type=float, default=3, help="passes over the data (default: %(default)s)")
    add("--ag-rows", type=options.positive, default=18500, help="AG News rows to train on (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="peak of the cosine schedule (default: %(default)s)")
    add("--batch-size", type=options.positive, default=32, help="texts a step (default: %(default)s)")
    add("--seeds", type=options.positive, default=2, help="networks trained, a core each (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last finished epochs")
    add("--one-seed", type=options.positive, help=argparse.SUPPRESS)  # what train_seeds gives its processes
    return parser.parse_args()


# --- Model ------------------------------------------------------------------------------------------------


def build_network(base: str, labels: list[str], rank: int = RANK):
    """The base encoder with a new head for `labels` and untrained LoRA adapters, and its tokeniser.

    All networks start from the same weights: only dropout and the order of rows depend on a run's seed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(0)
    source = model_files.find_base(base)
    names = dict(enumerate(labels))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
        with quiet_logging():
            network = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=len(labels), id2label=names, label2id={name: index for index, name in names.items()}
            )
    except (OSError, ValueError) as error:
        raise LabError(f"cannot load the base {base}: {said(error)}") from error
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
    place = seed_folder(arguments, 1).parent
    chosen = {name: str(value) for name, value in vars(arguments).items() if name not in OF_NO_SEED}
    record = place / "options.json"
    if arguments.resume:
        if not record.exists() or not any(place.glob("seed-*/*")):
            raise LabError(f"nothing to resume: {place} holds no finished epoch. Run it without --resume")
        if json.loads(record.read_text(encoding="utf-8")) != chosen:
            raise LabError(f"{place} is of a run with other options: {record} has them. Run it without --resume")
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    record.write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")


def train_seeds(arguments: argparse.Namespace, data: Data) -> list[dict]:
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


def train_seed(arguments: argparse.Namespace, data: Data, seed: int) -> None:
    """Train one network and leave its weights and record in its folder."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    started = time.perf_counter()
    network, tokenizer = build_network(arguments.base, data.labels)
    trainer = build_trainer(arguments, network, tokenizer, data, seed)
    place = seed_folder(arguments, seed)
    trainer.train(resume_from_checkpoint=arguments.resume and any(place.glob("checkpoint-*")))
    minutes = (time.perf_counter() - started) / 60
    ag_news = trainer.predict(encode(data.ag_dev, tokenizer, data.labels))
    right = ag_news.predictions[:, : len(AG_NEWS_LABELS)].argmax(-1) == ag_news.label_ids
    save_file(get_peft_model_state_dict(network, save_embedding_layers=False), place / SEED_WEIGHTS)
    record = {
        "seed": seed,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "minutes": round(minutes, 1),
        "dev_macro_f1": trainer.evaluate()["eval_macro_f1"],
        "ag_news_accuracy": float(right.mean()),
    }
    (place / SEED_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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


def build_trainer(arguments, network, tokenizer, data: Data, seed: int):
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
        bf16=not gpu and "avx512_bf16" in int8_engine.processor_flags(),
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


def calibrate(network, merged: classifier.Classifier, dev_rows: list[dict]) -> None:
    """Scale all logits of `network` by the one factor that makes our dev headlines likeliest; no label changes.

    merged: the same network as the labs load it
    Method: temperature scaling, Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    import torch
    from scipy.optimize import minimize_scalar

    logits = torch.from_numpy(merged.logits([row["text"] for row in dev_rows]))
    truth = torch.tensor([merged.labels.index(row["label"]) for row in dev_rows])
    scale = minimize_scalar(
        lambda factor: torch.nn.functional.cross_entropy(logits * factor, truth).item(), bounds=(0.2, 5)
    ).x
    for name, parameter in network.named_parameters():
        if "original" not in name and name.endswith(LAST_LAYER):
            parameter.data *= scale
    print(f"Logits scaled by {scale:.2f}, so that confidence is calibrated on our dev headlines")


if __name__ == "__main__":
    console.run(main, "requirements/train.txt")
