"""The widget "decode a label" in a real browser: what it finds, shows, and lets everybody use."""

from __future__ import annotations

import pytest
from conftest import DESKTOP, PHONE, TEXT, widget_page
from test_widget_label import DECODE, NAMES, STATE, changed, library

from qlib.widgets.label import EXAMPLES


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with nothing but the widget and the site's own loader."""
    folder = tmp_path_factory.mktemp("decode")
    with widget_page(folder, "Label", STATE, "grammar examples text billions") as found:
        yield found


MODULE = """async ({ source, given }) => {
    const text = `${source}\\nexport const found = DECODE;`;
    const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    return (await import(address)).found(given);
}""".replace("DECODE", DECODE.replace("`", "\\`"))


def found(page, rules: dict) -> dict[str, dict]:
    """What the browser finds in every name."""
    given = {"grammar": rules, "texts": NAMES}
    answers = page.evaluate(MODULE, {"source": STATE["_esm"], "given": given})
    return dict(zip(NAMES, answers))


def test_the_browser_finds_what_the_library_finds(visit, address):
    page = visit(address, DESKTOP).page
    expected = {name: library(name) for name in NAMES}
    assert found(page, STATE["grammar"]) == expected
    broken = found(page, changed("Q4_K_S", pattern="Q4_K_SS"))
    wrong = [name for name in NAMES if broken[name] != expected[name]]
    assert wrong == ["mistral-7b-instruct-v0.1.Q4_K_S.gguf"]


def field(page):
    return page.get_by_label("Label, or name of a file or repository")


def said(page) -> str:
    return page.get_by_role("status").inner_text()


def facts(page, card: str) -> dict[str, str]:
    group = page.get_by_role("group", name=card, exact=True)
    terms, answers = group.locator("dt").all_inner_texts(), group.locator("dd").all_inner_texts()
    return dict(zip(terms, answers, strict=True))


def test_a_name_shows_its_facts(visit, address):
    seen = visit(address, DESKTOP)
    size = "5.4 to 6.4 GB for 8 billion weights"
    bpw = "5.4 to 6.4 bits per weight of the whole file"
    assert said(seen.page) == f"UD-Q5_K_XL: {bpw}; {size}."
    field(seen.page).fill("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4")
    assert facts(seen.page, "GPTQ-Int4") == {
        "Bits of a code": "4",
        "Number format": "integers in groups",
        "Block or group": "128 weights",
        "Quantized": "weights",
        "Expected": "4.15625 bits per weight in this format",
        "Size": "37.4 GB if all 72 billion weights are in it",
        "Container": "safetensors",
        "Method": "GPTQ",
        "Equal in qlib": "int4-g128-asym",
    }
    field(seen.page).fill("4bit")
    assert facts(seen.page, "4bit")["Container"] == "not told by the label"
    assert (seen.external, seen.failures, seen.errors) == ([], [], [])


def test_every_label_of_a_name_is_shown(visit, address):
    page = visit(address, DESKTOP).page
    field(page).fill("BF16 with fp8 KV cache")
    assert said(page).startswith("2 labels: fp8 KV cache, BF16. fp8 KV cache: 8 to 8.02 bits per")
    assert page.locator("mark").all_inner_texts() == ["BF16", "fp8 KV cache"]
    assert page.locator(".bw-title").all_inner_texts() == ["fp8 KV cache", "BF16"]
    assert facts(page, "fp8 KV cache")["Size"] == "depends on model and context"


def test_no_label_names_the_nearest_which_keep_the_size(visit, address):
    page = visit(address, DESKTOP).page
    field(page).fill("Llama-3-70B-Q4KM.gguf")
    assert said(page) == "No label found in “Llama-3-70B-Q4KM.gguf”; nearest: Q4_K_M, Q4_K."
    page.get_by_role("button", name="Q4_K_M").press("Enter")
    assert field(page).input_value() == "Q4_K_M"
    assert said(page).endswith("; 42 to 42.9 GB for 70 billion weights.")
    field(page).fill("openai/gpt-oss-20b")
    assert said(page).endswith("labels look like Q4_K_M or FP8.")
    field(page).fill(" ")
    assert said(page) == "Type a label or a name, or press one of the examples."


def test_the_size_comes_from_the_name_unless_it_is_entered(visit, address):
    page = visit(address, DESKTOP).page
    size = page.get_by_label("Billions of weights")
    for name, value in (("Mixtral-8x7B-Q8_0", "56"), ("Q8_0", "8"), ("x-270m-Q8_0", "0.27")):
        field(page).fill(name)
        assert size.input_value() == value
    size.fill("100")
    size.press("Enter")
    assert said(page) == "Q8_0: 8.5 bits per weight in this format; 106 GB if all 100 billion " + (
        "weights are in it."
    )
    field(page).fill("NVFP4")
    assert size.input_value() == "100"
    for nothing in ("", "-3", "1e9"):
        size.fill(nothing)
        size.press("Enter")
        assert size.input_value() == "8"
    field(page).fill("Qwen3-8B-FP8")
    assert size.input_value() == "8"


def test_the_keyboard_reaches_everything_in_order(visit, address):
    page = visit(address, DESKTOP).page
    field(page).focus()
    reached = []
    for _ in EXAMPLES:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        reached.append(field(page).input_value())
    assert reached == list(EXAMPLES)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "number"


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)> Q4_K_M", "0bpw", "exl2.4.0bpw", "4bit-" * 60, "$& ~ @"]
)
def test_strange_texts_do_no_harm(visit, address, text):
    seen = visit(address, DESKTOP)
    field(seen.page).fill(text)
    assert seen.page.locator("img").count() == 0
    assert said(seen.page)
    assert "UD-Q5_K_XL" not in said(seen.page)
    assert "NaN" not in seen.page.locator(".bw").inner_text()
    assert "null" not in seen.page.locator(".bw").inner_text()
    assert seen.errors == []


SMALL = """() => [...document.querySelectorAll('.bw button, .bw input')]
    .map(e => e.getBoundingClientRect()).filter(b => Math.min(b.width, b.height) < 24).length"""
LONG = f"mlx-community/{'x' * 200}-MXFP4-Q8"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("text", [LONG, "Q4KM"], ids=["two", "none"])
def test_it_fits_and_everybody_can_use_it(visit, address, view, scheme, text):
    from test_site import overflow, violations

    seen = visit(address, view, scheme)
    field(seen.page).fill(text)
    assert overflow(seen) <= 0
    assert violations(seen) == []
    assert seen.page.evaluate(SMALL) == 0
    assert seen.page.evaluate(TEXT) >= 12
