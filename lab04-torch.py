"""Lab 1 of 3: PyTorch INT8 on the CPU: dynamic, or with --static.

    python lab04-torch.py                        # about 15 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-torch/: a frozen TorchScript archive that
loads with `torch.jit.load` alone, without `transformers`, `peft` or any pickled class. With --this-cpu it is an engine
of one C++ file, compiled for this processor: about twice as fast, and good for no other kind.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH=1 and -P leave out

from lab04 import in_one_line, labs, options
from lab04.artefact import folder, rebuilding, sealing
from lab04.compare import closing_check, report
from lab04.console import run
from lab04.quantise import exact_graph, preparation, this_cpu, torch_int8
from lab04.read import classifier, texts
from lab04.run import int8_engine

LAB = labs.LABS[0]


def main() -> None:
    parser = options.int8_argument_parser(__doc__, LAB)
    parser.add_argument(
        "--this-cpu", action="store_true", help="write the INT8 engine instead, compiled for this processor by g++"
    )
    parser.add_argument(
        "--recheck", action="store_true", help="with --this-cpu: also write the graph for what INT8 leaves open"
    )
    options.add_static(parser)
    arguments = parser.parse_args()
    if arguments.static and arguments.this_cpu:
        parser.error("--this-cpu takes a scale a row, which no neighbour changes: leave out --static")
    if arguments.recheck and not arguments.this_cpu:
        parser.error("--recheck goes with --this-cpu; lab04-optimum.py has one of its own")
    chosen = texts.choose(arguments)
    folder.check_output(arguments.output)
    if arguments.this_cpu:
        this_cpu.check_here()

    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)

    print("2. Prepare: even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32, chosen.prepare)

    facts: dict
    with folder.building(arguments.output) as built, tempfile.TemporaryDirectory() as scratch:
        if arguments.this_cpu:
            print("3. Quantise to INT8, compile the engine for this processor")
            model_file, facts = int8_engine.WEIGHTS_FILE, this_cpu.build(prepared, built)
            if arguments.recheck:
                exact_graph.write(fp32, chosen.check, arguments.threads, Path(scratch) / "exact", built)
        else:
            print("3. Quantise: Linear to INT8 per channel, Embedding to 8 bits per row; freeze to TorchScript")
            model_file, facts = torch_int8.MODEL_FILE, {"engine": torch_int8.choose_engine(arguments.static)}
            with in_one_line("cannot quantise this model with PyTorch"):
                archive = torch_int8.freeze(torch_int8.quantise(prepared, arguments.static), fp32)
            # Written by Python: on a full disk PyTorch's own writer ends the whole process.
            (built / model_file).write_bytes(archive)
            if arguments.static:
                facts["static"] = preparation.input_ranges(prepared)
        facts |= {"command": rebuilding.record(LAB.script, parser, arguments), "texts": chosen.record}
        sealing.seal(built, fp32, LAB.backend, LAB.precision, model_file, **facts)
        if arguments.recheck:
            exact_graph.record_threshold(built, chosen.prepare, arguments.threads)

        print("4. Check against FP32")
        check = closing_check.check_int8(built, fp32, arguments.threads, chosen)
        artefact = sealing.record_check(built, check)
    report.close_lab(fp32, artefact, arguments.output, "python lab04-optimum.py")


if __name__ == "__main__":
    run(main)
