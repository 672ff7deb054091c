"""How long answers take the more clients ask at once: the chart of docs/serving.md."""

from pathlib import Path

from benchmark import environment
from lab04.compare import charts

COLOURS = {"http": "#0072B2", "ray": "#E69F00"}  # of the servers that are charted


def save(path: Path, measured: dict) -> None:
    """p50 and p99 of the answers over the number of clients, for what is charted of the servers."""
    plt = charts.pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for name, colour in COLOURS.items():
        if not (server := measured["servers"].get(name)):
            continue
        rows = [row for row in server["load"] if row["p50_ms"] is not None]
        for key, style in (("p50_ms", "o-"), ("p99_ms", "o--")):
            label = f"{server['title']}, {key.removesuffix('_ms')}"
            axes.plot([row["clients"] for row in rows], [row[key] for row in rows], style, color=colour, label=label)
    axes.axhline(measured["model"]["p50_ms"], color="#555555", linestyle=":", label="the model alone, one headline")
    ticks = sorted({row["clients"] for server in measured["servers"].values() for row in server["load"]})
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)  # also where nothing was answered
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(number) for number in ticks])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="clients, one headline a request", ylabel="answered within (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.supxlabel(environment.hardware_line(measured["environment"]), fontsize=7, color="#555555")
    charts.save(figure, path)
