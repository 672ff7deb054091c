"""Every PNG of the lab. Saved without a display; colours are safe for colour-blind readers (Okabe and Ito, 2008)."""

import os
import textwrap
from pathlib import Path

import numpy as np

from lab04 import LabError
from lab04.backends import CompiledBackend
from lab04.consistency import top
from lab04.recheck import RecheckedBackend

# One colour per backend, the same on every chart; variants, by name, have their own, as they stand beside the plain.
COLOURS = {"torch": "#0072B2", "onnxruntime": "#E69F00", "tensorrt": "#009E73"}
VARIANTS = {RecheckedBackend.name: "#56B4E9", CompiledBackend.name: "#CC79A7"}
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans", "sans-serif"]


def save_confidence_chart(
    path: Path, headline: str, labels: list[str], rows: list[dict], right: str | None = None
) -> None:
    """Save one headline's softmax scores of all backends side by side, 0-100 %, the likeliest label first.

    rows: one dict a backend: `name` and `note` for the legend, `backend` for the colour, `probabilities` [labels].
    right: the label that the input names, which is marked. Labels outside every backend's top five are left out: their
    bars would be invisible. Raises LabError if the file cannot be written.
    """
    plt = pyplot()
    shown = choose_labels([row["probabilities"] for row in rows], labels.index(right) if right in labels else None)
    # The title is wrapped by characters; wide scripts take twice the room of Latin ones.
    title = textwrap.wrap(one_line(headline), 62 if headline.isascii() else 32, max_lines=3, placeholder=" …")
    bar = 0.8 / len(rows)
    height = min(9, 1.3 + 0.3 * len(title) + len(shown) * (0.2 + 0.16 * len(rows)))
    figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
    for place, row in enumerate(rows):
        positions = np.arange(len(shown)) + (place - (len(rows) - 1) / 2) * bar
        percent = 100 * row["probabilities"][shown]
        bars = axes.barh(
            positions,
            percent,
            bar * 0.92,
            color=colour(row["name"], row["backend"]),
            label=f"{row['name']} ({row['note']})",
        )
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
    columns = len(rows) if sum(len(row["name"] + row["note"]) for row in rows) < 90 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    save(figure, path)


def colour(name: str, backend: str) -> str:
    """The colour of a backend with a name (`Backend.name`) and a kind (`Artefact.backend`)."""
    return VARIANTS.get(name) or COLOURS[backend]


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


def one_line(text: str) -> str:
    """A headline as a chart can show it: control characters become blanks, runs of blanks one."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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
