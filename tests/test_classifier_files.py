"""Model folders as people have them: read as they were meant, or refused with what is wrong; never random weights."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import HEADLINES, copy_model

from lab04 import LabError, artefact
from lab04.artefact import sealing
from lab04.read import adapters, classifier

WEIGHTS = "model.safetensors"
BERT = "transformers.models.bert.modeling_bert"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A BERT of four classes, to be damaged."""
    return copy_model(model_folder("bert", 4), tmp_path / "model")


def edit_weights(file: Path, change) -> None:
    """Rewrite a safetensors file as `change(name, tensor)` says: (name, tensor) or None to leave it out."""
    kept = filter(None, (change(name, tensor) for name, tensor in safetensors.torch.load_file(file).items()))
    safetensors.torch.save_file(dict(kept), file, {"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def logits(network, tokenizer) -> np.ndarray:
    """The network's own answer to each headline, by `transformers` alone."""
    with torch.inference_mode():
        return np.concatenate([network(**tokenizer(text, return_tensors="pt")).logits for text in HEADLINES])


def loaded_logits(loaded: classifier.Classifier) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([loaded.model(**loaded.encode([text])).logits for text in HEADLINES])


def refusal(model, labels: str | None = None) -> str:
    with pytest.raises(LabError) as error:
        classifier.load(str(model), labels)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Weights that are not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["classifier.", "bert.pooler.", "bert.encoder.layer.1.output.dense."])
def test_missing_tensors_are_named_and_not_made_up(part, folder):
    edit_weights(folder / WEIGHTS, lambda name, tensor: None if name.startswith(part) else (name, tensor))
    assert part in refusal(folder) and "missing" in refusal(folder)


def test_head_under_another_name_is_refused(folder):
    edit_weights(folder / WEIGHTS, lambda name, tensor: (name.replace("classifier.", "out."), tensor))
    assert "classifier.bias" in refusal(folder) and "out.bias" in refusal(folder)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_networks_saved_in_a_wrapper_are_refused_with_what_to_save(wrapper, folder):
    edit_weights(folder / WEIGHTS, lambda name, tensor: (wrapper + name, tensor))
    assert "model.module" in refusal(folder)


def test_layers_that_the_configuration_leaves_out_are_noticed(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "has no place" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, folder):
    def spoil(name, tensor):
        return name, (torch.full_like(tensor, value) if name == "classifier.bias" else tensor)

    edit_weights(folder / WEIGHTS, spoil)
    assert "classifier.bias" in refusal(folder)


def test_git_lfs_pointer_is_told_from_weights(folder):
    (folder / WEIGHTS).write_text(POINTER)
    assert "git lfs pull" in refusal(folder)


def test_half_a_download_is_refused(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    assert "truncated" in refusal(folder)


def test_pickled_weights_come_with_the_command_that_converts_them(folder):
    before = loaded_logits(classifier.load(str(folder)))
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    message = refusal(folder)
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    np.testing.assert_array_equal(loaded_logits(classifier.load(str(folder))), before)


def test_sharded_weights_are_the_same_weights(folder, tmp_path):
    whole = classifier.load(str(folder))
    whole.model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    whole.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert classifier.load(str(tmp_path / "sharded")).weights_sha256 == whole.weights_sha256


# --- Adapters as peft saves them --------------------------------------------------------------------------

KINDS = {
    "lora": peft.LoraConfig("SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False),
    "dora": peft.LoraConfig("SEQ_CLS", r=4, target_modules=["query"], init_lora_weights=False, use_dora=True),
    "ia3": peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "loha": peft.LoHaConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], modules_to_save=["classifier"]),
    "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "adalora": peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=10),
}


@pytest.fixture
def adapter(model_folder, tmp_path):
    """`adapter(kind, classes)`: what peft writes of an adapter over a bare encoder, and its live logits."""

    def write(kind="lora", classes=3, name="default", encoder_only=True, **config):
        torch.manual_seed(2)
        base = copy_model(model_folder("bert", 4), tmp_path / "gpt2-and-t5" / "base")
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        if encoder_only:
            whole.base_model.save_pretrained(base)
            edit_json(base / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(2)}, label2id={})
        network = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=classes, ignore_mismatched_sizes=True
        )
        method = KINDS[kind]
        live = peft.get_peft_model(network, method, adapter_name=name).eval()
        live.save_pretrained(base.parent / "adapter")
        place = base.parent / "adapter" / ("" if name == "default" else name)
        edit_json(place / "adapter_config.json", **config)
        return base.parent / "adapter", logits(live, transformers.AutoTokenizer.from_pretrained(base))

    return write


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"prompt"}))
def test_adapter_without_a_configuration_answers_as_it_did_in_training(kind, adapter):
    folder, expected = adapter(kind)
    assert not (folder / "config.json").exists()
    loaded = classifier.load(str(folder), "one,two,three")
    assert loaded.labels == ["one", "two", "three"]
    np.testing.assert_allclose(loaded_logits(loaded), expected, atol=1e-5)


