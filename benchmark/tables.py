"""The tables of one run, from its results.json: printed at its end, and shown by the documents.

A column of something that was not measured is left out, so that older results show what they have.
"""

from collections.abc import Callable

from benchmark import environment, results
from benchmark.markdown import NOT_MEASURED, figure, per_second, ratio, span, table
from lab04 import one_line
from lab04.compare.report import counted

# The course lab this one follows, as its README states it: BERT-base, machine not named.
ORIGINAL = {
    "torch": ("PyTorch Quantised", 174, "~400", "3/3"),
    "onnxruntime": ("ONNX Quantised", 106, "~13", "3/3"),
    "tensorrt": ("TensorRT", 211, "~4", "0/3"),
}


def hardware(measured: dict) -> str:
    """One paragraph: machine, software, data, and how quiet the machine was."""
    here, settings, load = measured["environment"], measured["settings"], measured["load"] or {}
    libraries = ", ".join(
        f"{name} {here['libraries'][name]}"
        for name in ("torch", "onnxruntime", "transformers")
        if name in here["libraries"]
    )
    commit = (
        f"commit {here['git']['commit'][:10]}{' with changes' * here['git']['dirty']}" if here["git"] else "no commit"
    )
    busy = environment.busy(load, here["cores"])
    quiet = f" **The machine was busy**: {busy}." if busy else quiet_as_far_as_known(load)
    data = (
        "random weights, speed only"
        if settings["random_weights"]
        else f"{settings['data']}, {settings['headlines']} headlines"
    )
    return (
        f"Measured on {environment.hardware_line(here)}; {here['os']}; Python {here['python']}, {libraries}; {commit}; "
        f"weights {settings['weights_sha256'][:10]}; {data}{'; a quick run' * settings['quick']}.{quiet}"
    )


def quiet_as_far_as_known(load: dict) -> str:
    """What is on record of other users of the cores."""
    shares = (("stolen_share", "other virtual machines"), ("others_share", "other programs"))
    known = [f"by {who} {load[key]:.1%}" for key, who in shares if load.get(key) is not None]
    return f" Taken of the cores' time during the run: {', '.join(known)}." if known else ""


def summary(measured: dict, threads: str | None = None) -> str:
    """Size, latency and speed-up at a thread count, the first by default, beside changed labels and macro-F1.

    Never speed alone. Where they were measured: the share of the floor, and the labels that a batch changes.
    """
    settings = measured["settings"]
    threads, scored = threads or str(settings["threads"][0]), not settings["random_weights"]
    columns = [column for column in COLUMNS if scored or column not in QUALITY_COLUMNS]
    rows = [
        [f"{row['name']} {row['precision']}"] + [cell(measured, row, threads) for cell in (COLUMNS[c] for c in columns)]
        for row in measured["backends"].values()
    ]
    note = f"Batch 1, {counted(int(threads), 'thread')}, tokenisation apart; speed: PyTorch eager FP32 = 1"
    if scored:
        note += f"; changed: labels against FP32 PyTorch.{''.join(rechecks(measured, threads))}"
    else:
        note += ". The weights are random, so no accuracy is shown."
    reasons = [f"{row['name']}: {row['reason']}." for row in measured["backends"].values() if row["reason"]]
    if busy := environment.busy(measured["load"], measured["environment"]["cores"]):
        reasons.append(f"**Measured on a busy machine**: {busy}.")
    return "\n\n".join([measured_columns(["backend", *columns], rows), note, *reasons])


COLUMNS: dict[str, Callable[[dict, dict, str], str]] = {
    "size (MB)": lambda _, row, __: figure(row["model_mb"], ".1f"),
    "p50 (ms)": lambda _, row, threads: time_of(row, threads, "p50_ms"),
    "p95 (ms)": lambda _, row, threads: time_of(row, threads, "p95_ms"),
    "speed": lambda _, row, threads: ratio(row["latency"].get(threads, {})),
    "of the floor": lambda measured, row, threads: share_of_floor(measured, row, threads),
    "changed": lambda _, row, __: figure(row.get("consistency", {}).get("changed"), "d"),
    "changed by a batch": lambda _, row, __: figure(row.get("consistency", {}).get("batch_changed"), "d"),
    "macro-F1": lambda _, row, __: figure(100 * row["quality"]["macro_f1"] if "quality" in row else None, ".1f"),
}
QUALITY_COLUMNS = ("changed", "changed by a batch", "macro-F1")
NOT_ALWAYS_MEASURED = ("of the floor", "changed by a batch", "its largest logit change")


