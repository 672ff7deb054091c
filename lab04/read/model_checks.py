"""What a classifier must be for the lab to answer for it: one label per text, whole weights, answers padding keeps."""

from lab04 import LabError, in_one_line
from lab04.read.model_files import listed

# Neither padding nor merging may move these. The last is as long as the model reads.
PROBES = ["A headline", "Another and longer headline, of rather more words", "More of the same. " * 100]
PAGES = "reads where on a page or in a table a word stands: the lab gives it texts alone"
PADDED = "reads the padding of a batch as text, whatever the attention mask says"
LENGTHS = "takes another way for other lengths or languages: no lab can make one graph of it"
NOT_SERVED = {
    **dict.fromkeys(("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "markuplm", "tapas"), PAGES),
    **dict.fromkeys(("convbert", "fnet", "nystromformer", "yoso", "mra"), PADDED),
    **dict.fromkeys(("longformer", "reformer", "funnel", "xmod", "ernie_m"), LENGTHS),
}
PADDING_TOLERANCE = 1e-3  # what padding may move an FP32 logit by, as a share of the largest


def check_family(family, model: str) -> None:
    """Raise LabError unless `family`, a configuration class, is one of encoders that classify texts."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForSequenceClassification,
    )

    kind = f"{model} is of type {family.model_type!r}"
    if family not in AutoModelForSequenceClassification._model_mapping:
        raise LabError(f"{kind}, for which there is no sequence classifier")
    if reason := NOT_SERVED.get(family.model_type):
        raise LabError(f"{kind}, which {reason}. Take BERT or one of its like (README.md names them)")
    if family in MODEL_FOR_CAUSAL_LM_MAPPING and family not in MODEL_FOR_MASKED_LM_MAPPING:
        raise LabError(f"{kind}, made to continue texts: the lab takes encoders, such as BERT or ModernBERT")


def check_config(config, model: str) -> None:
    """Raise LabError unless the configuration is one of a classifier with one label per text, in floating point."""
    if getattr(config, "is_encoder_decoder", False):
        raise LabError(f"{model} is of type {config.model_type!r}, an encoder with a decoder: the lab takes no such")
    if getattr(config, "is_decoder", False):
        raise LabError(
            f"{model} is a decoder by its config.json (is_decoder): each token sees only those before it, and the "
            "padding. The lab takes encoders"
        )
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
    try:
        rows = loaded.model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError) as error:  # it reads characters or bytes, or is quantised in training
        kind = loaded.model.config.model_type
        raise LabError(
            f"{model} is of type {kind!r}, without a plain table of tokens: the lab cannot serve it"
        ) from error
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
    raise LabError(
        f"{model} is of type {loaded.model.config.model_type!r} and answers otherwise when a text is padded, as "
        "batches are: its network does not leave out what its attention mask hides. The lab cannot serve it"
    )


def padding_keeps_answers(loaded, model: str) -> bool:
    """Whether a short text has the same FP32 logits alone and beside a longer one."""
    import torch

    with in_one_line(f"cannot load the model {model}"), torch.inference_mode():
        padded = loaded.model(**loaded.encode(PROBES)).logits
        alone = torch.cat([loaded.model(**loaded.encode([text])).logits for text in PROBES])
        return bool((padded - alone).abs().max() <= PADDING_TOLERANCE * alone.abs().max())
