"""Lab 1 of 3: PyTorch dynamic INT8 on the CPU.

    python lab04-torch.py                        # about 15 seconds on two cores

Reads lora-news/adapter (or --model) and writes quantised-model-torch/: a frozen TorchScript archive that
loads with `torch.jit.load` alone, without `transformers`, `peft` or any pickled class. With --this-cpu it is code
compiled for this processor instead: faster, and good for no other kind.
"""

from lab04 import in_one_line, labs, options
from lab04.artefact import folder, rebuilding, sealing
from lab04.compare import closing_check, report
from lab04.console import quiet_logging, run
from lab04.quantise import preparation, this_cpu, torch_int8
from lab04.read import classifier, texts

LAB = labs.LABS[0]


def main() -> None:
    parser = options.int8_argument_parser(__doc__, LAB)
    parser.add_argument(
        "--this-cpu", action="store_true", help="compile for this processor (AVX512-VNNI or AMX, g++): about a minute"
    )
    arguments = parser.parse_args()
    chosen = texts.choose(arguments)
    folder.check_output(arguments.output)
    if arguments.this_cpu:
        this_cpu.check_here()

    print("1. Load the merged FP32 classifier")
    fp32 = classifier.load(arguments.model, arguments.labels)

    print("2. Prepare: even out the inputs, round weights so that their errors cancel")
    prepared = preparation.prepare(fp32, chosen.prepare)

    facts: dict
    with in_one_line("cannot quantise this model with PyTorch"):
        if arguments.this_cpu:
            print("3. Quantise and compile for this processor")
            with quiet_logging():
                archive = this_cpu.compile_network(prepared, fp32)
            model_file, facts = this_cpu.MODEL_FILE, {"compiled_for": this_cpu.describe()}
        else:
            print("3. Quantise: Linear to INT8 per channel, Embedding to 8 bits per row; freeze to TorchScript")
            facts = {"engine": torch_int8.choose_engine()}
            archive = torch_int8.freeze(torch_int8.quantise(prepared), fp32)
            model_file = torch_int8.MODEL_FILE

    with folder.building(arguments.output) as built:
        # Written by Python: on a full disk PyTorch's own writer ends the whole process.
        (built / model_file).write_bytes(archive)
        facts |= {"command": rebuilding.record(LAB.script, parser, arguments), "texts": chosen.record}
        sealing.seal(built, fp32, LAB.backend, LAB.precision, model_file, **facts)

        print("4. Check against FP32")
        check = closing_check.check_int8(built, fp32, arguments.threads, chosen)
        artefact = sealing.record_check(built, check)
    report.close_lab(fp32, artefact, arguments.output, "python lab04-optimum.py")


if __name__ == "__main__":
    run(main)
