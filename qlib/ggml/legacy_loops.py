"""The loops of the legacy types, compiled by numba: `legacy` imports this when it writes.

A block is a row of `x`, float32 [blocks, 32], and of `raw`, uint8 [blocks, bytes]. What one loop
leaves for the next stays in cache, since the outer ones take `TILE` blocks at a time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 2048
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)

compiled = njit(cache=True, nogil=True)


@compiled
def extremes(x, lows, highs):
    """The lowest and the highest value of each block; of 0 and -0 the first is the lowest."""
    for b in range(len(x)):
        low = high = x[b, 0]
        for i in range(1, 32):
            low = x[b, i] if x[b, i] < low else low
            high = x[b, i] if x[b, i] > high else high
        if low == 0:
            for i in range(31, -1, -1):
                low = x[b, i] if x[b, i] == low else low
        lows[b], highs[b] = low, high


@compiled
def peaks(x, lows, highs, found):
    """The value of largest magnitude of each block: of +a and -a the first, and 0 for zeros."""
    for b in range(len(x)):
        high = highs[b]
        peak = high if high > -lows[b] else lows[b]
        if high == -lows[b]:
            for i in range(31, -1, -1):
                peak = x[b, i] if abs(x[b, i]) == high else peak
        found[b] = peak if peak != 0 else ZERO


@compiled
def pack(x, d, shift, half, top, raw):
    """End each block of `raw` with codes trunc((x - shift) / d + half), at most `top`."""
    size = raw.shape[1]
    for b in range(len(x)):
        inverse = ONE / d[b] if d[b] != 0 else ZERO
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


@compiled
def pack_rounded(x, d, raw):
    """End each block of `raw` with int8 codes x / d, rounded half away from zero as C's roundf."""
    for b in range(len(x)):
        inverse = ONE / d[b] if d[b] != 0 else ZERO
        for i in range(32):
            value = x[b, i] * inverse
            # The part that trunc cuts off is exact.
            whole = np.trunc(value)
            raw[b, 2 + i] = np.int32(whole + np.trunc((value - whole) * 2))


@compiled
def write_signed(x, n, top, d, raw):
    """d = peak / -n, which gets the code 0."""
    low, high, zeros = np.empty_like(d[:TILE]), np.empty_like(d[:TILE]), np.zeros_like(d[:TILE])
    for start in range(0, len(x), TILE):
        at = slice(start, min(start + TILE, len(x)))
        extremes(x[at], low, high)
        peaks(x[at], low, high, d[at])
        d[at] /= -n
        pack(x[at], d[at], zeros, n + HALF, top, raw[at])


@compiled
def write_affine(x, top, d, low, raw):
    """d = (high - low) / top."""
    for start in range(0, len(x), TILE):
        at = slice(start, min(start + TILE, len(x)))
        extremes(x[at], low[at], d[at])
        for b in range(start, at.stop):
            d[b] = (d[b] - low[b]) / np.float32(top)
        pack(x[at], d[at], low[at], HALF, top, raw[at])


@compiled
def write_rounded(x, d, raw):
    """d = max |x| / 127."""
    low = np.empty_like(d[:TILE])
    for start in range(0, len(x), TILE):
        at = slice(start, min(start + TILE, len(x)))
        extremes(x[at], low, d[at])
        for b in range(start, at.stop):
            d[b] = max(abs(d[b]), abs(low[b - start])) / np.float32(127)
        pack_rounded(x[at], d[at], raw[at])
