"""What the browser tests share: the site on a local port, one Chromium, a recorded visit."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import browser as tools

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


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
        seen.page.goto(url, wait_until="networkidle")
        return seen

    yield open_page
    for context in contexts:
        context.close()
