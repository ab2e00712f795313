"""Texts to calibrate on and to measure with: two that come with the library, or the user's own."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from .errors import FormatError

# Written for this project, CC0, with no sentence in common.
NAMES = ("calibration", "evaluation")
DATA = Path(__file__).parent / "data"


def texts(name_or_path: str | os.PathLike) -> str:
    """Return a text: ``"calibration"``, ``"evaluation"``, or the content of a UTF-8 file.

    Raises ValueError for a name that is neither a text nor a file, and FormatError for a file that
    is empty or not UTF-8.

    >>> len(texts("calibration")) > 60_000
    True
    """
    name = os.fspath(name_or_path)
    path = DATA / f"{name}.txt" if name in NAMES else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = " and ".join(map(repr, NAMES))
        raise ValueError(f"unknown text {name!r}: {hint}known are {names}, or the path of a file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        message = "is not valid UTF-8; save the file as UTF-8"
        raise FormatError(path, "text", message, error.start) from error
    if not text.strip():
        raise FormatError(path, "text", "is empty")
    return text
