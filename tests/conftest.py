"""Small random classifiers of every supported family, and the labs run over them.

The models are random but not meaningless: their heads are fitted so that the labels of real headlines are decided.
A random head leaves all labels equally likely, and any rounding would then change the answer.
"""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# As on the smallest machine; must be set before torch and tokenizers read it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network

HEADLINES = [
    "Cybersecurity breach exposes NHS patient records",
    "AI tutor program set to roll out in Scottish schools",
    "Climate report warns UK cities face extreme flooding by 2030",
]
# What sees also the connections of libraries that are no Python code, as ONNX Runtime; a file's name follows.
RECORD_CALLS = ["strace", "-f", "-e", "trace=connect,sendto,sendmsg", "-o"]
POSITIONS = 64  # fewer than the lab's own maximum length, so that the model's limit is the one that counts


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with `pytest -m slow`")
    # A shell lets what it starts in the background ignore Ctrl-C, and so would the scripts started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Models -----------------------------------------------------------------------------------------------


@cache
def training_texts() -> list[str]:
    """Headlines that the vocabularies and the heads are made from."""
    with (ROOT / "lora-news" / "headlines" / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def small_config(family: str, vocabulary: int, **options):
    """A two-layer configuration of a family. `minilm` is BERT as all-MiniLM-L6-v2 is, half as wide: the widest here."""
    import transformers

    shape = {"num_hidden_layers": 2, "vocab_size": vocabulary, "initializer_range": 0.07, **options}
    small = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    match family:
        case "bert":
            return transformers.BertConfig(**shape, **small, max_position_embeddings=POSITIONS)
        case "minilm":
            minilm = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768}
            return transformers.BertConfig(**{**shape, **minilm, "initializer_range": 0.05, **options})
        case "distilbert":
            return transformers.DistilBertConfig(
                **{
                    "vocab_size": vocabulary,
                    "initializer_range": 0.07,
                    "max_position_embeddings": POSITIONS,
                    **options,
                },
                **{"n_layers": 2, "dim": 128, "n_heads": 4, "hidden_dim": 256},
            )
        case "roberta":  # its first two positions are not for text
            return transformers.RobertaConfig(
                **shape, **small, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
            )
        case "electra":
            return transformers.ElectraConfig(**shape, **small, embedding_size=32, max_position_embeddings=POSITIONS)
    # As published where that differs from the defaults; read by WordPiece, whose special tokens they must know.
    other = {
        "mpnet": {"max_position_embeddings": POSITIONS + 2},
        "albert": {"embedding_size": 32},
        "deberta-v2": {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8},
        "modernbert": {},
    }
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    positions = {"max_position_embeddings": POSITIONS}
    return transformers.AutoConfig.for_model(family, **shape, **small, **special, **(positions | other[family]))


def small_tokenizer(family: str):
    """The family's own tokenizer with 1,000 pieces at most: byte-level BPE for RoBERTa, else WordPiece."""
    import tokenizers
    import transformers

    if family == "roberta":
        trained = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.train_from_iterator(training_texts(), vocab_size=1000, special_tokens=special, show_progress=False)
        trained.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        return transformers.RobertaTokenizerFast(tokenizer_object=trained._tokenizer)
    # Counted rather than trained: the trainer breaks ties differently in every process.
    words = Counter(word for text in training_texts() for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word in sorted(words, key=lambda word: (-words[word], word)) if len(word) > 1]
    trained = tokenizers.BertWordPieceTokenizer({piece: index for index, piece in enumerate(pieces[:1000])})
    kind = {"distilbert": transformers.DistilBertTokenizerFast, "electra": transformers.ElectraTokenizerFast}
    untyped = {"model_input_names": ["input_ids", "attention_mask"]} if family in ("mpnet", "modernbert") else {}
    return kind.get(family, transformers.BertTokenizerFast)(tokenizer_object=trained._tokenizer, **untyped)


