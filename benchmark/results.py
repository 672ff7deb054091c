"""From raw measurements to results.json and CSV.

Everything in a results folder is derived from the run's journal (benchmark/journal.py).
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmark import environment, measures
from benchmark.journal import Journal
from lab04 import LabError
from lab04.artefact import contract
from lab04.run.scores import gaps, softmax

TIMES = ("mean_ms", *(f"p{percentile}_ms" for percentile in measures.PERCENTILES), "min_ms")

FORMAT = 1
RESULTS, CHANGED, FLOOR = "results.json", "changed.csv", "floor"  # FLOOR: in the name of a folder
GAP_BINS = 60
REFERENCE = "fp32-torch"  # every speed-up and every agreement is against this row


def summarise(journal: Journal) -> dict:
    """results.json of a journal: settings, environment, and every measure of every backend that has it so far."""
    start = journal.find("start")[0]
    truth = np.array(start["truth"])
    logits = {entry["id"]: np.array(entry["logits"]) for entry in journal.find("logits")}
    failures = {entry["id"]: entry["reason"] for entry in journal.find("failed")}
    fp32_gaps = gaps(logits[REFERENCE]) if REFERENCE in logits else np.empty(0)
    counts, edges = np.histogram(fp32_gaps, bins=GAP_BINS)
    rows = {}
    for backend in journal.find("backend"):
        name = backend["id"]
        row = rows[name] = {key: value for key, value in backend.items() if key not in ("unit", "id")}
        row["reason"] = failures.get(name)
        if name in logits:
            row["quality"] = measures.quality(truth, logits[name], start["settings"]["labels"])
            if REFERENCE in logits:
                row["consistency"] = measures.consistency(logits[REFERENCE], logits[name], truth)
                differ = logits[name].argmax(axis=1) != logits[REFERENCE].argmax(axis=1)
                row["changed_gaps"] = fp32_gaps[differ].tolist()
                for entry in journal.find("batched_logits", id=name)[-1:]:
                    row["consistency"] |= measures.batch_change(logits[name], np.array(entry["logits"]))
            entry = journal.find("logits", id=name)[-1]
            if "rechecked" in entry:
                row["rechecked"] = entry["rechecked"] / len(truth)
        row["latency"] = summarise_latency(journal, name)
        row["throughput"], row["throughput_range"] = summarise_throughput(journal, name)
        row["cold_start"] = summarise_cold_starts(journal, name)
    tokenisation = journal.find("tokenisation")
    return {
        "format": FORMAT,
        "finished": bool(journal.find("end")),
        "settings": start["settings"],
        "environment": start["environment"],
        "load": (journal.find("end") or [{}])[-1].get("load"),
        "tokenisation": measures.latency([tokenisation[0]["ms"]]) if tokenisation else None,
        # Best minus second FP32 logit of every headline: where a label can change at all.
        "fp32_gaps": {"edges": edges.tolist(), "headlines": counts.tolist()},
        "backends": rows,
    }


def summarise_latency(journal: Journal, name: str) -> dict:
    """Per thread count: `measures.latency`, and the speed-up over the reference in the rounds both ran."""
    by_threads = defaultdict(list)
    for entry in journal.find("latency"):
        if name in entry["ms"]:
            by_threads[str(entry["threads"])].append((entry["ms"].get(REFERENCE), entry["ms"][name]))
    summary = {}
    for threads, rounds in by_threads.items():
        summary[threads] = measures.latency([samples for _, samples in rounds])
        both = [(reference, samples) for reference, samples in rounds if reference]
        if both:
            summary[threads] |= measures.speed_up([a for a, _ in both], [b for _, b in both])
    return summary


def summarise_throughput(journal: Journal, name: str) -> tuple[dict, dict]:
    """Per thread count and batch size, over rounds: the median of headlines per second, and its least and most."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in journal.find("throughput"):
        for batch, per_second in entry["per_second"].get(name, {}).items():
            samples[str(entry["threads"])][batch].append(per_second)

    def over_rounds(summary):
        return {
            threads: {batch: summary(batches[batch]) for batch in sorted(batches, key=int)}
            for threads, batches in samples.items()
        }

    return over_rounds(lambda rates: float(np.median(rates))), over_rounds(lambda rates: [min(rates), max(rates)])


def summarise_cold_starts(journal: Journal, name: str) -> dict | None:
    """Medians over fresh processes: ms from start to first prediction, its parts, and the peak memory in MB."""
    entries = journal.find("cold_start", id=name)
    if not entries:
        return None
    parts = ("total_ms", "process_ms", "imports_ms", "load_ms", "first_ms", "memory_mb")
    return {part: float(np.median([e[part] for e in entries])) for part in parts} | {"processes": len(entries)}


def write(folder: Path, journal: Journal) -> dict:
    """Write results.json and the CSV files of a journal; return the results as `load` does."""
    results = summarise(journal)
    try:
        save_json(folder / RESULTS, results)
        write_csv(folder / "summary.csv", summary_rows(results))
        write_csv(folder / "throughput.csv", throughput_rows(results))
        write_csv(folder / "latency.csv", sample_rows(journal))
    except OSError as error:
        raise LabError(f"cannot write {folder}: {error.strerror}") from error
    return load(folder)


