"""What each step of the INT8 preparation is worth: `python -m benchmark.studies.steps`.

Quantises with PyTorch several times, each time with one step more, and runs every headline through all of them in
random order, in one process with one thread. Writes results/HARDWARE-ablation/results.json; docs/int8.md shows it.
"""

import argparse
import copy
import io
import random
import time
from pathlib import Path

import numpy as np

from benchmark import environment, results
from lab04 import ROOT, console, options
from lab04.console import quiet_logging
from lab04.quantise import preparation, torch_int8
from lab04.read import classifier, headlines
from lab04.read.texts import TEST_HEADLINES

STEPS = {
    "last layer for the one token that is read": lambda network, _: preparation.trim_last_layer(network),
    "inputs evened out (SmoothQuant)": preparation.scale_inputs,
    "errors of the weights cancel (GPTQ)": preparation.round_weights,
}
WARM_UPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.studies.steps", description=console.first_line(__doc__))
    options.add_model_options(parser)
    parser.add_argument("--data", type=Path, default=TEST_HEADLINES, help="labelled headlines (default: test.csv)")
    headlines.add_options(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    arguments = parser.parse_args()

    here = environment.describe()
    folder = arguments.output / environment.folder_name(here, "ablation")
    fp32 = classifier.load(arguments.model, arguments.labels)
    texts, _ = headlines.read_labelled(arguments.data, fp32.labels, **headlines.options(arguments))
    rows = measure(build_variants(fp32), fp32, texts)
    folder.mkdir(parents=True, exist_ok=True)
    results.save_json(
        folder / results.RESULTS,
        {
            "format": results.FORMAT,
            "environment": here,
            "data": arguments.data.name,
            "headlines": len(texts),
            "weights_sha256": fp32.weights_sha256,
            "steps": rows,
        },
    )
    for row in rows:
        print(f"{row['step']:<50} {row['error']:7.2%} {row['changed']:5d} {row['speed']:6.2f}x")
    print(f"Wrote {folder}")
    console.suggest("make readme")


def build_variants(fp32: classifier.Classifier) -> dict:
    """A traced INT8 network for each row of the table, from PyTorch's own recipe to ours."""
    import torch
    from torch.ao import quantization

    torch.set_num_threads(1)
    torch_int8.choose_engine()

    def traced(network):
        return torch.jit.load(io.BytesIO(torch_int8.freeze(network, fp32)))

    network = copy.deepcopy(fp32.model)
    with quiet_logging():
        variants = {"`quantize_dynamic` as it is": traced(quantization.quantize_dynamic(network, {torch.nn.Linear}))}
    name = "7-bit weights a row, 8-bit activations; 8-bit embeddings a row"
    variants[name] = traced(torch_int8.quantise(network))
    batches = preparation.typical_inputs(fp32)
    for name, step in STEPS.items():
        step(network, batches)
        variants[f"+ {name}"] = traced(torch_int8.quantise(network))
    return variants


def measure(variants: dict, fp32: classifier.Classifier, texts: list[str]) -> list[dict]:
    """One row a variant: root mean square error of its logits as a share of their spread, labels changed, speed.

    Speed is the median over headlines of the first variant's time divided by this one's.
    """
    import torch
    from tqdm import tqdm

    reference = fp32.logits(texts)
    logits = {name: np.empty_like(reference) for name in variants}
    times_ms = {name: np.empty(len(texts)) for name in variants}
    length = fp32.max_length
    shuffle = random.Random(0)
    with torch.inference_mode():
        for number in tqdm(range(-WARM_UPS, len(texts)), "Headlines", disable=None):
            tokens = fp32.tokenizer(texts[number], truncation=True, max_length=length, return_tensors="pt")
            inputs = [tokens[name] for name in fp32.input_names]
            for name in shuffle.sample(list(variants), len(variants)):
                started = time.perf_counter()
                logits[name][number] = variants[name](*inputs)[0].numpy()
                times_ms[name][number] = (time.perf_counter() - started) * 1e3
    first_ms = next(iter(times_ms.values()))
    return [
        {
            "step": name,
            "error": float(np.sqrt(np.mean((logits[name] - reference) ** 2)) / reference.std(axis=0).mean()),
            "changed": int((logits[name].argmax(1) != reference.argmax(1)).sum()),
            "speed": float(np.median(first_ms / times_ms[name])),
        }
        for name in variants
    ]


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
