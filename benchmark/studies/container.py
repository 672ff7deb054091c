"""Build the image of examples/container with buildah, run it under bubblewrap, and ask its server over HTTP.

    python -m benchmark.studies.container FOLDER HEADLINE …

No registry is asked: the base is what targets.py made of Debian's packages, as bare as python:3.11-slim. Prints one
JSON object a headline, each with the image's megabytes and the seconds from its start until it is ready.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark.studies.fetching import CACHE, call
from lab04 import ROOT, LabError, console

HERE = CACHE / "container"
ARTEFACT = "quantised-model-asked"  # .dockerignore lets folders of such names pass
BASE, IMAGE = "localhost/python:3.11-slim", "localhost/headlines:latest"
# What lets this machine's pip reach its packages lets the image's.
SETTINGS = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "http_proxy", "https_proxy", "no_proxy")
FILES = ("/etc/pip.conf", "/etc/ssl/certs", "/etc/resolv.conf")
START_S = 60


def buildah(*words: object) -> str:
    """What a buildah command says. Raises LabError with its last words if it fails."""
    try:
        return call("buildah", "--storage-driver=vfs", f"--root={HERE}/images", f"--runroot={HERE}/run", *words).strip()
    except subprocess.CalledProcessError as error:
        raise LabError(f"buildah {words[0]} failed: {error.stderr.strip()[-300:]}") from error


def image_sizes() -> dict[str, str]:
    """What buildah says of every image's size, by its names."""
    images = json.loads(buildah("images", "--json"))
    return {name: image["size"] for image in images for name in image["names"] or ()}


def import_base() -> None:
    """Make an image of the base's folder, which stands for the one that the Dockerfile begins with."""
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, HERE / "base", "/")
    buildah("config", "--env=PATH=/usr/local/bin:/usr/bin:/bin", container)
    buildah("commit", "--quiet", "--rm", container, BASE)


def build(folder: Path) -> float:
    """Build the image around an artefact by the Dockerfile; its size in MB."""
    if BASE not in image_sizes():
        import_base()
    context = HERE / "context"
    shutil.rmtree(context, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__")
    for part in ("lab04", "examples/http", "requirements"):
        shutil.copytree(ROOT / part, context / part, ignore=leave)
    shutil.copytree(folder, context / ARTEFACT)
    given = [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith(SETTINGS)]
    given += [f"--volume={file}:{file}:ro" for file in FILES if Path(file).exists()]
    buildah(
        "build", "--quiet", "--isolation=chroot", "--pull-never", "--layers", *given,
        f"--build-arg=ARTEFACT={ARTEFACT}", f"--file={ROOT}/examples/container/Dockerfile", f"--tag={IMAGE}", context,
    )  # fmt: skip
    number, unit = image_sizes()[IMAGE].split()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


@contextmanager
def running() -> Iterator[tuple[str, float]]:
    """The image's server on a port of this machine, as `docker run --read-only --cap-drop ALL` has it.

    Gives its address and the seconds until it was ready. Raises LabError if it ends before.
    """
    container = buildah("from", "--pull-never", IMAGE)
    root = buildah("mount", container)
    config = json.loads(buildah("inspect", container))["OCIv1"]["config"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = [word for pair in config["Env"] for word in ("--setenv", *pair.split("=", 1))]
    user = config["User"].split(":")[0]
    bubblewrap = ["bwrap", "--die-with-parent", "--ro-bind", root, "/", "--proc", "/proc", "--dev", "/dev"]
    bubblewrap += ["--unshare-user", "--uid", user, "--gid", user, "--cap-drop", "ALL", "--clearenv", *variables]
    command = [*bubblewrap, *config["Entrypoint"], "--port", str(port)]
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while time.perf_counter() - started < START_S and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1).close()
                break
            except OSError:
                time.sleep(0.02)
        else:
            server.kill()
            raise LabError(f"the image's server is not ready after {START_S} s: {server.communicate()[0][-500:]}")
        yield f"http://127.0.0.1:{port}/classify", time.perf_counter() - started
    finally:
        server.terminate()
        server.wait()
        buildah("rm", container)


def main() -> None:
    facts = {"image_mb": build(Path(sys.argv[1]))}
    with running() as (address, start_s):
        facts["start_s"] = start_s
        for text in sys.argv[2:]:
            started = time.perf_counter()
            with urllib.request.urlopen(address, json.dumps(text).encode()) as answer:
                probabilities = json.load(answer)["probabilities"]
            print(json.dumps({"probabilities": probabilities, "ms": 1e3 * (time.perf_counter() - started), **facts}))


if __name__ == "__main__":
    console.run(main)
