"""train.py on a small random base: what it writes, that it repeats itself, means, calibration, one-line errors."""

import csv
import json
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_in_process

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
        "ours": write_csv(folder / "ours.csv", ["text", "label"], [(row.text, row.label) for row in rows[::20]]),
    }


@pytest.fixture(scope="module")
def train(data, model_folder, tmp_path_factory):
    """`train(--option=value …)`: train a small adapter into a folder of its own; returns the exit code and it."""

    def run(*words: object, folder: Path | None = None, **options: object) -> tuple[int, Path]:
        folder = folder or tmp_path_factory.mktemp("trained") / "adapter"
        chosen = {"ag-news": data["ag_news"], "headlines": data["ours"], "base": model_folder("bert", 9)}
        chosen |= {"output": folder, "ag-rows": 300, "epochs": 1, "seeds": 1} | options
        arguments = [word for name, value in chosen.items() for word in (f"--{name}", value)]
        return run_in_process(TRAIN, *arguments, *words), folder

    return run


@pytest.fixture(scope="module")
def adapter(train) -> Path:
    code, folder = train()
    assert code == 0
    return folder


def weights(folder: Path) -> str:
    return classifier.load(str(folder)).weights_sha256


def test_an_adapter_loads_and_is_described(adapter, data):
    record = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    loaded = classifier.load(str(adapter))
    assert loaded.weights_sha256 == record["weights_sha256"]
    assert loaded.labels == sorted({row.label for row in headlines.read(data["ours"])})
    assert record["weights_sha256"][:16] in (adapter / "README.md").read_text(encoding="utf-8")
    assert (adapter / "confusion-matrix.png").stat().st_size > 10_000


def test_several_seeds_are_trained_and_reported(adapter, train):
    code, folder = train(seeds=2)
    assert code == 0
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert [seed["seed"] for seed in record["seeds"]] == [1, 2]
    alone = json.loads((adapter / "training.json").read_text(encoding="utf-8"))["seeds"][0]
    # A seed gives what it gives alone, to the bit: in a process of its own, beside another.
    assert {**record["seeds"][0], "minutes": 0} == {**alone, "minutes": 0}
    [first, again] = [
        (run.with_name(f"{run.name}-checkpoints") / "seed-1" / "weights.safetensors").read_bytes()
        for run in (adapter, folder)
    ]
    assert first == again
    assert weights(folder) == record["weights_sha256"] != weights(adapter)
    assert "| mean of weights |" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_mean_is_that_of_the_merged_weights(model_folder, tmp_path):
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    script = runpy.run_path(str(ROOT / TRAIN))
    base, labels = str(model_folder("bert", 6)), sorted(AG_NEWS_LABELS) + ["climate", "health"]
    merged, files = [], []
    for seed in range(3):
        network, _ = script["build_network"](base, labels)
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(get_peft_model_state_dict(network), files[-1])
        merged.append(network.merge_and_unload().state_dict())
    network, _ = script["build_network"](base, labels, 3 * script["RANK"])
    script["average"](network, files)
    for name, mean in network.merge_and_unload().state_dict().items():
        torch.testing.assert_close(mean, sum(state[name] for state in merged) / 3, rtol=1e-5, atol=1e-6)


def test_finished_seeds_are_not_trained_again(adapter, train, capfd):
    before = weights(adapter)
    assert train("--resume", folder=adapter)[0] == 0
    assert weights(adapter) == before
    assert ", step " not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"), [("adapter", "is of a run with other options"), ("none", "nothing to resume: ")]
)
def test_what_cannot_be_resumed_ends_in_one_line(adapter, train, capfd, folder, message):
    code, _ = train("--resume", folder=adapter.with_name(folder), epochs=2)
    assert code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (adapter.with_name(folder + "-checkpoints") / "options.json").exists() or folder == "adapter"


