"""What the adapter is trained and measured on: AG News' rows and our headlines, and which are held out."""

import argparse
import csv
import random
from pathlib import Path

from lab04 import LabError, said
from lab04.read import headlines

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")  # the hub data set's integers, in order
AG_NEWS_CLASSES = {str(number): label for number, label in enumerate(AG_NEWS_LABELS, start=1)}  # the file's
AG_NEWS_DEV = 1500  # AG News titles held out of training
AG_NEWS_LEAST = 2 * AG_NEWS_DEV  # as many again to train on, or the four labels are hardly learnt
OWN_DEV_SHARE = 0.05  # of our own headlines, held out likewise
WITH_DESCRIPTION = 12  # every twelfth AG News row keeps its description: the rest are titles, as headlines are


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
    """Rows of a CSV with the columns label,title[,description], or as AG News is published.

    That is 1-4,title,description, with the header Class Index,Title,Description or none. Raises LabError, naming the
    line, for what is neither.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, strict=True)
            lines = [(table.line_num, cells) for cells in table if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if lines and lines[0][1][0] in AG_NEWS_CLASSES:
        names = ["label", "title", "description"]
    else:
        header = [cell.strip().lower() for _, cells in lines[:1] for cell in cells]
        names = ["label" if name == "class index" else name for name in header]
        lines = lines[1:]
        if not {"label", "title"} <= set(names):
            raise LabError(f"{path} has no columns label and title, but {', '.join(header) or 'nothing'}")
    rows = []
    for line, cells in lines:
        row: dict = dict.fromkeys(names) | dict(zip(names, cells, strict=False))
        label, title = AG_NEWS_CLASSES.get(row["label"], row["label"]), row["title"]
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
        raise LabError(f"cannot read {name}: {said(error)}. Without network, give a CSV: --ag-news FILE.csv") from error