def test_adapter_may_have_other_classes_than_its_bases_head(adapter):
    folder, expected = adapter(classes=5, encoder_only=False)
    assert "unnamed" in refusal(folder)  # the base's four names are not these five classes
    np.testing.assert_allclose(loaded_logits(classifier.load(str(folder), "a,b,c,d,e")), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"base_model_name_or_path": "../base"}, {"name": "news"}])
def test_adapter_is_found_with_its_base(options, adapter):
    folder, expected = adapter(**options)
    np.testing.assert_allclose(loaded_logits(classifier.load(str(folder), "a,b,c")), expected, atol=1e-5)


@pytest.mark.parametrize("base, reason", [(None, "names no base"), ("/content/drive/bert", "base of")])
def test_adapter_without_its_base_is_refused(base, reason, adapter):
    assert reason in refusal(adapter(base_model_name_or_path=base)[0])


def test_adapter_without_its_head_is_refused(adapter):
    folder, _ = adapter()
    edit_weights(folder / adapters.ADAPTER_WEIGHTS, lambda name, t: None if "classifier" in name else (name, t))
    assert "classifier.weight" in refusal(folder, "a,b")


def test_adapter_whose_keys_fit_nothing_is_refused(adapter):
    folder, _ = adapter()
    edit_weights(folder / adapters.ADAPTER_WEIGHTS, lambda name, t: (name.replace(".bert.", "._orig_mod.bert."), t))
    assert "fit nothing" in refusal(folder, "a,b,c")


def test_adapter_that_lengthens_the_input_is_refused_by_name(adapter):
    assert "PROMPT_TUNING" in refusal(adapter("prompt")[0], "a,b,c")


def test_adapter_brings_its_resized_embeddings_along(model_folder, tmp_path):
    base = copy_model(model_folder("bert", 4), tmp_path / "base")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["exposes"])
    network.resize_token_embeddings(len(tokenizer))
    live = peft.get_peft_model(network, KINDS["lora"]).eval()
    live.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = classifier.load(str(tmp_path / "adapter"))
    np.testing.assert_allclose(loaded_logits(loaded), logits(live, tokenizer), atol=1e-5)


@pytest.mark.parametrize("start", ["pissa_niter_1", "pissa"])
def test_adapter_that_is_another_at_each_load_is_refused(start, adapter):
    KINDS["pissa"] = peft.LoraConfig("SEQ_CLS", r=4, target_modules=["query"], init_lora_weights=start)
    folder, expected = adapter("pissa")
    if start == "pissa":  # the same singular vectors each time
        loaded = [classifier.load(str(folder), "a,b,c") for _ in range(2)]
        assert loaded[0].weights_sha256 == loaded[1].weights_sha256
        np.testing.assert_allclose(loaded_logits(loaded[0]), expected, atol=1e-4)
    else:
        assert "by chance" in refusal(folder, "a,b,c") and start in refusal(folder, "a,b,c")


def test_adapter_over_layers_that_share_weights_is_refused(adapter):
    KINDS["replicated"] = peft.LoraConfig(
        "SEQ_CLS", r=4, target_modules=["query", "dense"], layer_replication=[[0, 2], [0, 2]], init_lora_weights=False
    )
    assert "when it is merged" in refusal(adapter("replicated")[0], "a,b,c")


@pytest.mark.parametrize(
    "written, reason",
    [
        ({"task_type": "TOKEN_CLS"}, "TOKEN_CLS"),
        ({"auto_mapping": {"base_model_class": "MeanBert", "parent_library": "__main__"}}, "MeanBert of __main__"),
        ({"auto_mapping": {"base_model_class": "BertForTokenClassification", "parent_library": BERT}}, "BertForToken"),
    ],
)
def test_adapter_of_another_task_or_class_is_refused(written, reason, adapter):
    assert reason in refusal(adapter(**written)[0], "a,b,c")


def test_adapter_below_a_model_or_of_a_checkpoint_is_not_taken_unasked(folder, adapter):
    shutil.copytree(adapter()[0], folder / "checkpoint-500")
    classifier.load(str(folder))
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "only as pytorch_model.bin" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert f"--model {folder / 'checkpoint-500'}" in refusal(folder)


