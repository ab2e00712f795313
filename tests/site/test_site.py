"""The built site in a real browser: nothing leaves it, nothing fails, everybody can read it."""

from __future__ import annotations

import gzip
from importlib.metadata import distribution
from pathlib import Path

import browser as tools
import pytest
from conftest import DESKTOP, PHONE, Visit

PAGES = tools.pages()
assert PAGES, "there is no site to test; run `make book` first"

AXE = Path(distribution("axe-playwright-python").locate_file("axe_playwright_python/axe.min.js"))
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
MEGABYTE = 1_000_000


def violations(visit: Visit) -> list[str]:
    """What axe-core finds against WCAG levels A and AA, one line each."""
    visit.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = visit.page.evaluate("tags => axe.run({ runOnly: tags, preload: false })", LEVELS)[
        "violations"
    ]
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]


def overflow(visit: Visit) -> int:
    """By how many pixels the page is wider than the window."""
    return visit.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


def weight(visit: Visit, site: str) -> int:
    """Bytes, compressed, of the page and of everything that it loaded."""
    local = {url.split("?")[0] for url in visit.requests if url.startswith(site)}
    files = [tools.SITE / url.removeprefix(f"{site}/") for url in sorted(local)]
    return sum(len(gzip.compress(file.read_bytes())) for file in files)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_loads_complete_and_accessible(visit, site, name, scheme):
    seen = visit(f"{site}/{name}", DESKTOP, scheme)
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])
    assert weight(seen, site) < 1.5 * MEGABYTE
    assert violations(seen) == []
    assert (tools.SITE / name).stat().st_size < 4 * MEGABYTE
    assert seen.page.locator("i[class*='fa-']").count() == 0, "icons missing from tools/vendor.py"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(visit, site, name, scheme):
    seen = visit(f"{site}/{name}", PHONE, scheme)
    assert seen.errors == []
    assert overflow(seen) <= 0
    assert violations(seen) == []
    title = seen.page.locator("h1:visible").first.bounding_box()
    bar = seen.page.locator(".bd-header-article")
    if bar.count():
        below = bar.bounding_box()["y"] + bar.bounding_box()["height"]
        assert title["y"] - below >= 12


def test_broken_page_is_found(visit, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<html><body><img src='gone.png'><script src='https://example.invalid/x.js'></script>"
        "<script>console.error('bad')</script><div style='width: 3000px'>wide</div></body></html>"
    )
    with tools.serve(tmp_path) as address:
        seen = visit(f"{address}/bad.html", PHONE)
        assert seen.external == ["https://example.invalid/x.js"]
        assert any("gone.png" in url for url in seen.failures)
        assert "bad" in seen.errors
        assert overflow(seen) > 2000
        assert any(line.startswith("image-alt") for line in violations(seen))


def test_visit_waits_for_a_slow_widget(visit, tmp_path):
    """The network falls idle before a slow machine has drawn it."""
    (tmp_path / "slow.html").write_text(
        "<html><body><div class='bw-widget'></div><script>addEventListener('load', () => setTimeout"
        "(() => { document.querySelector('div').dataset.ready = 'true' }, 1500))</script></body>"
        "</html>"
    )
    with tools.serve(tmp_path) as address:
        seen = visit(f"{address}/slow.html")
        assert seen.page.locator(".bw-widget").get_attribute("data-ready") == "true"


@pytest.mark.parametrize("name", PAGES)
def test_widgets_react_to_the_keyboard(visit, site, name):
    stored = (tools.SITE / name).read_text(encoding="utf-8").count("widget-view+json")
    seen = visit(f"{site}/{name}", PHONE)
    widgets = seen.page.locator(".bw-widget")
    assert widgets.count() == stored
    for widget in widgets.all():
        assert widget.get_attribute("data-ready") == "true"
        assert widget.bounding_box()["height"] > 60
        assert reacts(widget), widget.inner_text()[:200]


# Everything a reader can see of a widget: its markup without, its controls' values with.
STATE = (
    "el => el.innerHTML + [...el.querySelectorAll('input, select')].map(i => i.value + i.checked)"
)


def reacts(widget) -> bool:
    """Whether some key on some control changes the picture."""
    for control in widget.locator("input, select, button, [tabindex='0']").all():
        for key in ("ArrowRight", "ArrowLeft", "Space", "ArrowDown"):
            before = widget.evaluate(STATE)
            control.focus()
            control.press(key)
            if widget.evaluate(STATE) != before:
                return True
    return False


def test_root_leads_to_the_book(visit, site):
    seen = visit(f"{site}/index.html")
    assert seen.page.url == f"{site}/book/index.html"
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


def test_search_finds_a_page(visit, site):
    seen = visit(f"{site}/search.html?q=weights")
    seen.page.wait_for_selector("#search-results li a", timeout=15_000)
    assert seen.page.locator("#search-results li a").count() >= 1
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


def test_search_finds_nothing_for_nonsense(visit, site):
    seen = visit(f"{site}/search.html?q=zqxvkj")
    seen.page.wait_for_function(
        "document.querySelector('.search-summary')?.textContent.length > 20"
    )
    assert seen.page.locator("#search-results li a").count() == 0


def test_theme_switch_turns_the_page_dark(visit, site):
    seen = visit(f"{site}/book/index.html")
    theme = "document.documentElement.dataset.theme"
    button = seen.page.locator(".theme-switch-button:visible").first
    themes = set()
    for _ in range(3):
        button.click()
        themes.add(seen.page.evaluate(theme))
    assert themes == {"light", "dark"}


def test_column_uses_the_width_it_has(visit, site):
    seen = visit(f"{site}/book/index.html", DESKTOP)
    article = seen.page.locator(".bd-article-container").bounding_box()
    assert article["width"] >= 720
    assert 1280 - (article["x"] + article["width"]) <= 260


def test_wide_code_scrolls_with_a_cue(visit, site):
    name = next(page for page in PAGES if "<pre" in (tools.SITE / page).read_text(encoding="utf-8"))
    seen = visit(f"{site}/{name}", PHONE)
    code = seen.page.locator(".bd-article pre").first
    code.evaluate("el => { el.textContent = 'x'.repeat(400) }")
    look = code.evaluate(
        "el => [getComputedStyle(el).overflowX, getComputedStyle(el).backgroundAttachment]"
    )
    assert look == ["auto", "local, local, scroll, scroll"]
    assert overflow(seen) <= 0
