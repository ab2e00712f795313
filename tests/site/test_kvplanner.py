"""The KV planner in a real browser: its table, its keyboard, its picture, and sizes."""

from __future__ import annotations

import re

import pytest
from conftest import DESKTOP, PHONE, TEXT, widget_page

from qlib.plan import decode_bound, kv_bytes
from qlib.shapes import SHAPES
from qlib.widgets.kvplanner import NAMES, KVPlanner

STATE = KVPlanner().get_state()
TRAITS = "models kinds devices formats model weights device format context batch"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with nothing but the widget and the site's own loader."""
    folder = tmp_path_factory.mktemp("kvplanner")
    with widget_page(folder, "KV planner", STATE, TRAITS) as found:
        yield found


def cells(page, name: str) -> list[float]:
    """bits, GB, longest context and tokens/s of one format."""
    row = page.get_by_role("row").filter(has=page.get_by_role("radio", name=name))
    return [float(text.replace(",", "")) for text in row.locator("td").all_inner_texts()]


def said(page) -> str:
    return page.locator(".bw-readout").inner_text()


def test_the_table_shows_the_planner_of_the_library(visit, address):
    seen = visit(address, DESKTOP)
    shape, tokens = SHAPES["Llama-3.1-8B"], 32768
    for name, bits in (("f16", 16), ("fp8", 8), ("int4", 5), ("polar", 3.875)):
        found = cells(seen.page, name)
        speed = decode_bound(shape, 1.008e12, "int4-g128", tokens, kv_bits=bits)
        cache = kv_bytes(shape, tokens, bits=bits) / 1e9
        assert [found[0], found[1], found[3]] == pytest.approx([bits, cache, speed], rel=5e-3)
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


def test_a_format_is_chosen_by_keyboard(visit, address):
    page = visit(address, DESKTOP).page
    page.get_by_role("radio", name="int4").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("radio", name="turbo4").is_checked()
    assert "turbo4 cache" in said(page)
    # The focus stays in the table, whose numbers were written anew.
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.get_by_role("radio", name="kivi4").is_checked()
    assert page.get_by_text("the newest 128 tokens in 16 bits").is_visible()
    assert page.get_by_role("radio").count() == len(NAMES)


def test_the_sliders_and_lists(visit, address):
    page = visit(address, DESKTOP).page
    before = cells(page, "f16")
    page.get_by_role("slider", name="Context").press("ArrowRight")
    after = cells(page, "f16")
    assert after[1] == pytest.approx(2 * before[1], rel=5e-3)
    assert after[2] == before[2]
    page.get_by_role("slider", name="Batch").press("ArrowRight")
    assert cells(page, "f16")[2] == pytest.approx(before[2] / 2, abs=1)
    assert "for each of 2 sequences" in said(page)
    page.get_by_label("Model").select_option(label="DeepSeek-V3 (671 B)")
    assert said(page).endswith("The weights alone are too large for this card.")
    assert page.locator(".bw-chart circle").count() == 0
    assert page.get_by_text("one latent of 576 numbers").is_visible()
    page.get_by_label("Weights").select_option(label="int2-g32 (2.5 bits)")
    page.get_by_label("Card").select_option(label="M3 Ultra, 512 GB (384 GB)")
    assert "fits in 384 GB" in said(page)


def test_a_line_ends_where_the_card_is_full(visit, address):
    page = visit(address, DESKTOP).page
    ends = [cells(page, name)[2] for name in NAMES]
    dots = page.locator(".bw-chart circle").count()
    assert 0 < dots == sum(end <= 2**20 for end in ends) < len(NAMES)
    label = page.locator(".bw-chart").get_attribute("aria-label")
    assert re.search(r"int4 ends at [\d,]+ tokens, f16 at [\d,]+\.$", label)


SMALL = """() => [...document.querySelectorAll('.bw select, .bw label, .bw input[type=range]')]
    .map(e => e.getBoundingClientRect()).filter(b => b.height < 22).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_everybody_can_use_it(visit, address, view, scheme):
    from test_site import overflow, violations

    seen = visit(address, view, scheme)
    page = seen.page
    for label in (None, "DeepSeek-V3 (671 B)"):
        if label:
            page.get_by_label("Model").select_option(label=label)
            page.get_by_role("slider", name="Context").press("End")
            page.get_by_role("slider", name="Batch").press("End")
        assert overflow(seen) <= 0
        assert violations(seen) == []
        assert page.evaluate(SMALL) == 0
        assert page.evaluate(TEXT) >= 12
