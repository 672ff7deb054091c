"""What the benchmark's charts share: colours, titles, axes, the line at the foot."""

from pathlib import Path

from benchmark import environment, results
from benchmark.rows import made_by
from lab04.compare import charts
from lab04.compare.report import counted

REFERENCE_GREY, ONNX_GREY, PEER_GREY = "#555555", "#999999", "#BBBBBB"


def colour(name: str, row: dict) -> str:
    """A backend's colour: the lab's own, or a grey for what it is compared with."""
    if row["group"] in ("reference", "peer"):
        return {"fp32-torch": REFERENCE_GREY, "fp32-onnx": ONNX_GREY}.get(name, PEER_GREY)
    lab, options = made_by(name)
    return lab.shown[options][1]


def title(row: dict) -> str:
    return f"{row['name']} {row['precision']}"


def panel_title(count: str) -> str:
    return counted(int(count), "thread")


def per_thousand(row: dict) -> float:
    """Labels changed against FP32 per 1,000 headlines."""
    return 1000 * row["consistency"]["changed"] / row["quality"]["headlines"]


def arrange(rows: dict, most: int) -> tuple[dict, int, int]:
    """The rows worth a panel each, FP32's and our own, and the columns, at most `most`, and lines for them."""
    rows = {name: row for name, row in rows.items() if name == results.REFERENCE or row["group"] in ("lab", "check")}
    columns = max(min(most, len(rows)), 1)
    return rows, columns, -(-len(rows) // columns)


def tidy(axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def save(figure, path: Path, measured: dict) -> None:
    """Save a figure with its hardware at the foot, and, if that was busy, a word of it."""
    here = measured["environment"]
    busy = environment.busy(measured.get("load"), here["cores"])
    foot = environment.hardware_line(here) + f"; busy: {busy}" * bool(busy)
    figure.supxlabel(foot, fontsize=7, color="#555555")
    charts.save(figure, path)
