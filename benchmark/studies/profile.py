"""Where one headline's time goes: `python -m benchmark --profile`.

Runs the lab's CPU artefacts with the profilers of their own runtimes, prints microseconds and share of every kind of
operator, and writes results/HARDWARE-profile/: results.json and operators.png. Profiling itself takes time, so the
sums are somewhat above the latencies that `python -m benchmark` measures: compare the shares.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

from benchmark import environment, results
from benchmark.charts import speed
from lab04 import artefact
from lab04.read.texts import held_out_headlines
from lab04.run import runtimes

HEADLINES = 200
WARM_UPS = 20
SHOWN = 10  # kinds of operators; the rest is summed up


def run(artefacts: list[Path], threads: int, output: Path) -> None:
    """Profile artefact folders that run on the CPU; print, and write the results folder."""
    here = environment.describe()
    folder = output / environment.folder_name(here, "profile")
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict = {"format": results.FORMAT, "environment": here, "threads": threads, "backends": {}}
    for path in artefacts:
        built = artefact.load(path)
        tokenise = artefact.Tokeniser(built)
        batches = [tokenise([text]) for text in held_out_headlines()[:HEADLINES]]
        operators = PROFILERS[built.backend](built, batches, threads)
        measured["backends"][path.name] = {"backend": built.backend, "operators_us": operators}
        total = sum(operators.values())
        print(f"\n{path.name}: {total:.0f} µs a headline, {len(batches)} headlines")
        for kind, us in operators.items():
            print(f"  {kind:<52} {us:8.1f} µs {us / total:6.1%}")
    results.save_json(folder / results.RESULTS, measured)
    speed.save_profile(folder / "operators.png", measured)
    print(f"\nWrote {folder}")


def profile_onnxruntime(built: artefact.Artefact, batches: list[artefact.Tokens], threads: int) -> dict[str, float]:
    """Microseconds a headline by kind of operator, most first, from ONNX Runtime's own trace."""
    import onnxruntime

    kinds: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        options = runtimes.session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "trace")
        session = onnxruntime.InferenceSession(str(built.model_file), options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        for tokens in batches[:WARM_UPS] + batches:
            session.run(None, {name: tokens[name] for name in names})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    for event in kernels[len(kernels) * WARM_UPS // (WARM_UPS + len(batches)) :]:
        kinds[event["args"]["op_name"]] += event["dur"]
    return largest(kinds, len(batches))


def profile_torch(built: artefact.Artefact, batches: list[artefact.Tokens], threads: int) -> dict[str, float]:
    """Microseconds a headline by kind of operator, most first, from PyTorch's profiler: each operator's own time."""
    from torch.profiler import ProfilerActivity, profile

    with runtimes.open_backend(built, threads) as backend:
        for tokens in batches[:WARM_UPS]:
            backend.logits(tokens)
        with runtimes.quiet_stderr(), profile(activities=[ProfilerActivity.CPU]) as trace:  # it reports its own start
            for tokens in batches:
                backend.logits(tokens)
    return largest(Counter({row.key: row.self_cpu_time_total for row in trace.key_averages()}), len(batches))


def largest(kinds: Counter, headlines: int) -> dict[str, float]:
    """The largest entries divided by the number of headlines, then the sum of all others."""
    most = dict(kinds.most_common(SHOWN))
    most["all others"] = kinds.total() - sum(most.values())
    return {kind: us / headlines for kind, us in most.items()}


PROFILERS = {"onnxruntime": profile_onnxruntime, "torch": profile_torch}
