"""Figures and tables of the book: inline SVG that follows the page's colors, and plain tables."""

from __future__ import annotations

import hashlib
import html
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct under the three common color deficiencies; at least 3:1 on white and on the dark page.
COLORS = ("#3277d8", "#e9730c", "#a3418f", "#c27a8f", "#c25233", "#5299d6")

# Stand-in colors that `show` replaces by the page's own text and background colors.
INK, PAPER = "#010101", "#020202"
FAINT = (INK, 0.3)
_PAGE = {INK: "currentColor", PAPER: "var(--pst-color-background, var(--jp-layout-color0, Canvas))"}

_INK_KEYS = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color patch.edgecolor"
_STYLE = dict.fromkeys(_INK_KEYS.split(), INK) | {
    "svg.hashsalt": "qlib",
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 110,
}
_FONT = "var(--pst-font-family-base, system-ui, sans-serif)"


@dataclass(frozen=True, repr=False)
class Shown:
    """What a notebook displays: HTML for a page, text for a terminal and for the tests."""

    markup: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.markup


def figure(width: float = 5.2, height: float = 3.2, rows: int = 1, cols: int = 1):
    """Return `(figure, axes)` in the book's style; sizes in inches; axes: one, or an array."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    # Global, because texts and legends added later take their color from here.
    matplotlib.rcParams.update(_STYLE | {"axes.prop_cycle": cycler(color=COLORS)})
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, cols)


def show(fig: Figure, alt: str, caption: str | None = None) -> Shown:
    """Return the figure as inline SVG with an accessible name and, below it, a caption.

    >>> fig, ax = figure()
    >>> _ = ax.plot([8, 4, 2], [0.001, 0.3, 9])
    >>> show(fig, alt="The error explodes below four bits.")
    <figure: The error explodes below four bits.>
    """
    if not alt.strip():
        raise ValueError(
            "show: alt is empty; say what a reader who cannot see the figure must know"
        )
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    svg = _inline(buffer.getvalue(), alt)
    return Shown(f'<figure class="bw-figure">{svg}{below}</figure>', f"<figure: {alt}>")


def _inline(svg: str, alt: str) -> str:
    """Turn a Matplotlib SVG file into an element that fits in any page, any number of times."""
    opening = re.search(r"<svg[^>]*>", svg)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening[0]).groups())
    body = svg[opening.end() :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"font-family: ?[^;\"]*;? ?", "", body)
    # Coordinates need no more than hundredths; numbers that are read stay as they are.
    body = re.sub(
        r"(>[^<]*</text>)|(\d+\.\d{3,})",
        lambda found: found[1] or f"{float(found[2]):.2f}".rstrip("0").rstrip("."),
        body,
    )
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><")
    for color, page in _PAGE.items():
        body = body.replace(color, page)
    # Ids are global in a page: a prefix made of the content keeps figures apart and outputs stable.
    prefix = "f" + hashlib.sha256((alt + body).encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    pixels = width * 4 / 3
    look = (
        f"width: 100%; max-width: {pixels:.0f}px; min-width: {min(pixels, 340):.0f}px; height: auto"
    )
    return (
        f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="{look}; stroke-linejoin: round; font-family: {_FONT}">{body}'
    )


def table(rows: list[dict[str, object]], caption: str | None = None) -> Shown:
    """Return rows (one dictionary each, same keys; format numbers beforehand) as a table.

    >>> table([{"format": "int4-g128", "bpw": "4.12"}, {"format": "nf4", "bpw": "4.5"}])
    format      bpw
    int4-g128  4.12
    nf4         4.5
    """
    head = list(rows[0])
    cells = [[str(row[key]) for key in head] for row in rows]
    right = [all(re.match(r"[-+−±]?[\d.]", line[i]) for line in cells) for i in range(len(head))]
    return Shown(_table_html(head, cells, right, caption), _table_text(head, cells, right))


def _table_text(head: list[str], cells: list[list[str]], right: list[bool]) -> str:
    wide = [max(map(len, column)) for column in zip(head, *cells)]
    just = [str.rjust if flag else str.ljust for flag in right]
    lines = ("  ".join(j(c, w) for c, j, w in zip(line, just, wide)) for line in [head, *cells])
    return "\n".join(line.rstrip() for line in lines)


def _table_html(head: list[str], cells: list[list[str]], right: list[bool], caption) -> str:
    def line(tag: str, texts: list[str]) -> str:
        sides = ("right" if flag else "left" for flag in right)
        row = (
            f'<{tag} style="text-align: {s}">{html.escape(t)}</{tag}>' for t, s in zip(texts, sides)
        )
        return f"<tr>{''.join(row)}</tr>"

    title = f"<caption><span>{html.escape(caption)}</span></caption>" if caption else ""
    body = "".join(line("td", texts) for texts in cells)
    return (
        f'<table class="bw-table">{title}<thead>{line("th", head)}</thead>'
        f"<tbody>{body}</tbody></table>"
    )