def test_weights_never_lack_their_report(train, adapter, monkeypatch, tmp_path):
    import adapter_report

    folder = tmp_path / "adapter"
    for name in ("adapter", "adapter-checkpoints"):
        shutil.copytree(adapter.with_name(name), tmp_path / name)
    chosen = tmp_path / "adapter-checkpoints" / "options.json"
    chosen.write_text(chosen.read_text().replace(str(adapter), str(folder)))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_report, "describe", fail)
    code, _ = train("--resume", folder=folder)
    assert code == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "adapter-checkpoints"}


def test_a_folder_with_other_things_is_refused(train, tmp_path):
    (tmp_path / "notes.txt").touch()
    code, _ = train(folder=tmp_path)
    assert code == 2 and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_ag_news_says_nothing_of_our_other_labels(model_folder, tmp_path, monkeypatch):
    train = runpy.run_path(str(ROOT / TRAIN))
    monkeypatch.setattr(sys, "argv", [TRAIN, "--output", str(tmp_path / "adapter")])
    labels = sorted(AG_NEWS_LABELS) + ["climate", "health"]
    network, tokenizer = train["build_network"](str(model_folder("bert", 6)), labels)
    for ag_news, said in ((True, 4), (False, 6)):
        rows = [{"text": f"{label} news", "label": label, "ag_news": ag_news} for label in sorted(AG_NEWS_LABELS)]
        data = SimpleNamespace(train=rows, dev=rows, labels=labels)
        trainer = train["build_trainer"](train["parse_arguments"](), network, tokenizer, data, 1)
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


@pytest.fixture
def refused(tmp_path, capfd):
    """`refused(*arguments)`: the line in which training ends that never began."""

    def run(*arguments: object) -> str:
        assert run_in_process(TRAIN, *arguments, "--output", tmp_path / "adapter") == 2
        *_, line = capfd.readouterr().err.splitlines()
        assert line.startswith("train.py: ") and not (tmp_path / "adapter").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["topic", "headline"], [("World", "A")], "has no columns label and title, but topic, headline"),
        (["label", "title"], [("World", "A"), ("Weather", "B")], "line 3: 'Weather', 'B' is no label of AG News"),
        (["label", "title"], [("World", "")], "line 2: 'World', '' is no label of AG News"),
        (["label", "title"], [("World", "A")] * 4000, "4000 rows, none under Business or Sci/Tech or Sports: at least"),
        (["label", "title"], [(label, "A") for label in AG_NEWS_LABELS] * 100, "has 400 rows: at least 3000 rows"),
        (None, None, "No such file"),
    ],
)
def test_a_wrong_ag_news_file_ends_in_one_line(refused, tmp_path, columns, rows, message):
    path = tmp_path / "ag_news.csv"
    if columns:
        write_csv(path, columns, rows)
    assert message in refused("--ag-news", path)


def test_ag_news_is_read_as_published_and_with_names(tmp_path):
    read = runpy.run_path(str(ROOT / "lora-news/training_data.py"))["read_ag_news_file"]
    rows = [("3", "Oil, gas and coal", 'Prices "fell"'), ("1", "Talks in Geneva", "")]
    published = write_csv(tmp_path / "published.csv", rows[0], rows[1:])
    named = write_csv(tmp_path / "named.csv", ["Title", "Label"], [("Oil, gas and coal", "Business")])
    [first, second], [alone] = read(published), read(named)
    assert first == {"title": "Oil, gas and coal", "full": 'Oil, gas and coal. Prices "fell"', "label": "Business"}
    assert second == {"title": "Talks in Geneva", "full": "Talks in Geneva", "label": "World"}
    assert alone == {"title": "Oil, gas and coal", "full": "Oil, gas and coal", "label": "Business"}


def test_a_hub_that_cannot_be_reached_ends_in_one_line(refused):
    assert "Without network, give a CSV" in refused("--ag-news", "no-such/data-set")


def test_a_missing_label_is_named_by_its_line(refused, tmp_path, data):
    ours = write_csv(tmp_path / "ours.csv", ["text", "label"], [("A", "World"), ("B", "")])
    assert f"{ours}, line 3 has no label" in refused("--ag-news", data["ag_news"], "--headlines", ours)
