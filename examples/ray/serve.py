"""Serve an artefact over HTTP with Ray Serve: on this machine, or on the cluster that RAY_ADDRESS names.

    python examples/ray/serve.py                                     # Ctrl-C or SIGTERM stops it gracefully
    curl localhost:8000/classify -d '"Cybersecurity breach exposes NHS patient records"'
    curl localhost:8000/classify -d '["One headline", "Another one"]'

A headline, or a list of them, as JSON; the answer is {"label", "score"}, or a list of those. 400 or 413 with a sentence
says what is wrong with a request, 503 that the queue is full: try again later. Health: GET /-/healthz, /-/routes.
"""

import argparse
import asyncio
import json
import signal
import threading
from pathlib import Path

import classify  # beside this file: how an artefact travels and is opened
import ray
from ray import serve
from starlette.responses import JSONResponse

from lab04 import ROOT, artefact, console
from lab04.options import positive
from lab04.run.scores import softmax

MAX_BATCH = 32
MAX_WAIT_S = 0.002  # a headline waits no longer for others; about what one prediction takes
# Requests that a replica takes, and that wait for one; beyond that 503. It takes far more than a batch, because what
# waits outside is sent on by a timer of up to half a second: with 64 taken, 128 clients got a sixth of the answers.
MAX_TAKEN, MAX_WAITING = 192, 64
MAX_HEADLINES = 128  # of one request, which otherwise would keep all others waiting
MAX_BYTES = 1_000_000  # of one request


class Refused(Exception):
    """A request that cannot be answered: HTTP status and a sentence."""


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_queued_requests=MAX_WAITING)
class Server:
    """A replica: one process, one thread, one copy of the artefact."""

    def __init__(self, shipped: dict):
        self.item, self.tokenise, self.backend = classify.open_shipped(shipped)

    async def __call__(self, request):
        try:
            if request.method != "POST":
                raise Refused(405, "POST a headline or a list of headlines as JSON")
            texts = self.read(await request.body())
        except Refused as refusal:
            status, sentence = refusal.args
            return JSONResponse({"error": sentence}, status)
        answers = await asyncio.gather(*map(self.answer, texts if isinstance(texts, list) else [texts]))
        return JSONResponse(answers if isinstance(texts, list) else answers[0])

    def read(self, body: bytes) -> str | list[str]:
        """The headlines of a request. Raises Refused if there are none, too many, or one the model cannot read."""
        if len(body) > MAX_BYTES:
            raise Refused(413, f"the request is larger than {MAX_BYTES} bytes")
        try:
            texts = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the request is no JSON: send a headline in double quotes, or a list of them") from None
        several = texts if isinstance(texts, list) else [texts]
        if not several:
            raise Refused(400, "the list is empty: send at least one headline")
        if len(several) > MAX_HEADLINES:
            raise Refused(413, f"{len(several)} headlines are too many for one request: at most {MAX_HEADLINES}")
        for number, text in enumerate(several, start=1):
            if error := classify.error_of(text):
                raise Refused(400, f"headline {number} is {error}")
            if dropped := self.tokenise.dropped(text):
                raise Refused(413, f"headline {number} is too long: the model would not read its last {dropped} tokens")
        return texts

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT_S)
    async def answer(self, texts: list[str]) -> list[dict]:
        """Label and score of a text. Its caller gives one; Ray Serve gathers those of several requests in a list."""
        scores = softmax(self.backend.logits(self.tokenise(texts)))
        return [{"label": self.item.labels[row.argmax()], "score": float(row.max())} for row in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--artefact", type=Path, default=ROOT / "quantised-model-optimum", help="default: quantised-model-optimum")
    add("--replicas", type=positive, default=1, help="processes of one thread each (default: %(default)s)")
    add("--queue", type=positive, default=MAX_TAKEN, help="requests a replica takes (default: %(default)s)")
    add("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    add("--port", type=positive, default=8000, help="default: %(default)s")
    arguments = parser.parse_args()
    item = artefact.load(arguments.artefact)
    ray.cloudpickle.register_pickle_by_value(classify)  # the replicas' machines have no such file
    stop = threading.Event()
    classify.connect()
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    options = {"num_replicas": arguments.replicas, "max_ongoing_requests": arguments.queue}
    app = Server.options(**options).bind(classify.ship(item))
    serve.run(app, name="classify", route_prefix="/classify")
    print(f"Serving {arguments.artefact} on http://{arguments.host}:{arguments.port}/classify", flush=True)
    stop.wait()
    serve.delete("classify")  # takes no more, and answers what it took
    serve.shutdown()


if __name__ == "__main__":
    console.run(main)
