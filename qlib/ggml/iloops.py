"""The loops of IQ2 and IQ3, compiled by numba: `iquants` imports this when it writes.

All sums are float32 and run in order, as in C: which bytes a block gets hangs on their last bit.
Here a sub-block is a row of `x`, [sub-blocks, vectors, n], and a codebook is what
`codebooks.cells` returns.
"""

from __future__ import annotations

import numpy as np
from numba import njit

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
INF = np.float32(np.inf)
PASSES = 5

# As in C, a division by zero is infinite.
compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def nearest(x, w, scale, shift, bounds, near, levels):
    """The point with the least w (scale (level + shift) - x)^2 among those near one cell.

    Args:
        x, w: float32 [n], a vector and its weights.
        bounds: the cell's part of `near`.
    """
    best, chosen = INF, near[bounds[0]]
    for at in range(bounds[0], bounds[1]):
        point, error = near[at], ZERO
        for i in range(len(x)):
            difference = scale * (levels[point, i] + shift) - x[i]
            error += w[i] * difference * difference
        if error < best:
            best, chosen = error, point
    return chosen


@compiled
def snap(x, root, inverse, scale, cells, found):
    """Round a sub-block [vectors, n] to points; returns, as bits, which were no point at first.

    ggml weights the errors of this choice by the square root of their weights.
    """
    index, bounds, near, levels = cells
    width = 3 if len(index) == 4096 else 2
    top = np.float32(7) if width == 3 else np.float32(2)
    off = 0
    for v in range(len(x)):
        cell = 0
        for i in range(x.shape[1]):
            level = np.rint(HALF * (inverse * x[v, i] - ONE))
            # NaN, of which there is none in sound weights, must not become an index.
            cell |= (int(min(level, top)) if level > ZERO else 0) << width * i
        if index[cell] >= 0:
            found[v] = index[cell]
        else:
            off |= 1 << v
            found[v] = nearest(x[v], root[v], scale, ZERO, bounds[cell], near, levels)
    return off


@compiled
def products(x, w, found, levels):
    """The sums of w x level and of w level^2 over a sub-block."""
    xl, ll = ZERO, ZERO
    for v in range(len(x)):
        for i in range(x.shape[1]):
            level = levels[found[v], i]
            xl += w[v, i] * x[v, i] * level
            ll += w[v, i] * level * level
    return xl, ll


@compiled
def fit_points(x, w, root, peak, targets, whole, always, cells, scale, chosen):
    """Scale and points of every sub-block: one trial for each target, then one at the best scale.

    Args:
        x: magnitudes, float32 [sub-blocks, vectors, n]; w: weights of the squared errors, and root
            their square roots.
        peak: float32 [sub-blocks], the value that a trial puts at each of `targets`, in levels
            1, 3, 5, ...; sub-blocks with peak 0 are left out.
        whole: the last trial is for all vectors; otherwise for those that were no point before.
        always: there is a last trial even if all of them were.
        scale, chosen: float32 [sub-blocks] and int16 [sub-blocks, vectors], written. The scale is
            a first guess when it comes.
    """
    trial, levels = np.empty(x.shape[1], np.int16), cells[3]
    for s in range(len(x)):
        if peak[s] <= ZERO:
            continue
        best, off = ZERO, 1 if whole else 0
        for target in targets:
            inverse = target / peak[s]
            trial_off = snap(x[s], root[s], inverse, ONE / inverse, cells, trial)
            xl, ll = products(x[s], w[s], trial, levels)
            if ll > ZERO and xl * xl > best * ll:
                scale[s] = xl / ll
                best, off = scale[s] * xl, trial_off
                for v in range(len(trial)):
                    chosen[s, v] = trial[v]
        if scale[s] > ZERO and (off or always):
            snap(x[s], root[s], ONE / scale[s], scale[s], cells, trial)
            for v in range(len(trial)):
                if whole or off >> v & 1:
                    chosen[s, v] = trial[v]
            xl, ll = products(x[s], w[s], chosen[s], levels)
            if ll > ZERO:
                scale[s] = xl / ll


@compiled
def first_scales(x, w, n, scale):
    """The scale of x ~ scale * l, l from 0 to n: 9 are tried, then one level at a time is moved.

    ggml calls it make_qp_quants, and here gives it values of which some are negative; it keeps
    their levels as unsigned bytes, in which -1 becomes 255.

    Args:
        x, w: float32 [sub-blocks, values].
        n: float32, the highest level.
        scale: float32 [sub-blocks], written; left alone where no value is above 0.
    """
    levels = np.empty(x.shape[1], np.uint8)
    for s in range(len(x)):
        peak = x[s].max()
        if peak <= ZERO:
            continue
        kept = _coarse_inverse(x[s], w[s], n, peak)
        xl, ll = ZERO, ZERO
        for i in range(x.shape[1]):
            level = min(np.rint(kept * x[s, i]), n)
            levels[i] = int(level)
            xl += w[s, i] * x[s, i] * level
            ll += w[s, i] * level * level
        scale[s] = _moved(x[s], w[s], n, levels, xl, ll)


@compiled
def _coarse_inverse(x, w, n, peak):
    """The best of the inverse scales (n + k / 10) / peak, k from -4 to 4."""
    kept, least = n / peak, INF
    for k in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        inverse = (np.float32(0.1) * np.float32(k) + n) / peak
        scale, error = ONE / inverse, ZERO
        for i in range(len(x)):
            level = min(np.rint(inverse * x[i]), n)
            if k == 0 and level < ZERO:
                # Only this trial reads the level back from its byte.
                level += np.float32(256)
            difference = x[i] - scale * level
            error += w[i] * difference * difference
        if error < least:
            kept, least = inverse, error
    return kept


@compiled
def _moved(x, w, n, levels, xl, ll):
    """Move each level to where the fit of the others wants it; returns the least-squares scale."""
    for _ in range(PASSES):
        changed = False
        for i in range(len(x)):
            level = np.float32(levels[i])
            xl_others, ll_others = xl - w[i] * x[i] * level, ll - w[i] * level * level
            if not (xl_others > ZERO and ll_others > ZERO):
                continue
            new = min(np.rint(x[i] * ll_others / xl_others), n)
            if new == level:
                continue
            xl_new, ll_new = xl_others + w[i] * x[i] * new, ll_others + w[i] * new * new
            if xl_new * xl_new * ll > xl * xl * ll_new:
                levels[i], xl, ll, changed = int(new), xl_new, ll_new, True
        if not changed:
            break
    return xl / ll if ll > ZERO else ZERO
