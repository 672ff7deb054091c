"""What a classifier must be for the lab to answer for it: one label per text, whole weights, answers padding keeps."""

from lab04 import LabError, in_one_line
from lab04.read.model_files import listed

PADDING_TOLERANCE = 1e-3  # what padding may move an FP32 logit by, as a share of the largest


def check_config(config, model: str) -> None:
    """Raise LabError unless the configuration is one of a classifier with one label per text, in floating point."""
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise LabError(f"{model} is of type {config.model_type!r}, for which there is no sequence classifier")
    if getattr(config, "is_encoder_decoder", False):
        raise LabError(f"{model} is of type {config.model_type!r}, an encoder with a decoder: the lab takes no such")
    if config.problem_type == "multi_label_classification":
        raise LabError(f"{model} is a multi-label classifier: its scores are no softmax, the lab cannot compare them")
    if config.problem_type == "regression":
        raise LabError(f"{model} is a regression model: its scores are no softmax, the lab cannot compare them")
    if getattr(config, "quantization_config", None):
        raise LabError(f"{model} is quantised already: give the lab the FP32 or FP16 weights it was made from")


def check_finite(network, model: str) -> None:
    """Raise LabError if a weight is infinite or not a number."""
    damaged = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        raise LabError(
            f"{model} has weights that are infinite or no numbers, in {listed(damaged)}: its training failed"
        )


def check_tokens(loaded, model: str) -> None:
    """Raise LabError if a token has no row in the embedding table, or if padding on either side changes answers."""
    rows = loaded.model.get_input_embeddings().num_embeddings
    beyond = [token for token, number in loaded.tokenizer.get_vocab().items() if number >= rows]
    if beyond:
        raise LabError(
            f"the tokenizer of {model} has {len(beyond)} tokens ({beyond[0]!r} …) beyond the {rows} rows of its "
            "embedding table: resize the embeddings before training, or save the tokenizer it was trained with"
        )
    own = loaded.tokenizer.padding_side
    for side in (own, "right" if own == "left" else "left"):
        # Filling up is the lab's doing, for batches: on the side where it changes no answer.
        loaded.tokenizer.padding_side = side
        if padding_keeps_answers(loaded, model):
            return
    raise LabError(f"{model} answers otherwise when a text is padded: set the padding token it was trained with")


def padding_keeps_answers(loaded, model: str) -> bool:
    """Whether a short text has the same FP32 logits alone and beside a longer one."""
    import torch

    texts = ["A headline", "Another and longer headline, of rather more words"]
    with in_one_line(f"cannot load the model {model}"), torch.inference_mode():
        padded = loaded.model(**loaded.encode(texts)).logits
        alone = torch.cat([loaded.model(**loaded.encode([text])).logits for text in texts])
        return bool((padded - alone).abs().max() <= PADDING_TOLERANCE * alone.abs().max())
