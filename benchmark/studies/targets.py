"""Where the ONNX artefact runs outside this Python: each target sets up, into .elsewhere/, what it needs.

A target gives the command that folder and headlines follow; benchmark/studies/elsewhere.py asks them all.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.studies.fetching import CACHE, Missing, call, debian, fetched, need, npm, pinned, pip
from lab04 import ROOT

EXAMPLES = ROOT / "examples"
OLDEST = "1.15.1"
# An ordinary ARM processor as /proc/cpuinfo has it: without such a file ONNX Runtime reads the host's and crashes.
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
ARM_PACKAGES = [
    *("libc6", "zlib1g", "libstdc++6", "libgcc-s1", "libssl3t64", "libexpat1", "libffi8", "libbz2-1.0", "liblzma5"),
    *("python3.13-minimal", "libpython3.13-minimal", "libpython3.13-stdlib"),
]
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# The command that folder and headlines follow, its environment, and its versions.
Target = tuple[Sequence[object], dict[str, str], str]


def csharp(download: bool) -> Target:
    """With an SDK that; else Roslyn and .NET Core from npm and PyPI, and the official binding's source from npm."""
    if shutil.which("dotnet"):
        call("dotnet", "build", "--output", CACHE / "csharp", EXAMPLES / "csharp")
        return ["dotnet", CACHE / "csharp" / "classify.dll"], {}, f".NET {call('dotnet', '--version').strip()}"

    def fetch(folder: Path) -> None:
        need("npm")
        pip(folder / "python", "dotnetcore2==3.1.23", "pythonnet==3.2.1", "clr-loader==0.3.1", "cffi", "pycparser")
        pip(folder / "python", "psycopg2-binary==2.9.5")  # carries the OpenSSL 1.1 that this .NET asks for
        for package in ("@autorest/csharp@3.0.0-beta.20220302.1", "com.github.asus4.onnxruntime@0.4.9"):
            archive = call("npm", "pack", "--silent", package, cwd=folder).split()[-1]
            with tarfile.open(folder / archive) as file:
                names = [
                    member
                    for member in file.getmembers()
                    if member.name.startswith("package/Runtime") or member.name.endswith(".dll")
                ]
                file.extractall(folder, [member for member in names if "/Plugins/" not in member.name], filter="data")
            (folder / archive).unlink()
        framework = next(folder.glob("python/dotnetcore2/bin/shared/Microsoft.NETCore.App/*/"))
        for name in ("System.Collections.Immutable.dll", "System.Reflection.Metadata.dll"):
            shutil.copy(folder / "package" / name, framework)
        for name in ("ssl", "crypto"):
            [library] = folder.glob(f"python/psycopg2_binary.libs/lib{name}-*.so.1.1")
            library.with_name(f"lib{name}.so.1.1").symlink_to(library.name)

    folder = fetched("csharp", download, fetch)
    icu = next(Path("/usr/lib").glob("*/libicuuc.so.*.*"), None)
    if icu is None:
        raise Missing("no libicu on this machine")
    variables = {
        "PYTHONPATH": str(folder / "python"),
        "LD_LIBRARY_PATH": str(folder / "python" / "psycopg2_binary.libs"),
        "CLR_ICU_VERSION_OVERRIDE": icu.name.removeprefix("libicuuc.so."),  # newer than this .NET looks for
    }
    binding, program = folder / "Microsoft.ML.OnnxRuntime.dll", folder / "classify.dll"
    compiler = [sys.executable, "-m", "benchmark.studies.csharp", folder / "package"]
    if not binding.exists():
        sources = folder.glob("package/Runtime/**/*.cs")
        call(*compiler, binding, "library", *sources, cwd=ROOT, env={**os.environ, **variables})
    call(
        *compiler, program, "exe", f"-r:{binding}", EXAMPLES / "csharp" / "Classify.cs",
        cwd=ROOT, env={**os.environ, **variables},
    )  # fmt: skip
    import onnxruntime

    [library] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*.*")
    link = folder / "libonnxruntime.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    runtime = folder / "python" / "dotnetcore2" / "bin" / "dotnet"
    return [runtime, program], variables, f".NET Core 3.1.23, onnxruntime {onnxruntime.__version__}"


