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
            first = quote[0] if len(quote) else None
            if not isinstance(first, nodes.paragraph) or not isinstance(first[0], nodes.strong):
                continue
            kind = BOXES.get(first[0].astext().split()[0].rstrip(".:"))
            if kind:
                self._replace(quote, first, kind)

    def _replace(self, quote: nodes.block_quote, first: nodes.paragraph, kind: str) -> None:
        title = nodes.title("", "", *first.pop(0).children)
        if isinstance(title[-1], nodes.Text):
            title[-1] = nodes.Text(title[-1].rstrip(".: "))
        if len(first) and isinstance(first[0], nodes.Text):
            first[0] = nodes.Text(first[0].lstrip())
        body = [child for child in quote.children if child is not first or len(first)]
        quote.replace_self(nodes.admonition("", title, *body, classes=[kind, "bw-box"]))


def derive_addresses(app, config) -> None:
    """Fill the settings of other extensions from `html.baseurl` in _config.yml."""
    config.ogp_site_url = config.html_baseurl
    config.notfound_urls_prefix = urlsplit(config.html_baseurl).path


def setup(app) -> dict[str, bool]:
    app.add_transform(Boxes)
    app.connect("config-inited", derive_addresses, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
