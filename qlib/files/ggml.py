"""GGML tensor types: how many bytes a block of values takes, and what the bytes mean.

A row of a tensor is a run of blocks.  In the 32-value blocks byte j of `qs` holds value j in its
low nibble and value j + 16 in its high nibble; bit j of `qh` is the fifth bit of value j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GgmlType:
    """A tensor type: its name, its id in files, values per block and bytes per block."""

    name: str
    id: int
    block: int
    size: int


_TABLE = """
F32 0 1 4       F16 1 1 2       BF16 30 1 2     F64 28 1 8
I8 24 1 1       I16 25 1 2      I32 26 1 4      I64 27 1 8
Q4_0 2 32 18    Q4_1 3 32 20    Q5_0 6 32 22    Q5_1 7 32 24    Q8_0 8 32 34    Q8_1 9 32 36
Q2_K 10 256 84  Q3_K 11 256 110 Q4_K 12 256 144 Q5_K 13 256 176 Q6_K 14 256 210 Q8_K 15 256 292
IQ2_XXS 16 256 66   IQ2_XS 17 256 74    IQ2_S 22 256 82     IQ3_XXS 18 256 98   IQ3_S 21 256 110
IQ1_S 19 256 50     IQ1_M 29 256 56     IQ4_NL 20 32 18     IQ4_XS 23 256 136
TQ1_0 34 256 54     TQ2_0 35 256 66     MXFP4 39 32 17      NVFP4 40 64 36
Q1_0 41 128 18      Q2_0 42 64 18
"""
_CELLS = iter(_TABLE.split())
TYPES: dict[int, GgmlType] = {
    int(number): GgmlType(name, int(number), int(block), int(size))
    for name, number, block, size in zip(_CELLS, _CELLS, _CELLS, _CELLS)
}


def decode(kind: GgmlType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantize the bytes of a whole tensor.

    Args:
        kind: one of the types in DECODERS.
        raw: uint8 [bytes], a multiple of ``kind.size``.
        shape: shape of the result; the last axis is the one that is cut into blocks.

    Returns a new float32 array. Raises KeyError for a type without a decoder.
    """
    out = np.empty(shape, np.float32)
    # An infinite scale times a zero code is NaN, as in ggml; it needs no warning.
    with np.errstate(invalid="ignore", over="ignore"):
        DECODERS[kind.name](raw.reshape(-1, kind.size), out.reshape(-1, kind.block))
    return out


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16] -> codes [blocks, 32]: all low nibbles, then all high ones."""
    return np.concatenate((qs & 15, qs >> 4), axis=1)


def _fifth(qh: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 4] -> the fifth bit of each code, in place: 0 or 16 [blocks, 32]."""
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    # A bfloat16 is the upper half of a float32.
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 2:18]).view(np.int8)
    np.multiply(codes - np.int8(8), _half(blocks, 0), out=out)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks[:, 4:20]), _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = (_nibbles(blocks[:, 6:22]) | _fifth(blocks[:, 2:6])).view(np.int8)
    np.multiply(codes - np.int8(16), _half(blocks, 0), out=out)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 8:24]) | _fifth(blocks[:, 4:8])
    np.multiply(codes, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:34].view(np.int8), _half(blocks, 0), out=out)


# The types that can be read. A type is added here, by name, once its blocks can be decoded.
DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