def test_hub_id_is_found_in_the_hubs_cache(adapter, tmp_path, monkeypatch):
    folder, expected = adapter()
    cached = tmp_path / "hub" / "models--someone--news"
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    fetch = "huggingface_hub.snapshot_download"
    monkeypatch.setattr(fetch, lambda name, **options: str(cached / "snapshots" / ("a" * 40)))
    np.testing.assert_allclose(loaded_logits(classifier.load("someone/news", "a,b,c")), expected, atol=1e-5)


# --- Names of the classes ---------------------------------------------------------------------------------


def test_labels_name_the_classes_of_a_model_that_has_no_names(folder, tmp_path):
    edit_json(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(4)})
    assert "--labels" in refusal(folder)
    (tmp_path / "names.txt").write_text("Law, civil\nMoney\nFood\nArts\n")
    assert classifier.load(str(folder), "Law,Money,Food,Arts").labels == ["Law", "Money", "Food", "Arts"]
    assert classifier.load(str(folder), str(tmp_path / "names.txt")).labels[0] == "Law, civil"


@pytest.mark.parametrize("labels, reason", [("a,b,c", "4 classes"), ("a,b,c,a", "two classes"), ("a,,c,d", "empty")])
def test_labels_that_do_not_fit_are_refused(labels, reason, folder):
    assert reason in refusal(folder, labels)


def test_numbers_are_names(folder):
    edit_json(folder / "config.json", id2label={str(i): i for i in range(4)}, label2id={str(i): i for i in range(4)})
    assert classifier.load(str(folder)).labels == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "names, reason",
    [
        ({str(i): None for i in range(4)}, "unnamed"),
        ({str(i + 1): f"topic {i}" for i in range(4)}, "0 to 3"),
        ({"0": "good", "1": "good", "2": "bad", "3": "odd"}, "two classes"),
        (None, "its 4 classes"),
    ],
)
def test_names_that_name_nothing_are_refused(names, reason, folder):
    edit_json(folder / "config.json", id2label=names)
    assert reason in refusal(folder)


def test_names_of_the_users_stand_in_for_damaged_ones(folder):
    before = classifier.load(str(folder))
    for names in ({str(i + 1): f"topic {i}" for i in range(4)}, {"one": "a", "two": "b"}, {"0": "a", "7": "b"}):
        edit_json(folder / "config.json", id2label=names, label2id={})
        loaded = classifier.load(str(folder), "a,b,c,d")
        assert loaded.labels == ["a", "b", "c", "d"]
        assert loaded.weights_sha256 == before.weights_sha256
        assert "4 classes" in refusal(folder, "a,b")


