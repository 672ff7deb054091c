"""An artefact behind HTTP: one ASGI app, which serve.py runs on uvicorn and examples/ray/serve.py on many machines.

    POST /classify   a headline, or a list of them, as JSON; answers {"label", "score", "probabilities"}, or a list
    GET  /healthz    200 when requests are answered
    GET  /metrics    requests, batch sizes, seconds in the queue and in the model, in Prometheus' text form

A request that is refused gets {"error": a sentence}: 400 what it says is no headline, 408 its body did not come, 413 it
is too large, 503 the queue is full, with the seconds until it is not in Retry-After.

Requests are batched by what waits. When a thread of the model is free it takes all headlines that wait, up to a batch:
on an idle server that is one headline at once, under load a full batch, and nothing ever waits for a clock.

Strangers share a batch here, and dynamic INT8 takes the scale of a layer's inputs from the whole batch: one client's
headline could change another's label. Serve an artefact whose scales are constant (`--static`) or each token's own
(`--this-cpu`).
"""

import asyncio
import contextlib
import functools
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as write_metrics
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lab04 import LabError, artefact
from lab04.run.runtimes import open_backend
from lab04.run.scores import softmax

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own threads would wait for cores, and others for them

MAX_BATCH = 32  # headlines; the back ends run parts of eight, so that larger batches only lengthen the wait
QUEUE = 256  # headlines that may wait: a quarter of a second's work, and what waits longer is seldom still wanted
MAX_HEADLINES = 128  # of one request, which otherwise would keep all others waiting
MAX_BYTES = 1_000_000  # of one request
BODY_TIMEOUT_S = 10  # for a request's body, from the end of its headers
FULL = "the queue is full: try again later"  # 503
CLIENT_GONE = 499  # nginx's status for a client that did not wait; it is only counted
CLOSE = {"Connection": "close"}  # the rest of a body that was not read must not be taken for the next request
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # of the metrics' histograms


# Python hands its lock over after 5 ms: a part of a batch that is done would wait as long for the event loop. With this
# 32 clients got 1.08 times as many answers (Zen 4, the two in turn, 12 rounds).
SWITCH_S = 0.0001