def cpp(download: bool) -> Target:
    """Compiled against the wheel's library; the headers, where there are none, are Debian 13's."""
    need("make", "c++", "pkg-config")
    try:
        version = call("pkg-config", "--modversion", "icu-i18n", "nlohmann_json").split()[0]
    except subprocess.CalledProcessError as error:
        raise Missing("no libicu-dev or no nlohmann-json3-dev on this machine") from error
    include = Path("/usr/include/onnxruntime")
    if not include.exists():
        include = fetched("onnxruntime-headers", download, lambda folder: debian(
            folder, call("dpkg", "--print-architecture").strip(), "libonnxruntime-dev"
        )) / "usr" / "include" / "onnxruntime"  # fmt: skip
    folder = CACHE / "cpp"
    shutil.copytree(EXAMPLES / "cpp", folder, dirs_exist_ok=True)
    call("make", "--always-make", f"INCLUDE={include}", f"PYTHON={sys.executable}", cwd=folder)
    return [folder / "classify"], {}, f"ICU {version}, {pinned('onnxruntime')[0].replace('==', ' ')}"


def node(download: bool) -> Target:
    def fetch(folder: Path) -> None:
        shutil.copy(EXAMPLES / "node" / "package.json", folder)
        npm(folder)

    need("node", "npm")
    folder = fetched("node", download, fetch)
    shutil.copy(EXAMPLES / "node" / "classify.js", folder)
    return ["node", folder / "classify.js"], {}, f"Node {call('node', '--version').strip()[1:]}, {packages(folder)}"


TRANSFORMERS_JS = """
import { pipeline, env } from "@huggingface/transformers";
import { basename, dirname } from "node:path";
const [folder, ...headlines] = process.argv.slice(2);
[env.allowRemoteModels, env.localModelPath] = [false, dirname(folder)];
const options = { dtype: "q8", subfolder: "", session_options: { intraOpNumThreads: 1 } };
const classify = await pipeline("text-classification", basename(folder), options);
for (const headline of headlines) {
  const started = performance.now();
  const answer = await classify(headline, { top_k: null });
  const ms = performance.now() - started;
  const probabilities = Object.fromEntries(answer.map(({ label, score }) => [label, score]));
  console.log(JSON.stringify({ probabilities, ms }));
}
"""


def transformers_js(download: bool) -> Target:
    need("node", "npm")
    folder = fetched("transformers.js", download, lambda folder: npm(folder, "@huggingface/transformers@4.3.2"))
    (folder / "classify.mjs").write_text(TRANSFORMERS_JS)
    return ["node", folder / "classify.mjs"], {}, packages(folder)


def packages(folder: Path) -> str:
    """The package.json's dependencies that matter to a result, with their versions."""
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    names = [name for name in wanted if "onnxruntime" in name or "transformers" in name]
    return ", ".join(f"{name.split('/')[-1]} {wanted[name].lstrip('^')}" for name in names)


def browser(download: bool) -> Target:
    need("chromium", "npm")
    modules = EXAMPLES / "web" / "node_modules"
    if not modules.exists():
        if not download:
            raise Missing("examples/web has no node_modules: make elsewhere")
        npm(EXAMPLES / "web")
    folder = fetched("playwright", download, lambda folder: call(
        sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "playwright==1.65.2"
    ))  # fmt: skip
    version = call("chromium", "--version").split()[1]
    variables = {"PYTHONPATH": str(folder)}
    versions = f"Chromium {version}, {packages(EXAMPLES / 'web')}"
    return [sys.executable, "-m", "benchmark.studies.browser"], variables, versions


def optimum(download: bool) -> Target:
    code = """
import json, sys, time
import torch
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
folder, *headlines = sys.argv[1:]
torch.set_num_threads(1)
model, tokenizer = ORTModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
for headline in headlines:
    started = time.perf_counter()
    [answer] = classify([headline])
    ms = 1e3 * (time.perf_counter() - started)
    print(json.dumps({"probabilities": {one["label"]: one["score"] for one in answer}, "ms": ms}))
"""
    versions = ", ".join(pinned("optimum", "onnxruntime")).replace("==", " ")
    return [sys.executable, "-c", code], {"HF_HUB_OFFLINE": "1"}, versions


