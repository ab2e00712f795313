"""Interactive figures: Python computes the numbers, one JavaScript file per widget draws them."""

from __future__ import annotations

import sys
from pathlib import Path

import anywidget

_HERE = Path(__file__).parent


def _source(path: Path, suffix: str) -> str:
    """The shared part followed by the widget's own file, if it has one."""
    shared = _HERE / {".js": "base.js", ".css": "widget.css"}[suffix]
    own = path.with_suffix(suffix)
    return "\n".join(file.read_text(encoding="utf-8") for file in (shared, own) if file.exists())


class BookWidget(anywidget.AnyWidget):
    """Base of the book's widgets: takes the `.js` (and `.css`) next to the subclass's file.

    Subclasses declare traits with `.tag(sync=True)`; everything that happens on the page happens in
    JavaScript, so that the widget also works on the static site, where no Python runs.
    """

    def __init_subclass__(cls, **kwargs):
        # anywidget subclasses each class once more, with `_esm` as a trait: leave that one alone.
        if "_esm" not in cls.__dict__:
            path = Path(sys.modules[cls.__module__].__file__)
            cls._esm, cls._css = _source(path, ".js"), _source(path, ".css")
        super().__init_subclass__(**kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: interactive figure>"
