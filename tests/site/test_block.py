"""The Q4_K block in a real browser: what it shows, what a press does, and that a phone holds it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import DESKTOP, PHONE, TEXT, widget_page

from qlib.ggml import FORMATS
from qlib.widgets.block import Block


def block() -> np.ndarray:
    x = 0.05 * np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    return FORMATS["q4_k"].encode(x, None)[0]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with nothing but the widget and the site's own loader."""
    folder, state = tmp_path_factory.mktemp("block"), Block(block(), at=170).get_state()
    with widget_page(folder, "Block", state, "stored bytes at") as found:
        yield found


def changed(page) -> int:
    """How many weights the picture marks as changed."""
    return page.locator(".bw-chart rect[fill='var(--bw-c5)']").count()


def own(page) -> set[int]:
    names = page.locator(".bw-bytes button[aria-label*='part of weight']")
    labels = [name.get_attribute("aria-label") for name in names.all()]
    return {int(re.search(r"byte (\d+)", label)[1]) for label in labels}


def test_a_weight_shows_its_bytes(visit, address):
    seen = visit(address, DESKTOP)
    assert own(seen.page) == {0, 1, 2, 3, 5, 9, 13, 90}
    picture = seen.page.get_by_role("application")
    picture.focus()
    picture.press("ArrowUp")
    assert own(seen.page) == {0, 1, 2, 3, 4, 8, 12, 90}
    picture.press("ArrowRight")
    assert own(seen.page) == {0, 1, 2, 3, 4, 8, 12, 91}
    seen.page.get_by_label("Weight, 0 to 255").fill("0")
    picture.focus()
    assert own(seen.page) == {0, 1, 2, 3, 4, 8, 16}
    # The last byte of the block makes weights 223 and 255; presses go from one to the other.
    for at in (223, 255, 223):
        seen.page.locator(".bw-bytes button").last.click()
        assert seen.page.get_by_role("status").first.inner_text().startswith(f"Weight {at} = ")
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


@pytest.mark.parametrize(
    ("bit", "reach"),
    [
        ("bit 4 of byte 90, part of q", 1),
        ("bit 2 of byte 13, part of sc", 32),
        ("bit 2 of byte 1, part of d", 256),
    ],
)
def test_a_flipped_bit_reaches_its_weights_and_reset_takes_it_back(visit, address, bit, reach):
    page = visit(address, DESKTOP).page
    said = page.get_by_role("status").nth(1)
    button = page.locator(f".bw-octets button[aria-label$='{bit}']")
    before = button.get_attribute("aria-pressed")
    button.focus()
    button.press("Space")
    assert button.get_attribute("aria-pressed") != before
    found = re.search(r"part of (\d+) weights?; flipping it changed (\d+)", said.inner_text())
    assert int(found[1]) == reach >= int(found[2]) > 0.8 * reach
    # The chosen weight keeps its own color.
    assert changed(page) == int(found[2]) - 1
    page.get_by_role("button", name="Reset").click()
    assert changed(page) == 0
    assert "These are the stored bytes" in said.inner_text()


SMALL = """() => [...document.querySelectorAll('.bw button, .bw input, .bw svg')]
    .map(e => e.getBoundingClientRect()).filter(b => Math.min(b.width, b.height) < 24).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_everybody_can_use_it(visit, address, view, scheme):
    from test_site import overflow, violations

    seen = visit(address, view, scheme)
    assert overflow(seen) <= 0
    assert violations(seen) == []
    assert seen.page.evaluate(SMALL) == 0
    assert seen.page.evaluate(TEXT) >= 12
