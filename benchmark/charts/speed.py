"""Charts of speed: times as fast, latency, headlines a second over batches and over cores, time by operator."""

from pathlib import Path

import numpy as np

from benchmark.charts.style import panel_title, per_thousand, save, tidy, title
from lab04 import labs
from lab04.compare.charts import pyplot

# Peers are told apart by shade and mark; colours are ours.
PEER_MARKS = ("s", "^", "v", "D", "P", "X", "<", ">")
PEER_SHADES = ("#444444", "#888888", "#666666", "#AAAAAA")


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
    axes[0, 0].set_title(f"Speed, batch 1, {panel_title(count)}", loc="left", fontsize=10)
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
        axis.set_title(f"{panel_title(count)}, batch 1", loc="left", fontsize=10)
    axes[0, 0].invert_yaxis()
    tidy(axes.flat)
    return figure


def draw_throughput(plt, rows: dict, threads: list[str], _measured: dict):
    """Headlines per second over batch size, with the range over rounds; each line has its mark and name at its end."""
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
                    marker=PEER_MARKS[peers.index(name) % len(PEER_MARKS)] if peer else "o",
                    markersize=4.5 if peer else 6,
                    linewidth=1 if peer else 2,
                    color=PEER_SHADES[peers.index(name) % len(PEER_SHADES)] if peer else row["colour"],
                    zorder=2 if peer else 3,
                )
                for batch, (least, most) in row.get("throughput_range", {}).get(count, {}).items():
                    axis.vlines(int(batch), least, most, color=row["colour"], linewidth=1, zorder=1)
                ends.append((list(rates.values())[-1], row))
        batches = [int(batch) for batch in rates]
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
        axis.set_xlim(batches[0] / 1.15, batches[-1] * (batches[-1] / batches[0]) ** (0.34 * len(threads)))
        axis.set_xlabel("batch size (headlines, sorted by length)")
        axis.set_title(panel_title(count), loc="left", fontsize=10)
        named.append((axis, batches[-1], ends))
    axes[0, 0].set_ylim(bottom=0)  # once all is drawn: it ends the scaling that the panels share
    axes[0, 0].set_ylabel("headlines per second")
    tidy(axes.flat)
    for axis, last, ends in named:
        name_ends(axis, last, ends, last * 1.5)
    return figure


def name_ends(axis, x: int, ends: list[tuple[float, dict]], name_x: float) -> None:
    """Write each line's name right of its end at `x`, at `name_x`, moved up where two would touch."""
    line = 0.042 * axis.get_ylim()[1]  # a line of text in the axis' own unit
    last = -line
    for rate, row in sorted(ends, key=lambda end: end[0]):
        last = max(rate, last + line)
        ours = row["group"] == "lab"
        axis.annotate(
            title(row),
            (x, rate),
            (name_x, last),
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


def draw_cores(plt, rows: dict, threads: list[str], _measured: dict):
    """Headlines per second of one process over its threads, at each one's best batch size; dotted: twice as many cores,
    twice as much."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    counts, ends = [int(count) for count in threads], []
    for row in rows.values():
        rates = [max(row["throughput"][count].values()) for count in threads if count in row["throughput"]]
        ours = row["group"] == "lab"
        axis.plot(counts, rates, marker="o", color=row["colour"], linewidth=2 if ours else 1.2, zorder=3 if ours else 2)
        axis.plot(counts, [rates[0] * n / counts[0] for n in counts], ":", color=row["colour"], linewidth=0.8, zorder=1)
        ends.append((rates[-1], row))
    axis.set_xticks(counts, counts)
    axis.set_xlim(counts[0] - 0.05 * counts[-1], counts[-1] + 0.7 * (counts[-1] - counts[0]))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("threads of one process (dotted: as much as a process on each core would do at best)")
    axis.set_ylabel("headlines per second, best batch size")
    tidy([axis])
    name_ends(axis, counts[-1], ends, counts[-1] + 0.12 * (counts[-1] - counts[0]))
    return figure


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
    save(figure, path, measured)
