"""The tables of the studies, each from the results.json that its study wrote."""

from benchmark import environment
from benchmark.markdown import NOT_MEASURED, figure, ratio, table


def ablation(measured: dict) -> str:
    """What each step of the INT8 preparation is worth (benchmark/studies/steps.py)."""
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
    """Which families of networks both INT8 labs served, and how (benchmark/studies/families.py)."""
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


def million(measured: dict) -> str:
    """What a million headlines in a file cost (benchmark/studies/million.py)."""
    minutes: dict[str, list[str]] = {}
    for run in measured["runs"]:
        minutes.setdefault(run["title"], []).append(f"{run['minutes_for_a_million']:.0f}")
    taken = ", ".join(f"{' and '.join(times)} with {title}" for title, times in minutes.items())
    cores, here = " and ".join(map(str, sorted({run["cores"] for run in measured["runs"]}))), measured["environment"]
    return (
        f"A million headlines in a file take `predict.py --csv`, in minutes on {cores} cores: {taken}. The file had "
        f"{measured['headlines']:,}, on {here['cpu']} ({environment.strongest(here['isa'])})."
    )


def excerpt(measured: dict) -> str:
    """The first of the lab's headlines as `predict.py` prints it, of its first backend."""
    said = measured["predicted"]
    name, answer = next(iter(said["backends"].items()))
    best = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:5]
    lines = [
        f"Predicting: {said['text']!r}",
        "",
        f"[{name}]: {answer['label']} ({answer['id']}) | {answer['ms'] / 1e3:.4f} sec",
    ]
    lines += ["Top 5 Predictions:", *(f"  - {label:<12} {score:.4f}" for label, score in best)]
    return "\n".join(["```", *lines, "```"])


def python_versions(measured: dict) -> str:
    """With which Python and PyTorch the tests passed (benchmark/studies/this_python.py)."""
    rows = [
        [row["python"], row["torch"], str(row["passed"])]
        + [f"{row['failed']}" + f" ({row.get('note')})" * ("note" in row), str(row["not_run"]), str(row["commit"])]
        for row in measured["runs"]
    ]
    return table(["Python", "PyTorch", "tests passed", "failed", "not run", "commit"], rows)


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
    seen_on = environment.hardware_line(measured["environment"])
    how = f"Seen on {seen_on}. Labels and probabilities against Python's there; 0 is below 1e-6."
    return f"{how}\n\n{table(head, rows)}"


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


def static(measured: dict) -> str:
    """Dynamic and static INT8 on texts near and far (benchmark/studies/static.py)."""
    rows = [
        [f"{row['texts']} ({row['count']:,})", row["artefact"], f"{100 * row['error']:.1f}", str(row["changed"])]
        + [f"{change['batch_changed']}, {change['batch_max_change']:.4f}" for change in row["batches"].values()]
        for row in measured["static"]
    ]
    head = ["texts", "artefact", "logit error (% of spread)", "changed against FP32"]
    head += [f"changed by batches of {size}, largest logit change" for size in measured["static"][0]["batches"]]
    return table(head, rows)


OF_A_STUDY = {
    "static": static,
    "ablation": ablation,
    "families": families,
    "million": million,
    "excerpt": excerpt,
    "python-versions": python_versions,
    "elsewhere": elsewhere,
    "serving": serving,
    "serving-run": serving_run,
    "serving-memory": serving_memory,
    "serving-overload": serving_overload,
    "serving-file": serving_file,
    "ideas": ideas,
}
