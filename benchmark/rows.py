"""The rows of a run: the FP32 references, the lab's own artefacts and the peers, each with how it is opened."""

from pathlib import Path

from benchmark import peers
from lab04 import ROOT, LabError, artefact, labs
from lab04.artefact import Artefact, contract

ARTEFACTS = [ROOT / lab.folder for lab in labs.LABS]
# Measured if they are there: what a lab's options make, in a folder of the lab's name and theirs.
VARIANTS = [ROOT / "-".join((lab.folder, *options)) for lab in labs.LABS for options in lab.shown if options]


def row(name: str, precision: str, group: str, runner: str, folder: Path) -> dict:
    """A table row: its names, what the worker needs to open it, and room for its size or the reason it has none.

    group: `reference`, `lab`, `check` (labels without a speed) or `peer`
    """
    return {
        "name": name,
        "precision": precision,
        "group": group,
        "runner": runner,
        "folder": str(Path(folder).absolute()),
        "model_mb": None,
        "reason": None,
    }


def made_by(name: str) -> tuple[labs.Lab, tuple[str, ...]]:
    """The lab and the options that make the artefact of a row, by the row's id."""
    lab = labs.of_backend(name.split("-")[0])
    given = {"-".join((lab.backend, lab.precision.lower(), *options)): options for options in lab.shown}
    return lab, given.get(name, ())


def list_rows(
    built: list[Artefact], missing: dict, wanted: list[str] | None, reference: Path, scratch: Path, speed_only: bool
) -> dict[str, dict]:
    """Every row of the tables by its id, in their order.

    wanted: names of peers; an empty list means all, None none. reference: the FP32 folder. scratch: peers' folders.
    """
    rows = {}
    for name, peer in peers.REFERENCES.items():
        rows[name] = row(peer.name, peer.precision, "reference", name, reference)
    for folder in built:
        kind, precision = folder.backend, folder.manifest["precision"]
        name = "-".join((kind, precision.lower(), *folder.options))
        name = f"{name}-{folder.folder.name}" if name in rows else name
        title = folder.title.removesuffix(f" {precision}")
        rows[name] = row(title, precision, "lab", "artefact", folder.folder) | {"model_mb": folder.model_mb}
        if kind == "tensorrt" and not speed_only:
            # Whether or not an engine runs here: the graph it is built from, for its labels, not its speed.
            rows[f"{name}-graph"] = row(labs.GRAPH_ON_CPU, precision, "check", "graph", folder.folder)
    rows |= missing
    for name in peers.PEERS if wanted == [] else wanted or []:
        if name not in peers.PEERS:
            raise LabError(f"unknown peer {name!r}: choose from {', '.join(peers.PEERS)}")
        peer = peers.PEERS[name]
        rows[name] = row(peer.name, peer.precision, "peer", name, scratch / name)
    return rows


def load_artefacts(folders: list[Path] | None) -> tuple[list[artefact.Artefact], dict]:
    """The artefacts there are, and rows with a reason for the default ones that were never built."""
    built, missing = [], {}
    for folder in folders or [*ARTEFACTS, *filter(Path.exists, VARIANTS)]:
        if not folders and not folder.exists():
            [lab] = [lab for lab in labs.LABS if lab.folder == folder.name]
            spec = row(lab.shown[()][0].removesuffix(f" {lab.precision}"), lab.precision, "lab", "artefact", folder)
            missing[lab.backend] = spec | {"reason": f"not built: run python {lab.script}"}
        else:
            built.append(artefact.load(folder))
    if not built:
        raise LabError("no artefacts to measure: run python lab04-torch.py and python lab04-optimum.py")
    return built, missing


def check_origin(exported: artefact.Artefact, built: list[artefact.Artefact], model: str) -> None:
    """Raise LabError unless every artefact comes from the FP32 weights that it will be compared with."""
    for folder in built:
        if folder.manifest["weights_sha256"] != exported.manifest["weights_sha256"]:
            raise LabError(
                f"{folder.folder} was built from other weights than {model}: give the --model it was built from, or "
                f"build it again from this one (it was: {folder.rebuild_command})"
            )
    contract.check_together([exported, *built])
