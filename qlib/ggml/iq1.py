"""Writers of IQ1_S and IQ1_M (layouts and readers: `codebooks`).

Every weight is d (2 s + 1) times -1, 0 or 1, all three moved up or down by 1/8. A sub-block of
32 or 16 weights is sorted, cut into three, and each way to cut is tried (`iloops1.fit_thirds`);
then each 8 values of -1, 0, 1 go to a point of the codebook, which has 2048 of the 6561 there are.
"""

from __future__ import annotations

import numpy as np

from .block import TYPES, BlockFormat
from .codebooks import CoarseFormat, cells, read_iq1_m, read_iq1_s
from .iq4 import error_weights, merged
from .iquants import joined, to_steps
from .search import columns, total


def fit(x: np.ndarray, w: np.ndarray, size: int, tiny: float):
    """Scales, points and shifts of all blocks.

    Args:
        x, w: weights and the weights of their squared errors, float32 [rows, cols].
        size: weights of a sub-block.
        tiny: sub-blocks whose magnitudes are all below are taken for zeros.

    Returns d float32 [blocks, 1]; steps uint8 [blocks, 256 / size]; and for every 8 weights, that
    is [blocks, 32], the index uint16 and the shift float32, 1/8 or -1/8.
    """
    from . import iloops1

    values, w = (np.ascontiguousarray(a).reshape(-1, size // 8, 8) for a in (x, w))
    peak = np.abs(values).max((1, 2))
    peak[peak < np.float32(tiny)] = 0
    scale, index = np.zeros_like(peak), np.zeros(values.shape[:2], np.int16)
    shifts = np.full(index.shape, np.float32(0.125))
    iloops1.fit_thirds(values, w, peak, size == 16, cells("IQ1_S"), scale, shifts, index)
    d, steps = to_steps(scale.reshape(-1, 256 // size), 7)
    return d, steps, index.reshape(len(d), 32).astype(np.uint16), shifts.reshape(len(d), 32)


def write_iq1_s(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    d, steps, index, shifts = fit(x, error_weights(x, importance, 256), 32, 1e-12)
    high = merged((index >> 8).reshape(-1, 8, 4), 3, "<u2")
    minus = (shifts[:, ::4] < 0).astype("<u2")
    words = high | steps.astype("<u2") << 12 | minus << 15
    # ggml found this factor by trial; it makes up for what the points change in the levels.
    d16 = (d * np.float32(1.125)).astype("<f2")
    return joined(len(x), d16, index.astype(np.uint8), words)


def write_iq1_m(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    w = error_weights(x, importance, 256)
    d, steps, index, shifts = fit(x, w, 16, 1e-7)
    levels = (cells("IQ1_S")[3][index] + shifts[:, :, None]).reshape(-1, 16, 16)
    levels *= (2 * steps + 1).astype(np.float32)[:, :, None]
    q, w = columns(levels, 256), columns(w, 256)
    xl, ll = total(w * q * columns(x, 256)), total(w * q * q)
    fitted = np.where(ll > 0, xl / ll, d[:, 0])
    d16 = np.where(d[:, 0] > 0, fitted * np.float32(1.1125), 0).astype("<f2").view(np.uint16)
    four = index >> 8 | (shifts < 0).astype(np.uint16) << 3
    nibbles = d16[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) & 15
    words = merged(steps.reshape(-1, 4, 4), 3, "<u2") | nibbles << 12
    return joined(len(x), index.astype(np.uint8), merged(four.reshape(-1, 16, 2), 4, "u1"), words)


FORMATS = {
    "iq1_s": CoarseFormat(TYPES["IQ1_S"], write_iq1_s, read_iq1_s, True),
    "iq1_m": BlockFormat(TYPES["IQ1_M"], write_iq1_m, read_iq1_m, True),
}
