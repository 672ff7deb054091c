"""Every PNG of the lab. Saved without a display; colours are safe for colour-blind readers (Okabe and Ito, 2008)."""

import os
import re
import textwrap
import unicodedata
from pathlib import Path

import numpy as np

from lab04 import LabError, one_line
from lab04.compare.side_by_side import Runner
from lab04.run.scores import top

FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans", "sans-serif"]


def save_confidence_chart(
    path: Path, headline: str, right: str | None, runners: list[Runner], results: list[tuple[np.ndarray, float]]
) -> None:
    """Save one headline's softmax scores of all backends side by side, 0-100 %, the likeliest label first.

    right: the label that the input names, which is marked. results: probabilities [labels] and ms of every runner.
    Labels outside every backend's top five are left out: their bars would be invisible. Raises LabError if the file
    cannot be written.
    """
    labels = runners[0].artefact.labels
    rows = [(runner, note(runner, ms), scores) for runner, (scores, ms) in zip(runners, results, strict=True)]
    plt = pyplot()
    shown = choose_labels([scores for scores, _ in results], labels.index(right) if right in labels else None)
    # The title is wrapped by characters; wide scripts take twice the room of Latin ones.
    title = textwrap.wrap(one_line(headline), 62 if headline.isascii() else 32, max_lines=3, placeholder=" …")
    bar = 0.8 / len(rows)
    height = min(9, 1.3 + 0.3 * len(title) + len(shown) * (0.2 + 0.16 * len(rows)))
    figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
    for place, (runner, noted, scores) in enumerate(rows):
        positions = np.arange(len(shown)) + (place - (len(rows) - 1) / 2) * bar
        percent = 100 * scores[shown]
        label = f"{runner.name} ({noted})"
        bars = axes.barh(positions, percent, bar * 0.92, color=runner.colour, label=label)
        axes.bar_label(bars, [f"{value:.1f} %" for value in percent], padding=4, fontsize=10)
    names = ["✓ " * (labels[i] == right) + labels[i] for i in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=14, parse_math=False)
    for i, tick in zip(shown, axes.get_yticklabels(), strict=True):
        tick.set_weight("bold" if labels[i] == right else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.margins(y=0.02)
    axes.set_xlabel("softmax score (%)" + ";  ✓ the right label" * (right in labels), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(title), fontsize=15, x=0.01, ha="left", parse_math=False)
    columns = len(rows) if sum(len(runner.name + noted) for runner, noted, _ in rows) < 90 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    save(figure, path)


def note(runner: Runner, ms: float) -> str:
    """What stands behind a backend's name: its time, unless no speed is claimed."""
    return "labels only" if runner.reason else f"{ms:.1f} ms" + ", rechecked" * runner.last_rechecked()


class ChartNames:
    """File names of the charts; headlines that begin alike get a number, so that none overwrites another."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot write to {folder}: {error.strerror}") from error

    def next(self, text: str) -> Path:
        ascii_text = unicodedata.normalize("NFKD", text[:20]).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "_", ascii_text.lower()).strip("_") or "headline"
        self._used[slug] = self._used.get(slug, 0) + 1
        number = f"_{self._used[slug]}" if self._used[slug] > 1 else ""
        return self._folder / f"confidence_{slug}{number}.png"


def choose_labels(probabilities: list[np.ndarray], right: int | None) -> list[int]:
    """Indices of the labels in any backend's top five, and of the right one, by mean score, largest first."""
    mean = np.mean(probabilities, axis=0)
    found = {index for scores in probabilities for index in top(scores)}
    if right is not None:
        found.add(right)
    return sorted(found, key=lambda index: (-mean[index], index))


def save_confusion_matrix(path: Path, counts: np.ndarray, labels: list[str], title: str) -> None:
    """Save counts [expected, predicted] as a chart. Raises LabError if the file cannot be written."""
    from sklearn.metrics import ConfusionMatrixDisplay

    plt = pyplot()
    side = 3 + 0.5 * len(labels)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    ConfusionMatrixDisplay(counts, display_labels=labels).plot(
        ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45
    )
    axes.set_title(title, parse_math=False)
    save(figure, path)


def pyplot():
    """matplotlib's pyplot on the Agg canvas, with fonts for many scripts and no notice of missing glyphs."""
    import logging
    import warnings

    # A notebook's inherited back end may not be installed here, and matplotlib's import already refuses its name.
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Glyph .* missing")
    plt.rcParams["font.family"] = FONTS
    return plt


def save(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and free it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)