def measured_columns(head: list[str], rows: list[list[str]]) -> str:
    """A table without those of NOT_ALWAYS_MEASURED that no row has."""
    kept = [
        column
        for column, name in enumerate(head)
        if name not in NOT_ALWAYS_MEASURED or any(row[column] != NOT_MEASURED for row in rows)
    ]
    return table([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def time_of(row: dict, threads: str, measure: str) -> str:
    return figure(row["latency"].get(threads, {}).get(measure), ".2f")


def share_of_floor(measured: dict, row: dict, threads: str) -> str:
    """The least time that this processor could take for the network's products, as a share of the median time."""
    floor, speed = measured.get("floor_ms"), row["latency"].get(threads)
    return f"{floor / speed['p50_ms']:.0%}" if floor and speed and threads == "1" else NOT_MEASURED


def rechecks(measured: dict, threads: str) -> list[str]:
    """What rechecking costs on average, which percentiles do not show: the mean time beside the plain artefact's."""
    sentences = []
    for name, row in measured["backends"].items():
        if "rechecked" not in row:
            continue
        plain = measured["backends"].get(name.removesuffix("-recheck"), {"latency": {}})
        times = [backend["latency"].get(threads, {}).get("mean_ms") for backend in (row, plain)]
        mean = "; mean {:.2f} ms, without recheck {:.2f}".format(*times) if all(times) else ""
        sentences.append(
            f" {row['name']}: {row['rechecked']:.1%} of the headlines ran again in its second graph; its size is "
            f"both's{mean}."
        )
    return sentences


def changed(rows: list[dict], most: int = 3) -> str:
    """The first of `results.changed_rows`: headline, FP32's label and the labels others gave it."""
    lines = [f"Labels changed on {counted(len(rows), 'headline')}, all in {results.CHANGED}; the clearest to FP32:"]
    for row in rows[:most]:
        fp32 = row[f"{results.REFERENCE}_label"]
        names = [key.removesuffix("_label") for key in row if key.endswith("_label") and key != "true_label"]
        others = [f"{name}: {row[f'{name}_label']}" for name in names if row[f"{name}_label"] != fp32]
        lines.append(
            f"  {one_line(row['headline'])!r} {fp32} {row[f'{results.REFERENCE}_score']:.2f}; {', '.join(others)}"
        )
    return "\n".join(lines)


def latency(measured: dict) -> str:
    """Every percentile and the mean at every thread count, with intervals."""
    rows = [
        [row["name"], row["precision"], threads]
        + [f"{speed['p50_ms']:.2f} ({span(speed['p50_interval_ms'], '.2f')})"]
        + [figure(speed.get(key), ".2f") for key in ("p90_ms", "p95_ms", "p99_ms", "min_ms", "mean_ms")]
        + [f"{ratio(speed)} ({span(speed['speed_up_interval'], '.2f')})", str(speed["samples"])]
        for row in measured["backends"].values()
        for threads, speed in row["latency"].items()
    ]
    head = ["backend", "precision", "threads", "p50 (ms)", "p90", "p95", "p99", "min", "mean", "× FP32 PyTorch", "n"]
    return table(head, rows)


def quality(measured: dict) -> str:
    """Accuracy, macro-F1 and calibration, with 95 % intervals in percent."""
    rows = [
        [row["name"], row["precision"]]
        + [f"{100 * q['macro_f1']:.1f} ({span(q['macro_f1_interval'], '.1f', 100)})"]
        + [f"{100 * q['accuracy']:.1f} ({span(q['accuracy_interval'], '.1f', 100)})", f"{100 * q['ece']:.1f}"]
        for row in measured["backends"].values()
        if (q := row.get("quality"))
    ]
    return table(["backend", "precision", "macro-F1 (95 %)", "accuracy % (95 %)", "ECE %"], rows)


def labels(measured: dict) -> str:
    """F1 of every label, in percent, of FP32 PyTorch and the lab's own backends."""
    scored = [
        row
        for name, row in measured["backends"].items()
        if row.get("quality") and (name == results.REFERENCE or row["group"] in ("lab", "check"))
    ]
    names = scored[0]["quality"]["f1"] if scored else {}
    rows = [[name] + [f"{100 * row['quality']['f1'][name]:.1f}" for row in scored] for name in names]
    return table(["label"] + [f"{row['name']} {row['precision']}" for row in scored], rows)


def consistency(measured: dict) -> str:
    """What each backend changed against the FP32 weights."""
    rows = [
        [row["name"], row["precision"]]
        + [f"{c['agreement']:.2%} ({span(c['agreement_interval'], '.2f', 100)})", str(c["changed"])]
        + [f"{c['right_to_wrong']} / {c['wrong_to_right']}", f"{c['mcnemar_p']:.2f}"]
        + [f"{100 * c['macro_f1_change']:+.2f} ({span(c['macro_f1_change_interval'], '+.2f', 100)})"]
        + [f"{c['mean_change']:.4f} / {c['max_change']:.4f}", f"{c['kl']:.1e}"]
        + [figure(c.get("batch_changed"), "d"), figure(c.get("batch_max_change"), ".3f")]
        for name, row in measured["backends"].items()
        if (c := row.get("consistency")) and name != results.REFERENCE
    ]
    head = ["backend", "precision", "agreement (95 %)", "changed", "right→wrong / wrong→right", "McNemar p"]
    head += [
        "macro-F1 change (95 %)",
        "probability change, mean / max",
        "KL (nats)",
        "changed by a batch",
        "its largest logit change",
    ]
    return measured_columns(head, rows)


def throughput(measured: dict) -> str:
    """Headlines per second by batch size and thread count."""
    batches = [str(batch) for batch in measured["settings"]["amounts"]["batches"]]
    rows = [
        [row["name"], row["precision"], threads] + [per_second(rates.get(batch)) for batch in batches]
        for row in measured["backends"].values()
        for threads, rates in row["throughput"].items()
    ]
    return table(["backend", "precision", "threads"] + [f"batch {batch}" for batch in batches], rows)


def cold_start(measured: dict) -> str:
    """From a fresh process to its first prediction, in seconds, and its peak memory."""
    rows = [
        [row["name"], row["precision"]]
        + [f"{c[key] / 1e3:.2f}" for key in ("total_ms", "process_ms", "imports_ms", "load_ms", "first_ms")]
        + [f"{c['memory_mb']:.0f}"]
        for row in measured["backends"].values()
        if (c := row["cold_start"])
    ]
    head = ["backend", "precision", "first prediction (s)", "process", "imports", "load", "first call"]
    return table([*head, "peak memory (MB)"], rows)


def original(measured: dict) -> str:
    """The course lab's own table, beside this run's rows for the same three backends."""
    threads = str(measured["settings"]["threads"][0])
    rows = []
    for kind, (name, size, milliseconds, correct) in ORIGINAL.items():
        found: dict = next(
            (row for key, row in measured["backends"].items() if key.startswith(kind) and row["group"] == "lab"), {}
        )
        ours = figure(found.get("latency", {}).get(threads, {}).get("p50_ms"), ".1f")
        rows.append([name, str(size), figure(found.get("model_mb"), ".1f"), milliseconds, ours, correct])
    head = ["backend", "size, original (MB)", "size here (MB)", "latency, original (ms)", "p50 here (ms)"]
    return table([*head, "correct, original"], rows)


OF_A_RUN = {
    "hardware": hardware,
    "summary": summary,
    "latency": latency,
    "quality": quality,
    "labels": labels,
    "consistency": consistency,
    "throughput": throughput,
    "cold-start": cold_start,
    "original": original,
}
