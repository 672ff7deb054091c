"""What benchmark/studies/targets.py fetches into folders of .elsewhere/: wheels, npm packages and Debian's."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmark import environment
from lab04 import ROOT, LabError

CACHE = ROOT / ".elsewhere"


class Missing(LabError):
    """What a target needs is not on this machine, in one sentence."""


def need(*programs: str) -> None:
    """Raise Missing for the first of some programs that is not on PATH."""
    for program in programs:
        if not shutil.which(program):
            raise Missing(f"no {program} on this machine")


def fetched(name: str, download: bool, fetch: Callable[[Path], object]) -> Path:
    """The folder .elsewhere/NAME, which `fetch` fills if it may. Raises Missing if it is not there or did not come."""
    folder, partial = CACHE / name, CACHE / f"{name}.partial"
    if folder.exists():
        return folder
    if not download:
        raise Missing(f"{name} is not set up: make elsewhere")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fetch(partial)
    except subprocess.CalledProcessError as error:
        raise Missing(f"{name} did not come: {error.stderr.strip().splitlines()[-1:]}") from error
    partial.rename(folder)
    return folder


def call(*command: object, **options) -> str:
    """Run a program; its output. Raises CalledProcessError, with what it said on stderr."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def pip(target: Path, *packages: str, machine: str | None = None, python: str = "3.11") -> None:
    """Install wheels into a folder of their own, for another machine if one is named."""
    options = ["--no-deps", "--only-binary=:all:"]
    if machine:
        options += ["--python-version", python]
        options += [f"--platform=manylinux_2_{libc}_{machine}" for libc in (17, 27, 28)]
    call(sys.executable, "-m", "pip", "install", "--quiet", "--target", target, *options, *packages)


def npm(target: Path, *packages: str) -> None:
    call("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages, cwd=target)


def pinned(*names: str) -> list[str]:
    """Packages at the versions installed here."""
    installed = environment.library_versions()
    return [f"{name}=={installed[name]}" for name in names]


def debian(folder: Path, machine: str, *names: str) -> None:
    """Unpack packages of Debian 13 for a machine of Debian's names into a folder, whatever is installed here."""
    need("apt-get", "dpkg-deb")
    apt = folder.with_name(f"{folder.name}-apt")
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state" / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keys}] http://deb.debian.org/debian trixie main\n")
    settings = {
        "APT::Architecture": machine, "APT::Architectures": machine, "APT::Sandbox::User": "root",
        "Dir::Etc::SourceList": apt / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": apt / "state", "Dir::State::status": apt / "state" / "status",
        "Dir::Cache": apt / "cache",
    }  # fmt: skip
    options = [f"-o{name}={value}" for name, value in settings.items()]
    call("apt-get", *options, "update")
    call("apt-get", *options, "download", *names, cwd=apt)
    for package in apt.glob("*.deb"):
        call("dpkg-deb", "-x", package, folder)
    shutil.rmtree(apt)
