"""Charts of the labels: which are taken for which, how far to trust a score, where the changed ones lie."""

import numpy as np

from benchmark import results
from benchmark.charts.style import PEER_GREY, arrange, tidy, title


def draw_confusion(plt, rows: dict, _threads: list[str], measured: dict):
    """FP32's truth by prediction, shaded by the share of the true label; then what each of ours does otherwise."""
    labels = measured["settings"]["labels"]
    same = {name: row for name, row in rows.items() if not row.get("consistency", {}).get("changed", 1)}
    same.pop(results.REFERENCE, None)
    rows, columns, lines = arrange({name: row for name, row in rows.items() if name not in same}, 2)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.9 + 4 * columns, 0.9 + 3.8 * lines), sharey=True, layout="constrained", squeeze=False
    )
    first = np.array(next(iter(rows.values()))["quality"]["confusion"])
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for place, (axis, row) in enumerate(zip(axes.flat, rows.values(), strict=False)):
        counts = np.array(row["quality"]["confusion"])
        if place:
            draw_differences(axis, counts - first)
            axis.set_title(f"{title(row)}: against FP32", loc="left", fontsize=11)
        else:
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            write_cells(axis, counts, "d", shares > 0.5)
            axis.set_title(f"{title(row)}: headlines", loc="left", fontsize=11)
        axis.set_xticks(
            range(len(labels)), labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=10, parse_math=False
        )
        axis.set_yticks(range(len(labels)), labels, fontsize=10, parse_math=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("true label", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("predicted label", fontsize=11)
    if unchanged := [title(row) for row in arrange(same, 1)[0].values()]:
        figure.suptitle(f"No label changed: {', '.join(unchanged)}", fontsize=9, x=0.01, ha="left")
    return figure


def draw_differences(axis, differences: np.ndarray) -> None:
    """Headlines more (orange) or fewer (blue) in each cell; right ones are on the diagonal."""
    from matplotlib.patches import Rectangle

    most = max(np.abs(differences).max(), 1)
    axis.imshow(differences, cmap="PuOr_r", vmin=-2 * most, vmax=2 * most, aspect="auto")
    write_cells(axis, differences, "+d", np.zeros(differences.shape, bool))
    for place in range(len(differences)):
        corner = (place - 0.5, place - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#999999", linewidth=0.7, zorder=3))


def write_cells(axis, counts: np.ndarray, form: str, dark: np.ndarray) -> None:
    for (line, column), number in np.ndenumerate(counts):
        if number:
            ink = "white" if dark[line, column] else "black"
            axis.text(column, line, format(number, form), ha="center", va="center", fontsize=10, color=ink, zorder=2)


def draw_reliability(plt, rows: dict, _threads: list[str], _measured: dict):
    """Accuracy over confidence in the bins of the calibration error; each bin says how many headlines it holds."""
    rows, columns, lines = arrange(rows, 3)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.6 + 3.6 * columns, 0.6 + 3.5 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows.values(), strict=False):
        bins = row["quality"]["reliability"]
        axis.plot([0, 100], [0, 100], color="#555555", linewidth=0.8, linestyle=":")
        for bin_ in bins:
            x, y, count = 100 * bin_["confidence"], 100 * bin_["accuracy"], bin_["count"]
            axis.scatter(x, y, s=12 + 300 * count / row["quality"]["headlines"], color=row["colour"], alpha=0.8)
            below = y > 15 and y < x
            axis.annotate(
                str(count),
                (x, y),
                (0, -9 if below else 9),
                textcoords="offset points",
                ha="right" if x > 90 else "center",
                va="top" if below else "bottom",
                fontsize=7.5,
                color="#333333",
            )
        axis.set_title(f"{title(row)}\nECE {100 * row['quality']['ece']:.1f} %", loc="left", fontsize=10)
        axis.set_xlim(0, 105)
        axis.set_ylim(-4, 114)
        axis.set_yticks(range(0, 101, 20))
        axis.set_xlabel("confidence (%)", fontsize=9)
        axis.set_ylabel("correct (%); figures: headlines", fontsize=9)
    tidy(axes.flat)
    return figure


def changed_by_us(row: dict) -> bool:
    """Whether a row is one of the lab's own backends that has its changed labels on record."""
    return row["group"] in ("lab", "check") and bool(row.get("changed_gaps"))


def draw_border(plt, rows: dict, _threads: list[str], measured: dict):
    """Above: all headlines by their FP32 gap; below, on the same axis: the ones whose label each backend changed."""
    gaps = measured["fp32_gaps"]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 3.4 + 0.38 * len(rows)), sharex=True, layout="constrained", height_ratios=(3, 0.6 + len(rows))
    )
    above.stairs(gaps["headlines"], gaps["edges"], fill=True, color=PEER_GREY)
    above.set_ylabel("headlines")
    above.set_title(f"All {sum(gaps['headlines']):,} headlines", loc="left", fontsize=10)
    for place, row in enumerate(rows.values()):
        changed = row["changed_gaps"]
        below.plot(changed, [place] * len(changed), "|", color=row["colour"], markersize=14)
    below.set_yticks(range(len(rows)), [f"{title(row)}: {len(row['changed_gaps'])}" for row in rows.values()])
    below.set_ylim(len(rows) - 0.5, -0.5)
    below.set_title("Headlines whose label changed", loc="left", fontsize=10)
    below.set_xlabel("FP32 gap: best minus second logit")
    below.set_xlim(left=0)
    tidy((above, below))
    return figure
