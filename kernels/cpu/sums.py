"""What a product adds up on the CPU: one row of activations, or four that share each weight.

Weights are unpacked in registers, and that costs more than to multiply them. Four rows at a time
need each of them once. One row alone has two sums and two others, which take turns, because an
addition waits for the one before it. Its argument `group` says which a kernel is compiled for:

    stride = stride_of(planes, group)
    for r in range(0, len(planes), step_of(stride)):
        x, sums, others = planes[r, 0], nothing(), nothing()
        sums = plus(sums, weights, x, i, stride)          # again and again, or others
        put(sums, others, y, r, o, scale, stride)
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from .simd import load, splat, total

# The argument `group` of a kernel for rows four by four; None is that of a kernel for single rows.
FOUR = np.int64(4)
# Where a sum needs no scale any more.
ONE = np.float32(1)


def stride_of(planes, group):
    """Inside numba: numbers between two rows of planes [rows, j, i], or None for one row."""


def step_of(stride):
    """Inside numba: how many rows are summed up together."""


def nothing():
    """Inside numba: four sums of zero. One row needs two of them, and `put` adds up whatever is."""
    zero = splat(np.float32(0))
    return zero, zero, zero, zero


def plus(sums, weights, x, i, stride):
    """Inside numba: sums with sixteen weights times x[i : i + 16], and the next rows' as well."""


def put(sums, others, y, r, o, scale, stride):
    """Inside numba: y[r, o] = scale times all sums of the row, and for the next rows as well."""


@overload(stride_of)
def _stride_of(planes, group):
    if isinstance(group, types.NoneType):
        return lambda planes, group: None
    return lambda planes, group: planes.shape[1] * planes.shape[2]


@overload(step_of)
def _step_of(stride):
    step = 1 if isinstance(stride, types.NoneType) else int(FOUR)
    return lambda stride: step


@overload(nothing)
def _nothing():
    return nothing


@overload(plus)
def _plus(sums, weights, x, i, stride):
    def one(sums, weights, x, i, stride):
        return sums[1], sums[0] + weights * load(x, i), sums[2], sums[3]

    def four(sums, weights, x, i, stride):
        return (
            sums[0] + weights * load(x, i),
            sums[1] + weights * load(x, i + stride),
            sums[2] + weights * load(x, i + 2 * stride),
            sums[3] + weights * load(x, i + 3 * stride),
        )

    return one if isinstance(stride, types.NoneType) else four


@overload(put)
def _put(sums, others, y, r, o, scale, stride):
    def one(sums, others, y, r, o, scale, stride):
        y[r, o] = total((sums[0] + others[0]) + (sums[1] + others[1])) * scale

    def four(sums, others, y, r, o, scale, stride):
        y[r, o] = total(sums[0] + others[0]) * scale
        y[r + 1, o] = total(sums[1] + others[1]) * scale
        y[r + 2, o] = total(sums[2] + others[2]) * scale
        y[r + 3, o] = total(sums[3] + others[3]) * scale

    return one if isinstance(stride, types.NoneType) else four
