"""The benchmark's charts, all drawn from results.json: PNG files for a README.

Bars start at zero, units are on the axes, the hardware is in the footer; colours are those of `charts`, safe for
colour-blind readers, and a backend has the same one everywhere.
"""

from pathlib import Path

import numpy as np

from benchmark import environment, results
from lab04 import labs
from lab04.compare import charts
from lab04.compare.charts import pyplot, save

REFERENCE_GREY, ONNX_GREY, PEER_GREY = "#555555", "#999999", "#BBBBBB"
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
MOST_LABELS = 12  # a confusion matrix of more labels is unreadable at this size


def save_all(folder: Path, measured: dict) -> list[Path]:
    """Draw every chart the results have data for; return the files."""
    drawn = []
    threads = [str(count) for count in measured["settings"]["threads"]]
    rows = {name: row | {"colour": colour(name, row)} for name, row in measured["backends"].items()}
    timed = {name: row for name, row in rows.items() if any(row["latency"].get(count) for count in threads)}
    scored = {name: row for name, row in rows.items() if row.get("quality")}
    sized = {name: row for name, row in rows.items() if row["model_mb"]}
    both = {name: row for name, row in timed.items() if row.get("consistency")}
    for file, draw, content in (
        ("overview.png", draw_overview, both),
        ("speed-up.png", draw_speed_up, timed),
        ("latency.png", draw_latency, timed),
        ("throughput.png", draw_throughput, {name: row for name, row in rows.items() if row["throughput"]}),
        ("size.png", draw_size, sized),
        (
            "confusion.png",
            draw_confusion,
            {n: r for n, r in scored.items() if len(r["quality"]["confusion"]) <= MOST_LABELS},
        ),
        ("reliability.png", draw_reliability, scored),
        ("border.png", draw_border, {n: r for n, r in rows.items() if n != results.REFERENCE and changed_by_us(r)}),
    ):
        (folder / file).unlink(missing_ok=True)  # an earlier run may have drawn what this one has no data for
        if content:
            figure = draw(pyplot(), content, threads, measured)
            figure.supxlabel(environment.hardware_line(measured["environment"]), fontsize=7, color="#555555")
            save(figure, folder / file)
            drawn.append(folder / file)
    return drawn


def colour(name: str, row: dict) -> str:
    """A backend's colour: the lab's own, or a grey for what it is compared with."""
    if row["group"] in ("reference", "peer"):
        return {"fp32-torch": REFERENCE_GREY, "fp32-onnx": ONNX_GREY}.get(name, PEER_GREY)
    return charts.colour(row["name"], name.split("-")[0])


def title(row: dict) -> str:
    return f"{row['name']} {row['precision']}"


def draw_overview(plt, rows: dict, threads: list[str], measured: dict):
    """All in one: time across, labels changed up, size as area; the best place is the lower left."""
    count = threads[0]
    rows = {name: row for name, row in rows.items() if count in row["latency"]}
    headlines = next(iter(rows.values()))["quality"]["headlines"]
    figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
    points = []
    for row in sorted(rows.values(), key=lambda row: -(row["model_mb"] or 0)):  # small discs in front of large ones
        x, y = row["latency"][count]["p50_ms"], per_thousand(row)
        ours = row["group"] == "lab"
        axes.scatter(x, y, s=14 * (row["model_mb"] or 1), color=row["colour"], alpha=0.9 if ours else 0.55, zorder=3)
        points.append((x, y, row, ours))
    axes.set_xscale("log")
    low, high = min(x for x, *_ in points), max(x for x, *_ in points)
    axes.set_xlim(low / 2.8, high * 1.6)  # room for names on both sides
    top = max(y for _, y, *_ in points) or 1
    axes.set_ylim(-0.12 * top, 1.14 * top)
    ticks = [
        tick for tick in (0.5, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500) if low / 2.8 < tick < high * 1.6
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        f"milliseconds a headline (median, {count} thread{'s' * (count != '1')}, logarithmic): left is faster"
    )
    axes.set_ylabel(f"labels changed per 1,000 headlines\n(against FP32, {headlines:,} headlines)")
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_title("What quantisation buys and costs: lower left is best; area = size of the model file", loc="left")
    tidy([axes])
    place_names(figure, axes, points)
    return figure


