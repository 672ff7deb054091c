"""What each idea of the INT8 engine is worth: `python -m benchmark.studies.ideas`, a minute on a quiet machine.

Compiles copies of lab04/run/int8_engine.cpp in each of which one idea is switched off, and runs the same headlines
through all of them in turn, in one process with one thread. Writes results/HARDWARE-engine/results.json; docs/int8.md
shows it.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmark import environment, results
from lab04 import ROOT, LabError, artefact, console
from lab04.quantise import preparation, this_cpu
from lab04.read import classifier, headlines
from lab04.read.texts import TEST_HEADLINES
from lab04.run.int8_engine import PART, SOURCE, Engine

BATCHES = {1: (120, 8), 6: (60, 3)}  # headlines of a call: rounds, calls of a round. Six are some 96 tokens, one part
SAME = 0.1  # logits: what another order of additions may change, as it tips a rounding to the next byte
# Each idea, and what stands in its place in a copy of the C++ file.
WITHOUT: dict[str, list[tuple[str, str]]] = {
    "the next panel of weights is asked for ahead": [("line = 0; R > 1 && line", "line = 0; false && line")],
    "scale, bias, GELU and sum while a product is in registers or its panel in the nearest cache": [
        (" * (scale * x.scales[row + r]) + bias;\n      if (add) value += load(to);", ";"),
        ("    const Floats scale = load(linear.scales + at), bias = load(linear.biases + at);\n", ""),
        (
            "  const int tiles =",
            "  static float* const sums = (float*)aligned_alloc(64, 16 << 20);\n  const int tiles =",
        ),
        ("(x, row, linear, column, add, out);", "(x, row, linear, column, add, sums);"),
        (
            """    if (activation != NONE)  // while the panel's results are at hand
      for (int row = 0; row < rows; row++) activate(activation, out + (size_t)row * linear.columns + column, COLUMNS);
  }
""",
            """  }
  auto pass = [&](auto f) {
    for (int row = 0; row < rows; row++)
      for (int k = 0; k < linear.columns; k += LANES) f(row, k, (size_t)row * linear.columns + k);
  };
  pass([&](int row, int k, size_t at) {
    store(sums + at, load(sums + at) * (load(linear.scales + k) * x.scales[row]));
  });
  pass([&](int, int k, size_t at) { store(sums + at, load(sums + at) + load(linear.biases + k)); });
  pass([&](int, int, size_t at) { store(out + at, add ? load(out + at) + load(sums + at) : load(sums + at)); });
  if (activation != NONE) activate(activation, out, rows * linear.columns);
