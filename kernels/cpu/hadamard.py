"""The fast Walsh-Hadamard transform on a CPU: every row is read once and stays in the cache.

A Hadamard matrix of size 2^k acts on one bit of the index after another: numbers whose indices
differ in that bit only, a and b, become a + b and a - b. The four lowest bits are the lane of a
vector, where the partner is fetched by a permutation of the lanes. All other bits number vectors,
and four of these, which differ in two bits, take two rounds between one load and one store.

The base of a size m 2^k comes last and mixes m vectors that lie 2^k apart, by the method of four
Russians: with any signs, four vectors have sixteen sums. These are written to a tile, and one
addition then does the work of four rows of the base.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int32
from numba import types
from torch import Tensor

from .scales import compiled
from .simd import LANES, load, load_bytes, lookup, splat, store
from .threads import machine_code, run, words

_bit, _lane = np.arange(4)[:, None], np.arange(LANES)
# For each bit of the lane: the lane that differs in it, and 1 where it is 0, -1 where it is 1.
PARTNERS = (_lane ^ 1 << _bit).astype(np.uint8).ravel()
SIGNS = (1 - 2 * (_lane >> _bit & 1)).astype(np.float32).ravel()
_matrix = types.float32[:, ::1]
KINDS = (_matrix, types.int64, types.int32[:, ::1], types.float32[::1], _matrix)


def hadamard(
    x: Float[Tensor, "rows n"], base: Float[Tensor, "m m"], factors: Float[Tensor, " n"]
) -> Float[Tensor, "rows n"]:
    """(x * factors) @ (base ⊗ H), where H is Sylvester's Hadamard matrix of size n / m.

    Args:
        x: on the CPU, computed in float32.
        base: Hadamard matrix of 1 and -1, which must stay as it is; m is 1 or a multiple of 4.
        factors: one for every column of `x`.

    Raises ValueError with the reason of `why_not`, or if a shape is another.
    """
    if x.ndim != 2 or not x.is_floating_point() or base.ndim != 2 or len(base) != base.shape[1]:
        raise ValueError(f"hadamard: x is {x.dtype} {list(x.shape)}, base is {list(base.shape)}")
    m, n = len(base), x.shape[1]
    if reason := why_not(n, m):
        raise ValueError(f"hadamard: {reason}")
    if factors.shape != (n,):
        raise ValueError(f"hadamard: factors are {list(factors.shape)}, rows have {n}")
    x, factors = (t.float().contiguous().resolve_neg() for t in (x, factors))
    sums = _sums(base)
    y = torch.empty_like(x)
    operands = words(x, m, sums, factors, y)
    # Additions per number: one in every round, and one for four rows of the base.
    work = x.numel() * ((n // m).bit_length() + m // 4)
    run(machine_code(_transform, KINDS), operands, len(x), work)
    return y


@lru_cache(maxsize=64)
def _sums(base: Float[Tensor, "m m"]) -> Int32[Tensor, "groups m"]:
    """For four rows of the base and each column: where in a tile the sum with its signs lies."""
    negative = base[: len(base) // 4 * 4].unflatten(0, (-1, 4)) < 0
    numbers = (negative * negative.new_tensor([[1], [2], [4], [8]], dtype=torch.int32)).sum(1)
    return (LANES * numbers).int()


def why_not(n: int, m: int) -> str | None:
    """Why rows of n are not multiplied with a base of size m, or None."""
    size = n // max(m, 1)
    if m < 1 or n % (4 * LANES) or n % m or size < LANES or size & (size - 1) or (m % 4 and m > 1):
        return f"rows of {n} are not {m} times a power of two from {LANES}, and 64 or more"
    return None


@compiled
def _transform(x, m, sums, factors, y, start, stop):
    n = x.shape[1]
    size = n // m
    step = 4 * LANES if size >= 4 * LANES else LANES
    tile = np.empty((sums.shape[0] * 16 + 1) * LANES, np.float32)
    # A vector that lies across two lines of the cache takes twice as long.
    tile = tile[(-tile.ctypes.data // 4) % LANES :]
    for r in range(start, stop):
        _along(x[r], factors, y[r], step > LANES)
        _across(y[r], step, size)
        if m > 1:
            _mix(y[r], sums, tile)


@compiled
def _along(x, factors, y, more):
    """The four rounds for the bits of the lane, and if more, two for the next two bits."""
    for i in range(0, len(x), 4 * LANES):
        j, k, l = i + LANES, i + 2 * LANES, i + 3 * LANES  # noqa: E741
        a, b = _lanes(load(x, i) * load(factors, i)), _lanes(load(x, j) * load(factors, j))
        c, d = _lanes(load(x, k) * load(factors, k)), _lanes(load(x, l) * load(factors, l))
        if more:
            a, b, c, d = _two_rounds(a, b, c, d)
        _store_four(y, i, LANES, a, b, c, d)


@compiled
def _lanes(v):
    for bit in range(4):
        v = lookup(v, load_bytes(PARTNERS, bit * LANES)) + v * load(SIGNS, bit * LANES)
    return v


@compiled
def _two_rounds(a, b, c, d):
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@compiled
def _across(y, step, size):
    """The rounds for the bits of the index from `step` to `size`, one part of y after another."""
    for start in range(0, len(y), size):
        half = step
        while 4 * half <= size:
            for first in range(start, start + size, 4 * half):
                for i in range(first, first + half, LANES):
                    j, k, l = i + half, i + 2 * half, i + 3 * half  # noqa: E741
                    a, b, c, d = _two_rounds(load(y, i), load(y, j), load(y, k), load(y, l))
                    _store_four(y, i, half, a, b, c, d)
            half *= 4
        if 2 * half == size:
            for i in range(start, start + half, LANES):
                a, b = load(y, i), load(y, i + half)
                store(y, i, a + b)
                store(y, i + half, a - b)


@compiled
def _mix(y, sums, tile):
    """y[j, :] = sum over i of base[i, j] y[i, :], in place; y has m rows of equal length."""
    groups, m = sums.shape
    size = len(y) // m
    for column in range(0, size, LANES):
        for group in range(groups):
            _fill(y, 4 * group * size + column, size, tile, group * 16 * LANES)
        for j in range(0, m, 4):
            a = b = c = d = splat(np.float32(0))
            for group in range(groups):
                at = group * 16 * LANES
                a += load(tile, at + sums[group, j])
                b += load(tile, at + sums[group, j + 1])
                c += load(tile, at + sums[group, j + 2])
                d += load(tile, at + sums[group, j + 3])
            i = j * size + column
            _store_four(y, i, size, a, b, c, d)


@compiled
def _fill(y, i, step, tile, at):
    """The sixteen sums of four vectors of y: bit b of a sum's number says that b is negative."""
    a, b, c, d = load(y, i), load(y, i + step), load(y, i + 2 * step), load(y, i + 3 * step)
    for number in range(8):
        v = a * splat(SIGNS[number]) + b * splat(SIGNS[LANES + number])
        v += c * splat(SIGNS[2 * LANES + number]) + d
        store(tile, at + number * LANES, v)
        store(tile, at + (15 - number) * LANES, v * splat(np.float32(-1)))


@compiled
def _store_four(y, i, step, a, b, c, d):
    store(y, i, a)
    store(y, i + step, b)
    store(y, i + 2 * step, c)
    store(y, i + 3 * step, d)
