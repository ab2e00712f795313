"""The widget "one weight in six containers" in a real browser: hex, table, keyboard, sizes."""

from __future__ import annotations

import re

import pytest
from conftest import DESKTOP, PHONE, TEXT, widget_page
from test_widget_containers import K, ours, weight

from qlib.widgets.containers import KINDS, Containers

STATE = Containers(weight(), 2, 37).get_state()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with nothing but the widget and the site's own loader."""
    folder = tmp_path_factory.mktemp("containers")
    with widget_page(folder, "Containers", STATE, "shape containers chosen at") as found:
        yield found


def said(page) -> list[str]:
    return page.get_by_role("status").all_inner_texts()


def column(page, k: int) -> list[str]:
    """One column of the table, a text for each container."""
    cells = page.locator(f".bw-where tbody tr td:nth-child({k})").all_inner_texts()
    return [" ".join(text.split()) for text in cells]


def test_the_same_weight_in_every_container(visit, address):
    seen = visit(address, DESKTOP)
    values = [float(text.replace("−", "-")) for text in column(seen.page, 5)]
    right = [ours(name)[2, 37].item() for name in KINDS]
    assert values == pytest.approx(right, rel=1e-3)
    assert values != pytest.approx([value * 1.01 for value in right], rel=1e-3)
    assert column(seen.page, 4)[2] == column(seen.page, 4)[4] == "8, not stored"
    sentence, effect = said(seen.page)
    assert sentence.startswith("GPTQ: weight [2, 37] = (code − zero) × scale = (")
    assert effect == "Byte 138 holds its code in the high half, and that of [2, 36]."
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


@pytest.mark.parametrize(
    ("name", "byte", "half", "other"),
    [
        ("GPTQ", 138, "high", "[2, 36]"),
        ("AWQ", 148, "high", "[0, 37]"),
        ("compressed-tensors", 82, "high", "[2, 36]"),
        ("MLX", 82, "high", "[2, 36]"),
        ("GGUF Q4_0", 97, "low", "[2, 53]"),
        ("bitsandbytes NF4", 82, "low", "[2, 36]"),
    ],
)
def test_a_container_is_chosen(visit, address, name, byte, half, other):
    page = visit(address, DESKTOP).page
    button = page.get_by_role("button", name=name, exact=True)
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator('.bw-where [aria-pressed="true"]').count() == 1
    assert said(page)[0].startswith(f"{name}: weight [2, 37] = ")
    wanted = f"Byte {byte} holds its code in the {half} half, and that of {other}."
    assert said(page)[1] == wanted


def cell(page, byte: int):
    return page.locator(".bw-bytes button").nth(byte)


def test_a_byte_leads_to_its_weights(visit, address):
    page = visit(address, DESKTOP).page
    cell(page, 0).click()
    assert said(page)[1] == "Byte 0 is part of the code of 2 weights."
    first = said(page)[0]
    assert "weight [0, 0] = " in first or "weight [0, 1] = " in first
    cell(page, 0).click()
    assert said(page)[0] != first
    cell(page, 264).click()
    assert said(page)[1] == "Byte 264 is part of the scale of 32 weights."
    cell(page, 256).click()
    # Two zero points share a byte.
    assert said(page)[1] == "Byte 256 is part of the zero of 64 weights."
    cell(page, 296 + 4 * 40).click()
    assert said(page)[1] == "Byte 456 is part of the group of 8 weights."
    page.get_by_role("button", name="compressed-tensors", exact=True).click()
    cell(page, 288).click()
    assert said(page)[1] == "Byte 288 says nothing of a single weight."


def test_the_keyboard_reaches_everything(visit, address):
    page = visit(address, DESKTOP).page
    page.get_by_label("Row, 0 to 7").focus()
    page.get_by_label("Row, 0 to 7").fill("5")
    page.keyboard.press("Tab")
    assert "weight [5, 37] = " in said(page)[0]
    page.get_by_label("Column, 0 to 63").fill("99")
    page.keyboard.press("Tab")
    assert "weight [5, 63] = " in said(page)[0]
    assert page.get_by_label("Column, 0 to 63").input_value() == "63"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert "weight [4, 62] = " in said(page)[0]
    page.keyboard.press("Tab")
    for key in ("Home", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    name = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert re.match(r"[0-9a-f]{2}, byte 17, code", name)
    # Every tensor of the container is one stop.
    for first in (256, 264, 296):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert f", byte {first}, " in name
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "GPTQ"


def test_the_picture_chooses(visit, address):
    page = visit(address, DESKTOP).page
    box = page.locator(".bw-containers svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 10.5 / K, box["y"] + 16 * 3.5)
    assert "weight [3, 10] = " in said(page)[0]


SMALL = """() => [...document.querySelectorAll('.bw button, .bw input')]
    .map(e => e.getBoundingClientRect()).filter(b => Math.min(b.width, b.height) < 24).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["GPTQ", "bitsandbytes NF4"])
def test_it_fits_and_everybody_can_use_it(visit, address, view, scheme, name):
    from test_site import overflow, violations

    seen = visit(address, view, scheme)
    seen.page.get_by_role("button", name=name, exact=True).press("Enter")
    assert overflow(seen) <= 0
    assert violations(seen) == []
    assert seen.page.evaluate(SMALL) == 0
    assert seen.page.evaluate(TEXT) >= 12
