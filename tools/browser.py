"""One way to open the built site in headless Chromium, for the tests and the screenshots."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build/html"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
QUIET = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()

# Nothing more will change: the theme has made what scrolls reachable (at "load"), fonts are there,
# and every widget has been drawn or has said why not.
SETTLED = """() => document.readyState === 'complete' && document.fonts.status === 'loaded'
    && [...document.querySelectorAll('.bw-widget')].every(widget => widget.dataset.ready)"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    prefix = "/"

    def translate_path(self, path: str) -> str:
        """The file of an address; what lies outside the prefix does not exist."""
        if not path.startswith(self.prefix):
            return str(Path(self.directory) / "outside-the-prefix")
        return super().translate_path(path[len(self.prefix) - 1 :])

    def log_message(self, *args) -> None:
        """Requests are recorded by the browser; the server stays silent."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """A browser that leaves a page hangs up in the middle of answers: that is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve(folder: Path = SITE, prefix: str = "/") -> Iterator[str]:
    """Serve a folder on a free port of this machine, below a prefix; gives its address."""
    kind = type("Handler", (_Handler,), {"prefix": prefix})
    handler = functools.partial(kind, directory=str(folder))
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}".rstrip("/")
    finally:
        server.shutdown()
        server.server_close()


def published_prefix() -> str:
    """The path below which the published site lies, from _config.yml."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return urlsplit(config["html"]["baseurl"]).path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium that talks to nobody on its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


def visit(page: Page, address: str) -> None:
    """Open an address and wait until the page has settled, on a slow machine too."""
    page.goto(address, wait_until="load")
    page.wait_for_load_state("networkidle")
    page.wait_for_function(SETTLED)


def pages(folder: Path = SITE) -> list[str]:
    """Every page of the site, as a path from its root; not the redirect at the root itself."""
    made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html"))
    return [name for name in made if name != "index.html" and not name.startswith("_")]
