"""Open INT8 compiled for one kind of processor (lab04/quantise/this_cpu.py)."""

from lab04 import LabError, in_one_line
from lab04.artefact import Artefact


def describe() -> dict:
    """What compiled code depends on: PyTorch's version, and the processor's flags as the system names them."""
    import cpuinfo
    import torch

    return {"torch": torch.__version__, "flags": sorted(cpuinfo.get_cpu_info().get("flags", []))}


def load(artefact: Artefact):
    """The compiled network. Raises LabError, before any of its code runs, if it is for another machine."""
    import torch

    wanted, here = artefact.manifest["compiled_for"], describe()
    missing = sorted(set(wanted["flags"]) - set(here["flags"]))
    if missing or wanted["torch"] != here["torch"]:
        needs = f"a processor with {' '.join(missing[:3])}" if missing else f"PyTorch {wanted['torch']}"
        command = f"python lab04-torch.py --this-cpu --output {artefact.folder}"
        raise LabError(f"{artefact.folder} is compiled code that needs {needs}: run {command} here")
    torch.cpu._init_amx()  # the system must permit AMX to every process; without AMX this does nothing
    with in_one_line(f"cannot open {artefact.folder}"):  # it is unpacked into the temporary folder, and run from there
        return torch._inductor.aoti_load_package(str(artefact.model_file))
