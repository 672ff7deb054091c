"""The figures of README.md and docs/: every one is written by this module from results/*/results.json.

    <!-- results:FOLDER/TABLE --> … <!-- /results -->             one of TABLES, from results/FOLDER/results.json
    <!-- results:all/by-cpu --> … <!-- /results -->               a row for every folder of results; or by-cpu-brief
    <!-- results:FOLDER/backends.torch-int8.model_mb:.1f --> … <!-- /results -->      a single value in a sentence

`python -m benchmark --readme` fills them in; a test fails when a file says anything else.
"""

import json
import re
from pathlib import Path

from benchmark import environment, results
from lab04 import ROOT, LabError, one_line

BLOCK = re.compile(r"(<!-- results:([^/\s]+)/(\S+) -->)(.*?)(<!-- /results -->)", re.DOTALL)
NOT_MEASURED = "–"
SLOWER_ARTEFACTS = ("082ad3e",)  # commits measured before the artefacts became faster; the by-CPU table marks them
INT8 = ("torch-int8", "onnxruntime-int8")
FILES = ("README.md", "docs/measuring.md", "docs/int8.md", "docs/tensorrt.md", "docs/serving.md", "examples/README.md")

# The course lab this one follows, as its README states it: BERT-base, machine not named.
ORIGINAL = {
    "torch": ("PyTorch Quantised", 174, "~400", "3/3"),
    "onnxruntime": ("ONNX Quantised", 106, "~13", "3/3"),
    "tensorrt": ("TensorRT", 211, "~4", "0/3"),
}


def update(path: Path, root: Path) -> None:
    """Fill a file in place. Raises LabError if it cannot be read or written."""
    try:
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text, root), encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot update {path}: {error.strerror}") from error
    print(f"Wrote {path}")


def fill(text: str, root: Path) -> str:
    """The text with the content of every marked block made anew from the results below `root`."""

    def replace(match: re.Match) -> str:
        opening, folder, what, _, closing = match.groups()
        if folder == "all":
            return f"{opening}\n{by_cpu(root, brief=what == 'by-cpu-brief')}\n{closing}"
        measured = results.load(root / folder) | {"printed": printed(root, folder)}
        if what in TABLES:
            return f"{opening}\n{TABLES[what](measured)}\n{closing}"
        return f"{opening}{value(measured, what)}{closing}"

    return BLOCK.sub(replace, text)


def value(measured: dict, path: str) -> str:
    """One value of results.json by dotted path and format: `backends.torch-int8.model_mb:.1f`."""
    keys, _, form = path.partition(":")
    found = measured
    try:
        for key in keys.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return format(found, form)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LabError(
            f"the text asks for {path}, which is neither in the results nor one of {', '.join(TABLES)}"
        ) from error


def printed(root: Path, folder: str) -> str:
    """What `make lab` printed on the hardware of a folder; empty where that was not kept.

    It is the make-lab.txt of the folder that bears the hardware's name alone, without a tag.
    """
    files = [path for path in root.glob("*/make-lab.txt") if folder.startswith(path.parent.name)]
    return files[0].read_text(encoding="utf-8") if files else ""


def correct_of_three(output: str) -> dict[str, str]:
    """Right answers to the lab's three headlines by backend, from the summary that `predict.py` printed."""
    found = re.findall(r"^(\S.*?)  .*?(\d+ of \d+)", output.partition("\nSummary: ")[2], re.MULTILINE)
    return {name: count.replace(" of ", "/") for name, count in found}


def excerpt(measured: dict) -> str:
    """The first headline as `predict.py` printed it, of its first backend. Raises LabError if that was not kept."""
    if "\nPredicting: " not in measured["printed"]:
        raise LabError("no make-lab.txt beside these results: keep there what `make lab` prints")
    paragraphs = measured["printed"].partition("\nPredicting: ")[2].split("\n\n")
    return "\n\n".join(["```\nPredicting: " + paragraphs[0], *paragraphs[1:2]]) + "\n```"