""",
        ),
    ],
    "the last layer goes on with the first token alone, from its query on": [
        ("const int rows = last ? headlines : tokens;", "const int rows = tokens;"),
        ("    if (last) keep_first_tokens(w, stride);\n", ""),
        ("const size_t row = last ? headline : token;", "const size_t row = token;"),
        ("last ? 1 : length,", "length,"),
        (
            "  apply(w.hidden, stride, headlines, model.head",
            "  keep_first_tokens(w, stride);\n  apply(w.hidden, stride, headlines, model.head",
        ),
    ],
    "tiles of 8 × 48 sums (without: 4 × 32)": [
        ("LANES = 16, ROWS = 8, VECTORS = 3", "LANES = 16, ROWS = 4, VECTORS = 2")
    ],
    "rows split evenly, 17 as 6 + 6 + 5 (without: 8 + 8 + 1)": [
        ("(rows - row + tiles - tile - 1) / (tiles - tile)", "std::min(ROWS, rows - row)")
    ],
    "weights on huge pages": [("if (huge_pages) madvise", "if (false) madvise")],
}
PADDING = "a batch lies end to end, without padding"
ONE_SCALE = [
    (
        """  for (int row = 0; row < rows; row++, x += stride) {
    Floats low{}, high{};  // 0 is always among what can be said exactly
    for (int k = 0; k < width; k += LANES) {
      const Floats value = load(x + k) * load(factor + k);
""",
        """  Floats low{}, high{};
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < width; k += LANES) {
      const Floats value = load(x + (size_t)row * stride + k) * load(factor + k);
""",
    ),
    (
        "    const float least = across(low, smaller)",
        "  for (int row = 0; row < rows; row++, x += stride) {\n    const float least = across(low, smaller)",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.studies.ideas", description=console.first_line(__doc__))
    parser.add_argument("--data", type=Path, default=TEST_HEADLINES, help="headlines (default: test.csv)")
    headlines.add_options(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()

    this_cpu.check_here()
    here = environment.describe()
    fp32 = classifier.load()
    texts = [row.text for row in headlines.read(arguments.data, **headlines.options(arguments))]
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.safetensors"
        this_cpu.write_weights(preparation.prepare(fp32), weights)
        whole, one_scale, *others = [
            Engine(compiled(changes, Path(scratch) / f"{number}"), weights)
            for number, changes in enumerate([[], ONE_SCALE, *WITHOUT.values()])
        ]
        tokens = [{name: ids.numpy() for name, ids in fp32.encode([text]).items()} for text in texts]
        measured = {
            "format": results.FORMAT,
            "environment": here,
            "data": arguments.data.name,
            "headlines": len(texts),
            "weights_sha256": fp32.weights_sha256,
            "error": errors(fp32.logits(texts), {"a_scale_a_token": whole, "one_scale": one_scale}, tokens),
            "ideas": race(whole, dict(zip(WITHOUT, others, strict=True)), tokens),
        }
    folder = arguments.output / environment.folder_name(here, "engine")
    folder.mkdir(parents=True, exist_ok=True)
    results.save_json(folder / results.RESULTS, measured)
    for row in measured["ideas"]:
        print(f"{row['idea']:<92}", *(f"{ratio:6.2f}" if ratio else "     –" for ratio in row["without"].values()))
    print(f"Wrote {folder}")
    console.suggest("make readme")


def changed(changes: list[tuple[str, str]]) -> str:
    """The C++ file with some changes. Raises LabError if one has no place in it, or more than one."""
    code = SOURCE.read_text(encoding="utf-8")
    for old, new in changes:
        if code.count(old) != 1:
            raise LabError(f"{SOURCE.name} has {code.count(old)} places for {old!r}: this study is of an older one")
        code = code.replace(old, new)
    return code


def compiled(changes: list[tuple[str, str]], stem: Path) -> Path:
    """The library of a copy of the engine with some changes."""
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text(changed(changes), encoding="utf-8")
    this_cpu.compile_engine(library, source=source)
    return library


def errors(reference: np.ndarray, engines: dict[str, Engine], tokens: list[artefact.Tokens]) -> dict[str, float]:
    """Root mean square change of the logits [texts, labels], each headline alone, as a share of their spread."""
    found = {}
    for name, engine in engines.items():
        logits = np.concatenate([engine.logits(one) for one in tokens])
        found[name] = float(np.sqrt(np.mean((logits - reference) ** 2)) / reference.std(axis=0).mean())
    return found


def race(whole: Engine, others: dict[str, Engine], tokens: list[artefact.Tokens]) -> list[dict]:
    """For each idea the CPU time without it, as a multiple of the whole engine's: the median over rounds."""
    chance = random.Random(0)
    rows: dict[str, dict] = {name: {"idea": name, "without": {}} for name in [*others, PADDING]}
    for batch, (rounds, calls) in BATCHES.items():
        groups = [tokens[start : start + batch] for start in range(0, len(tokens) - batch + 1, batch)]
        groups = [group for group in groups if sum(one["input_ids"].size for one in group) <= PART]
        runs = {name: (engine, False) for name, engine in others.items()} | {"whole": (whole, False)}
        if batch > 1:
            runs[PADDING] = whole, True
        check_same(whole, others, joined(groups[0]))
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            block = chance.choices(groups, k=calls)
            seconds = {}
            for name in chance.sample(list(runs), len(runs)):
                engine, padded = runs[name]
                given = [joined(group, padded) for group in block]
                engine.logits(given[0])
                started = time.process_time()
                for call in given:
                    engine.logits(call)
                seconds[name] = time.process_time() - started
            for name in runs:
                ratios[name].append(seconds[name] / seconds["whole"])
        for name, row in rows.items():
            row["without"][str(batch)] = statistics.median(ratios[name]) if name in ratios else None
    return sorted(rows.values(), key=lambda row: -max(filter(None, row["without"].values())))


def joined(group: list[artefact.Tokens], padded: bool = False) -> artefact.Tokens:
    """One call of some headlines; `padded`: their padding counts as tokens, which the engine then computes."""
    width = max(one["input_ids"].shape[1] for one in group)
    call = {
        name: np.concatenate([np.pad(one[name], ((0, 0), (0, width - one[name].shape[1]))) for one in group])
        for name in group[0]
    }
    return call | {"attention_mask": np.ones_like(call["attention_mask"])} if padded else call


def check_same(whole: Engine, others: dict[str, Engine], call: artefact.Tokens) -> None:
    """Raise LabError if a logit is another one without an idea, each of which is about time alone."""
    for name, engine in others.items():
        change = np.abs(engine.logits(call) - whole.logits(call)).max()
        if not change < SAME:
            raise LabError(f"without {name!r} logits move by {change:.3g}: that is another network")


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
