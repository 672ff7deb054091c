"""train.py on a small random base: what it writes, that it repeats itself, calibrated scores, one-line errors."""

import csv
import json
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_in_process, run_script

from lab04.read import classifier, headlines
from lab04.read.texts import TRAIN_HEADLINES

AG_NEWS_LABELS = {"World", "Sports", "Business", "Sci/Tech"}
TRAIN = "lora-news/train.py"


def write_csv(path: Path, columns: list[str], rows: list) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """A few hundred of our headlines, and all of those with AG News' labels in place of AG News."""
    folder, rows = tmp_path_factory.mktemp("data"), list(headlines.read(TRAIN_HEADLINES))
    ag_news = [(row.label, row.text) for row in rows if row.label in AG_NEWS_LABELS]
    return {
        "ag_news": write_csv(folder / "ag_news.csv", ["label", "title"], ag_news),
        "ours": write_csv(folder / "ours.csv", ["text", "label"], [(row.text, row.label) for row in rows[::10]]),
    }


@pytest.fixture(scope="module")
def train(data, model_folder, tmp_path_factory):
    """Train a small adapter; returns its folder."""

    def run() -> Path:
        folder = tmp_path_factory.mktemp("trained") / "adapter"
        options = {"--ag-news": data["ag_news"], "--headlines": data["ours"], "--base": model_folder("bert", 9)}
        options |= {"--output": folder, "--ag-rows": 500, "--epochs": 1}
        assert run_in_process(TRAIN, *(word for option in options.items() for word in option)) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def adapter(train) -> Path:
    return train()


def test_an_adapter_loads_and_is_described(adapter, data):
    record = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    loaded = classifier.load(str(adapter))
    assert loaded.weights_sha256 == record["weights_sha256"]
    assert loaded.labels == sorted({row.label for row in headlines.read(data["ours"])})
    assert record["weights_sha256"][:16] in (adapter / "README.md").read_text(encoding="utf-8")
    assert (adapter / "confusion-matrix.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_weights(adapter, train):
    assert classifier.load(str(train())).weights_sha256 == classifier.load(str(adapter)).weights_sha256


def test_ag_news_says_nothing_of_our_other_labels(model_folder, tmp_path, monkeypatch):
    train = runpy.run_path(str(ROOT / TRAIN))
    monkeypatch.setattr(sys, "argv", [TRAIN, "--output", str(tmp_path / "adapter")])
    labels = sorted(AG_NEWS_LABELS) + ["climate", "health"]
    network, tokenizer = train["build_network"](str(model_folder("bert", 6)), labels)
    for ag_news, said in ((True, 4), (False, 6)):
        rows = [{"text": f"{label} news", "label": label, "ag_news": ag_news} for label in sorted(AG_NEWS_LABELS)]
        trainer = train["build_trainer"](train["parse_arguments"](), network, tokenizer, labels, rows, rows)
        trainer.compute_loss(network, trainer.data_collator(list(trainer.train_dataset))).backward()
        [gradient] = [
            p.grad for name, p in network.named_parameters() if name.endswith("default.weight") and p.shape[0] == 6
        ]
        assert [bool(row.any()) for row in gradient] == [column < said for column in range(6)]
        network.zero_grad()


def test_scores_are_calibrated_on_the_held_out_headlines(adapter, data):
    from sklearn.metrics import log_loss

    rows = list(headlines.read(data["ours"]))
    random.Random(0).shuffle(rows)
    held_out, loaded = rows[: len(rows) // 20], classifier.load(str(adapter))
    logits = loaded.logits([row.text for row in held_out])

    def loss(factor: float) -> float:
        scores = np.exp(factor * logits.astype(float))
        truth = [row.label for row in held_out]
        return log_loss(truth, scores / scores.sum(axis=1, keepdims=True), labels=loaded.labels)

    assert loss(1) <= min(loss(0.9), loss(1.1))


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["topic", "headline"], [("World", "A")], "line 2 has no label"),
        (["label", "title"], [("Weather", "A")], "line 2: label 'Weather' is not one of"),
        (["label", "title"], [("World", "A")] * 4000, "none of ['Business', 'Sci/Tech', 'Sports']"),
        (None, None, "No such file"),
    ],
)
def test_a_wrong_ag_news_file_ends_in_one_line(tmp_path, columns, rows, message):
    path = tmp_path / "ag_news.csv"
    if columns:
        write_csv(path, columns, rows)
    ended = run_script(TRAIN, "--ag-news", path, "--output", tmp_path / "adapter")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("train.py: ") and message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "adapter").exists()


def test_a_hub_that_cannot_be_reached_ends_in_one_line(tmp_path):
    ended = run_script(TRAIN, "--ag-news", "no-such/data-set", "--output", tmp_path / "adapter")
    assert ended.returncode == 2
    assert "Without network, give a CSV" in ended.stderr.splitlines()[-1]


def test_a_missing_label_is_named_by_its_line(tmp_path, data):
    ours = write_csv(tmp_path / "ours.csv", ["text", "label"], [("A", "World"), ("B", "")])
    ended = run_script(TRAIN, "--ag-news", data["ag_news"], "--headlines", ours, "--output", tmp_path / "adapter")
    assert ended.returncode == 2
    assert f"{ours}, line 3 has no label" in ended.stderr
