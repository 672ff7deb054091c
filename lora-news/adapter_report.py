"""The adapter's folder: its files, its figures, its model card."""

import json
from pathlib import Path

from training_data import AG_NEWS_LABELS, Data

from lab04.compare import charts
from lab04.read import classifier

OURS, DEV = "headlines/test.csv", "headlines held out of headlines/train.csv"
AG_NEWS = "AG News titles held out, its four labels to choose from"


def save(network, tokenizer, base: str, folder: Path) -> None:
    """Write the LoRA weights, head, tokeniser and label names, naming the base by its public name."""
    network.peft_config["default"].base_model_name_or_path = base
    network.save_pretrained(folder, save_embedding_layers=False)
    network.config._name_or_path = base
    network.config.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)  # tokenizer.json holds the same vocabulary


def describe(folder: Path, data: Data, run: dict) -> None:
    """Score the merged model on every test set; print, and write the chart, training.json and the model card.

    run: what the training says of itself; see `train.main`
    """
    from sklearn.metrics import classification_report, confusion_matrix

    merged, labels = classifier.load(str(folder)), data.labels
    record, tables = run | {"weights_sha256": merged.weights_sha256, "results": {}}, {}
    for name, rows in {OURS: data.test, DEV: data.dev, AG_NEWS: data.ag_dev}.items():
        choice = labels[: len(AG_NEWS_LABELS)] if rows[0]["ag_news"] else labels
        truth = [row["label"] for row in rows]
        columns = merged.logits([row["text"] for row in rows])[:, : len(choice)].argmax(axis=1)
        predicted = [choice[column] for column in columns]
        record["results"][name] = classification_report(truth, predicted, output_dict=True, zero_division=0)
        tables[name] = classification_report(truth, predicted, digits=3, zero_division=0)
        print(f"\n{name}\n{tables[name]}")
        if name == OURS:
            counts = confusion_matrix(truth, predicted, labels=labels)
            charts.save_confusion_matrix(folder / "confusion-matrix.png", counts, labels, name)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(record, tables), encoding="utf-8")


def model_card(record: dict, tables: dict[str, str]) -> str:
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
        f"- Base: `{record['base']}`; LoRA of rank {record['rank']} on every encoder Linear, head trained whole.",
        f"- Data: {record['training_texts']} texts an epoch, AG News and ours.",
        f"- {steps} steps of {record['batch_size']}, {epochs} epochs, peak learning rate {record['learning_rate']}; "
        f"{len(record['seeds'])} seeds, the weights are their mean.",
        f"- Merged weights `{record['weights_sha256'][:16]}…`.",
        "",
        "| seed | dev macro-F1 | AG News titles | minutes, one thread |",
        "|---|---|---|---|",
    ]
    for seed in record["seeds"]:
        figures = f"{seed['dev_macro_f1']:.3f} | {seed['ag_news_accuracy']:.3f} | {seed['minutes']}"
        lines.append(f"| {seed['seed']} | {figures} |")
    dev, ag_news = record["results"][DEV]["macro avg"]["f1-score"], record["results"][AG_NEWS]["accuracy"]
    lines.append(f"| mean of weights | {dev:.3f} | {ag_news:.3f} | |")
    for name, table in tables.items():
        lines += ["", f"## {name}", "", "```", table.strip("\n"), "```"]
    return "\n".join([*lines, "", "![Confusion matrix on our test headlines](confusion-matrix.png)", ""])
