"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights share a float16 scale `d` (and minimum `m`).

Q4_0  d qs          (q - 8) d       byte j of qs holds value j in its low nibble
Q4_1  d m qs        q d + m         and value j + 16 in its high nibble;
Q5_0  d qh qs       (q - 16) d      bit j of qh is the fifth bit of value j
Q5_1  d m qh qs     q d + m
Q8_0  d qs          q d             32 int8
"""

from __future__ import annotations

import numpy as np

from . import search
from .block import TYPES, BlockFormat


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def nibbles(qs: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16] -> codes [blocks, 32]: all low nibbles, then all high ones."""
    return np.concatenate((qs & 15, qs >> 4), axis=1)


def fifth_bits(qh: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 4] -> the fifth bit of each code, in place: 0 or 16 [blocks, 32]."""
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def read_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = nibbles(blocks[:, 2:18]).view(np.int8)
    np.multiply(codes - np.int8(8), half(blocks, 0), out=out)


def read_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(nibbles(blocks[:, 4:20]), half(blocks, 0), out=out)
    out += half(blocks, 2)


def read_q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = (nibbles(blocks[:, 6:22]) | fifth_bits(blocks[:, 2:6])).view(np.int8)
    np.multiply(codes - np.int8(16), half(blocks, 0), out=out)


def read_q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = nibbles(blocks[:, 8:24]) | fifth_bits(blocks[:, 4:8])
    np.multiply(codes, half(blocks, 0), out=out)
    out += half(blocks, 2)


def read_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:34].view(np.int8), half(blocks, 0), out=out)


def write_q4_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return write_signed(x, importance, 8, TYPES["Q4_0"].size)


def write_q5_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return write_signed(x, importance, 16, TYPES["Q5_0"].size)


def write_q4_1(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return write_affine(x, importance, 15, TYPES["Q4_1"].size)


def write_q5_1(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return write_affine(x, importance, 31, TYPES["Q5_1"].size)


def write_signed(x: np.ndarray, importance: np.ndarray | None, n: int, size: int) -> np.ndarray:
    """The value of largest magnitude gets the code 0: d = largest / -n, codes to 2 n - 1."""
    from . import legacy_loops

    raw = np.empty((x.size // 32, size), np.uint8)
    if importance is None:
        d = np.empty(len(raw), np.float32)
        legacy_loops.write_signed(x.reshape(-1, 32), np.float32(n), np.int32(2 * n - 1), d, raw)
    else:
        d, codes = search.fit_signed(search.columns(x, 32), weights(x, importance), n)
        pack_codes(codes, 2 * n - 1, raw)
    put_halves(raw, d)
    return raw.reshape(len(x), -1)


def write_affine(x: np.ndarray, importance: np.ndarray | None, top: int, size: int) -> np.ndarray:
    """The lowest value gets the code 0 and the highest `top`."""
    from . import legacy_loops

    raw = np.empty((x.size // 32, size), np.uint8)
    if importance is None:
        d, low = np.empty((2, len(raw)), np.float32)
        legacy_loops.write_affine(x.reshape(-1, 32), np.int32(top), d, low, raw)
    else:
        values, trials = search.columns(x, 32), (-0.9, 0.05, 36)
        d, depth, codes = search.fit_affine(values, weights(x, importance), top, trials)
        low = -depth
        pack_codes(codes, top, raw)
    put_halves(raw, d, low)
    return raw.reshape(len(x), -1)


def write_q8_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """d = max |x| / 127, and codes rounded half away from zero. An importance changes nothing."""
    from . import legacy_loops

    raw = np.empty((x.size // 32, TYPES["Q8_0"].size), np.uint8)
    d = np.empty(len(raw), np.float32)
    legacy_loops.write_rounded(x.reshape(-1, 32), d, raw)
    put_halves(raw, d)
    return raw.reshape(len(x), -1)


def put_halves(raw: np.ndarray, *numbers: np.ndarray) -> None:
    """Begin every block with float16 numbers, each given as float32 [blocks]."""
    for i, number in enumerate(numbers):
        raw.view("<f2")[:, i] = number


def weights(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """importance * sqrt(mean of the row's squares + x * x), in columns of 32."""
    squares = x * x
    mean = np.add.accumulate(squares, axis=1)[:, -1:] / np.float32(x.shape[1])
    return search.columns(importance * np.sqrt(mean + squares), 32)


def pack_codes(codes: np.ndarray, top: int, raw: np.ndarray) -> None:
    """End each block of `raw` with codes [32, blocks] that are chosen already."""
    from . import legacy_loops

    ones = np.ones(len(raw), np.float32)
    codes = np.ascontiguousarray(codes.T)
    legacy_loops.pack(codes, ones, 0 * ones, np.float32(0), np.int32(top), raw)


FORMATS = {
    "q4_0": BlockFormat(TYPES["Q4_0"], write_q4_0, read_q4_0),
    "q4_1": BlockFormat(TYPES["Q4_1"], write_q4_1, read_q4_1),
    "q5_0": BlockFormat(TYPES["Q5_0"], write_q5_0, read_q5_0),
    "q5_1": BlockFormat(TYPES["Q5_1"], write_q5_1, read_q5_1),
    "q8_0": BlockFormat(TYPES["Q8_0"], write_q8_0, read_q8_0),
}
