"""The benchmark's charts, all drawn from results.json: PNG files for a README.

Bars start at zero, units are on the axes, the hardware is in the footer; colours are those of the lab's own charts,
safe for colour-blind readers, and a backend has the same one everywhere.
"""

from pathlib import Path

from benchmark.charts import labels, overview, speed
from benchmark.charts.style import colour, save
from lab04.compare.charts import pyplot

MOST_LABELS = 12  # a confusion matrix of more labels is unreadable at this size
GONE = ("size.png",)  # drawn by earlier versions


def save_all(folder: Path, measured: dict) -> list[Path]:
    """Draw every chart the results have data for; return the files."""
    threads = [str(count) for count in measured["settings"]["threads"]]
    rows = {name: row | {"colour": colour(name, row)} for name, row in measured["backends"].items()}

    def having(wanted):
        return {name: row for name, row in rows.items() if wanted(row)}

    timed = having(lambda row: any(row["latency"].get(count) for count in threads))
    scored = having(lambda row: row.get("quality"))
    several = having(lambda row: len(row["throughput"]) > 1)
    charts = {
        "overview.png": (overview.draw, {name: row for name, row in timed.items() if row.get("consistency")}),
        "speed-up.png": (speed.draw_speed_up, timed),
        "latency.png": (speed.draw_latency, timed),
        "throughput.png": (speed.draw_throughput, having(lambda row: row["throughput"])),
        "cores.png": (speed.draw_cores, several),
        "confusion.png": (labels.draw_confusion, scored if len(measured["settings"]["labels"]) <= MOST_LABELS else {}),
        "reliability.png": (labels.draw_reliability, scored),
        "border.png": (labels.draw_border, {n: r for n, r in rows.items() if labels.changed_by_us(r)}),
    }
    drawn = []
    for file in GONE:
        (folder / file).unlink(missing_ok=True)
    for file, (draw, content) in charts.items():
        (folder / file).unlink(missing_ok=True)  # an earlier run may have drawn what this one has no data for
        if content:
            save(draw(pyplot(), content, threads, measured), folder / file, measured)
            drawn.append(folder / file)
    return drawn
