"""Measured elsewhere, kept with the book: `load(name)` reads results/<name>.json.

Each file says with which command, on which device and when it was made; the pages that show it
measure a part of it again.
"""

from __future__ import annotations

import json
from pathlib import Path


def load(name: str) -> dict:
    """The contents of `<name>.json`. Raises FileNotFoundError naming what there is."""
    folder = Path(__file__).parent
    path = folder / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise FileNotFoundError(
            f"no results called {name!r}; there are: {names or 'none yet'}"
        )
    return json.loads(path.read_text())