def oldest(download: bool) -> Target:
    folder = fetched("onnxruntime-oldest", download, lambda folder: pip(
        folder, f"onnxruntime=={OLDEST}", "numpy==1.26.4", *pinned("tokenizers")
    ))  # fmt: skip
    command = [sys.executable, "-m", "benchmark.studies.answer"]
    return command, {"PYTHONPATH": str(folder)}, f"Python {platform.python_version()}, onnxruntime {OLDEST}"


def arm(download: bool, cpu: str = "neoverse-n1") -> Target:
    """Debian's Python for ARM64, unpacked, under Debian 13's QEMU: 10 or newer, as 7.2 computes SME wrongly."""

    def fetch(folder: Path) -> None:
        debian(folder / "arm64", "arm64", *ARM_PACKAGES)
        debian(folder / "amd64", "amd64", "qemu-user")
        (folder / "arm64" / "lib").symlink_to("usr/lib")
        (folder / "arm64" / "proc").mkdir()
        (folder / "arm64" / "proc" / "cpuinfo").write_text(CPUINFO)
        pip(folder / "site", *pinned("onnxruntime", "numpy", "tokenizers"), machine="aarch64", python="3.13")

    if platform.machine() != "x86_64":
        raise Missing("this emulation is set up for x86 machines")
    folder = fetched("arm64", download, fetch)
    qemu, root = folder / "amd64" / "usr" / "bin" / "qemu-aarch64", folder / "arm64"
    variables = {**QUIET, "PYTHONHOME": f"{root}/usr", "PYTHONPATH": f"{folder}/site", "PYTHONDONTWRITEBYTECODE": "1"}
    given = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    python = [root / "usr" / "bin" / "python3.13", "-m", "benchmark.studies.answer"]
    version = call(qemu, "--version").split()[2]
    versions = f"QEMU {version}, {', '.join(pinned('onnxruntime')).replace('==', ' ')}"
    return [qemu, "-cpu", cpu, "-L", root, *given, *python], {}, versions


def arm_sme(download: bool) -> Target:
    return arm(download, cpu="max")


def container(download: bool) -> Target:
    """The image, built and run without a registry; its base is Debian 12, which has Python 3.11."""

    def fetch(folder: Path) -> None:
        need("debootstrap")
        base = folder / "base"
        call("debootstrap", "--variant=minbase", "--include=python3,python3-venv", "bookworm", base)
        call("chroot", base, "python3", "-m", "venv", "/usr/local")
        for left in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache"):
            shutil.rmtree(base / left)  # python:3.11-slim has none of them either

    need("buildah", "bwrap")
    if os.geteuid():
        raise Missing("only root can unpack a system's packages and mount an image")
    fetched("container", download, fetch)
    buildah = call("buildah", "--version").split()[2]
    return [sys.executable, "-m", "benchmark.studies.container"], {}, f"buildah {buildah}, Python 3.11"


TARGETS: dict[str, tuple[str, Callable[[bool], Target]]] = {
    "csharp": ("C# (`csharp/`)", csharp),
    "cpp": ("C++ (`cpp/`)", cpp),
    "node": ("Node (`node/`)", node),
    "browser": ("browser, wasm (`web/`)", browser),
    "transformers.js": ("transformers.js in Node", transformers_js),
    "optimum": ("Optimum's `pipeline`", optimum),
    "container": ("the image of `container/`, over HTTP", container),
    "oldest": ("an old ONNX Runtime", oldest),
    "arm": ("ARM64 Neoverse N1, emulated", arm),
    "arm-sme": ("ARM64 with SME, emulated, without KleidiAI", arm_sme),
}
EMULATED, EVERY = ("arm", "arm-sme"), 10  # an emulated processor is slow: every tenth headline
