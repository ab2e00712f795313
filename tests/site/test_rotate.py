"""The rotation widget in a real browser: its examples, its sliders by keyboard, and sizes."""

from __future__ import annotations

import re

import pytest
from conftest import DESKTOP, PHONE, TEXT, widget_page

from qlib.widgets.rotate import Rotate

NAMES = "channels unit spread places scales grids draws presets basis count size stages signs bits"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with nothing but the widget and the site's own loader."""
    folder = tmp_path_factory.mktemp("rotate")
    with widget_page(folder, "Rotate", Rotate().get_state(), NAMES) as found:
        yield found


def said(page) -> str:
    return page.locator(".bw-readout").inner_text()


def cells(page, row: str) -> list[str]:
    """The numbers of one row of the table: original, rotated."""
    return page.locator(".bw-numbers tr", has_text=row).locator("td").all_inner_texts()


def pressed(page) -> list[str]:
    return page.locator('button[aria-pressed="true"]').all_inner_texts()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("one outlier", r"gains 1[12]\.\d dB"),
        ("massive activation", r"loses \d\.\d dB"),
        ("Gaussian", "changes little"),
        ("worst case", r"loses 1[12]\.\d dB"),
    ],
)
def test_an_example_is_chosen(visit, address, name, verdict):
    seen = visit(address, DESKTOP)
    seen.page.get_by_role("button", name=name).press("Enter")
    assert pressed(seen.page) == [name]
    assert re.match(f"At 4 bits the rotation {verdict}: SNR ", said(seen.page))
    before, after = cells(seen.page, "energy")
    assert before == after
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


def test_the_sliders_answer_to_the_keyboard(visit, address):
    page = visit(address, DESKTOP).page
    stages, size = (
        page.get_by_role("slider", name="Stages"),
        page.get_by_role("slider", name="Their size"),
    )
    assert cells(page, "largest") == ["32.0", "6.00"]
    stages.press("Home")
    assert page.get_by_text("After 0 of 6 stages: nothing is mixed yet").is_visible()
    assert "changes little" in said(page)
    for done in range(1, 7):
        stages.press("ArrowRight")
        assert page.get_by_text(f"After {done} of 6 stages: each channel a mix of").is_visible()
    size.press("ArrowRight")
    assert size.get_attribute("aria-valuetext") == "64 × typical"
    assert cells(page, "largest")[0] == "64.0"
    assert pressed(page) == []
    page.get_by_role("slider", name="Outliers").press("End")
    assert float(cells(page, "largest")[1]) > 16
    page.get_by_role("slider", name="Grid").press("End")
    assert said(page).startswith("At 8 bits ")
    before = cells(page, "SNR")
    page.get_by_role("radio", name="none").press("ArrowRight")
    assert page.get_by_role("radio", name="draw 1").is_checked()
    assert cells(page, "SNR")[0] == before[0]
    assert cells(page, "SNR")[1] != before[1]


def test_the_bars_that_are_lost_have_their_own_color(visit, address):
    page = visit(address, DESKTOP).page
    lost = [
        page.locator(".bw-chart").nth(k).locator("rect[fill='var(--bw-c5)']").count()
        for k in (0, 1)
    ]
    assert [f"{count} of 64" for count in lost] == cells(page, "rounded to zero")
    assert lost[0] > 50 > lost[1]


SMALL = """() => [...document.querySelectorAll('.bw button, .bw label, .bw input[type=range]')]
    .map(e => e.getBoundingClientRect()).filter(b => b.height < 22).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_everybody_can_use_it(visit, address, view, scheme):
    from test_site import overflow, violations

    seen = visit(address, view, scheme)
    seen.page.get_by_role("button", name="massive activation").press("Enter")
    assert overflow(seen) <= 0
    assert violations(seen) == []
    assert seen.page.evaluate(SMALL) == 0
    assert seen.page.evaluate(TEXT) >= 12
