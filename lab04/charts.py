"""Every PNG of the lab. Saved without a display; colours are safe for colour-blind readers (Okabe and Ito, 2008)."""

import os
import textwrap
from pathlib import Path

import numpy as np

from lab04 import LabError

# One colour per backend, the same on every chart.
COLOURS = {"torch": "#0072B2", "onnxruntime": "#E69F00", "tensorrt": "#009E73"}
ALL_LABELS_UP_TO = 10  # with more labels a chart shows only the union of the backends' top five
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans", "sans-serif"]


def save_confidence_chart(path: Path, headline: str, labels: list[str], rows: list[dict]) -> None:
    """Save one headline's softmax scores of all backends side by side, labels in the model's order, 0-100 %.

    rows: one dict a backend: `name` and `note` for the legend, `backend` for the colour, `probabilities` [labels].
    Raises LabError if the file cannot be written.
    """
    plt = pyplot()
    shown = list(range(len(labels)))
    if len(labels) > ALL_LABELS_UP_TO:
        shown = sorted({i for row in rows for i in np.argsort(-row["probabilities"], kind="stable")[:5].tolist()})
    # The title is wrapped by characters; wide scripts take twice the room of Latin ones.
    title = textwrap.wrap(one_line(headline), 70 if headline.isascii() else 40, max_lines=3, placeholder=" …")
    bar = 0.8 / len(rows)
    height = 1.6 + 0.25 * len(title) + len(shown) * (0.28 + 0.2 * len(rows))
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    for place, row in enumerate(rows):
        positions = np.arange(len(shown)) + (place - (len(rows) - 1) / 2) * bar
        percent = 100 * row["probabilities"][shown]
        bars = axes.barh(
            positions, percent, bar * 0.92, color=COLOURS[row["backend"]], label=f"{row['name']} ({row['note']})"
        )
        axes.bar_label(bars, [f"{value:.1f} %" for value in percent], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), [labels[i] for i in shown], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.margins(y=0.02)
    axes.set_xlabel("softmax score (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("\n".join(title), fontsize=12, loc="left", parse_math=False, pad=12)
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)), frameon=False, fontsize=8)
    save(figure, path)


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