class Metrics:
    """What GET /metrics tells; all of it counted on the event loop."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files of the process
        histogram = functools.partial(Histogram, registry=self.registry)
        self.requests = Counter("classify_requests", "Answers by HTTP status", ["status"], registry=self.registry)
        self.batch = histogram("classify_batch_headlines", "Headlines of a batch", buckets=(1, 2, 4, 8, 16, MAX_BATCH))
        self.queue = histogram("classify_queue_seconds", "From a headline's arrival to its batch", buckets=SECONDS)
        self.model = histogram("classify_model_seconds", "A batch in the tokeniser and the model", buckets=SECONDS)

    def answer(self, request: Request) -> Response:
        return Response(write_metrics(self.registry), media_type=CONTENT_TYPE_LATEST)


class Headline(NamedTuple):
    """A headline that waits, its answer to be, and when it came (`perf_counter`)."""

    text: str
    answer: asyncio.Future
    came: float


class Batches:
    """The queue and the threads that empty it: the model goes on though the event loop is busy with refusals."""

    def __init__(self, run: Callable[[list[str]], list], threads: int, room: int, metrics: Metrics):
        self.run, self.room, self.metrics = run, room, metrics
        self.waiting: deque[Headline] = deque()
        self.changed = threading.Condition()  # guards the queue and the next two
        self.idle, self.closed = 0, False
        self.seconds = 0.0  # of a headline, in the last batch
        self.threads = [threading.Thread(target=self.work, name="model", daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def wait_s(self, headlines: int) -> int:
        """Whole seconds until so many headlines may find room: 0 where they do now."""
        if len(self.waiting) + headlines <= self.room:
            return 0
        return max(1, math.ceil(self.seconds * len(self.waiting) / len(self.threads)))

    def add(self, texts: list[str]) -> list[asyncio.Future]:
        """The answers to some headlines, in their order. Raises HTTPException (503) unless all find room."""
        if wait_s := self.wait_s(len(texts)):
            raise HTTPException(503, FULL, {"Retry-After": str(wait_s)})
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        answers = [loop.create_future() for _ in texts]
        with self.changed:
            self.waiting.extend(Headline(text, answer, now) for text, answer in zip(texts, answers, strict=True))
            self.changed.notify(len(texts))
        return answers

    def forget(self) -> None:
        """Drop what nobody waits for any more: clients that give up and ask again must not fill the queue."""
        with self.changed:
            self.waiting = deque(headline for headline in self.waiting if not headline.answer.done())

    def work(self) -> None:
        """A thread's life: take what waits, run it, hand the answers to the event loop."""
        while batch := self.take():
            started = time.perf_counter()
            try:
                rows = self.run([headline.text for headline in batch])
            except Exception as failure:  # of the model; each of its requests says so, and the thread goes on
                rows = [failure] * len(batch)
            self.seconds = (time.perf_counter() - started) / len(batch)
            batch[0].answer.get_loop().call_soon_threadsafe(self.finish, batch, rows, started, self.seconds)

    def take(self) -> list[Headline]:
        """The next batch: a fair share of what waits, where several threads are idle. Empty when all is done."""
        with self.changed:
            self.idle += 1
            self.changed.wait_for(lambda: self.waiting or self.closed)
            share = min(MAX_BATCH, math.ceil(len(self.waiting) / self.idle))
            self.idle -= 1
            return [self.waiting.popleft() for _ in range(share)]

    def finish(self, batch: list[Headline], rows: list, started: float, each: float) -> None:
        """On the event loop: give a batch's answers to the requests that wait for them."""
        self.metrics.batch.observe(len(batch))
        self.metrics.model.observe(each * len(batch))
        for headline, row in zip(batch, rows, strict=True):
            self.metrics.queue.observe(started - headline.came)
            if headline.answer.done():  # its client went away
                continue
            if isinstance(row, Exception):
                headline.answer.set_exception(row)
            else:
                headline.answer.set_result(row)

    def close(self) -> None:
        """Let the threads answer what waits, and end."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()


def create(item: artefact.Artefact, threads: int = 1, queue: int = QUEUE) -> Starlette:
    """The app of an artefact, ready to answer.

    threads: batches that run at once, each in one thread over the same weights. queue: headlines that may wait.
    Raises LabError as `open_backend` does.
    """
    if item.backend == "tensorrt":
        raise LabError(f"{item.folder} is a GPU's engine: serve it with Triton, see examples/triton")
    sys.setswitchinterval(SWITCH_S)
    tokenise, backend = artefact.Tokeniser(item), open_backend(item, 1)
    labels, most, metrics = item.labels, min(MAX_HEADLINES, queue), Metrics()

    def run(texts: list[str]) -> list[dict | int]:
        """In a thread of the model: label, score and probabilities; of a headline too long, the tokens too many."""
        tokens = tokenise(texts)
        scores = softmax(backend.logits(tokens))
        best = scores.argmax(axis=1).tolist()
        return [
            tokenise.dropped(text, tokens)
            or {"label": labels[index], "score": row[index], "probabilities": dict(zip(labels, row, strict=True))}
            for text, index, row in zip(texts, best, scores.tolist(), strict=True)
        ]

    batches = Batches(run, threads, queue, metrics)

    async def classify(request: Request) -> Response:
        texts, alone = parse(await read(request), most)
        answers = asyncio.gather(*batches.add(texts))
        # The body is read: all that can still come is that the client goes away.
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: answers.cancel())
        try:
            rows = await answers
        except asyncio.CancelledError:
            batches.forget()
            if not gone.done():  # the server is stopped in the middle
                raise
            raise HTTPException(CLIENT_GONE, "the client went away") from None
        finally:
            gone.cancel()
        for number, row in enumerate(rows, start=1):
            if isinstance(row, int):
                sentence = f"headline {number} is too long: the model would not read its last {row} tokens"
                raise HTTPException(413, sentence)
        metrics.requests.labels("200").inc()
        return JSONResponse(rows[0] if alone else rows)

    async def refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, HTTPException)
        metrics.requests.labels(str(refusal.status_code)).inc()
        return JSONResponse({"error": refusal.detail}, refusal.status_code, refusal.headers)

    async def fail(request: Request, error: Exception) -> Response:
        metrics.requests.labels("500").inc()
        return JSONResponse({"error": "the model failed: see the server's log"}, 500)

    async def ready(request: Request) -> Response:
        return JSONResponse({"status": "ready", "artefact": item.title, "sha256": item.manifest["sha256"]})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        yield {"batches": batches}  # for serve.py's protocol
        batches.close()
        backend.close()

    return Starlette(
        routes=[
            Route("/classify", classify, methods=["POST"]),
            Route("/healthz", ready),
            Route("/metrics", metrics.answer),
        ],
        exception_handlers={HTTPException: refuse, Exception: fail},
        lifespan=lifespan,
    )


async def read(request: Request) -> bytes:
    """The body of a request. Raises HTTPException if it is too large, comes too slowly or stops."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    raise HTTPException(413, f"the request is larger than {MAX_BYTES} bytes", CLOSE)
    except TimeoutError:
        raise HTTPException(408, f"the request's body did not come within {BODY_TIMEOUT_S} s", CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(CLIENT_GONE, "the client went away") from None
    return bytes(body)


def parse(body: bytes, most: int) -> tuple[list[str], bool]:
    """A request's headlines, and whether it is one alone in no list. Raises HTTPException if it is anything else."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        sentence = "the request is no JSON: send a headline in double quotes, or a list of them"
        raise HTTPException(400, sentence) from None
    alone = not isinstance(given, list)
    texts = [given] if alone else given
    if not texts:
        raise HTTPException(400, "the list is empty: send at least one headline")
    if len(texts) > most:
        raise HTTPException(413, f"{len(texts)} headlines are too many for one request: at most {most}")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise HTTPException(400, f"headline {number} is not text: send it in double quotes")
        if not text.strip():
            raise HTTPException(400, f"headline {number} is empty")
    return texts, alone
