"""Click the bits: the fields of a float, its exact value, and its place among its neighbors."""

from __future__ import annotations

import torch
import traitlets

from ..grid import FLOATS, FloatFormat
from . import BookWidget

LABELS = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "e4m3": "FP8 E4M3",
    "e5m2": "FP8 E5M2",
    "e2m3": "FP6 E2M3",
    "e3m2": "FP6 E3M2",
    "e2m1": "FP4 E2M1",
    "e8m0": "E8M0 (a scale)",
}


def landmarks(format: FloatFormat) -> list[dict]:
    """Codes worth a look: {"text", "code"} for the smallest, one, the largest, infinity and NaN."""
    exponents = 2**format.exponent - 1
    top = exponents << format.mantissa
    # Below the special codes: all of the top exponent, the last code, or none.
    largest = {"ieee": top - 1, "nan": (top | 2**format.mantissa - 1) - 1}
    marks = {
        "smallest": int(format.signed),
        "one": format.bias << format.mantissa,
        "largest": largest.get(format.specials, top | 2**format.mantissa - 1),
    }
    if format.specials == "ieee":
        marks["infinity"] = top
    if format.specials != "none":
        marks["NaN"] = top | 2**format.mantissa - 1
    return [{"text": text, "code": code} for text, code in marks.items()]


def describe(format: FloatFormat) -> dict:
    """What the page needs to read and to round in one format."""
    return {
        "name": format.name,
        "label": LABELS[format.name],
        "signed": int(format.signed),
        "exponent": format.exponent,
        "mantissa": format.mantissa,
        "bias": format.bias,
        "specials": format.specials,
        "largest": format.max,
        "marks": landmarks(format),
    }


class Bits(BookWidget):
    """Choose a format, click its bits or ask for a number, and read what the code means.

    Args:
        format: name of one of `qlib.grid.FLOATS` of at most 16 bits to start with.
        asked: the number whose nearest value is shown first.

    Raises ValueError for an unknown name.
    """

    formats = traitlets.List().tag(sync=True)
    format = traitlets.Unicode().tag(sync=True)
    code = traitlets.Int().tag(sync=True)
    asked = traitlets.Float(allow_none=True).tag(sync=True)

    def __init__(self, format: str = "e4m3", asked: float = 0.3):
        known = {one.name: one for one in FLOATS}
        if format not in known:
            raise ValueError(f"unknown float format {format!r}: known are {', '.join(known)}")
        code = int(known[format].grid.round(torch.tensor(asked)))
        every = [describe(one) for one in FLOATS]
        super().__init__(formats=every, format=format, code=code, asked=asked)
