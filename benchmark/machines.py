"""What all committed runs say together: a row for each machine, and what may be claimed on which processor.

Left out are quick looks, other people's models and runs that did not finish. Rows of earlier weights or artefacts,
and of a busy machine, say so.
"""

import json
from collections.abc import Callable
from pathlib import Path

from benchmark import environment, results
from benchmark.markdown import NOT_MEASURED, per_second, ratio, table
from lab04.read.classifier import DEFAULT_MODEL

INT8 = ("torch-int8", "onnxruntime-int8")
REAL = "real_headlines"  # what the name of the data nobody here wrote begins with
SIGNIFICANT = 0.05


def runs(root: Path) -> list[dict]:
    """The finished runs of the shipped weights that may be shown, in the order of their folders' names."""
    trained = json.loads((Path(DEFAULT_MODEL) / "training.json").read_text(encoding="utf-8"))
    found = []
    for path in sorted(root.glob(f"*/{results.RESULTS}")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        if "backends" not in measured or "settings" not in measured or not measured["finished"]:
            continue
        if measured["settings"]["random_weights"] or results.why_not_shown(measured):
            continue
        measured["earlier_weights"] = measured["settings"]["weights_sha256"] != trained["weights_sha256"]
        found.append(measured)
    for measured in found:
        measured["earlier_artefacts"] = artefact_bytes(measured) != artefact_bytes(newest(found))
    return found


def newest(found: list[dict]) -> dict:
    """The latest run of the shipped weights; those from before the date was noted count as the oldest."""
    return max(reversed(found), key=lambda run: (not run["earlier_weights"], run["environment"].get("date", "")))


def artefact_bytes(measured: dict) -> list[int]:
    """Sizes of the INT8 artefacts: a change of the recipe shows in them, the same build elsewhere does not."""
    sizes = [measured["backends"].get(name, {}).get("model_mb") for name in INT8]
    return [round(1e6 * size) for size in sizes if size]


def current(root: Path) -> list[dict]:
    """The latest run on real headlines of every processor, as far as it is of today's weights and artefacts."""
    by_cpu = {}
    for run in sorted(runs(root), key=lambda run: run["environment"].get("date", "")):
        if run["settings"]["data"].startswith(REAL) and not run["earlier_weights"] and not run["earlier_artefacts"]:
            by_cpu[run["environment"]["cpu"]] = run
    return list(by_cpu.values())


def on_real_headlines(root: Path, measured: dict) -> dict | None:
    """The run on real headlines of the same machine, if there is one."""
    here = measured["environment"]
    return next(
        (
            run
            for run in runs(root)
            if run["settings"]["data"].startswith(REAL)
            and (run["environment"]["cpu"], run["environment"]["cores"]) == (here["cpu"], here["cores"])
        ),
        None,
    )


def processor(measured: dict) -> str:
    here = measured["environment"]
    return f"{here['cpu']} ({environment.strongest(here['isa'])})"


# --- A row a machine --------------------------------------------------------------------------------------


def by_cpu(root: Path, brief: bool = False) -> str:
    """Every run: machine, FP32 time, × of both INT8 back ends and of the best peer, best throughput, origin.

    `brief` leaves out rows of earlier weights, and where rows come from.
    """
    rows = []
    for run in runs(root):
        if run["earlier_weights"] and brief:
            continue
        settings, here, backends = run["settings"], run["environment"], run["backends"]
        threads = str(settings["threads"][0])
        speeds = {name: row["latency"].get(threads, {}) for name, row in backends.items()}
        peers = {name: speeds[name] for name, row in backends.items() if row["group"] == "peer" and speeds[name]}
        best = max(peers, key=lambda name: peers[name].get("speed_up", 0), default=None)
        rates = [
            rate for name in INT8 for rate in backends.get(name, {}).get("throughput", {}).get(threads, {}).values()
        ]
        rows.append(
            [processor(run), data(run)]
            + [f"{speeds[results.REFERENCE].get('p50_ms', float('nan')):.1f}"]
            + [ratio(speeds.get(name, {})) for name in INT8]
            + [f"{ratio(peers[best])} {backends[best]['name']}" if best else NOT_MEASURED]
            + [per_second(max(rates, default=None))]
            + [here["git"]["commit"][:7] if here["git"] else NOT_MEASURED]
            + [settings["weights_sha256"][:7] + " (earlier)" * run["earlier_weights"]]
        )
    head = ["CPU", "data", "FP32 ms", "PyTorch", "ONNX", "best peer", "per s", "commit", "weights"]
    return table(head[:-2], [row[:-2] for row in rows]) if brief else table(head, rows)


def data(run: dict) -> str:
    """Whose headlines a run was on, and what is to be known of it beside its figures."""
    name = "real" if run["settings"]["data"].startswith(REAL) else run["settings"]["data"].removesuffix(".csv")
    marks = {
        "earlier artefacts": run["earlier_artefacts"],
        "busy machine": environment.busy(run["load"], run["environment"]["cores"]),
    }
    return ", ".join([name, *(mark for mark, true in marks.items() if true)])


# --- Claims -----------------------------------------------------------------------------------------------


def first_sentence(root: Path) -> str:
    """What quantisation buys and costs, over the processors measured with today's artefacts on real headlines."""
    found = current(root)
    if not found:
        return "No run of today's weights and artefacts on real headlines is in results/ yet."
    rows = [run["backends"][name] for run in found for name in INT8]
    speeds = [row["latency"]["1"]["speed_up"] for row in rows]
    sizes = [row["model_mb"] / run["backends"][results.REFERENCE]["model_mb"] for run in found for row in rows]
    headlines = found[0]["settings"]["headlines"]
    engines = [run["backends"]["torch-int8-this-cpu"] for run in found if "torch-int8-this-cpu" in run["backends"]]
    compiled = [row["latency"]["1"]["speed_up"] for row in engines if row["latency"].get("1")]
    changed = [row["consistency"]["changed"] for row in rows + engines]
    faster = f" Compiled for the processor it stands on, {span_of(compiled, '.1f')} times." if compiled else ""
    return (
        f"**Stored and computed in 8-bit whole numbers, this classifier of news headlines has {max(sizes):.0%} of its "
        f"size and is {span_of(speeds, '.1f')} times as fast.{faster}** Of {headlines:,} real headlines "
        f"{span_of(changed, 'd')} get another label than before. So measured on {listed(map(processor, found))}, "
        "one headline at a time, beside the 32-bit original in PyTorch."
    )


def label_claims(root: Path) -> str:
    """What rounding did to the labels of real headlines, by processor, and what may be said of it."""
    rows = []
    for run in current(root):
        for row in run["backends"].values():
            if row["group"] == "lab" and (close := row.get("consistency")):
                rows.append(
                    [processor(run), f"{row['name']} {row['precision']}", str(close["changed"])]
                    + [str(close["right_to_wrong"]), str(close["wrong_to_right"]), f"{close['mcnemar_p']:.2f}"]
                    + [verdict(close)]
                )
    head = ["CPU", "backend", "changed", "right became wrong", "wrong became right", "McNemar p", "what that is"]
    return table(head, rows)


def verdict(close: dict) -> str:
    """What the split of right and wrong changes is a sign of; nothing is claimed beyond McNemar's test."""
    if not close["changed"]:
        return "no label changed"
    if close["mcnemar_p"] >= SIGNIFICANT:
        return "no sign of harm or gain in so few"
    return "a sign of real harm" if close["right_to_wrong"] > close["wrong_to_right"] else "a sign of a real gain"


def speed_claims(root: Path) -> str:
    """The fastest rows for one headline, by processor: ours, the best other recipe, and how far apart they are."""
    rows = []
    for run in current(root):
        groups = [{n: row for n, row in run["backends"].items() if row["group"] == group} for group in ("lab", "peer")]
        best = [fastest(group) for group in groups]
        if all(best):
            ours, other = (run["backends"][name] for name in best)
            speeds = [row["latency"]["1"]["speed_up"] for row in (ours, other)]
            rows.append(
                [processor(run)]
                + [f"{row['name']}, {row['latency']['1']['p50_ms']:.2f} ms" for row in (ours, other)]
                + [f"{speeds[0] / speeds[1]:.2f}×"]
            )
    return table(["CPU", "our fastest", "fastest other recipe", "ours beside it"], rows)


def fastest(rows: dict[str, dict]) -> str | None:
    """The INT8 row that is most times as fast as FP32 for one headline on one thread; None if none was timed."""
    speeds = {
        name: row["latency"]["1"]["speed_up"]
        for name, row in rows.items()
        if row["precision"] == "INT8" and "speed_up" in row["latency"].get("1", {})
    }
    return max(speeds, key=lambda name: speeds[name], default=None)


def span_of(values: list, form: str) -> str:
    """The least and the greatest value, or the one they both are."""
    ends = [format(end, form) for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def listed(names) -> str:
    """`one`, `one and another`, `one, another and a third`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def brief(root: Path) -> str:
    return by_cpu(root, brief=True)


OF_ALL: dict[str, Callable[[Path], str]] = {
    "by-cpu": by_cpu,
    "by-cpu-brief": brief,
    "first-sentence": first_sentence,
    "label-claims": label_claims,
    "speed-claims": speed_claims,
}
