"""Headlines to token ids, with the artefact's own tokenizer.json and nothing else."""

import numpy as np

from lab04.artefact.contract import Artefact

Tokens = dict[str, np.ndarray]  # input_ids, attention_mask[, token_type_ids]: int64 [batch, sequence]


class Tokeniser:
    """Headlines to token ids, with the artefact's own tokenizer.json and nothing else."""

    def __init__(self, artefact: Artefact):
        from tokenizers import Tokenizer

        config = artefact.manifest["tokenizer"]
        self._tokenizer = Tokenizer.from_file(str(artefact.folder / "tokenizer.json"))
        self.max_length = config["max_length"]
        self._tokenizer.enable_truncation(self.max_length, direction=config.get("truncation_side", "right"))
        self._tokenizer.no_padding()
        self._pad_id = config["pad_id"]
        self._pad_left = config.get("padding_side") == "left"
        self._names = config["inputs"]
        # Where the model takes types and the tokeniser gives none, they are zeros.
        self._typed = config.get("typed", False)

    def __call__(self, texts: list[str]) -> Tokens:
        """Token ids of a batch, padded to its longest text: int64 arrays [batch, sequence]."""
        encodings = self._tokenizer.encode_batch_fast([clean(text) for text in texts])
        longest = max(len(encoding.ids) for encoding in encodings)
        tokens = {name: np.zeros((len(texts), longest), dtype=np.int64) for name in self._names}
        tokens["input_ids"][:] = self._pad_id
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            place = slice(longest - length, None) if self._pad_left else slice(length)
            tokens["input_ids"][row, place] = encoding.ids
            tokens["attention_mask"][row, place] = 1
            if self._typed:
                tokens["token_type_ids"][row, place] = encoding.type_ids
        return tokens

    def dropped(self, text: str, tokens: Tokens) -> int:
        """How many tokens of a text, whose `tokens` fill a batch of its own, lie beyond the model's maximum length."""
        if tokens["input_ids"].shape[1] < self.max_length:
            return 0
        return sum(part.special_tokens_mask.count(0) for part in self._tokenizer.encode(clean(text)).overflowing)


def clean(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 library accepts, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
