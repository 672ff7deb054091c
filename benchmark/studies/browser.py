"""Ask the page of examples/web in headless Chromium; prints one JSON object a headline, as the examples do.

    python -m benchmark.studies.browser FOLDER HEADLINE … [--screenshot FILE]

FOLDER lies below the project's. Needs playwright and Debian's chromium. Fails if anything is fetched or sent once the
page has loaded, from anywhere else at all, or if the page does not work when the server is gone.
"""

import argparse
import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

from lab04 import ROOT

DONE = "#bars[aria-busy=false]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.studies.browser")
    parser.add_argument("folder", type=Path)
    parser.add_argument("headlines", nargs="+")
    parser.add_argument("--screenshot", type=Path)
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    served: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            served.append(form % values)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(ROOT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    folder = Path(os.path.relpath(arguments.folder, ROOT / "examples" / "web")).as_posix()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 720, "height": 500})
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()

        def ask(text: str) -> dict | None:
            page.fill("#text", text)
            page.wait_for_selector(DONE, state="attached")
            labels = page.eval_on_selector_all("#bars span", "all => all.map(one => one.textContent)")
            shares = page.eval_on_selector_all("#bars meter", "all => all.map(one => one.value)")
            if not labels:
                return None
            tokens, ms, *_ = page.inner_text("#said").split(", ")
            probabilities = dict(zip(labels, shares, strict=True))
            return {"tokens": int(tokens.split()[0]), "probabilities": probabilities, "ms": float(ms.split()[0])}

        page.goto(f"{here}examples/web/?artefact={folder}")
        page.wait_for_selector(DONE, state="attached", timeout=120_000)
        if arguments.screenshot:
            page.screenshot(path=arguments.screenshot)
        before = len(served), len(asked)
        answers = [ask(text) for text in arguments.headlines]
        assert before == (len(served), len(asked)), "something left the page"
        assert all(url.startswith(here) for url in asked), "something came from elsewhere"
        server.shutdown()
        server.server_close()
        page.reload()
        page.wait_for_selector(DONE, state="attached", timeout=120_000)
        again = ask(arguments.headlines[0])
        assert again and answers[0] and again["probabilities"] == answers[0]["probabilities"], "other answers offline"
        browser.close()
    for answer in answers:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
