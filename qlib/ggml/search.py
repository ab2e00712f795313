"""The searches of ggml for the scales of a block, in the order in which ggml rounds.

Which bytes a block gets hangs on the last bit of sums of 8 to 256 products, so these sums must be
taken as C takes them: in float32, first value first. Here a block is a column. Values lie
[n, blocks], and a sum over axis 0 adds whole rows, in order, to all blocks at a time.

Every search tries several inverse scales 1 / s, rounds the values to levels l under each, fits the
scale that has the least weighted squared error for those levels, and keeps the best pair.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np

# Blocks whose largest magnitude is below are taken for zeros.
TINY = np.float32(1e-15)
TENTH = np.float32(0.1)
# Trials of the inverse scale, in tenths around the first guess, which comes first; and the passes
# over all levels.
SIGNED_TRIALS = (0, *range(-9, 0), *range(1, 10))
POSITIVE_TRIALS = (0, *range(-4, 0), *range(1, 5))
PASSES = 5

_building = threading.Lock()


def compiled(loop: Callable) -> Callable:
    """`loop` compiled by numba at its first call, so that importing qlib does not import numba."""

    @functools.cache
    def build():
        from numba import njit

        return njit(nogil=True, cache=True)(loop)

    @functools.wraps(loop)
    def call(*arrays):
        with _building:
            ready = build()
        return ready(*arrays)

    return call


def finite(x: np.ndarray) -> bool:
    """Whether contiguous float32 values are all finite: none has the exponent's eight bits set."""
    return _largest_bits(x.reshape(-1).view(np.int32)) < 0x7F800000


@compiled
def _largest_bits(bits):
    top = np.int32(0)
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    return top


def columns(x: np.ndarray, n: int) -> np.ndarray:
    """Values cut into blocks of n, each a column: [n, blocks], contiguous."""
    return np.ascontiguousarray(x.reshape(-1, n).T)


def total(x: np.ndarray) -> np.ndarray:
    """The sum of each column [n, blocks] -> [blocks], first value first."""
    # A single column is contiguous, and numpy would sum it in pairs.
    return x.sum(0) if x.shape[1] > 1 else np.add.accumulate(x, axis=0)[-1]


def largest(x: np.ndarray) -> np.ndarray:
    """The value of largest magnitude of each column, with its sign; of +a and -a the first."""
    high, low = x.max(0), x.min(0)
    found = np.where(high > -low, high, low)
    tied = np.flatnonzero(high == -low)
    found[tied] = x[np.abs(x[:, tied]).argmax(0), tied]
    return found


def lowest(x: np.ndarray) -> np.ndarray:
    """The lowest value of each column, at most 0; of 0 and -0 the first."""
    low = x.min(0)
    zero = np.flatnonzero(low == 0)
    low[zero] = x[(x[:, zero] == 0).argmax(0), zero]
    return np.where(low > 0, 0, low)


def to_levels(x: np.ndarray, low: int, high: int) -> np.ndarray:
    """`x` rounded to integers, halves to even, and clipped, in place."""
    return np.clip(np.rint(x, out=x), np.float32(low), np.float32(high), out=x)


@compiled
def round_under(x, shift, inverse, low, high, levels):
    """levels = round((x - shift) * inverse), clipped; shift and inverse are [blocks]."""
    for i in range(len(x)):
        for b in range(x.shape[1]):
            level = np.rint((x[i, b] - shift[b]) * inverse[b])
            levels[i, b] = min(max(level, low), high)


def emptied(zero: np.ndarray, scale: np.ndarray, codes: np.ndarray):
    """The same scale and codes, with zeros in the blocks marked by `zero`, in place."""
    scale[zero] = 0
    codes[:, zero] = 0
    return scale, codes


def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The sum over axis 0 of (a * b) * c -> [blocks]."""
    sums = np.zeros_like(a[0])
    _dot(a, b, c, sums)
    return sums


@compiled
def _dot(x, y, z, sums):
    for i in range(len(x)):
        for b in range(x.shape[1]):
            sums[b] += x[i, b] * y[i, b] * z[i, b]


def fit_signed(x: np.ndarray, w: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """x ~ scale * l with levels l from -n to n - 1: 19 scales tried around n / largest value.

    ggml calls it make_qx_quants.

    Args:
        x: float32 [values, blocks].
        w: weights of the squared errors, like `x`.

    Returns scale float32 [blocks], whose sign is opposite to that of the largest value, and codes
    l + n, float32 [values, blocks]. A block of zeros has scale 0 and codes 0.
    """
    peak = largest(x)
    bottom, top, levels = np.float32(-n), np.float32(n - 1), np.empty_like(x)
    best = scale = kept = none = np.zeros_like(peak)
    for step in SIGNED_TRIALS:
        inverse = -(np.float32(n) + TENTH * np.float32(step)) / peak
        round_under(x, none, inverse, bottom, top, levels)
        xl, ll = dot(w, x, levels), dot(w, levels, levels)
        better = (ll > 0) & (xl * xl > best * ll) if step else ll != 0
        scale = np.where(better, xl / ll, scale)
        best = np.where(better, scale * xl, best)
        kept = np.where(better, inverse, kept) if step else inverse
    round_under(x, none, kept, bottom, top, levels)
    levels += np.float32(n)
    return emptied(np.abs(peak) < TINY, scale, levels)


def fit_signed_in_turn(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `fit_signed` with weights x * x, but by moving one level at a time from the first guess.

    ggml calls it make_q3_quants.
    """
    peak, levels = largest(x), np.empty_like(x)
    none, bottom, top = np.zeros_like(peak), np.float32(-n), np.float32(n - 1)
    round_under(x, none, bottom / peak, bottom, top, levels)
    scale, levels = descend(x, x * x, levels, bottom, top)
    levels += top + 1
    return emptied(np.abs(peak) < TINY, scale, levels)


