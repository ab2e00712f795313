"""Figures and tables: stable, accessible, and the same colors in Python and in the widgets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlib import plots, widgets

WIDGETS = Path(widgets.__file__).parent


def drawn(height: float = 1.0, alt: str = "A line rises & falls.", caption: str | None = None):
    fig, ax = plots.figure()
    ax.plot([0, 1, 2], [0, height, 0.123456], label="line")
    ax.text(1, 0.5, "text")
    ax.legend()
    return plots.show(fig, alt, caption)


def test_same_drawing_gives_the_same_bytes():
    assert drawn().markup == drawn().markup
    assert drawn().markup != drawn(height=2.0).markup


def test_figure_is_named_and_captioned():
    shown = drawn(caption="Rises < falls.")
    assert repr(shown) == "<figure: A line rises & falls.>"
    assert shown._repr_html_() == shown.markup
    assert 'role="img" aria-label="A line rises &amp; falls."' in shown.markup
    assert shown.markup.endswith("<figcaption>Rises &lt; falls.</figcaption></figure>")


def test_figure_needs_an_alternative_text():
    with pytest.raises(
        ValueError, match="show: alt is empty; say what a reader who cannot see the"
    ):
        drawn(alt=" ")


def test_ink_follows_the_page():
    markup = drawn().markup
    assert plots.INK not in markup
    assert plots.PAPER not in markup
    assert "currentColor" in markup
    assert plots.COLORS[0] in markup
    # What could reach out of the figure and change the page around it.
    assert not re.search(r"<style|<\?xml|DejaVu|\d\.\d{3}", markup)


def test_two_figures_on_a_page_do_not_share_ids():
    def ids(markup: str) -> set[str]:
        return set(re.findall(r'\bid="([^"]+)"', markup))

    one, other = drawn().markup, drawn(height=2.0).markup
    assert ids(one)
    assert ids(one) & ids(other) == set()
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one))
    assert {a or b for a, b in used} <= ids(one)


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#14181e", "#121212"])
@pytest.mark.parametrize("color", plots.COLORS)
def test_colors_stand_out_on_light_and_dark(color, page):
    assert contrast(color, page) >= 3
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_widgets_have_the_same_colors():
    css = (WIDGETS / "widget.css").read_text()
    assert tuple(re.findall(r"--bw-c\d: (#\w+)", css)) == plots.COLORS


def test_table_is_aligned_and_escaped():
    rows = [{"format": "a<b", "bpw": "4.25"}, {"format": "nf4 & more", "bpw": "10.5"}]
    shown = plots.table(rows, caption="C")
    assert repr(shown) == "format       bpw\na<b         4.25\nnf4 & more  10.5"
    assert '<td style="text-align: left">a&lt;b</td>' in shown.markup
    assert '<th style="text-align: right">bpw</th>' in shown.markup
    assert "<caption><span>C</span></caption>" in shown.markup


SOURCES = sorted(WIDGETS.glob("*.js"))


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_script_is_small_and_asks_no_other_host(path):
    source = path.read_text()
    assert len(source.encode()) < 12_000
    assert not re.search(r"\bimport\b|\bfetch\(|https?://(?!www\.w3\.org/)", source)
    assert path.stem == "base" or "export default { render }" in source


def test_widget_joins_the_shared_and_its_own_script(tmp_path, monkeypatch):
    (tmp_path / "demo_bits.py").write_text(
        "from qlib.widgets import BookWidget\n\n\nclass Bits(BookWidget):\n    pass\n"
    )
    (tmp_path / "demo_bits.js").write_text("export default { render };")
    monkeypatch.syspath_prepend(str(tmp_path))
    from demo_bits import Bits

    widget = Bits()
    assert repr(widget) == "<Bits: interactive figure>"
    assert widget._esm == (WIDGETS / "base.js").read_text() + "\nexport default { render };"
    assert widget._css == (WIDGETS / "widget.css").read_text()


def test_numbers_of_a_figure_are_not_rounded():
    figure, axes = plots.figure()
    axes.set_yticks([0.035, 0.04])
    axes.text(0.5, 0.5, "1.2345")
    found = plots.show(figure, "alt")._repr_html_()
    assert {"0.035", "0.040", "1.2345"} <= set(re.findall(r">([\d.]+)</text>", found))
    assert not re.search(r"\d\.\d{3}", re.sub(r">[^<]*</text>", "", found))
