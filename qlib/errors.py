"""What many files raise: the error of every file reader, and one for what is no model."""

from __future__ import annotations

import os
from typing import Any

# A hostile file may choose the names that end up in a message.
LONGEST = 120


class FormatError(ValueError):
    """A file is not what its format demands.

    Args:
        path: the file or folder.
        field: the part of it that is wrong: a header field, a metadata key, a tensor.
        message: what was found and what is needed.
        offset: where the field lies, in bytes from the start of the file, if that is known.

    >>> print(FormatError("model.gguf", "n_tensors", "is -1; need 0 or more", 8))
    model.gguf: field 'n_tensors' at byte 8: is -1; need 0 or more
    """

    def __init__(
        self, path: str | os.PathLike, field: str, message: str, offset: int | None = None
    ) -> None:
        super().__init__(path, field, message, offset)
        self.path, self.field, self.message, self.offset = path, field, message, offset

    def __str__(self) -> str:
        field = self.field if len(self.field) <= LONGEST else self.field[:LONGEST] + "..."
        where = "" if self.offset is None else f" at byte {self.offset}"
        return f"{os.fspath(self.path)}: field {field!r}{where}: {self.message}"


def require_model(model: Any) -> None:
    """Raise TypeError, with the remedy, unless `model` is a model."""
    if not hasattr(model, "parameters"):
        pair = isinstance(model, tuple) and hasattr(model[0], "parameters")
        got = "pair (model, tokenizer): pass its first part" if pair else type(model).__name__
        raise TypeError(f"need a model, got a {got}")