def fit_positive(x: np.ndarray, w: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """x ~ scale * l for x >= 0 and levels l from 0 to n: 9 scales tried, then one level at a time.

    ggml calls it make_qp_quants. Arguments and results as for `fit_signed`; the codes are the
    levels.
    """
    peak = x.max(0)
    zero = peak < TINY
    least = kept = np.zeros_like(peak)
    for step in POSITIVE_TRIALS:
        inverse = (TENTH * np.float32(step) + np.float32(n)) / peak
        diff = x - (np.float32(1) / inverse) * to_levels(x * inverse, 0, n)
        error = total(w * diff * diff)
        better = error < least if step else ~zero
        least, kept = np.where(better, error, least), np.where(better, inverse, kept)
    levels = to_levels(x * kept, 0, n)
    return emptied(zero, *descend(x, w, levels, np.float32(0), np.float32(n)))


def descend(x, w, levels, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Move each level in turn to where the fit of the others wants it, while that is better.

    Returns the least-squares scale [blocks] and the levels [values, blocks].
    """
    xl, ll = dot(w, x, levels), dot(w, levels, levels)
    # One block at a time is done here, so its values should be neighbors.
    levels = np.ascontiguousarray(levels.T)
    x, w = (np.ascontiguousarray(a.T) for a in (x, w))
    _descend(x, w, levels, low, high, PASSES, xl, ll)
    return np.divide(xl, ll, out=np.zeros_like(xl), where=ll > 0), levels.T


@compiled
def _descend(x, w, levels, low, high, passes, xls, lls):
    for block in range(len(x)):
        xl, ll = xls[block], lls[block]
        for _ in range(passes):
            before = xl, ll
            for i in range(x.shape[1]):
                value, weight, level = x[block, i], w[block, i], levels[block, i]
                # The sums without this value. ggml asks for a second one above 0 only where all
                # levels are positive.
                xl_others = xl - weight * value * level
                ll_others = ll - weight * level * level
                if not (xl_others > 0 and (ll_others > 0 or low < 0)):
                    continue
                new = min(max(np.rint(value * ll_others / xl_others), low), high)
                xl_new = xl_others + weight * value * new
                ll_new = ll_others + weight * new * new
                if new != level and ll_new > 0 and xl_new * xl_new * ll > xl * xl * ll_new:
                    levels[block, i], xl, ll = new, xl_new, ll_new
            if before == (xl, ll):
                break
        xls[block], lls[block] = xl, ll


def fit_affine(
    x: np.ndarray, w: np.ndarray, n: int, trials: tuple[float, float, int], absolute: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x ~ scale * l - depth with levels l from 0 to n and depth >= 0.

    Tries the inverse scales (n + first + step * i) / (highest - lowest), i = 0 ... last, where the
    lowest value is at most 0 and moves as better fits are found. ggml calls it make_qkx2_quants
    and make_qkx3_quants.

    Args:
        x, w: values and weights, float32 [values, blocks].
        trials: (first, step, last).
        absolute: compare the sums of absolute errors instead of squares.

    Returns scale and depth, float32 [blocks], and codes, float32 [values, blocks].
    """
    first, step, last = trials
    low, high = lowest(x), x.max(0)
    flat = high == low
    sw, sx = total(w), total(w * x)
    zero, top = np.float32(0), np.float32(n)
    levels, ones = np.empty_like(x), np.ones_like(x)

    def error(scale, low):
        sums = np.zeros_like(scale)
        _affine_error(x, w, levels, scale, low, absolute, sums)
        return sums

    kept = low, top / (high - low)
    scale = np.float32(1) / kept[1]
    round_under(x, *kept, zero, top, levels)
    least = error(scale, low)
    for i in range(last + 1):
        trial = low, (np.float32(first) + np.float32(step) * np.float32(i) + top) / (high - low)
        round_under(x, *trial, zero, top, levels)
        sl, sll, sxl = dot(w, levels, ones), dot(w, levels, levels), dot(w, levels, x)
        det = sw * sll - sl * sl
        new_scale, new_low = (sw * sxl - sx * sl) / det, (sll * sx - sl * sxl) / det
        new_scale = np.where(new_low > 0, sxl / sll, new_scale)
        new_low = np.where(new_low > 0, 0, new_low)
        new_error = error(new_scale, new_low)
        better = (det > 0) & (new_error < least)
        kept = tuple(np.where(better, *pair) for pair in zip(trial, kept))
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
        least = np.where(better, new_error, least)
    round_under(x, *kept, zero, top, levels)
    scale, levels = emptied(flat, scale, levels)
    return scale, -low, levels


@compiled
def _affine_error(x, w, levels, scale, low, absolute, sums):
    for i in range(len(x)):
        for b in range(x.shape[1]):
            diff = scale[b] * levels[i, b] + low[b] - x[i, b]
            sums[b] += w[i, b] * (abs(diff) if absolute else diff * diff)
