"""What a reader of the README came for, from the runs of one machine: the six rows, which one to take, what it costs.

Every figure and every choice follows from the results, so that a new measurement may change the answer.
"""

from collections.abc import Callable

from benchmark import results, tables
from benchmark.machines import fastest, processor
from benchmark.markdown import NOT_MEASURED, per_second, table
from benchmark.rows import made_by
from lab04.compare.report import counted

PLAIN = ("torch-int8", "onnxruntime-int8")
RECHECKED, TUTORIAL = "onnxruntime-int8-recheck", "torch-tutorial"
COLUMNS = ("size (MB)", "p50 (ms)", "p95 (ms)", "speed", "of the floor", "changed", "changed by a batch", "macro-F1")


def six_rows(measured: dict, _real: dict | None) -> str:
    """FP32, both INT8 artefacts, a faster one of ours, the rechecked one, the fastest other recipe, PyTorch's own."""
    backends = measured["backends"]
    best = fastest({name: row for name, row in backends.items() if row["group"] == "peer" and name != TUTORIAL})
    ours = fastest({name: row for name, row in backends.items() if row["group"] == "lab" and "rechecked" not in row})
    wanted = dict.fromkeys((results.REFERENCE, *PLAIN, ours, RECHECKED, best, TUTORIAL))
    names = [name for name in wanted if name in backends]
    rows = [
        [f"{backends[name]['name']} {backends[name]['precision']}"]
        + [tables.COLUMNS[column](measured, backends[name], "1") for column in COLUMNS]
        for name in names
    ]
    return tables.measured_columns(["", *COLUMNS], rows)


def which_one(measured: dict, real: dict | None) -> str:
    """What to take for which traffic; `measured` has all cores' figures, `real` the labels that changed."""
    fp32, most = measured["backends"][results.REFERENCE], str(max(measured["settings"]["threads"]))
    ours = {name: row for name, row in measured["backends"].items() if row["group"] == "lab"}
    answering = {name: row for name, row in ours.items() if "rechecked" not in row}
    rows = []

    def answer(what: str, name: str, figures: str) -> None:
        rows.append([what, f"{ours[name]['name']}: `{command(name)}`", figures])

    if timed := [name for name, row in answering.items() if "1" in row["latency"]]:
        quickest = min(timed, key=lambda name: ours[name]["latency"]["1"]["p50_ms"])
        times = [row["latency"]["1"][measure] for row in (ours[quickest], fp32) for measure in ("p50_ms", "p95_ms")]
        said = "p50 {:.1f} ms, p95 {:.1f}; FP32 {:.1f} and {:.1f}".format(*times)
        labels = real or measured
        if (changed := labels["backends"].get(quickest, {}).get("consistency", {}).get("changed")) is not None:
            said += f"; {changed} of {labels['settings']['headlines']:,} labels changed"
        answer("one text at a time", quickest, said)
        for what, threads in (("a large file: a process on each core", "1"), ("one process on all cores", most)):
            fastest = max(timed, key=lambda name: best_rate(ours[name], threads)[0])
            (rate, batch), (slow, _) = best_rate(ours[fastest], threads), best_rate(fp32, threads)
            each = "a core" if threads == "1" else f"with {counted(int(threads), 'thread')}"
            if rate and (threads != "1" or what.startswith("a large")):
                answer(what, fastest, f"{rate:.0f} headlines/s {each} in batches of {batch}; FP32 {per_second(slow)}")
    rows += no_neighbour_may_change(real or measured)
    rows += no_label_may_change(real or measured)
    if weighed := [name for name, row in ours.items() if row["cold_start"]]:
        least = min(weighed, key=lambda name: ours[name]["cold_start"]["memory_mb"])
        megabytes = [row["cold_start"]["memory_mb"] for row in (ours[least], fp32)]
        answer("little memory", least, "{:.0f} MB at most; FP32 {:.0f}".format(*megabytes))
    engine: dict = next((row for name, row in ours.items() if name.startswith("tensorrt")), {"latency": {}})
    on_gpu = tables.time_of(engine, "1", "p50_ms")
    said = "not measured by us" if on_gpu == NOT_MEASURED else f"p50 {on_gpu} ms"
    rows.append(["an NVIDIA GPU", "TensorRT: `lab04-nvidia.py`", said])
    return table(["you have", "take", f"on {processor(measured)}"], rows)


def no_neighbour_may_change(measured: dict) -> list[list[str]]:
    """The quickest artefact in batches whose answers are the same to the bit in any, beside what the plain one does."""
    backends, found = measured["backends"], {}
    for name, row in backends.items():
        close, rate = row.get("consistency", {}), best_rate(row, "1")[0]
        if row["group"] == "lab" and "rechecked" not in row and close.get("batch_max_change") == 0 and rate:
            found[name] = rate
    plain = backends.get(PLAIN[1], {}).get("consistency", {})
    if not found or "batch_changed" not in plain:
        return []
    name = max(found, key=lambda name: found[name])
    figures = "{:.0f} headlines/s a core; 0 of {:,} labels changed by a batch, {} by {}'s".format(
        found[name], measured["settings"]["headlines"], plain["batch_changed"], backends[PLAIN[1]]["name"]
    )
    return [["a server: no request may change another's", f"{backends[name]['name']}: `{command(name)}`", figures]]


def no_label_may_change(measured: dict) -> list[list[str]]:
    """The quickest artefact that rechecks and changed no label, with what that does to its slowest requests."""
    backends, found = measured["backends"], {}
    for name, row in backends.items():
        kept = "rechecked" in row and row.get("consistency", {}).get("changed") == 0
        plain = backends.get(name.removesuffix("-recheck"), {"latency": {}})
        if kept and row["latency"].get("1") and plain["latency"].get("1"):
            found[name] = (row["latency"]["1"]["p95_ms"], plain["latency"]["1"]["p95_ms"])
    if not found:
        return []
    name = min(found, key=lambda name: found[name])
    figures = "0 of {:,} changed; p95 {:.1f} ms in place of {:.1f}".format(
        measured["settings"]["headlines"], *found[name]
    )
    return [["no label may change", f"{backends[name]['name']}: `{command(name)}`", figures]]


def command(name: str) -> str:
    """The lab script and options that make a row's artefact."""
    lab, options = made_by(name)
    return " ".join((lab.script, *(f"--{option}" for option in options)))


def best_rate(row: dict, threads: str) -> tuple[float, str]:
    """Most headlines a second at a thread count, and the batch size they were reached at; 0 if not measured."""
    return max(((rate, batch) for batch, rate in row["throughput"].get(threads, {}).items()), default=(0.0, ""))


OF_A_MACHINE: dict[str, Callable[[dict, dict | None], str]] = {
    "six-rows": six_rows,
    "which-one": which_one,
}
