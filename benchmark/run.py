"""One run of the benchmark, stage by stage, into a journal.

Every backend runs in a process of its own, all of them in random order within each round, and is compared with FP32
PyTorch in the same round, so that drift and neighbours cancel.
"""

import argparse
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmark import environment, results
from benchmark.measures import batch_change
from benchmark.process import Process
from lab04 import ROOT, LabError, artefact, labs
from lab04.artefact import contract
from lab04.read import headlines
from lab04.run.backend import Unavailable

ARTEFACTS = [ROOT / lab.folder for lab in labs.LABS]
# Measured if they are there: what a lab's options make, in a folder of the lab's name and theirs.
VARIANTS = [ROOT / "-".join((lab.folder, *options)) for lab in labs.LABS for options in lab.shown if options]

NEIGHBOURS = 32  # headlines of a batch in which a label is compared with the one alone

# --- How much is measured ---------------------------------------------------------------------------------
FULL = {
    "rounds": 80,  # of latency; the round is the unit that intervals resample
    "headlines_per_round": 25,
    "warm_ups": 3,  # calls before each round's block: another process had the caches
    "latency_seconds": 150,  # per thread count; reached after at least `minimum_rounds`, no further round starts
    "minimum_rounds": 10,
    "batches": [1, 2, 4, 8, 16, 32, 64],
    "throughput_headlines": 128,
    "throughput_rounds": 3,
    "throughput_seconds": 100,  # as above, after at least one round
    "cold_starts": 5,
    "peer_cold_starts": 2,
    "quality_headlines": None,  # all
}
QUICK = FULL | {
    "rounds": 5,
    "minimum_rounds": 3,
    "headlines_per_round": 8,
    "latency_seconds": 10,
    "batches": [1, 8, 32],
    "throughput_headlines": 32,
    "throughput_rounds": 1,
    "cold_starts": 1,
    "peer_cold_starts": 1,
    "quality_headlines": 120,
}