# --- The network that was asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, reason",
    [
        ({"architectures": ["MeanBert"]}, "MeanBert"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["RobertaForSequenceClassification"]}, "not a BertForSequenceClassification"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rope_parameters"),
        ({"pooling": "mean", "layer_types": ["full_attention"]}, "layer_types, pooling"),
        ({"pooler_type": "mean"}, "pooler_type"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_a_network_of_other_arithmetic_is_refused(written, reason, folder):
    edit_json(folder / "config.json", **written)
    assert reason in refusal(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused(folder):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Own", None]})
    assert "code of its own" in refusal(folder)


def test_a_base_may_have_another_head_but_not_another_body(adapter):
    folder, expected = adapter()
    base = folder.parent / "base" / "config.json"
    edit_json(base, architectures=["BertForMaskedLM"])
    np.testing.assert_allclose(loaded_logits(classifier.load(str(folder), "a,b,c")), expected, atol=1e-5)
    edit_json(base, architectures=["MeanBert"])
    assert "MeanBert" in refusal(folder, "a,b,c")


@pytest.mark.parametrize(
    "written",
    [
        {"architectures": None},
        {"architectures": ["TFBertForSequenceClassification"]},
        # What published classifiers carry: a multilingual BERT's, a rater's, ALBERTs', FARM's, AutoTrain's …
        {
            "directionality": "bidi",
            "pooler_fc_size": 768,
            "pooler_num_attention_heads": 12,
            "pooler_type": "first_token_transform",
        },
        {
            "_num_labels": 5,
            "finetuning_task": "sentiment-analysis",
            "output_past": True,
            "gradient_checkpointing": True,
        },
        {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0},
        {"language": "english", "name": "Bert", "model_name": "ours", "seq_classif_dropout": 0.2, "tie_weights_": True},
        {"max_length": 64, "padding": "max_length", "task_specific_params": None, "torch_dtype": "float16"},
        {
            "sentence_transformers": {"version": "5.0"},
            "unsloth_fixed": True,
            "train_batch_size": 32,
            "xla_device": True,
        },
        {
            "dtype": "float32",
            "use_cache": False,
            "attn_implementation": "sdpa",
            "_name_or_path": "x",
            "use_bfloat16": 0,
        },
    ],
)
def test_what_published_models_carry_changes_nothing(written, folder):
    before = loaded_logits(classifier.load(str(folder)))
    edit_json(folder / "config.json", **written)
    np.testing.assert_array_equal(loaded_logits(classifier.load(str(folder))), before)


@pytest.fixture
def of_version_5(model_folder, tmp_path):
    """`of_version_5(**changes)`: a ModernBERT as transformers 5 writes its configuration, and its logits before."""
    rope = {"global_rope_theta": 20.0, "local_rope_theta": 500.0}
    folder = copy_model(model_folder("modernbert", 9), tmp_path / "modern", **rope, local_attention=4)
    edit_json(folder / "config.json", global_attn_every_n_layers=2, num_hidden_layers=2)
    before = loaded_logits(classifier.load(str(folder)))
    kinds = ["full_attention", "sliding_attention"]
    parameters = {
        kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in zip(kinds, rope.values(), strict=True)
    }

    def write(**changes):
        config = json.loads((folder / "config.json").read_text())
        for name in (*rope, "global_attn_every_n_layers", "torch_dtype"):
            config.pop(name, None)
        config |= {"layer_types": kinds, "rope_parameters": parameters, "dtype": "float32"} | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write, before


def test_what_transformers_5_calls_otherwise_is_understood(of_version_5):
    write, before = of_version_5
    np.testing.assert_array_equal(loaded_logits(classifier.load(str(write()))), before)
    # The settings must tell: others answer otherwise.
    other = {kind: {"rope_theta": 160000.0} for kind in ("full_attention", "sliding_attention")}
    assert np.abs(loaded_logits(classifier.load(str(write(rope_parameters=other)))) - before).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"rope_parameters": {"rope_theta": 20.0}},
        {
            "rope_parameters": {
                k: {"rope_theta": 2.0, "rope_type": "yarn"} for k in ("full_attention", "sliding_attention")
            }
        },
    ],
)
def test_what_this_transformers_cannot_compute_is_refused(changes, of_version_5):
    assert next(iter(changes)) in refusal(of_version_5[0](**changes))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "xlnet", "openai-gpt"])
def test_a_network_made_to_continue_texts_is_refused_by_name(family, folder):
    edit_json(folder / "config.json", model_type=family, architectures=None)
    assert f"{family!r}, made to continue texts" in refusal(folder)


# --- Settings and tokenisers ------------------------------------------------------------------------------


def test_how_a_network_hands_over_its_results_changes_nothing(folder):
    before = loaded_logits(classifier.load(str(folder)))
    edit_json(folder / "config.json", torchscript=True, return_dict=False, output_attentions=True)
    edit_json(folder / "config.json", output_hidden_states=True)
    np.testing.assert_array_equal(loaded_logits(classifier.load(str(folder))), before)


def test_folder_without_a_tokenizer_is_refused(folder):
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.txt"), *folder.glob("special*")):
        file.unlink()
    assert "no tokenizer" in refusal(folder)


def test_token_beyond_the_embedding_table_is_refused(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zorkcoin"])
    tokenizer.save_pretrained(folder)
    assert "zorkcoin" in refusal(folder)


def test_inputs_are_those_of_the_model_whatever_the_tokenizer_gives(folder, model_folder, tmp_path):
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    loaded = classifier.load(str(folder))
    assert loaded.input_names == ["input_ids", "attention_mask", "token_type_ids"]
    assert not loaded.encode(HEADLINES)["token_type_ids"].any()
    other = copy_model(model_folder("distilbert", 2), tmp_path / "distilbert")
    edit_json(other / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert classifier.load(str(other)).input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_artefact_cuts_where_the_tokenizer_says_and_fills_where_no_answer_changes(side, folder, tmp_path):
    edit_json(folder / "tokenizer_config.json", truncation_side=side, padding_side=side, model_max_length=16)
    loaded = classifier.load(str(folder))
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "model").touch()
    sealing.seal(tmp_path / "built", loaded, "onnxruntime", "INT8", "model")
    texts = [" ".join(HEADLINES), HEADLINES[0][:12]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # BERT counts positions from the first token: filled up on the left it would answer otherwise.
    expected = tokenizer(texts, truncation=True, padding=True, padding_side="right", return_tensors="np")
    assert expected["input_ids"].shape == (2, 16)
    for name, ids in artefact.Tokeniser(artefact.load(tmp_path / "built"))(texts).items():
        np.testing.assert_array_equal(ids, expected[name])
        np.testing.assert_array_equal(loaded.encode(texts)[name], expected[name])
