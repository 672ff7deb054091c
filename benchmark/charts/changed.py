"""What a changed label looks like: headlines near the border of two labels, and what each backend made of them."""

from pathlib import Path

from benchmark.charts.style import REFERENCE_GREY, save, tidy
from lab04 import labs
from lab04.compare.charts import pyplot

FILE, MOST = "changed.png", 3  # headlines shown


def draw_changed(folder: Path, measured: dict) -> None:
    """Save `changed.png` from the results of benchmark/studies/single_headlines.py; none changed, no picture.

    For each headline the two labels at stake; a bar a backend, the one it decided for in full colour.
    """
    (folder / FILE).unlink(missing_ok=True)
    rows = measured["changed"][:MOST]
    if not rows:
        return
    colours = {title: colour for lab in labs.LABS for title, colour in lab.shown.values()} | {"FP32": REFERENCE_GREY}
    names = list(rows[0]["probabilities"])
    figure, axes = pyplot().subplots(
        len(rows),
        1,
        figsize=(8, 0.8 + len(rows) * (0.75 + 0.34 * len(names))),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, row in zip(axes[:, 0], rows, strict=True):
        at_stake = labels_at_stake(row)
        for line, name in enumerate(names):
            scores = row["probabilities"][name]
            decided = max(scores, key=lambda label: scores[label])
            for side, label in zip((-1, 1), at_stake, strict=True):
                percent = 100 * scores[label]
                axis.barh(line, side * percent, 0.78, color=colours[name], alpha=1 if label == decided else 0.25)
                axis.annotate(
                    f"{percent:.0f} %",
                    (side * percent, line),
                    (4 * side, 0),
                    textcoords="offset points",
                    va="center",
                    ha="left" if side > 0 else "right",
                    fontsize=9,
                    weight="bold" if label == decided else "normal",
                )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(-100, 100)
        left, right = (("✓ " * (label == row["label"])) + label for label in at_stake)
        axis.set_title(f"{row['text']}\n", loc="left", fontsize=11, parse_math=False)
        for text, place in ((f"← {left}", 0.25), (f"{right} →", 0.75)):
            axis.text(place, 1.02, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=10)
    axes[-1, 0].set_xticks([-100, -50, 0, 50, 100], ["100", "50", "0", "50", "100"])
    axes[-1, 0].set_xlabel("softmax score (%); ✓ the right label; full colour: the label given", fontsize=9)
    tidy(axes.flat)
    save(figure, folder / FILE, measured)


def labels_at_stake(row: dict) -> tuple[str, str]:
    """FP32's label, and the one that most others gave instead."""
    given = [max(scores, key=lambda label: scores[label]) for scores in row["probabilities"].values()]
    others = [label for label in given if label != given[0]]
    return given[0], max(set(others), key=lambda label: (others.count(label), label))
