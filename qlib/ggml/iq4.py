"""IQ4_NL and IQ4_XS: 4-bit codes that mean 16 unevenly spaced levels, fine around zero.

IQ4_NL  d qs                      d LEVELS[q]               32 weights
IQ4_XS  d scales_h scales_l qs    d (s - 32) LEVELS[q]      256 weights, a 6-bit s for every 32

In each 16 bytes of qs, byte j holds code j in its low nibble and code j + 16 in its high nibble.
Scale i has its low 4 bits in nibble i of scales_l and its high 2 in bits 2i and 2i + 1 of the
16-bit scales_h. No level is zero: a zero is stored as 1 d.
"""

from __future__ import annotations

import numpy as np

from .block import TYPES, BlockFormat
from .legacy import half, nibbles
from .search import TINY, columns, largest, to_levels, total

LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# Inverse scales tried: the largest value of a block goes to each of these.
TARGETS = range(-127 - 7, -127 + 8)


def _nearest_table() -> np.ndarray:
    """CODES[floor(2 x)] is the code of the level nearest to x, of two equally near the upper.

    The sum of two neighboring levels is a whole number, twice the bound between them, so
    floor(2 x) tells on which side of it x lies. Negative indices count from the end.
    """
    doubled = np.concatenate((np.arange(256), np.arange(-256, 0)))
    return np.searchsorted(LEVELS[:-1] + LEVELS[1:], doubled, side="right").astype(np.uint8)


CODES = _nearest_table()
NEAREST = LEVELS[CODES]


def _look_up(table: np.ndarray, x: np.ndarray, per_scale: np.ndarray) -> np.ndarray:
    """What `table`, CODES or NEAREST, says of x * per_scale."""
    doubled = np.multiply(x, per_scale * np.float32(2))
    np.floor(doubled, out=doubled)
    # A weight without importance may lie far outside.
    np.clip(doubled, np.float32(-256), np.float32(255), out=doubled)
    return table[doubled.astype(np.int16)]


def error_weights(
    x: np.ndarray, importance: np.ndarray | None, block: int, spread: float = 2.0
) -> np.ndarray:
    """The weight of each squared error, as ggml sets it: x^2, or importance sqrt(spread m + x^2).

    Args:
        x: float32 [rows, cols].
        importance: float32 [rows, cols] or None.
        block: weights over which m, the mean of x^2, is taken.
    """
    squares = np.square(x)
    if importance is None:
        return squares
    mean = total(columns(squares, block)) * np.float32(spread / block)
    spread_out = mean[:, None] + squares.reshape(-1, block)
    return importance * np.sqrt(spread_out, out=spread_out).reshape(x.shape)


def fit_levels(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The scale of each block: of 16 that are tried the one with the least weighted error.

    Every trial rounds the block under some scale, fits the scale anew to the levels found, and
    counts what that leaves. ggml rounds a block under the winner once more, and so do the callers.

    Args:
        x, w: values and weights of their squared errors, float32 [32, blocks].
    """
    peak = largest(x)
    scale = best = np.zeros_like(peak)
    terms = np.empty_like(x)
    # The first guess is one of the others but for a rounding, and is taken unseen.
    first = np.float32(1) / (-peak / LEVELS[0])
    for trial in (first, *(np.float32(target) / peak for target in TARGETS)):
        levels = _look_up(NEAREST, x, trial)
        wl = np.multiply(w, levels, out=terms)
        ll = total(wl * levels)
        xl = total(np.multiply(wl, x, out=terms))
        better = (ll > 0) & ((xl * xl > best * ll) | (trial is first))
        scale = np.where(better, xl / ll, scale)
        best = np.where(better, scale * xl, best)
    return np.where(np.abs(peak) < TINY, 0, scale)


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is 0."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def merged(fields: np.ndarray, width: int, dtype: str) -> np.ndarray:
    """Numbers of so many bits [..., n] put into one integer [...], the first lowest."""
    shifts = np.arange(0, width * fields.shape[-1], width).astype(dtype)
    return np.bitwise_or.reduce(fields.astype(dtype) << shifts, axis=-1)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Codes [32, blocks] -> uint8 [blocks, 16]."""
    return np.ascontiguousarray((codes[:16] | codes[16:] << 4).T)


def write_iq4_nl(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    values = columns(x, 32)
    scale = fit_levels(values, columns(error_weights(x, importance, 32), 32))
    codes = _look_up(CODES, values, inverse(scale))
    d = scale[:, None].astype("<f2").view(np.uint8)
    return np.concatenate((d, _pack(codes)), axis=1).reshape(len(x), -1)


def write_iq4_xs(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """d = -(largest scale) / 32, so that the sub-block of the largest scale has s - 32 = -32."""
    values = columns(x, 32)
    fitted = fit_levels(values, columns(error_weights(x, importance, 256), 32)).reshape(-1, 8)
    d = -largest(fitted.T)[:, None] / np.float32(32)
    steps = to_levels(fitted * inverse(d), -32, 31)
    codes = _look_up(CODES, values, inverse((d * steps).reshape(-1)))
    six = (steps + np.float32(32)).astype(np.uint8)
    high = merged(six >> 4, 2, "<u2")[:, None]
    low = merged(six.reshape(-1, 4, 2) & 15, 4, "u1")
    pieces = (d.astype("<f2").view(np.uint8), high.view(np.uint8), low)
    return np.concatenate((*pieces, _pack(codes).reshape(-1, 128)), axis=1).reshape(len(x), -1)


def read_iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(LEVELS[nibbles(blocks[:, 2:18])], half(blocks, 0), out=out)


def read_iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks[:, 2:4].view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    scale = half(blocks, 0) * ((low | high << 4).astype(np.float32) - np.float32(32))
    values = LEVELS[nibbles(blocks[:, 8:].reshape(-1, 16))]
    np.multiply(values.reshape(-1, 8, 32), scale[:, :, None], out=out.reshape(-1, 8, 32))


FORMATS = {
    "iq4_nl": BlockFormat(TYPES["IQ4_NL"], write_iq4_nl, read_iq4_nl),
    "iq4_xs": BlockFormat(TYPES["IQ4_XS"], write_iq4_xs, read_iq4_xs),
}
