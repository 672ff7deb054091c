"""Families of networks: README names those that are measured, and what cannot be served says so in one line."""

import inspect
import re

import pytest
import torch
import transformers
from conftest import POSITIONS, ROOT, small_tokenizer

from benchmark.studies.families import FAMILIES, describe
from lab04 import LabError
from lab04.quantise import onnx_graph
from lab04.read import classifier, config_keys, model_checks

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"max_position_embeddings": POSITIONS}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}


@pytest.fixture
def write(tmp_path):
    """`write(family, **shape)`: the folder of a small random classifier."""

    def write(family, **shape):
        torch.manual_seed(0)
        tokenizer = small_tokenizer("bert")
        names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
        config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **SPECIAL, **names, **shape)
        network = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        known = [name for name in tokenizer.model_input_names if name in inspect.signature(network.forward).parameters]
        tokenizer.model_input_names = known
        network.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return write


def test_readme_names_the_families_that_are_measured():
    [named] = re.findall(r"Both INT8 labs serve ([^:]+): \[", (ROOT / "README.md").read_text("utf-8"))
    named = re.split(", | and ", named)
    assert [re.sub(r"\W|_", "", name.lower()) for name in named] == [re.sub(r"\W|_", "", name) for name in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_study_asks_of_a_family_only_what_it_knows(family):
    """A setting too many and the labs refuse the network: its row would be one of a refusal."""
    config = describe(family, small_tokenizer("bert"))
    config_keys.check_keys(config.to_dict(), config, family)


@pytest.mark.parametrize(
    "family, shape, reason",
    [
        ("fnet", {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}, "reads the padding"),
        ("convbert", SMALL | {"embedding_size": 32, "num_attention_heads": 4}, "reads the padding"),
        ("nystromformer", SMALL, "reads the padding"),
        ("canine", SMALL, "without a plain table of tokens"),
        ("longformer", SMALL | {"attention_window": 16}, "one graph"),
        ("layoutlm", SMALL, "on a page"),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}, "made to continue texts"),
        ("llama", SMALL, "made to continue texts"),
        ("qwen2", SMALL | {"num_key_value_heads": 2}, "made to continue texts"),
        ("xlnet", {"d_model": 32, "n_head": 2, "n_layer": 1, "d_inner": 32}, "made to continue texts"),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "an encoder with a decoder"),
        ("bert", SMALL | {"is_decoder": True}, "is_decoder"),
    ],
)
def test_families_that_cannot_be_served_say_so(family, shape, reason, write):
    with pytest.raises(LabError, match=reason) as error:
        classifier.load(str(write(family, **shape)))
    assert repr(family) in str(error.value) or "is_decoder" in reason


def test_a_network_that_reads_padding_is_noticed_whatever_its_name(write, monkeypatch):
    monkeypatch.setattr(model_checks, "NOT_SERVED", {})
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
    with pytest.raises(LabError, match="does not leave out what its attention mask hides"):
        classifier.load(str(write("fnet", **shape)))


def test_what_optimum_cannot_export_is_named(write, tmp_path):
    network = classifier.load(str(write("ernie", **SMALL))).model
    with pytest.raises(LabError, match="exports no 'ernie'.*lab04-torch.py"):
        onnx_graph.export(network, tmp_path)
