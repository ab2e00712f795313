"""Sphinx extension of the book: plain Markdown of the notebooks becomes boxes, and addresses derive from one setting."""

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
    """`> **Definition: block.** Text` becomes a titled admonition; elsewhere it stays a block quote."""

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
    """The quote as an admonition: the bold words are its title, what follows them its first line."""
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


def setup(app) -> dict[str, bool]:
    app.add_transform(Boxes)
    app.connect("config-inited", derive_addresses, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