def place_names(figure, axes, points: list[tuple]) -> None:
    """Name every point beside it, ours first and in bold, where the name covers neither a point nor another name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout decides where everything is
    pixels = figure.dpi / 72
    taken = []
    for x, y, row, _ in points:
        centre, radius = axes.transData.transform((x, y)), pixels * np.sqrt(14 * (row["model_mb"] or 1) / np.pi)
        taken.append(Bbox([centre - radius, centre + radius]))
    discs = dict(zip((id(row) for *_, row, _ in points), taken, strict=True))
    spots = [(side, step) for step in range(9) for side in ("right", "left", "above", "below")]
    for x, y, row, ours in sorted(points, key=lambda point: not point[3]):
        disc, words = discs[id(row)], f"{title(row)}, {row['model_mb']:.0f} MB"
        for side, step in spots:
            away = offset(side, step, disc.width / 2 / pixels)
            name = axes.annotate(
                words,
                (x, y),
                away,
                textcoords="offset points",
                ha={"right": "left", "left": "right"}.get(side, "center"),
                va="center",
                fontsize=10 if ours else 8.5,
                color=row["colour"] if ours else "#333333",
                weight="bold" if ours else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},  # over other names' lines
                zorder=5,
            )
            box = name.get_window_extent().padded(1)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if step:  # too far off to be taken for the disc's own
                    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7}
                    axes.annotate("", (x, y), away, textcoords="offset points", arrowprops=line, zorder=4)
                break
            name.remove()  # and after the last spot there is no room: a name over another makes both unreadable


def offset(side: str, step: int, radius: float) -> tuple[float, float]:
    """Points from a disc's centre to its name: beside it, or with `step` further up or down in turn."""
    away = (radius + 4, 0) if side == "right" else (-radius - 4, 0)
    rise = 11 * ((step + 1) // 2) * (1 if step % 2 else -1)
    if side in ("above", "below"):
        return 0, (radius + 8 + 11 * step) * (1 if side == "above" else -1)
    return away[0], rise


def per_thousand(row: dict) -> float:
    """Labels changed against FP32 per 1,000 headlines."""
    return 1000 * row["consistency"]["changed"] / row["quality"]["headlines"]


def draw_speed_up(plt, rows: dict, threads: list[str], measured: dict):
    """Left: times faster than FP32 PyTorch, with interval; right: labels changed against it, on the same lines."""
    close = {name: row["consistency"] for name, row in rows.items() if row.get("consistency")}
    figure, axes = plt.subplots(
        1, 1 + bool(close), figsize=(10, 1.6 + 0.42 * len(rows)), sharey=True, layout="constrained", squeeze=False
    )
    count, places = threads[0], range(len(rows))
    speeds = [row["latency"].get(count, {}) for row in rows.values()]
    values = [speed.get("speed_up", 0) for speed in speeds]
    errors = [np.abs(np.subtract(s["speed_up_interval"], s["speed_up"])) if "speed_up" in s else (0, 0) for s in speeds]
    bars = axes[0, 0].barh(places, values, color=[row["colour"] for row in rows.values()], xerr=np.transpose(errors))
    # Labels stand right of the interval's end, not of the bar's.
    for bar, value, error in zip(bars, values, errors, strict=True):
        axes[0, 0].annotate(
            f"{value:.2f}×",
            (value + error[1], bar.get_y() + bar.get_height() / 2),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes[0, 0].axvline(1, color="#555555", linewidth=0.8, linestyle=":")
    axes[0, 0].set_yticks(places, [title(row) for row in rows.values()])
    axes[0, 0].set_xlim(0, 1.18 * max(value + error[1] for value, error in zip(values, errors, strict=True)))
    axes[0, 0].set_xlabel("times as fast as FP32 PyTorch")
    axes[0, 0].set_title(f"Speed, batch 1, {count} thread{'s' * (count != '1')}", loc="left", fontsize=10)
    axes[0, 0].invert_yaxis()
    if close:
        changed = [per_thousand(row) if name in close else 0 for name, row in rows.items()]
        bars = axes[0, 1].barh(places, changed, color=[row["colour"] for row in rows.values()])
        axes[0, 1].bar_label(bars, [f"{number:.1f}" for number in changed], padding=3, fontsize=8)
        axes[0, 1].set_xlim(0, 1.18 * max([*changed, 1]))
        headlines = next(iter(rows.values()))["quality"]["headlines"]
        axes[0, 1].set_xlabel("labels changed per 1,000 headlines")
        axes[0, 1].set_title(f"Cost, against FP32 on {headlines:,} headlines", loc="left", fontsize=10)
    tidy(axes.flat)
    return figure


def draw_latency(plt, rows: dict, threads: list[str], _measured: dict):
    """Box from the 25th to the 75th percentile, line at the median, whiskers from the 5th to the 95th."""
    figure, axes = plt.subplots(
        1, len(threads), figsize=(10, 1.6 + 0.42 * len(rows)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, count in zip(axes.flat, threads, strict=True):
        for place, row in enumerate(rows.values()):
            if count in row["latency"]:
                quantiles = row["latency"][count]["quantiles_ms"]
                low, q1, median, q3, high = (quantiles[percent - 1] for percent in (5, 25, 50, 75, 95))
                box = {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high}
                axis.bxp(
                    [box],
                    positions=[place],
                    orientation="horizontal",
                    widths=0.6,
                    showfliers=False,
                    patch_artist=True,
                    boxprops={"facecolor": row["colour"]},
                    medianprops={"color": "black"},
                )
                axis.annotate(
                    f"median {median:.2f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
        axis.set_yticks(range(len(rows)), [title(row) for row in rows.values()])
        axis.set_xlim(
            0, 1.35 * max(row["latency"][count]["quantiles_ms"][94] for row in rows.values() if count in row["latency"])
        )
        axis.set_xlabel("ms per headline (5th, 25th, 50th, 75th, 95th percentile)", fontsize=9)
        axis.set_title(f"{count} thread{'s' * (count != '1')}, batch 1", loc="left", fontsize=10)
    axes[0, 0].invert_yaxis()
    tidy(axes.flat)
    return figure


def draw_throughput(plt, rows: dict, threads: list[str], _measured: dict):
    """Headlines per second over batch size; each line has its name at its end, and greys a line style each."""
    figure, axes = plt.subplots(1, len(threads), figsize=(10, 5.4), sharey=True, layout="constrained", squeeze=False)
    peers = [name for name, row in rows.items() if row["group"] == "peer"]
    named = []
    for axis, count in zip(axes.flat, threads, strict=True):
        ends = []
        for name, row in rows.items():
            if rates := row["throughput"].get(count, {}):
                peer = name in peers
                axis.plot(
                    [int(batch) for batch in rates],
                    list(rates.values()),
                    marker="." if peer else "o",
                    linestyle=LINES[peers.index(name) % len(LINES)] if peer else "-",
                    linewidth=1.2 if peer else 2,
                    color="#888888" if peer else row["colour"],
                    zorder=2 if peer else 3,
                )
                ends.append((list(rates.values())[-1], row))
        batches = [int(batch) for batch in rates]
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
        axis.set_xlim(batches[0] / 1.15, batches[-1] * (batches[-1] / batches[0]) ** (0.34 * len(threads)))
        axis.set_xlabel("batch size (headlines, sorted by length)")
        axis.set_title(f"{count} thread{'s' * (count != '1')}", loc="left", fontsize=10)
        named.append((axis, batches[-1], ends))
    axes[0, 0].set_ylim(bottom=0)  # once all is drawn: it ends the scaling that the panels share
    axes[0, 0].set_ylabel("headlines per second")
    tidy(axes.flat)
    for axis, last, ends in named:
        name_ends(axis, last, ends)
    return figure


def name_ends(axis, x: int, ends: list[tuple[float, dict]]) -> None:
    """Write each line's name at its right end, moved up where two would touch."""
    line = 0.042 * axis.get_ylim()[1]  # a line of text in the axis' own unit
    last = -line
    for rate, row in sorted(ends, key=lambda end: end[0]):
        last = max(rate, last + line)
        ours = row["group"] == "lab"
        axis.annotate(
            title(row),
            (x, rate),
            (x * 1.5, last),
            va="center",
            fontsize=8,
            color=row["colour"] if ours else "#333333",
            weight="bold" if ours else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "#BBBBBB",
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def draw_size(plt, rows: dict, _threads: list[str], _measured: dict):
    """Model files in MB."""
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.38 * len(rows)), layout="constrained")
    sizes = [row["model_mb"] for row in rows.values()]
    bars = axis.barh(range(len(rows)), sizes, color=[row["colour"] for row in rows.values()])
    axis.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [title(row) for row in rows.values()])
    axis.set_xlim(0, 1.12 * max(sizes))
    axis.set_xlabel("model file (MB)")
    axis.invert_yaxis()
    tidy([axis])
    return figure


def draw_confusion(plt, rows: dict, _threads: list[str], measured: dict):
    """Truth by prediction, in headlines, one matrix a backend; shade is the share of the row."""
    labels = measured["settings"]["labels"]
    rows, columns, lines = arrange(rows)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 3.6 * columns, 1.3 + 3.6 * lines), sharey=True, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows.values(), strict=False):
        counts = np.array(row["quality"]["confusion"])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (line, column), number in np.ndenumerate(counts):
            if number:
                ink = "white" if shares[line, column] > 0.5 else "black"
                axis.text(column, line, number, ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(
            range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False
        )
        axis.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        axis.set_title(title(row), loc="left", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("predicted label (headlines; shade: share of the true label)", fontsize=7)
    axes[0, 0].set_ylabel("true label")
    return figure


def draw_reliability(plt, rows: dict, _threads: list[str], _measured: dict):
    """Accuracy over confidence in the bins of the calibration error; dots grow with the bin's count."""
    rows, columns, lines = arrange(rows)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1 + 2.8 * columns, 1.1 + 2.8 * lines),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows.values(), strict=False):
        bins = row["quality"]["reliability"]
        axis.plot([0, 100], [0, 100], color="#555555", linewidth=0.8, linestyle=":")
        axis.scatter(
            [100 * b["confidence"] for b in bins],
            [100 * b["accuracy"] for b in bins],
            s=[8 + 300 * b["count"] / row["quality"]["headlines"] for b in bins],
            color=row["colour"],
            alpha=0.8,
        )
        axis.set_title(f"{title(row)}\nECE {100 * row['quality']['ece']:.1f} %", loc="left", fontsize=9)
        axis.set_xlim(0, 105)
        axis.set_ylim(0, 105)
    for axis in axes[:, 0]:
        axis.set_ylabel("correct (%)")
    for axis in axes[-1]:
        axis.set_xlabel("confidence (%)")
    tidy(axes.flat)
    return figure


def changed_by_us(row: dict) -> bool:
    """Whether a row is one of the lab's own backends that has its changed labels on record."""
    return row["group"] in ("lab", "check") and "changed_gaps" in row


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


def arrange(rows: dict) -> tuple[dict, int, int]:
    """The rows worth a panel each, FP32 and the lab's own, and the columns and lines to set them in."""
    rows = {name: row for name, row in rows.items() if name == results.REFERENCE or row["group"] in ("lab", "check")}
    columns = min(4, len(rows))
    return rows, columns, -(-len(rows) // columns)


def tidy(axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def save_profile(path: Path, measured: dict) -> None:
    """Save `benchmark.studies.profile`'s microseconds by kind of operator, a panel a back end on one scale."""
    plt = pyplot()
    rows = measured["backends"]
    figure, axes = plt.subplots(
        1, len(rows), figsize=(6 * len(rows), 4.2), sharex=True, layout="constrained", squeeze=False
    )
    for panel, (name, row) in zip(axes[0], rows.items(), strict=True):
        kinds = row["operators_us"]
        bars = panel.barh(range(len(kinds)), kinds.values(), color=labs.of_backend(row["backend"]).shown[()][1])
        total = sum(kinds.values())
        panel.bar_label(bars, [f"{us:.0f} µs, {us / total:.0%}" for us in kinds.values()], padding=3, fontsize=8)
        panel.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_xlabel("µs a headline, by the runtime's own profiler")
        panel.set_title(name)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(environment.hardware_line(measured["environment"]), fontsize=7, color="#555555")
    save(figure, path)