def write_model(folder: Path, family: str, labels: int, seed: int = 0, **shape) -> Path:
    """Write a random model of a family as `save_pretrained` does; `shape` is another than the family's."""
    import torch
    import transformers

    from benchmark.studies.families import decide_labels

    torch.manual_seed(seed)
    tokenizer = small_tokenizer(family)
    names = {index: f"topic {index}" for index in range(labels)}
    numbers = {name: index for index, name in names.items()}
    config = small_config(family, len(tokenizer), id2label=names, label2id=numbers, **shape)
    network = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    decide_labels(network, tokenizer, training_texts()[::4], POSITIONS)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 1) -> Path:
    """Write a LoRA adapter with a head of its own over a model folder."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = peft.LoraConfig("SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    network = peft.get_peft_model(network, config).eval()
    network.save_pretrained(folder)
    network.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_model(source: Path, target: Path, **config) -> Path:
    """Copy a model folder, with changes to its config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Callable[..., Path]:
    """`shared_folder(name, write)`: a folder that `write(folder)` filled once, whichever worker needed it first."""
    from lab04.artefact.folder import locked

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def share(name: str, write: Callable[[Path], object]) -> Path:
        place = root / "shared" / name
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            if not (place / "written").exists():
                write(place / "folder")
                (place / "written").touch()
        return place / "folder"

    return share


@pytest.fixture(scope="session")
def model_folder(shared_folder) -> Callable[..., Path]:
    """`model_folder(family, labels)`: the folder of a random model; family `adapter` is LoRA over a BERT."""

    def build(family: str, labels: int, seed: int = 0) -> Path:
        def write(folder: Path) -> None:
            if family == "adapter":
                write_adapter(folder, build("bert", labels, seed))
            else:
                write_model(folder, family, labels, seed)

        return shared_folder(f"{family}-{labels}-{seed}", write)

    return build


# --- Scripts ----------------------------------------------------------------------------------------------


def run_in_process(script: str, *arguments: object) -> int:
    """Run a script's main here, where torch and transformers are already imported. Returns its exit code."""
    argv, sys.argv = sys.argv, [str(ROOT / script), *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
    return 0


def run_script(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own. Output is text unless `text=False`."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 300, **options})


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess:
    """`python -m benchmark`, which is found from the project's folder alone."""
    command = [sys.executable, "-m", "benchmark", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def few_headlines(monkeypatch) -> None:
    """Labs in this process look at few headlines, for tests that are not about what they find there."""
    look_at_few_headlines(monkeypatch)


def look_at_few_headlines(monkeypatch) -> None:
    """Let the labs prepare, check and time a network on some hundred headlines; test_privacy runs them on all."""
    from lab04.compare import closing_check
    from lab04.quantise import preparation
    from lab04.read import texts

    some, training = texts.held_out_headlines()[:100], texts.training_headlines()[::100]
    monkeypatch.setattr(texts, "held_out_headlines", lambda: some)
    monkeypatch.setattr(texts, "training_headlines", lambda: training)
    monkeypatch.setattr(preparation, "EVERY", 1)
    monkeypatch.setattr(closing_check, "held_out_headlines", lambda: some)
    monkeypatch.setattr(closing_check, "TIMED", 20)
    monkeypatch.setattr(closing_check, "IN_BATCHES", 16)


@pytest.fixture(scope="session")
def artefact_folder(model_folder, shared_folder) -> Callable[..., Path]:
    """`artefact_folder(backend, family, labels)`: a lab's artefact of a random model, for reading only."""
    scripts = {"torch": "lab04-torch.py", "onnx": "lab04-optimum.py", "tensorrt": "lab04-nvidia.py"}

    def build(backend: str, family: str = "bert", labels: int = 9, seed: int = 0) -> Path:
        name = f"quantised-model-{backend}"

        def write(folder: Path) -> None:
            model = model_folder(family, labels, seed)
            with pytest.MonkeyPatch.context() as monkeypatch:
                look_at_few_headlines(monkeypatch)
                code = run_in_process(scripts[backend], "--model", model, "--output", folder / name)
            # 3: the FP16 graph is written, but there is no GPU here to build its engine
            assert code == 0 or (code == 3 and backend == "tensorrt"), f"{scripts[backend]} ended with {code}"

        return shared_folder(f"{backend}-{family}-{labels}-{seed}", write) / name

    return build