def by_cpu(root: Path, brief: bool = False) -> str:
    """Every run on trained weights: machine, FP32 time, × of both INT8 back ends and of the best peer, best throughput.

    Earlier weights and earlier artefacts are marked; `brief` leaves rows of the former out, and where rows come from.
    """
    trained = json.loads((ROOT / "lora-news" / "adapter" / "training.json").read_text(encoding="utf-8"))
    rows = []
    for path in sorted(root.glob(f"*/{results.RESULTS}")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        if "backends" not in measured or "settings" not in measured or measured["settings"]["random_weights"]:
            continue
        settings, here, backends = measured["settings"], measured["environment"], measured["backends"]
        threads = str(settings["threads"][0])
        speeds = {name: row["latency"].get(threads, {}) for name, row in backends.items()}
        peers = {name: speeds[name] for name, row in backends.items() if row["group"] == "peer" and speeds[name]}
        best = max(peers, key=lambda name: peers[name].get("speed_up", 0), default=None)
        rates = [
            rate for name in INT8 for rate in backends.get(name, {}).get("throughput", {}).get(threads, {}).values()
        ]
        earlier = settings["weights_sha256"] != trained["weights_sha256"]
        if earlier and brief:
            continue
        commit = here["git"]["commit"][:7] if here["git"] else NOT_MEASURED
        data = settings["data"].split("_")[0].removesuffix(".csv")
        rows.append(
            [
                f"{here['cpu']} ({environment.strongest(here['isa'])})",
                data + ", earlier" * commit.startswith(SLOWER_ARTEFACTS),
            ]
            + [f"{speeds[results.REFERENCE].get('p50_ms', float('nan')):.1f}"]
            + [ratio(speeds.get(name, {})) for name in INT8]
            + [f"{ratio(peers[best])} {backends[best]['name']}" if best else NOT_MEASURED]
            + [f"{max(rates):.0f}" if rates else NOT_MEASURED]
            + [commit]
            + [settings["weights_sha256"][:7] + " (earlier)" * earlier]
        )
    head = ["CPU", "data", "FP32 ms", "PyTorch", "ONNX", "best peer", "per s", "commit", "weights"]
    return table(head[:-2], [row[:-2] for row in rows]) if brief else table(head, rows)


# --- Tables -----------------------------------------------------------------------------------------------


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
    stolen = load.get("stolen_share")
    quiet = "" if stolen is None else f" Other virtual machines took {stolen:.1%} of its time during the run."
    data = (
        "random weights, speed only"
        if settings["random_weights"]
        else f"{settings['data']}, {settings['headlines']} headlines"
    )
    return (
        f"Measured on {environment.hardware_line(here)}; {here['os']}; Python {here['python']}, {libraries}; {commit}; "
        f"weights {settings['weights_sha256'][:10]}; {data}{'; a quick run' * settings['quick']}.{quiet}"
    )


def summary(measured: dict) -> str:
    """Size, latency and speed-up at the first thread count, beside changed labels and macro-F1. Never speed alone."""
    settings = measured["settings"]
    threads, scored = str(settings["threads"][0]), not settings["random_weights"]
    rows = []
    for row in measured["backends"].values():
        speed, quality, close = row["latency"].get(threads), row.get("quality"), row.get("consistency")
        cells = [f"{row['name']} {row['precision']}", figure(row["model_mb"], ".1f")]
        cells += [f"{speed['p50_ms']:.2f}", f"{speed['p95_ms']:.2f}", ratio(speed)] if speed else [NOT_MEASURED] * 3
        if scored:
            cells += [str(close["changed"]) if close else NOT_MEASURED]
            cells += [f"{100 * quality['macro_f1']:.1f}" if quality else NOT_MEASURED]
        rows.append(cells)
    reasons = "".join(f"\n\n{row['name']}: {row['reason']}." for row in measured["backends"].values() if row["reason"])
    rechecked = "".join(
        f" {row['name']}: {row['rechecked']:.1%} of the headlines ran again in its second graph; its size is both's"
        f"{mean_time(measured, row, threads)}."
        for row in measured["backends"].values()
        if "rechecked" in row
    )
    head = ["backend", "size (MB)", "p50 (ms)", "p95 (ms)", "speed"]
    note = f"Batch 1, {threads} thread{'s' * (threads != '1')}, tokenisation apart; speed: PyTorch eager FP32 = 1"
    if not scored:
        return f"{table(head, rows)}\n\n{note}. The weights are random, so no accuracy is shown.{reasons}"
    note += f"; changed: labels against FP32 PyTorch.{rechecked}"
    return f"{table([*head, 'changed', 'macro-F1'], rows)}\n\n{note}{reasons}"


def mean_time(measured: dict, row: dict, threads: str) -> str:
    """What rechecking costs on average, which percentiles do not show: the mean time beside plain ONNX INT8's."""
    plain = measured["backends"].get(INT8[1], {"latency": {}})
    times = [backend["latency"].get(threads, {}).get("mean_ms") for backend in (row, plain)]
    return "; mean {:.2f} ms, without recheck {:.2f}".format(*times) if all(times) else ""


def lab(measured: dict) -> str:
    """The original lab's columns, and what quantisation cost on these headlines. Never speed alone."""
    threads, rows, correct = str(measured["settings"]["threads"][0]), [], correct_of_three(measured["printed"])
    for row in measured["backends"].values():
        if row["group"] == "peer":
            continue
        speed, rates = row["latency"].get(threads), row["throughput"].get(threads, {})
        quality, close = row.get("quality"), row.get("consistency")
        rows.append(
            [row["name"], row["precision"], "GPU" if row["name"] == "TensorRT" else "CPU"]
            + [figure(row["model_mb"], ".1f"), figure(speed and speed["p50_ms"], ".2f"), figure(rates.get("1"), ".0f")]
            + [correct.get(row["name"], NOT_MEASURED), str(close["changed"]) if close else NOT_MEASURED]
            + [figure(quality and 100 * quality["macro_f1"], ".1f")]
        )
    reasons = "".join(f"\n\n{row['name']}: {row['reason']}." for row in measured["backends"].values() if row["reason"])
    head = ["backend", "precision", "device", "MB", "ms", "per s", "of the 3", "changed", "macro-F1"]
    return table(head, rows) + reasons


def changed(rows: list[dict], most: int = 3) -> str:
    """The first of `results.changed_rows`: headline, FP32's label and the labels others gave it."""
    lines = [f"Labels changed on {len(rows)} headlines, all in {results.CHANGED}; the clearest to FP32:"]
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
        for name, row in measured["backends"].items()
        if (c := row.get("consistency")) and name != results.REFERENCE
    ]
    head = ["backend", "precision", "agreement (95 %)", "changed", "right→wrong / wrong→right", "McNemar p"]
    return table([*head, "macro-F1 change (95 %)", "probability change, mean / max", "KL (nats)"], rows)


