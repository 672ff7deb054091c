"""Answer headlines with an artefact, one JSON object a line, as the examples in other languages do.

    python -m benchmark.studies.answer FOLDER HEADLINE …

Needs numpy, tokenizers and onnxruntime, of whatever version: elsewhere.py runs it with older and emulated ones.
"""

import json
import sys
import time

from lab04 import artefact
from lab04.run import runtimes, scores


def main() -> None:
    item = artefact.load(sys.argv[1])
    tokenise, backend = artefact.Tokeniser(item), runtimes.open_backend(item)
    for text in sys.argv[2:]:
        tokens = tokenise([text])
        started = time.perf_counter()
        logits = backend.logits(tokens)
        ms = 1e3 * (time.perf_counter() - started)
        probabilities = dict(zip(item.labels, scores.softmax(logits)[0].tolist(), strict=True))
        print(json.dumps({"tokens": tokens["input_ids"].shape[1], "probabilities": probabilities, "ms": ms}))


if __name__ == "__main__":
    main()
