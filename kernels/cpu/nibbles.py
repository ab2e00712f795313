"""Codes of four bits on the CPU: integers, NF4, FP4 and any other grid of sixteen values.

A weight of 4 bits is an eighth of the memory traffic of float32, but only if it is unpacked where
it is used. A block has one scale, so it knows only sixteen weights: their table fits one vector
register, and to unpack is to look up. `product` has the ladder.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

from .product import Packed
from .scales import (
    AHEAD,
    check,
    compiled,
    offsets,
    read_bytes,
    read_row,
    scales,
    scheme_of,
    stored,
    why_not_zero_point,
)  # fmt: skip
from .simd import (
    LANES,
    load,
    load_bytes,
    lookup,
    prefetch,
    splat,
    store,
    two_halves,
)  # fmt: skip
from .sums import ONE, nothing, plus, put, step_of, stride_of

NUMBERS = np.arange(16, dtype=np.float32)


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    scheme = scheme_of(q.format)
    return _why_not(scheme) if scheme else f"{type(q.format).__name__} is not a Scheme"


@lru_cache(maxsize=256)
def _why_not(scheme: Scheme) -> str | None:
    if scheme.grid.bits != 4:
        return f"the grid {scheme.grid.name} does not have codes of 4 bits"
    if isinstance(scheme.scale, Divisor):
        return "the scale divides"
    if scheme.block == 16 and scheme.offset is not None:
        return "blocks of 16 have an offset"
    if type(scheme.block) is int and scheme.block % 32 and scheme.block != 16:
        return f"blocks of {scheme.block} are neither 16 nor a multiple of 32"
    if not scheme.grid.points[0].isfinite():
        return f"code 0 of the grid {scheme.grid.name} is no number, and it pads the rows"
    return why_not_zero_point(scheme)


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`. A block's weights are (base - zero) * scale + offset."""
    check("nibbles", q, why_not(q))
    q, order = stored(q)
    scheme, codes = q.format, q.parts["codes"].contiguous()
    points = scheme.grid.points
    base = torch.nn.functional.pad(points, (0, 16 - len(points)))
    zero, offset = offsets(q)
    if zero is not None:
        base = base - scheme.offset.min
    first = (codes, base)
    if scheme.block == 16:
        return Packed(q.shape, 2, (*first, *scales(q)), _dot16, _unpack16, order)
    size = scheme.block // 2 if type(scheme.block) is int else codes.shape[1]
    vectors = -(-size // LANES)
    return Packed(q.shape, 2, (*first, vectors, *scales(q), zero, offset), _dot, _unpack, order)


@compiled
def _weights(base, factors, zero, offset, o, b):
    """The sixteen weights of block b of row o, as `Scheme.decode` computes them."""
    levels = load(base, 0)
    if zero is not None:
        levels -= splat(NUMBERS[(zero[o, b >> 1] >> ((b & 1) << 2)) & 15])
    weights = levels * splat(factors[b])
    return weights if offset is None else weights + splat(offset[o, b])


@compiled
def _dot(codes, base, vectors, scale, table, zero, offset, group, planes, y, start, stop):
    """y [rows, out] from codes [out, bytes] and planes [rows, 2, bytes]."""
    whole, factors = codes.shape[1] // (vectors * LANES), np.empty(scale.shape[1], np.float32)
    stride = stride_of(planes, group)
    for o in range(start, stop):
        row = codes[o]
        read_row(scale, table, o, factors)
        for r in range(0, len(planes), step_of(stride)):
            low, high = planes[r, 0], planes[r, 1]
            of_low = of_high = nothing()
            i = 0
            for b in range(whole):
                weights = _weights(base, factors, zero, offset, o, b)
                for _ in range(vectors):
                    prefetch(row, i + AHEAD)
                    byte = load_bytes(row, i)
                    of_low = plus(of_low, lookup(weights, byte), low, i, stride)
                    of_high = plus(of_high, lookup(weights, byte >> 4), high, i, stride)
                    i += LANES
            if i < len(row):
                weights = _weights(base, factors, zero, offset, o, whole)
                for j in range(i, len(row), LANES):
                    byte = read_bytes(row, j)
                    of_low = plus(of_low, lookup(weights, byte), low, j, stride)
                    of_high = plus(of_high, lookup(weights, byte >> 4), high, j, stride)
            put(of_low, of_high, y, r, o, ONE, stride)


@compiled
def _unpack(codes, base, vectors, scale, table, zero, offset, chunk, first, start, stop):
    """chunk [rows, 2, bytes] = weights of the rows first + start, ..., first + stop - 1."""
    factors = np.empty(scale.shape[1], np.float32)
    for o in range(start, stop):
        row, low, high = codes[first + o], chunk[o, 0], chunk[o, 1]
        read_row(scale, table, first + o, factors)
        for b in range(len(factors)):
            weights = _weights(base, factors, zero, offset, first + o, b)
            at = b * vectors * LANES
            for i in range(at, min(at + vectors * LANES, len(row)), LANES):
                byte = read_bytes(row, i)
                store(low, i, lookup(weights, byte))
                store(high, i, lookup(weights, byte >> 4))


@compiled
def _pair(factors, i):
    """The scales of the two blocks of 16 whose codes are bytes i, ..., i + 15."""
    b = i >> 3
    return two_halves(factors[b], factors[min(b + 1, len(factors) - 1)])


@compiled
def _dot16(codes, base, scale, table, group, planes, y, start, stop):
    """`_dot` for blocks of 16: a vector of bytes has two, and its lanes their scales."""
    values, factors = load(base, 0), np.empty(scale.shape[1], np.float32)
    stride = stride_of(planes, group)
    for o in range(start, stop):
        row = codes[o]
        read_row(scale, table, o, factors)
        for r in range(0, len(planes), step_of(stride)):
            low, high = planes[r, 0], planes[r, 1]
            of_low = of_high = nothing()
            for i in range(0, len(row), LANES):
                byte, pair = read_bytes(row, i), _pair(factors, i)
                of_low = plus(of_low, lookup(values, byte) * pair, low, i, stride)
                of_high = plus(of_high, lookup(values, byte >> 4) * pair, high, i, stride)
            put(of_low, of_high, y, r, o, ONE, stride)


@compiled
def _unpack16(codes, base, scale, table, chunk, first, start, stop):
    """`_unpack` for blocks of 16."""
    values, factors = load(base, 0), np.empty(scale.shape[1], np.float32)
    for o in range(start, stop):
        row, low, high = codes[first + o], chunk[o, 0], chunk[o, 1]
        read_row(scale, table, first + o, factors)
        for i in range(0, len(row), LANES):
            byte, pair = read_bytes(row, i), _pair(factors, i)
            store(low, i, lookup(values, byte) * pair)
            store(high, i, lookup(values, byte >> 4) * pair)
