"""Decode a label: what the name of a file or repository tells about its quantization."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace

import traitlets

from ..families import BITS, GROUP, MODIFIERS, Family
from ..label import EVERY
from . import BookWidget

EXAMPLES = (
    "Llama-3.1-8B-Instruct-UD-Q5_K_XL.gguf",
    "Qwen2.5-7B-Instruct-GPTQ-Int4",
    "nvidia/DeepSeek-R1-NVFP4",
    "turboderp/Llama-3-8B-exl3-3.0bpw",
    "mlx-community/Mistral-7B-4bit-g32",
    "mlx-community/gpt-oss-20b-MXFP4-Q8",
)
# What JavaScript with the flags i and u refuses or reads in another way: groups of other kinds than
# (?: (?= (?! (?<= (?<!, escapes other than \d and of punctuation, possessive repeats, {,n}.
FOREIGN = re.compile(
    r"\(\?(?![:=!]|<[=!])(?:P?<\w+>|\w+)?|\\[^d().\[\]{}*+?^$|/\\]|[*+?}]\+|\{,|[^\x00-\x7f]"
)
COLUMNS = tuple(field.name for field in fields(Family))
# Stand for the pattern of a family and for its longest part, which recurs many times.
PLACE, SHARED = "@", "~"


def portable(family: Family) -> str:
    """The pattern of a family, which JavaScript reads as Python does.

    Python's digits are those of every script, JavaScript's 0 to 9. Raises ValueError for a
    construct that JavaScript lacks or reads in another way.
    """
    if found := FOREIGN.search(family.pattern):
        raise ValueError(
            f"{family.name}: JavaScript does not read {found[0]!r} in the pattern as Python does; "
            "write it with (?:...), \\d and ASCII"
        )
    return family.pattern.replace(MODIFIERS, SHARED)


def frame() -> str:
    """The pattern of a label that stands alone, with PLACE where that of its family goes."""
    return replace(EVERY[0], pattern=PLACE, needs="").matches(PLACE)[0].re.pattern


def grammar(families: list[Family]) -> dict:
    """The families as one row each, and the patterns that all of them share."""
    rows = [replace(family, pattern=portable(family)) for family in families]
    return {
        "columns": list(COLUMNS),
        "families": [[plain(getattr(row, name)) for name in COLUMNS] for row in rows],
        "bits": BITS,
        "group": GROUP,
        "frame": frame(),
        "shared": MODIFIERS,
    }


def plain(value: object) -> object:
    """The value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


class Label(BookWidget):
    """Type the name of a file or repository and read what the labels in it mean.

    Args:
        text: the name that is shown first.
        billions: billions of weights of the model whose size is shown; None for what the name
            tells ("7B"), or 8 where it tells nothing.

    Raises ValueError unless `billions` is None or a positive number.
    """

    grammar = traitlets.Dict().tag(sync=True)
    examples = traitlets.List().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    billions = traitlets.Float(allow_none=True).tag(sync=True)

    def __init__(self, text: str = EXAMPLES[0], billions: float | None = None):
        if billions is not None and not 0 < billions < math.inf:
            raise ValueError(f"billions of weights is a positive number, got {billions}")
        every = grammar(EVERY)
        super().__init__(grammar=every, examples=list(EXAMPLES), text=text, billions=billions)
