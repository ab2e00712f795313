"""The block formats of ggml (llama.cpp), byte for byte. One family, one file."""

from __future__ import annotations

import numpy as np

from . import fp4, iq1, iq4, iquants, kquants, legacy, plain, ternary
from .block import BY_ID, TYPES, BlockFormat, GgmlType

__all__ = ["BY_ID", "FORMATS", "READERS", "TYPES", "BlockFormat", "GgmlType", "decode"]

# Every format of ggml that can be written, by its name in `qlib.format`.
FORMATS: dict[str, BlockFormat] = {**legacy.FORMATS, **kquants.FORMATS}
FORMATS |= iq4.FORMATS | ternary.FORMATS | fp4.FORMATS | iquants.FORMATS | iq1.FORMATS
# Functions that decode blocks, by type.
READERS = plain.READERS | {format.kind.name: format.read for format in FORMATS.values()}


def decode(kind: GgmlType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantize the bytes of a whole tensor.

    Args:
        kind: one of the types in READERS.
        raw: uint8 [bytes], a multiple of ``kind.size``.
        shape: shape of the result; the last axis is the one that is cut into blocks.

    Returns a new float32 array. Raises KeyError for a type without a reader.
    """
    out = np.empty(shape, np.float32)
    # An infinite scale times a zero code is NaN, as in ggml; it needs no warning.
    with np.errstate(invalid="ignore", over="ignore"):
        READERS[kind.name](raw.reshape(-1, kind.size), out.reshape(-1, kind.block))
    return out
