"""Sphinx extension of the book: block quotes become boxes, addresses derive from one setting."""

from __future__ import annotations

from urllib.parse import urlsplit

from docutils import nodes
from sphinx.transforms import SphinxTransform

# First word of a block quote's bold title -> the theme's admonition whose color it takes.
BOXES = {
    "Definition": "note",
    "Takeaway": "important",
    "Notice": "tip",
    "You": "seealso",
    "Warning": "warning",
}


class Boxes(SphinxTransform):
    """`> **Definition: block.** Text` becomes a titled admonition on the site."""

    default_priority = 400

    def apply(self) -> None:
        for quote in list(self.document.findall(nodes.block_quote)):
            first = quote.next_node(nodes.paragraph)
            # The Markdown parser leaves empty texts around inline marks.
            words = [node for node in first or [] if node.astext()]
            if not words or not isinstance(words[0], nodes.strong):
                continue
            kind = BOXES.get(words[0].astext().split()[0].rstrip(".:"))
            if kind:
                quote.replace_self(box(quote, first, words, kind))


def box(
    quote: nodes.block_quote, first: nodes.paragraph, words: list[nodes.Node], kind: str
) -> nodes.admonition:
    """The quote as an admonition: the bold words are its title, the rest is its text."""
    title = nodes.title("", "", *words[0].children)
    if isinstance(title[-1], nodes.Text):
        title[-1] = nodes.Text(title[-1].rstrip(".: "))
    rest = words[1:]
    if rest and isinstance(rest[0], nodes.Text):
        rest[0] = nodes.Text(rest[0].lstrip())
    opening = [nodes.paragraph("", "", *rest)] if rest else []
    others = [child for child in quote.children if child is not first]
    return nodes.admonition("", title, *opening, *others, classes=[kind, "bw-box"])


def derive_addresses(app, config) -> None:
    """Fill the settings of other extensions from `html.baseurl` in _config.yml."""
    config.ogp_site_url = config.html_baseurl
    config.notfound_urls_prefix = urlsplit(config.html_baseurl).path


def drop_unused_mathjax(app, page, template, context, doctree) -> None:
    """Load MathJax only where the page itself has math, not where one that it lists has."""
    if not app.env.get_domain("math").data["has_equations"].get(page):
        scripts = context["script_files"]
        scripts[:] = [script for script in scripts if "mathjax" not in str(script).lower()]


def setup(app) -> dict[str, bool]:
    app.add_transform(Boxes)
    app.connect("config-inited", derive_addresses, priority=100)
    app.connect("html-page-context", drop_unused_mathjax, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
