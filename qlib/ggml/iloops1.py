"""The loops of IQ1, compiled by numba: `iq1` imports this when it writes.

Sums run in order and sub-blocks are rows, as in `iloops`.
"""

from __future__ import annotations

import numpy as np

from .iloops import INF, ONE, ZERO, compiled, nearest

SHIFT = np.float32(0.125)


@compiled
def fit_thirds(x, w, peak, halves, cells, scale, shifts, chosen):
    """IQ1: scale, shifts and points of every sub-block, from the best split of its sorted values.

    Of all ways to call the lowest values -1, the highest 1 and the others 0, under either shift,
    the one with the least weighted error is kept; then its vectors become points.

    Args:
        x, w: values and weights of the squared errors, float32 [sub-blocks, vectors, 8].
        peak: float32 [sub-blocks]; sub-blocks with peak 0 are left out.
        halves: each of two vectors has a shift of its own (IQ1_M).
        scale, shifts, chosen: float32 [sub-blocks], float32 and int16 [sub-blocks, vectors],
            written.
    """
    level = np.empty(x.shape[1] * 8, np.int64)
    for s in range(len(x)):
        if peak[s] <= ZERO:
            continue
        values, weights = x[s].ravel(), w[s].ravel()
        order = ascending(values)
        if halves:
            found, low, high, first, last = _split_halves(values, weights, order)
        else:
            found, low, high, first = _split(values, weights, order)
            last = first
        if low < 0:
            scale[s] = ZERO
            continue
        sign = 1 if found >= ZERO else -1
        for at in range(len(order)):
            level[order[at]] = 1 + sign * (int(at >= high) - int(at < low))
        for v in range(x.shape[1]):
            shifts[s, v] = np.float32(sign) * (first if v == 0 else last)
        scale[s] = _settle(x[s], w[s], level, abs(found), shifts[s], cells, chosen[s])


@compiled
def ascending(x):
    """The order of the values, equal ones as they come; for a few dozen inserting is quickest."""
    order = np.empty(len(x), np.int64)
    for i in range(len(x)):
        at = i
        while at > 0 and x[order[at - 1]] > x[i]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
    return order


@compiled
def _split(x, w, order):
    """(scale, low, high, shift): the values order[:low] are -1, those order[high:] are 1."""
    n = len(order)
    sx, sw = np.zeros(n + 1, np.float32), np.zeros(n + 1, np.float32)
    for at in range(n):
        sx[at + 1] = sx[at] + w[order[at]] * x[order[at]]
        sw[at + 1] = sw[at] + w[order[at]]
    best, found, kept_low, kept_high, kept_shift = -INF, ZERO, -1, -1, ZERO
    for low in range(n + 1):
        for high in range(low, n + 1):
            for shift in (SHIFT, -SHIFT):
                a, b, c = shift - ONE, shift, shift + ONE
                xl = sx[low] * a + (sx[high] - sx[low]) * b + (sx[n] - sx[high]) * c
                ll = sw[low] * a * a + (sw[high] - sw[low]) * b * b + (sw[n] - sw[high]) * c * c
                if ll > ZERO and xl * xl > best * ll:
                    found = xl / ll
                    best, kept_low, kept_high, kept_shift = found * xl, low, high, shift
    return found, kept_low, kept_high, kept_shift


@compiled
def _split_halves(x, w, order):
    """As `_split` for two vectors that have a shift each; the sums are taken value by value.

    Four pairs of shifts are summed side by side: in numbers 0 to 3 w x q, in 4 to 7 w q^2.
    """
    n = len(order)
    terms, sums = np.zeros((4, n, 8), np.float32), np.zeros((3, 8), np.float32)
    for at in range(n):
        i = order[at]
        for k in range(4):
            minus = k >= 2 if i < 8 else k % 2 == 1
            for third in range(3):
                q = np.float32(third - 1) + (-SHIFT if minus else SHIFT)
                terms[third, at, k] = w[i] * q * x[i]
                terms[third, at, k + 4] = w[i] * q * q
    nothing = terms[3, 0]
    best, found, kept_low, kept_high, kept = -INF, ZERO, -1, -1, 0
    for low in range(n + 1):
        # Row 0 sums the values below `low`, row 1 goes on to `high`, row 2 to the end.
        _add(sums[0], terms[0, low - 1] if low else nothing, sums[0])
        for high in range(low, n + 1):
            if high > low:
                _add(sums[1], terms[1, high - 1], sums[1])
            else:
                _add(sums[0], nothing, sums[1])
            _add(sums[1], nothing, sums[2])
            for at in range(high, n):
                _add(sums[2], terms[2, at], sums[2])
            for k in range(4):
                xl, ll = sums[2, k], sums[2, k + 4]
                if ll > ZERO and xl * xl > best * ll:
                    found = xl / ll
                    best, kept_low, kept_high, kept = found * xl, low, high, k
    first = -SHIFT if kept >= 2 else SHIFT
    return found, kept_low, kept_high, first, -SHIFT if kept % 2 else SHIFT


@compiled
def _add(a, b, out):
    for k in range(8):
        out[k] = a[k] + b[k]


@compiled
def _settle(x, w, level, scale, shifts, cells, chosen):
    """Turn the levels 0, 1, 2 of each vector into a point; returns the scale, fitted if need be."""
    index, bounds, near, levels = cells
    off = False
    for v in range(len(x)):
        cell = 0
        for i in range(8):
            cell |= level[8 * v + i] << 2 * i
        chosen[v] = index[cell]
        if chosen[v] < 0:
            off = True
            chosen[v] = nearest(x[v], w[v], scale, shifts[v], bounds[cell], near, levels)
    if not off:
        return scale
    xl, ll = ZERO, ZERO
    for v in range(len(x)):
        for i in range(8):
            q = levels[chosen[v], i] + shifts[v]
            xl += w[v, i] * q * x[v, i]
            ll += w[v, i] * q * q
    return xl / ll if xl > ZERO and ll > ZERO else scale
