"""The machine and the software a result was measured with, found without being asked."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version

from lab04 import ROOT
from lab04.artefact import sealing

# What decides which INT8 kernels run: 8-bit dot products (VNNI, AMX, dotprod, i8mm) or none (plain AVX2).
ISA_FLAGS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}
# Virtual machines hide the model name ("AMD EPYC"); family and model number still tell the generation, and py-cpuinfo
# does not know it.
ZEN = {23: [(0, "Zen1"), (0x30, "Zen2")], 25: [(0, "Zen3"), (0x10, "Zen4"), (0x20, "Zen3"), (0x60, "Zen4")]}
ZEN[26] = [(0, "Zen5")]
LIBRARIES = (*sealing.LIBRARIES, "optimum-onnx", "tokenizers", "scikit-learn", "scipy")
PEER_LIBRARIES = ("sentence-transformers", "openvino", "nncf", "ctranslate2")


def describe() -> dict:
    """CPU, instruction sets, cores, memory, GPU, operating system, libraries, git commit: plain JSON values."""
    import psutil

    cpu = read_cpu()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu["name"],
        "isa": [name for flag, name in ISA_FLAGS.items() if flag in cpu["flags"]],
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": find_gpu(),
        "os": f"{operating_system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
        "git": describe_commit(),
    }


def operating_system() -> str:
    """The distribution's name and version where there is one, else the system's."""
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{platform.system()} {platform.release()}"


def usable_cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu() -> dict:
    """Name, with AMD's generation, and flags of the processor; on ARM the name is often only the architecture's."""
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    name = info.get("brand_raw") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core|@.*", " ", name)
    if info.get("vendor_id_raw") == "AuthenticAMD":
        steps = [zen for first, zen in ZEN.get(info["family"], []) if first <= info["model"]]
        name += " " + "".join(steps[-1:])
    return {"name": " ".join(name.split()), "flags": info.get("flags", [])}


def find_gpu() -> str | None:
    """Name and driver of the first NVIDIA GPU, or None."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return output.splitlines()[0] if output else None
    return None


def library_versions() -> dict[str, str]:
    """Installed versions of every library that a figure depends on."""
    versions = {}
    for name in (*LIBRARIES, *PEER_LIBRARIES):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_commit() -> dict | None:
    """The commit of this checkout, and whether tracked files differ from it; None outside git."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        # Results of earlier runs are no part of what is measured.
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!README.md", ":!docs")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(changes.strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def folder_name(environment: dict, tag: str = "") -> str:
    """Name of a results folder: the hardware, then the tag, as in `amd-epyc-zen4-2-cores-bert-base`."""
    words = f"{environment['cpu']} {environment['gpu'] or ''} {environment['cores']} cores {tag}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def hardware_line(environment: dict) -> str:
    """The hardware in one line, for the foot of charts and tables."""
    isa = ", ".join(environment["isa"]) or "no INT8 instructions known"
    gpu = f"; GPU {environment['gpu']}" if environment["gpu"] else ""
    return f"{environment['cpu']}, {environment['cores']} cores, {isa}, {environment['memory_gb']:.0f} GB{gpu}"


def strongest(isa: list[str]) -> str:
    """The instruction set of a processor that decides how fast INT8 is, for a column of a table."""
    return next((name for name in reversed(ISA_FLAGS.values()) if name in isa and name != "AVX512-BF16"), "no INT8")


class Watch:
    """How quiet the machine is from here on: who else had its cores."""

    def __init__(self):
        self._before, self._ours, self._load = cpu_times(), own_seconds(), load_average()

    def load(self) -> dict:
        """What happened since: load averages over a minute, and shares of all cores' time that went elsewhere.

        stolen_share: to other virtual machines, as the hypervisor says; others_share: to other processes of this one.
        None where the system cannot tell.
        """
        after = cpu_times()
        spent = {kind: after[kind] - self._before[kind] for kind in after}
        total = sum(spent.values())
        others = sum(spent.get(kind, 0) for kind in BUSY_KINDS) - (own_seconds() - self._ours)
        return {
            "load_average_start": self._load,
            "load_average": load_average(),
            "stolen_share": spent["steal"] / total if total > 0 and "steal" in spent else None,
            "others_share": max(others, 0) / total if total > 0 else None,
        }


BUSY_KINDS = ("user", "nice", "system", "irq", "softirq")
MOST_STOLEN, MOST_BY_OTHERS = 0.02, 0.10  # of all cores' time; above, a time says more of the neighbours than of us


def busy(load: dict | None, cores: int) -> str:
    """Why a run's times are those of a busy machine, in words; empty if it was quiet, or nothing is known.

    At the end the run itself is part of the load average: up to a core each is its own.
    """
    load, reasons = load or {}, []
    for key, when in (("load_average_start", "at the start"), ("load_average", "at the end")):
        if (load.get(key) or 0) > cores + 0.5:
            reasons.append(f"load average {load[key]:.1f} on {cores} cores {when}")
    for key, most, who in (
        ("stolen_share", MOST_STOLEN, "other virtual machines"),
        ("others_share", MOST_BY_OTHERS, "other programs"),
    ):
        if (load.get(key) or 0) > most:
            reasons.append(f"{who} took {load[key]:.0%} of the time")
    return "; ".join(reasons)


def load_average() -> float | None:
    """Mean number of processes that wanted a core in the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_times() -> dict:
    """Seconds of CPU time since boot by kind, over all cores."""
    import psutil

    return psutil.cpu_times()._asdict()


def own_seconds() -> float:
    """CPU seconds of this process and of the workers that have ended."""
    import psutil

    times = psutil.Process().cpu_times()
    return times.user + times.system + times.children_user + times.children_system
