"""The shipped weights: what the adapter says, the merged model says."""

import json

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from lab04.read import classifier, headlines, model_files
from lab04.read.texts import TEST_HEADLINES, held_out_headlines

LABELS = ["Business", "Sci/Tech", "Sports", "World", "climate", "education", "health", "security", "tech-policy"]


def test_merged_logits_equal_adapter_logits():
    merged = classifier.load()
    base = AutoModelForSequenceClassification.from_pretrained(
        model_files.find_base(model_files.DEFAULT_BASE), config=AutoConfig.from_pretrained(classifier.DEFAULT_MODEL)
    )
    adapter = PeftModel.from_pretrained(base, classifier.DEFAULT_MODEL).eval()
    tokens = merged.tokenizer(held_out_headlines()[:64], padding=True, return_tensors="pt")
    with torch.inference_mode():
        np.testing.assert_allclose(merged.model(**tokens).logits, adapter(**tokens).logits, atol=2e-5)


def test_the_shipped_adapter_is_the_one_its_card_describes():
    merged = classifier.load()
    record = json.loads((classifier.ROOT / "lora-news" / "adapter" / "training.json").read_text(encoding="utf-8"))
    assert merged.labels == LABELS
    assert merged.weights_sha256 == record["weights_sha256"]


def test_test_headlines_are_classified_as_the_model_card_says():
    from sklearn.metrics import f1_score

    merged = classifier.load()
    texts, truth = headlines.read_labelled(TEST_HEADLINES, merged.labels)
    record = json.loads((classifier.ROOT / "lora-news" / "adapter" / "training.json").read_text(encoding="utf-8"))
    said = record["results"]["headlines/test.csv"]["macro avg"]
    first = int(said["support"])  # the file may have grown at its end since
    macro_f1 = f1_score(truth[:first], merged.logits(texts[:first]).argmax(axis=1), average="macro")
    assert abs(macro_f1 - said["f1-score"]) < 0.005
