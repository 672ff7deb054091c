"""The overview: what quantisation buys and costs, every backend in one picture."""

import numpy as np

from benchmark.charts.style import per_thousand, tidy, title
from lab04.compare.report import counted

TICKS_MS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500)


def draw(plt, rows: dict, threads: list[str], measured: dict):
    """All in one: time across, labels changed up, size as area; the best place is the lower left.

    A line goes on to the 95th percentile; where it was measured, an upright one marks the floor of a core.
    """
    count = threads[0]
    rows = {name: row for name, row in rows.items() if count in row["latency"]}
    headlines = next(iter(rows.values()))["quality"]["headlines"]
    figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
    points = []
    for row in sorted(rows.values(), key=lambda row: -(row["model_mb"] or 0)):  # small discs in front of large ones
        x, y = row["latency"][count]["p50_ms"], per_thousand(row)
        ours = row["group"] == "lab"
        axes.scatter(x, y, s=14 * (row["model_mb"] or 1), color=row["colour"], alpha=0.9 if ours else 0.55, zorder=3)
        slow = row["latency"][count]["p95_ms"]
        axes.plot([x, slow], [y, y], color=row["colour"], linewidth=1.2, marker="|", markevery=[1], zorder=2)
        points.append((x, y, row, ours))
    floor = measured.get("floor_ms") if count == "1" else None
    low, high = min([x for x, *_ in points] + [floor] * bool(floor)), max(x for x, *_ in points)
    axes.set_xscale("log")
    axes.set_xlim(low / 2.8, high * 1.6)  # room for names on both sides
    top = max(y for _, y, *_ in points) or 1
    axes.set_ylim(-0.22 * top, 1.14 * top)  # room for a name below the discs that stand on zero
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.14 * top])
    ticks = [tick for tick in TICKS_MS if low / 2.8 < tick < high * 1.6]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if floor:
        axes.axvline(floor, color="#CC3311", linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            "the floor of this core",
            (floor, 1.12 * top),
            (-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=8,
            color="#CC3311",
        )
    axes.set_xlabel(
        f"milliseconds a headline, {counted(int(count), 'thread')}, logarithmic: "
        "disc the median, line to the 95th percentile"
    )
    axes.set_ylabel(f"labels changed per 1,000 headlines\n(against FP32, {headlines:,} headlines)")
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_title("What quantisation buys and costs: lower left is best; area = size of the model file", loc="left")
    tidy([axes])
    place_names(figure, axes, points, count)
    return figure


def place_names(figure, axes, points: list[tuple], count: str) -> None:
    """Name every point beside it, ours first and in bold, where the name covers neither a point nor another name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout decides where everything is
    pixels = figure.dpi / 72
    taken = []
    for x, y, row, _ in points:
        centre, radius = axes.transData.transform((x, y)), pixels * np.sqrt(14 * (row["model_mb"] or 1) / np.pi)
        taken.append(Bbox([centre - radius, centre + radius]))
    discs = dict(zip((id(row) for *_, row, _ in points), taken, strict=True))
    for x, y, row, _ in points:  # and the lines to the 95th percentiles
        ends = [axes.transData.transform((time, y)) for time in (x, row["latency"][count]["p95_ms"])]
        taken.append(Bbox([ends[0] - (0, 2), ends[1] + (0, 2)]))
    spots = [(side, step) for step in range(16) for side in ("right", "left", "above", "below")]
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
