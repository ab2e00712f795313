"""What the browser tests share: the site on a local port, one Chromium, a recorded visit."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import browser as tools

ROOT = Path(__file__).resolve().parents[2]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>:root {{ color-scheme: light dark }} body {{ margin: 1rem }}</style>"""
# The size in pixels of the smallest text of a widget.
TEXT = """() => Math.min(...[...document.querySelectorAll('.bw *')].filter(e => e.textContent)
    .map(e => parseFloat(getComputedStyle(e).fontSize)))"""


@contextlib.contextmanager
def widget_page(folder: Path, title: str, state: dict, names: str) -> Iterator[str]:
    """The address of a page with nothing but one widget, of these traits, and the site's loader."""
    loader = (ROOT / "site_static/js/anywidget-lite.js").read_text(encoding="utf-8")
    own = {name: state[name] for name in ("_esm", "_css", *names.split())}
    kind = "application/vnd.jupyter.widget"
    parts = [
        f"<script>{loader}</script></head><body><main><h1>{title}</h1>",
        f'<script type="{kind}-state+json">{json.dumps({"state": {"w": {"state": own}}})}</script>',
        f'<script type="{kind}-view+json">{{"model_id": "w"}}</script></main></body></html>',
    ]
    (folder / "widget.html").write_text("".join([HEAD.format(title=title), *parts]), "utf-8")
    with tools.serve(folder) as home:
        yield f"{home}/widget.html"


@dataclass
class Visit:
    """One loaded page, and what its loading asked for and complained about."""

    page: Page
    home: str
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.failures.append(request.url))
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", self._response)

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _response(self, response) -> None:
        if response.status >= 400:
            self.failures.append(f"{response.status} {response.url}")

    @property
    def external(self) -> list[str]:
        """Requests that leave the site."""
        local = (self.home, "data:", "blob:")
        return [url for url in self.requests if not url.startswith(local)]


@pytest.fixture(scope="session")
def site():
    """The built site, served below the path that it is published at."""
    with tools.serve(prefix=tools.published_prefix()) as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    with tools.chromium() as running:
        yield running


@pytest.fixture
def visit(chromium):
    """Open an address in a fresh profile: `visit(url, viewport, "dark")`."""
    contexts = []

    def open_page(url: str, viewport=DESKTOP, scheme: str = "light") -> Visit:
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        seen = Visit(context.new_page(), "/".join(url.split("/")[:3]))
        seen.listen()
        tools.visit(seen.page, url)
        return seen

    yield open_page
    for context in contexts:
        context.close()
