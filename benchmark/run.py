"""One run of the benchmark, stage by stage, into a journal.

Every backend runs in a process of its own, all of them in random order within each round, and is compared with FP32
PyTorch in the same round, so that drift and neighbours cancel.
"""

import argparse
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark import environment, peers
from benchmark.journal import open_journal
from benchmark.process import Process
from benchmark.rows import check_origin, list_rows, load_artefacts
from lab04 import LabError, artefact
from lab04.artefact import contract
from lab04.read import classifier, headlines
from lab04.run.backend import Unavailable

# --- How much is measured ---------------------------------------------------------------------------------
FULL: dict[str, Any] = {
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


NEIGHBOURS = 32  # headlines of a batch, where it is looked whether they change each other's labels


class Run:
    """One run of the benchmark: what is measured, on what, and the journal it goes into."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.amounts = QUICK if arguments.quick else FULL
        self.threads, self.seed, self.scratch = arguments.threads, arguments.seed, scratch
        self.reference = scratch / "fp32"
        self.rows: dict[str, dict] = {}

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

        self.rows = list_rows(
            built, missing, arguments.peers, self.reference, self.scratch, speed_only=arguments.random_weights
        )
        settings = {
            "model": Path(arguments.model).name,
            "shipped": Path(arguments.model).resolve() == Path(classifier.DEFAULT_MODEL).resolve(),
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
        self.folder = arguments.output / environment.folder_name(here, folder_tag(settings, arguments.tag))
        self.journal = open_journal(self.folder, settings, arguments.resume, arguments.force)
        if not self.journal.entries:
            self.journal.append("start", settings=settings, environment=here, truth=[truth[i] for i in sorted(chosen)])

    def measure(self) -> None:
        """All stages; each skips what the journal already has."""
        self.watch = environment.Watch()
        if busy := environment.busy(self.watch.load(), environment.usable_cores()):
            print(f"   This machine is busy ({busy}): times will be said to be of a busy machine")
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
        self.journal.append("end", load=self.watch.load())

    def build(self) -> None:
        """Build the peers and enter every row; one that cannot be built is a row with its reason."""
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
                    self.journal.append("logits", id=name, **worker.ask("logits", texts=self.quality_texts))
                    batched = worker.ask("logits_in_batches", texts=mixed, batch=NEIGHBOURS)
                    rows = [row for _, row in sorted(zip(order, batched["logits"], strict=True))]
                    self.journal.append("batched_logits", id=name, logits=rows)
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
            spent = sum(entry["seconds"] for entry in self.journal.find(unit, threads=threads))
            done = self.journal.find(unit, threads=threads, round=number)
            if done or (number >= least and spent > self.amounts[f"{unit}_seconds"]):
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
        per_second: dict[str, dict] = {name: {} for name in workers}
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
        """A worker for a row, or for a task of another name."""
        forgiving = name in self.rows and self.rows[name]["group"] == "peer"
        return Process(self.scratch / f"{name}.log", threads, forgiving)

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


def folder_tag(settings: dict, tag: str) -> str:
    """What is added to a results folder's name: a look, or another model, never replaces a full run of ours."""
    another = "" if tag or settings["shipped"] else settings["model"]
    return " ".join(filter(None, (tag, another, "quick" * settings["quick"])))


def progress(items, label: str):
    """The items, with a progress bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, disable=None, leave=False)
