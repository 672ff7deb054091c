"""Serve an artefact over HTTP from this process, with uvicorn: app.py says what is answered.

    python examples/http/serve.py                        # Ctrl-C or SIGTERM: what was taken is answered, then it stops
    curl localhost:8000/classify -d '"Cybersecurity breach exposes NHS patient records"'
    curl localhost:8000/classify -d '["One headline", "Another one"]'

It listens when it can answer, on this machine alone unless --host says otherwise, and has no authentication.
"""

import argparse
import gc
import json
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, Python looks only in its folder
from lab04 import LabError, artefact, console, options

try:
    import app  # beside this file
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ModuleNotFoundError as missing:
    print(f"{missing.name} is not installed: pip install -r requirements/http.txt", file=sys.stderr)
    sys.exit(2)

HEADERS_TIMEOUT_S = 10
IDLE_TIMEOUT_S = 60  # of a connection between requests: longer than the usual proxy in front keeps one
STOP_TIMEOUT_S = 30  # more than a full queue and the slowest body take
MAX_CONNECTIONS = 1000  # a process may open 1,024 files by default
FULL = json.dumps({"error": app.FULL})
REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(FULL)}\r\nRetry-After: %d\r\n\r\n{FULL}"
)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which alone would wait for ever for a request's headers, and make a task of each refusal."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.headers_timeout = self.loop.call_later(HEADERS_TIMEOUT_S, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.headers_timeout.cancel()
        self.headers_timeout = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        batches, before = self.app_state["batches"], self.cycle
        plain = self.url == b"/classify" and not self.expect_100_continue
        in_turn = before is None or before.response_complete  # on this connection: answers keep the order of requests
        self.refused_s = batches.wait_s(1) if plain and in_turn else 0
        if not self.refused_s:  # a refused body has no more time than its headers
            self.headers_timeout.cancel()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.refused_s:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.refused_s:
            super().on_message_complete()
            return
        self.headers_timeout.cancel()
        self.app_state["batches"].metrics.requests.labels("503").inc()
        self.transport.write((REFUSAL % self.refused_s).encode())
        if not self.parser.should_keep_alive():
            self.transport.close()
        self.on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.headers_timeout.cancel()
        super().connection_lost(exc)


def main() -> None:
    arguments = parse_arguments()
    item = artefact.load(arguments.artefact)
    options.say_if_dynamic(item)
    application = app.create(item, arguments.threads, arguments.queue)
    listening = listen(arguments.host, arguments.port)
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            loop="uvloop",
            http=Protocol,
            lifespan="on",
            proxy_headers=False,  # nothing here asks who the client is
            access_log=False,  # /metrics counts; a line a request costs more than reading it
            log_level="warning",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_TIMEOUT_S,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal that stopped it once more at its end: to have been asked to stop is no failure.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    host, port = listening.getsockname()[:2]
    gc.freeze()  # what is loaded stays: the collector need not look through it again and again
    print(f"Serving {arguments.artefact} on http://{f'[{host}]' if ':' in host else host}:{port}/classify", flush=True)
    server.run(sockets=[listening])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_artefact(parser)
    add = parser.add_argument
    add("--threads", type=options.positive, default=1, help="batches at once, a core each (default: %(default)s)")
    add("--queue", type=options.positive, default=app.QUEUE, help="headlines that may wait (default: %(default)s)")
    add("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    return parser.parse_args()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises LabError if there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise LabError(f"cannot listen on {host}, port {port}: {error.args[-1]}") from error


if __name__ == "__main__":
    console.run(main)