class Run:
    """One run of the benchmark: what is measured, on what, and the journal it goes into."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.amounts = QUICK if arguments.quick else FULL
        self.threads, self.seed, self.scratch = arguments.threads, arguments.seed, scratch
        self.reference = scratch / "fp32"

        print("1. Export the FP32 references")
        with self.process("export") as worker:
            model, labels = (
                str(Path(given).absolute()) if given and Path(given).exists() else given
                for given in (arguments.model, arguments.labels)
            )
            worker.ask("export", model=model, labels=labels, reference=str(self.reference))
        exported = artefact.load(self.reference)
        built, missing = load_artefacts(arguments.artefacts)
        check_origin(exported, built, arguments.model)
        columns = headlines.options(arguments)
        self.texts, truth = headlines.read_labelled(arguments.data, exported.labels, **columns)
        chosen = random.Random(self.seed).sample(range(len(truth)), len(truth))[: self.amounts["quality_headlines"]]
        self.quality_texts = [self.texts[index] for index in sorted(chosen)]

        self.rows = self.list_rows(built, missing, arguments)
        settings = {
            "model": Path(arguments.model).name,
            "weights_sha256": exported.manifest["weights_sha256"],
            "labels": exported.labels,
            "data": arguments.data.name,
            "data_sha256": contract.describe_file(arguments.data)["sha256"],
            "headlines": len(self.texts),
            "threads": self.threads,
            "quick": arguments.quick,
            "random_weights": arguments.random_weights,
            "seed": self.seed,
            "amounts": self.amounts,
        }
        here = environment.describe()
        self.folder = arguments.output / environment.folder_name(here, arguments.tag)
        self.journal = open_journal(self.folder, settings, arguments)
        if not self.journal.entries:
            self.journal.append("start", settings=settings, environment=here, truth=[truth[i] for i in sorted(chosen)])

    def list_rows(self, built: list[artefact.Artefact], missing: dict, arguments: argparse.Namespace) -> dict:
        """Every row of the tables by its id: how to open it, and what results.json says of it."""
        from benchmark import peers

        rows = {}
        for name, peer in peers.REFERENCES.items():
            rows[name] = row(peer.name, peer.precision, "reference", name, self.reference)
        for folder in built:
            kind, precision = folder.backend, folder.manifest["precision"]
            name = "-".join((kind, precision.lower(), *folder.options))
            name = f"{name}-{folder.folder.name}" if name in rows else name
            rows[name] = row(folder.title, precision, "lab", "artefact", folder.folder) | {"model_mb": folder.model_mb}
            if kind == "tensorrt" and not arguments.random_weights:
                # Whether or not an engine runs here: the graph it is built from, for its labels, not its speed.
                rows[f"{name}-graph"] = row(labs.GRAPH_ON_CPU, precision, "check", "graph", folder.folder)
        rows |= missing
        for name in peers.PEERS if arguments.peers == [] else arguments.peers or []:
            if name not in peers.PEERS:
                raise LabError(f"unknown peer {name!r}: choose from {', '.join(peers.PEERS)}")
            peer = peers.PEERS[name]
            rows[name] = row(peer.name, peer.precision, "peer", name, self.scratch / name)
        return rows

    def measure(self) -> None:
        """All stages; each skips what the journal already has."""
        times = environment.cpu_times()
        print("2. Build what is compared")
        self.build()
        if not self.journal.find("start")[0]["settings"]["random_weights"]:
            print("3. Quality and agreement with FP32")
            self.measure_quality()
        for threads in self.threads:
            print(f"4. Latency and throughput, {threads} thread{'s' * (threads > 1)}")
            self.measure_speed(threads)
        print("5. Cold starts and memory")
        self.measure_cold_starts()
        load = {
            "stolen_share": environment.stolen_share(times, environment.cpu_times()),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }
        self.journal.append("end", load=load)

    def build(self) -> None:
        """Build the peers and enter every row; one that cannot be built is a row with its reason."""
        from benchmark import peers

        for name, spec in self.rows.items():
            try:
                if spec["reason"]:
                    raise Unavailable(spec["reason"])
                if spec["group"] == "peer" and not self.failed(name):
                    print(f"   {spec['name']}")
                    with self.process(name) as worker:
                        worker.ask("build", peer=name, reference=str(self.reference), folder=spec["folder"])
                if spec["group"] in ("reference", "peer"):
                    spec["model_mb"] = peers.model_mb(name, Path(spec["folder"]), self.reference)
            except LabError as error:
                self.fail(name, error)
            if not self.journal.find("backend", id=name):
                facts = {key: spec[key] for key in ("name", "precision", "group", "model_mb")}
                self.journal.append("backend", id=name, **facts)

    def measure_quality(self) -> None:
        """Logits of every backend for all headlines, alone as `predict.py` runs them, then among random neighbours."""
        order = random.Random(self.seed).sample(range(len(self.quality_texts)), len(self.quality_texts))
        mixed = [self.quality_texts[index] for index in order]
        for name in progress(
            [name for name in self.alive() if not self.journal.find("logits", id=name)], "   backends"
        ):
            try:
                with self.process(name, self.threads[0]) as worker:
                    self.open(worker, name, self.threads[0])
                    answer = worker.ask("logits", texts=self.quality_texts)
                    batched = worker.ask("batch_logits", texts=mixed, batch=NEIGHBOURS)["logits"]
                    alone = np.array(answer["logits"])[order]
                    self.journal.append("logits", id=name, **answer, **batch_change(alone, np.array(batched)))
            except LabError as error:
                self.fail(name, error)

    def measure_speed(self, threads: int) -> None:
        """Latency, then throughput, with all backends open at once and taking turns."""
        with ExitStack() as stack:
            workers = {}
            for name in self.alive(timed=True):
                try:
                    worker = stack.enter_context(self.process(name, threads))
                    self.open(worker, name, threads)
                    workers[name] = worker
                except LabError as error:
                    self.fail(name, error)
            self.rounds("latency", threads, self.amounts["rounds"], self.amounts["minimum_rounds"], workers)
            self.rounds("throughput", threads, self.amounts["throughput_rounds"], 1, workers)

    def rounds(self, unit: str, threads: int, most: int, least: int, workers: dict[str, Process]) -> None:
        """Run the rounds of a unit that the journal lacks, until there are `most`, or `least` and the time is up."""
        for number in progress(range(most), f"   {unit}"):
            done = self.journal.find(unit, threads=threads)
            spent = sum(entry["seconds"] for entry in done)
            if number < len(done) or (number >= least and spent > self.amounts[f"{unit}_seconds"]):
                continue
            started = time.perf_counter()
            entry = getattr(self, f"{unit}_round")(random.Random(f"{self.seed} {threads} {number}"), workers)
            self.journal.append(unit, threads=threads, round=number, seconds=time.perf_counter() - started, **entry)

    def latency_round(self, chance: random.Random, workers: dict[str, Process]) -> dict:
        """The same randomly chosen headlines through every backend, one block each, in random order."""
        texts = chance.choices(self.texts, k=self.amounts["headlines_per_round"])
        samples = {}
        for name in chance.sample(sorted(workers), len(workers)):
            try:
                samples[name] = workers[name].ask("latency", texts=texts, warm_ups=self.amounts["warm_ups"])["ms"]
            except LabError as error:
                self.fail(name, error)
                del workers[name]
        tokenise = artefact.Tokeniser(artefact.load(self.reference))
        return {"tokens": [tokenise([text])["input_ids"].shape[1] for text in texts], "ms": samples}

    def throughput_round(self, _chance: random.Random, workers: dict[str, Process]) -> dict:
        """One set of headlines, the same in every round, through every backend at every batch size, in random order."""
        chance = random.Random(self.seed)
        texts = chance.choices(self.texts, k=self.amounts["throughput_headlines"])
        pairs = [(name, batch) for name in sorted(workers) for batch in self.amounts["batches"]]
        per_second = {name: {} for name in workers}
        for name, batch in _chance.sample(pairs, len(pairs)):
            if name in workers:
                try:
                    answer = workers[name].ask("throughput", texts=texts, batch=batch)
                    per_second[name][str(batch)] = answer["per_second"]
                except LabError as error:
                    self.fail(name, error)
                    del workers[name]
        return {"per_second": per_second}

    def measure_cold_starts(self) -> None:
        """Fresh processes to their first prediction, and the peak memory of each; then tokenisation on its own."""
        rounds = self.amounts["cold_starts"]
        for number in progress(range(rounds), "   rounds"):
            names = self.alive(timed=True)
            for name in random.Random(f"{self.seed} {number}").sample(names, len(names)):
                peer = self.rows[name]["group"] == "peer"
                if self.journal.find("cold_start", id=name, round=number) or (
                    peer and number >= self.amounts["peer_cold_starts"]
                ):
                    continue
                try:
                    self.journal.append("cold_start", id=name, round=number, **self.start_cold(name))
                except LabError as error:
                    self.fail(name, error)
        if not self.journal.find("tokenisation"):
            with self.process("tokenisation") as worker:
                answer = worker.ask("tokenisation", texts=self.texts[:1000], reference=str(self.reference))
                self.journal.append("tokenisation", **answer)

    def start_cold(self, name: str) -> dict:
        """Times in ms of a fresh process up to its first prediction, and its peak memory in MB after some more."""
        threads = self.threads[0]
        started = time.perf_counter()
        with self.process(name, threads) as worker:
            parts = self.open(worker, name, threads) | worker.ask("first", text=self.texts[0])
            parts["total_ms"] = (time.perf_counter() - started) * 1e3
            parts["process_ms"] = parts["total_ms"] - sum(parts[key] for key in ("imports_ms", "load_ms", "first_ms"))
            worker.ask("latency", texts=self.texts[:20], warm_ups=0)
            return parts | worker.ask("memory")

    def process(self, name: str, threads: int = 1) -> Process:
        return Process(self.scratch / f"{name}.log", threads)

    def open(self, worker: Process, name: str, threads: int) -> dict:
        spec = self.rows[name]
        return worker.ask(
            "open", runner=spec["runner"], folder=spec["folder"], reference=str(self.reference), threads=threads
        )

    def alive(self, timed: bool = False) -> list[str]:
        """Ids of the rows that can be measured; with `timed`, of those whose speed means something."""
        return [
            name
            for name, spec in self.rows.items()
            if not self.failed(name) and not (timed and spec["group"] == "check")
        ]

    def failed(self, name: str) -> bool:
        return bool(self.journal.find("failed", id=name))

    def fail(self, name: str, error: LabError) -> None:
        """Note why a row is not measured any further; a reference that cannot run, or a fault to mend, ends the run."""
        if not isinstance(error, Unavailable) or self.rows[name]["group"] == "reference":
            raise error
        if not self.failed(name):
            self.journal.append("failed", id=name, reason=str(error))


def row(name: str, precision: str, group: str, runner: str, folder: Path) -> dict:
    """A table row: its names, what the worker needs to open it, and room for its size or the reason it has none."""
    return {
        "name": name,
        "precision": precision,
        "group": group,
        "runner": runner,
        "folder": str(Path(folder).absolute()),
        "model_mb": None,
        "reason": None,
    }


def load_artefacts(folders: list[Path] | None) -> tuple[list[artefact.Artefact], dict]:
    """The artefacts there are, and rows with a reason for the default ones that were never built."""
    built, missing = [], {}
    for folder in folders or [*ARTEFACTS, *filter(Path.exists, VARIANTS)]:
        if not folders and not folder.exists():
            [lab] = [lab for lab in labs.LABS if lab.folder == folder.name]
            spec = row(lab.shown[()][0], lab.precision, "lab", "artefact", folder)
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


def open_journal(folder: Path, settings: dict, arguments: argparse.Namespace) -> results.Journal:
    """The journal of a results folder, empty unless --resume. Raises LabError rather than lose or mix measurements."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = results.Journal(folder / results.JOURNAL)
    except OSError as error:
        raise LabError(f"cannot write {folder}: {error.strerror}") from error
    started = journal.find("start")
    if arguments.resume and started:
        differing = [key for key, value in settings.items() if started[0]["settings"].get(key) != value]
        if differing:
            raise LabError(f"cannot resume {folder}: other {', '.join(differing)}; discard it with --force")
        return journal
    if started and not journal.find("end") and not arguments.force:
        raise LabError(f"{folder} holds an interrupted run: go on with --resume, or discard it with --force")
    journal.start_again()
    return journal


def progress(items, label: str):
    """The items, with a progress bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, disable=None, leave=False)