def throughput(measured: dict) -> str:
    """Headlines per second by batch size and thread count."""
    batches = [str(batch) for batch in measured["settings"]["amounts"]["batches"]]
    rows = [
        [row["name"], row["precision"], threads] + [figure(rates.get(batch), ".0f") for batch in batches]
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


def ablation(measured: dict) -> str:
    """What each step of the INT8 preparation is worth (benchmark/steps.py)."""
    rows = [
        [row["step"], f"{100 * row['error']:.1f}", str(row["changed"]), f"{row['speed']:.2f}×"]
        for row in measured["steps"]
    ]
    head = ["PyTorch INT8", "logit error (% of spread)", f"changed, of {measured['headlines']:,}", "speed"]
    return table(head, rows)


def ideas(measured: dict) -> str:
    """What a headline costs without each of the engine's ideas."""
    rows = [[row["idea"], *(figure(row["without"][batch], ".2f") for batch in ("1", "6"))] for row in measured["ideas"]]
    return table(["without it, times as much CPU time", "batch 1", "batch 6"], rows)


def families(measured: dict) -> str:
    """Which families of networks both INT8 labs served, and how (benchmark/families.py)."""
    rows = []
    for row in measured["families"]:
        served = [row[name] for name in ("torch", "onnxruntime")]
        fp32 = [f"{check['fp32_ms']:.1f}" for check in served if "fp32_ms" in check]
        cells = [row["family"], f"{row['parameters_m']:.0f}", fp32[0] if fp32 else NOT_MEASURED]
        for check in served:
            kept = "refused" if "refused" in check else f"{check['agreement']:.1%}"
            cells += [ratio(check), kept]
        rows.append(cells)
    head = ["family", "M", "FP32 ms", "PyTorch", "same", "ONNX", "same"]
    return table(head, rows)


def elsewhere(measured: dict) -> str:
    """What runs the ONNX artefact outside this Python, and how (benchmark/studies/elsewhere.py)."""
    rows = [
        [
            row["title"],
            row["versions"],
            f"{row['same']} of {row['headlines']}",
            f"{row['difference']:.1g}" if row["difference"] >= 1e-6 else "0",
            "emulated" if row["emulated"] else f"{row['ms']:.1f}",
        ]
        for row in measured["targets"].values()
    ]
    head = ["where", "versions", "same labels", "largest difference of a probability", "ms a headline"]
    hardware_ = environment.hardware_line(measured["environment"])
    return (
        f"Seen on {hardware_}. Labels and probabilities against Python's there; 0 is below 1e-6.\n\n{table(head, rows)}"
    )


def original(measured: dict) -> str:
    """The course lab's own table, beside this run's rows for the same three backends."""
    threads = str(measured["settings"]["threads"][0])
    rows = []
    for kind, (name, size, milliseconds, correct) in ORIGINAL.items():
        found = next(
            (row for key, row in measured["backends"].items() if key.startswith(kind) and row["group"] == "lab"), {}
        )
        ours = figure(found.get("latency", {}).get(threads, {}).get("p50_ms"), ".1f")
        rows.append([name, str(size), figure(found.get("model_mb"), ".1f"), milliseconds, ours, correct])
    head = ["backend", "size, original (MB)", "size here (MB)", "latency, original (ms)", "p50 here (ms)"]
    return table([*head, "correct, original"], rows)


def serving(measured: dict) -> str:
    """Answers/s, p50 and p99 by clients, of every server (benchmark/studies/serving.py)."""
    rows = [
        [server["title"], str(row["clients"]), f"{row['per_second']:.0f}"]
        + [figure(row["p50_ms"], ".1f"), figure(row["p99_ms"], ".1f"), str(row["refused"])]
        for server in measured["servers"].values()
        for row in server["load"]
    ]
    return table(["server", "clients", "answers/s", "p50 (ms)", "p99 (ms)", "refused"], rows)


def serving_run(measured: dict) -> str:
    """One paragraph: where and how the serving figures were measured, and the model's own."""
    here, model = measured["environment"], measured["model"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    commit = f"commit {here['git']['commit'][:10]}{' with changes' * here['git']['dirty']}" if here["git"] else ""
    return (
        f"Measured on {measured['date']} on {environment.hardware_line(here)}, load average {measured['load_before']} "
        f"before the start; {measured['artefact']['title']}, one thread; {versions}; {commit}. The model alone needs "
        f"{model['p50_ms']:.2f} ms for a headline, from text to probabilities, and does {model['per_second']:.0f} a "
        f"second in batches of 32. `wrk` on the same machine, {measured['seconds']} s a row."
    )


def serving_memory(measured: dict) -> str:
    """Memory of the process that holds the app, before and after many requests."""
    rows = [
        [server["title"], f"{memory['before_mb']:.0f}", f"{memory['after_mb']:.0f}", f"{memory['requests']:,}"]
        for server in measured["servers"].values()
        if (memory := server["memory"])
    ]
    return table(["server", "before (MB)", "after (MB)", "requests between"], rows)


def serving_overload(measured: dict) -> str:
    """Four times as many clients as find room, by what a refused one does next."""
    overload = measured["overload"]
    rows = [
        [does, f"{row['per_second']:.0f}", f"{row['refused']:,}", str(row["lost"])]
        + [figure(row["refusal_p50_ms"], ".1f"), figure(row["refusal_p99_ms"], ".1f")]
        for does, row in (("waits as `Retry-After` says", overload["patient"]), ("asks at once", overload["at_once"]))
    ]
    return table(["a refused client", "answers/s", "refused", "lost", "refused within (ms), p50", "p99"], rows)


def serving_file(measured: dict) -> str:
    """A file of headlines through Ray Data (examples/ray/classify.py)."""
    if not (file := measured.get("file")):
        return "Not measured on this machine."
    rows = [
        [f"`classify.py --workers {number}`", str(row["per_second"]), f"{row['changed']:,} of {file['headlines']:,}"]
        for number, row in file["workers"].items()
    ]
    return table(["", "headlines/s", "labels other than alone"], rows)


TABLES = {
    "hardware": hardware,
    "excerpt": excerpt,
    "lab": lab,
    "summary": summary,
    "latency": latency,
    "quality": quality,
    "labels": labels,
    "consistency": consistency,
    "throughput": throughput,
    "cold-start": cold_start,
    "original": original,
    "ablation": ablation,
    "families": families,
    "elsewhere": elsewhere,
    "serving": serving,
    "serving-run": serving_run,
    "serving-memory": serving_memory,
    "serving-overload": serving_overload,
    "serving-file": serving_file,
    "ideas": ideas,
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that reads as plain text too; columns of figures are right-aligned."""
    import tabulate

    tabulate.MIN_PADDING = 0  # else it widens every column by two beyond its header
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    right = [column > 0 and any(row[column][:1].isdigit() for row in rows) for column in range(len(head))]
    sides = ["right" if flush else "left" for flush in right]
    return tabulate.tabulate(rows, head, tablefmt="pipe", colalign=sides, disable_numparse=True)


def figure(number: float | None, form: str) -> str:
    return NOT_MEASURED if number is None else format(number, form)


def span(interval: list[float], form: str, scale: float = 1) -> str:
    """A 95 % interval as `low to high`."""
    return " to ".join(format(scale * end, form) for end in interval)


def ratio(speed: dict) -> str:
    return f"{speed['speed_up']:.2f}×" if "speed_up" in speed else NOT_MEASURED
