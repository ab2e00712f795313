"""TQ1_0, TQ2_0, Q1_0, Q2_0: the values -d, 0, d, or only their signs.

TQ1_0  qs qh d    (t - 1) d             256 weights, five trits to a byte
TQ2_0  qs d       (q - 1) d             256 weights, four 2-bit codes to a byte
Q1_0   d qs       d if the bit is set, else -d       128 weights, first bit lowest
Q2_0   d qs       (q - 1) d, q to 3     64 weights, first code lowest

TQ1_0 and TQ2_0 are meant for weights that already are ternary: d is the largest magnitude, not
the mean magnitude that BitNet b1.58 trains with.
"""

from __future__ import annotations

import numpy as np

from .block import TYPES, BlockFormat
from .legacy import half
from .search import columns, compiled, total

# (byte, first value, bytes, trits in each) of the three parts of TQ1_0: trit n of byte m of a
# part is its value n * bytes + m.
PARTS = [(0, 0, 32, 5), (32, 160, 16, 5), (48, 240, 4, 4)]


def _packed_trits() -> np.ndarray:
    """The byte for each number of five trits: floor(byte * 3^5 / 256) is the number again."""
    number = np.arange(243)
    return (-(number * -256 // 243)).astype(np.uint8)


def _trits() -> np.ndarray:
    """The five trits of every byte [256, 5], first trit first.

    The byte is a binary fraction of five ternary digits: times 3, the whole part is a digit.
    """
    fraction = np.arange(256)[:, None] * 3 ** np.arange(5) % 256
    return (fraction * 3 >> 8).astype(np.uint8)


PACKED, TRITS = _packed_trits(), _trits()


def _sign_codes(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """d = max |x| of each block, as float16 bytes, and round(x / d) + 1 [blocks, size]."""
    blocks = x.reshape(-1, size)
    d, codes = np.empty((len(blocks), 1), np.float32), np.empty(blocks.shape, np.uint8)
    _choose_signs(blocks, d, codes)
    return d.astype("<f2").view(np.uint8), codes


@compiled
def _choose_signs(x, d, codes):
    for b in range(len(x)):
        low = high = x[b, 0]
        for i in range(x.shape[1]):
            low = x[b, i] if x[b, i] < low else low
            high = x[b, i] if x[b, i] > high else high
        d[b, 0] = max(high, -low)
        inverse = np.float32(1) / d[b, 0] if d[b, 0] > 0 else np.float32(0)
        # A d too small for an inverse will be stored as 0, and ggml writes zeros there.
        inverse = np.float32(0) if np.isinf(inverse) else inverse
        for i in range(x.shape[1]):
            value = x[b, i] * inverse
            codes[b, i] = int(value >= 0.5) + int(value > -0.5)


def write_tq1_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """An importance changes nothing, here as in the other three."""
    d, codes = _sign_codes(x, 256)
    packed = []
    for _, start, size, digits in PARTS:
        number = np.zeros((len(codes), size), np.uint8)
        for n in range(5):
            number *= 3
            if n < digits:
                number += codes[:, start + n * size : start + (n + 1) * size]
        packed.append(PACKED[number])
    return np.concatenate((*packed, d), axis=1).reshape(len(x), -1)


def write_tq2_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, codes = _sign_codes(x, 256)
    planes = codes.reshape(-1, 2, 4, 32)
    qs = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return np.concatenate((qs.reshape(-1, 64), d), axis=1).reshape(len(x), -1)


def write_q1_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """d = mean |x|."""
    d = total(np.abs(columns(x, 128)))[:, None] / np.float32(128)
    bits = np.packbits(x.reshape(-1, 128) >= 0, axis=1, bitorder="little")
    return np.concatenate((d.astype("<f2").view(np.uint8), bits), axis=1).reshape(len(x), -1)


def write_q2_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """d = max |x|, so of the four values 2 d is never written."""
    d, codes = _sign_codes(x, 64)
    four = codes.reshape(-1, 16, 4)
    qs = four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6
    return np.concatenate((d, qs), axis=1).reshape(len(x), -1)


def read_tq1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for at, start, size, digits in PARTS:
        trits = TRITS[blocks[:, at : at + size], :digits].swapaxes(1, 2)
        out[:, start : start + size * digits] = trits.reshape(-1, size * digits)
    out -= 1
    out *= half(blocks, 52)


def read_tq2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    qs, planes = blocks[:, :64].reshape(-1, 2, 32), out.reshape(-1, 2, 4, 32)
    for j in range(4):
        planes[:, :, j] = qs >> 2 * j & 3
    out -= 1
    out *= half(blocks, 64)


def read_q1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    d = half(blocks, 0)
    np.copyto(out, -d)
    np.copyto(out, d, where=np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").view(bool))


def read_q2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for j in range(4):
        out[:, j::4] = blocks[:, 2:] >> 2 * j & 3
    out -= 1
    out *= half(blocks, 0)


FORMATS = {
    "tq1_0": BlockFormat(TYPES["TQ1_0"], write_tq1_0, read_tq1_0),
    "tq2_0": BlockFormat(TYPES["TQ2_0"], write_tq2_0, read_tq2_0),
    "q1_0": BlockFormat(TYPES["Q1_0"], write_q1_0, read_q1_0),
    "q2_0": BlockFormat(TYPES["Q2_0"], write_q2_0, read_q2_0),
}
