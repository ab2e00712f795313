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
    raw = np.empty((x.size // 32, size), np.uint8)
    if importance is None:
        blocks = x.reshape(-1, 32)
        d = extremes(blocks)[2] / np.float32(-n)
        pack(blocks, d, np.zeros_like(d), n + 0.5, 2 * n - 1, raw)
    else:
        d, codes = search.fit_signed(search.columns(x, 32), weights(x, importance), n)
        pack_codes(codes, 2 * n - 1, raw)
    put_halves(raw, d)
    return raw.reshape(len(x), -1)


def write_affine(x: np.ndarray, importance: np.ndarray | None, top: int, size: int) -> np.ndarray:
    """The lowest value gets the code 0 and the highest `top`."""
    raw = np.empty((x.size // 32, size), np.uint8)
    if importance is None:
        blocks = x.reshape(-1, 32)
        low, high, _ = extremes(blocks)
        d = (high - low) / np.float32(top)
        pack(blocks, d, low, 0.5, top, raw)
    else:
        values, trials = search.columns(x, 32), (-0.9, 0.05, 36)
        d, depth, codes = search.fit_affine(values, weights(x, importance), top, trials)
        low = -depth
        pack_codes(codes, top, raw)
    put_halves(raw, d, low)
    return raw.reshape(len(x), -1)


def write_q8_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """d = max |x| / 127, and codes rounded half away from zero. An importance changes nothing."""
    raw = np.empty((x.size // 32, TYPES["Q8_0"].size), np.uint8)
    blocks = x.reshape(-1, 32)
    d = np.abs(extremes(blocks)[2]) / np.float32(127)
    _pack_rounded(blocks, d, raw)
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


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is 0."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def extremes(blocks: np.ndarray) -> np.ndarray:
    """The lowest value, the highest and that of largest magnitude of each block: [3, blocks].

    Of 0 and -0, and of +a and -a, the first counts; a block of zeros has 0.
    """
    found = np.empty((3, len(blocks)), np.float32)
    _extremes(blocks, *found)
    return found


@search.compiled
def _extremes(x, lows, highs, peaks):
    for b in range(len(x)):
        low = high = x[b, 0]
        for i in range(1, 32):
            low = x[b, i] if x[b, i] < low else low
            high = x[b, i] if x[b, i] > high else high
        peak = high if high > -low else low
        if low == 0 or high == -low:
            for i in range(31, -1, -1):
                low = x[b, i] if x[b, i] == low else low
                peak = x[b, i] if abs(x[b, i]) == high else peak
        lows[b], highs[b] = low, high
        peaks[b] = peak if peak != 0 else np.float32(0)


def pack(blocks, d, shift, half, top: int, raw: np.ndarray) -> None:
    """End each block of `raw` with codes trunc((x - shift) / d + half), at most `top`."""
    _pack(blocks, d, shift, np.float32(half), np.int32(top), raw)


def pack_codes(codes: np.ndarray, top: int, raw: np.ndarray) -> None:
    """As `pack`, for codes [32, blocks] that are chosen already."""
    ones = np.ones(len(raw), np.float32)
    pack(np.ascontiguousarray(codes.T), ones, 0 * ones, 0, top, raw)


@search.compiled
def _pack(x, d, shift, half, top, raw):
    size = raw.shape[1]
    for b in range(len(x)):
        inverse = np.float32(1) / d[b] if d[b] != 0 else np.float32(0)
        for i in range(16):
            low = min(np.int32((x[b, i] - shift[b]) * inverse + half), top)
            high = min(np.int32((x[b, i + 16] - shift[b]) * inverse + half), top)
            raw[b, size - 16 + i] = low & 15 | high << 4
        if top > 15:
            fifth = np.uint32(0)
            for i in range(32):
                code = min(np.int32((x[b, i] - shift[b]) * inverse + half), top)
                fifth |= np.uint32(code >> 4 & 1) << np.uint32(i)
            for i in range(4):
                raw[b, size - 20 + i] = fifth >> np.uint32(8 * i)


@search.compiled
def _pack_rounded(x, d, raw):
    for b in range(len(x)):
        inverse = np.float32(1) / d[b] if d[b] != 0 else np.float32(0)
        for i in range(32):
            value = x[b, i] * inverse
            # As C's roundf: halves go away from zero. The part that trunc cuts off is exact.
            whole = np.trunc(value)
            raw[b, 2 + i] = np.int32(whole + np.trunc((value - whole) * 2))


FORMATS = {
    "q4_0": BlockFormat(TYPES["Q4_0"], write_q4_0, read_q4_0),
    "q4_1": BlockFormat(TYPES["Q4_1"], write_q4_1, read_q4_1),
    "q5_0": BlockFormat(TYPES["Q5_0"], write_q5_0, read_q5_0),
    "q5_1": BlockFormat(TYPES["Q5_1"], write_q5_1, read_q5_1),
    "q8_0": BlockFormat(TYPES["Q8_0"], write_q8_0, read_q8_0),
}