def changed_rows(journal: Journal, texts: list[str]) -> list[dict]:
    """The headlines whose FP32 label one of the lab's own backends changed, largest FP32 gap first.

    `texts` are the headlines of the quality stage. Scores are probabilities.
    """
    start = journal.find("start")[0]
    labels, truth = start["settings"]["labels"], start["truth"]
    logits = {entry["id"]: np.array(entry["logits"]) for entry in journal.find("logits")}
    if REFERENCE not in logits:
        return []
    probabilities = {name: softmax(values) for name, values in logits.items()}
    ids = {name: values.argmax(axis=1) for name, values in logits.items()}
    own = [row["id"] for row in journal.find("backend") if row["group"] in ("lab", "check") and row["id"] in logits]
    fp32_gaps = gaps(logits[REFERENCE])
    changed = [index for index in range(len(texts)) if any(ids[name][index] != ids[REFERENCE][index] for name in own)]
    rows = []
    for index in sorted(changed, key=lambda index: -fp32_gaps[index]):
        row = {
            "headline": texts[index],
            "true_label": labels[truth[index]],
            "fp32_gap": round(float(fp32_gaps[index]), 4),
        }
        for name in [REFERENCE, *(name for name in logits if name != REFERENCE)]:
            best = ids[name][index]
            row |= {f"{name}_label": labels[best], f"{name}_score": round(float(probabilities[name][index, best]), 4)}
        rows.append(row)
    return rows


def write_changed(folder: Path, rows: list[dict]) -> None:
    """Write `changed_rows` beside the results; where no label changed, remove an earlier run's."""
    try:
        (folder / CHANGED).unlink(missing_ok=True)
        write_csv(folder / CHANGED, rows)
    except OSError as error:
        raise LabError(f"cannot write {folder}: {error.strerror}") from error


def load(folder: Path) -> dict:
    """results.json of a folder, with `floor_ms` if that of its machine and weights was measured (benchmark/floor.py).

    Raises LabError if it is missing or of another format.
    """
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if results["format"] != FORMAT:
            raise ValueError(f"format {results['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"no readable {folder / RESULTS} ({error}): run python -m benchmark") from error
    if (machine := results.get("environment")) and "settings" in results:
        for path in folder.parent.glob(f"{environment.folder_name(machine, FLOOR)}*/{RESULTS}"):
            floor = json.loads(path.read_text(encoding="utf-8"))
            if floor["weights_sha256"] == results["settings"]["weights_sha256"]:
                results["floor_ms"] = floor["floor_ms"]
    return results


def ours(measured: dict) -> bool:
    """Whether a run is of the adapter that the lab ships; of a stranger's model, no document may speak as of ours."""
    settings = measured["settings"]
    return settings.get("shipped", settings["model"] == "adapter")


def why_not_shown(measured: dict) -> str:
    """Why a run's figures go into no document, in words; empty if they may. Random weights show speed alone."""
    if measured["settings"]["quick"]:
        return "a quick look"
    if not ours(measured) and not measured["settings"]["random_weights"]:
        return "another model than the lab's"
    return ""


def save_json(path: Path, value: dict) -> None:
    """Write JSON in place of a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(contract.render(value), encoding="utf-8")
    temporary.replace(path)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that share their keys, which become the header; no rows, no file."""
    if rows:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def summary_rows(results: dict) -> list[dict]:
    """One row per backend and thread count with every single-valued measure; empty where not measured."""
    rows = []
    for name, row in results["backends"].items():
        for threads in map(str, results["settings"]["threads"]):
            speed, quality = row["latency"].get(threads, {}), row.get("quality", {})
            close, cold = row.get("consistency", {}), row["cold_start"] or {}
            rows.append(
                {"backend": name, "precision": row["precision"], "threads": threads, "model_mb": row["model_mb"]}
                | {key: speed.get(key) for key in (*TIMES, "samples")}
                | {key: speed.get(key) for key in ("speed_up",)}
                | {key: quality.get(key) for key in ("headlines", "accuracy", "macro_f1", "ece")}
                | {key: close.get(key) for key in ("agreement", "changed", "right_to_wrong", "wrong_to_right")}
                | {key: close.get(key) for key in ("mcnemar_p", "mean_change", "max_change", "kl", "loyalty")}
                | {key: cold.get(key) for key in ("total_ms", "imports_ms", "load_ms", "first_ms", "memory_mb")}
                | {"rechecked": row.get("rechecked"), "reason": row["reason"]}
            )
    return rows


def throughput_rows(results: dict) -> list[dict]:
    """One row per backend, thread count and batch size."""
    return [
        {"backend": name, "threads": threads, "batch": batch, "headlines_per_second": round(rate, 2)}
        for name, row in results["backends"].items()
        for threads, batches in row["throughput"].items()
        for batch, rate in batches.items()
    ]


def sample_rows(journal: Journal) -> list[dict]:
    """Every timed call: where and when it ran, how many tokens the headline has, how long it took."""
    return [
        {"threads": e["threads"], "round": e["round"], "backend": name, "tokens": tokens, "ms": round(ms, 4)}
        for e in journal.find("latency")
        for name, samples in e["ms"].items()
        for tokens, ms in zip(e["tokens"], samples, strict=True)
    ]
