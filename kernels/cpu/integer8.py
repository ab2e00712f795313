"""Integer codes of eight bits on the CPU: a byte is a code, and arithmetic unpacks it.

`product` has the ladder.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qlib.grid import Grid
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

from .product import Packed
from .scales import AHEAD, check, compiled, offsets, read_bytes, read_row, scales, scheme_of, stored
from .simd import LANES, floats, load, load_bytes, prefetch, splat, store, total


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    scheme = scheme_of(q.format)
    return _why_not(scheme) if scheme else f"{type(q.format).__name__} is not a Scheme"


@lru_cache(maxsize=256)
def _why_not(scheme: Scheme) -> str | None:
    if scheme.grid.name not in ("int8", "uint8") or not scheme.is_standard:
        return f"the grid {scheme.grid.name} is not an integer grid of 8 bits"
    if isinstance(scheme.scale, Divisor):
        return "the scale divides"
    if type(scheme.block) is int and scheme.block % LANES:
        return f"blocks of {scheme.block} are not a multiple of {LANES}"
    if isinstance(scheme.offset, Grid) and scheme.offset.bits != 8:
        return f"the zero point is stored as {scheme.offset.name}, not in 8 bits"
    return None


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`. A block's weights are (code + least - zero) * scale + offset."""
    check("integer8", q, why_not(q))
    q, order = stored(q)
    scheme, codes = q.format, q.parts["codes"].contiguous()
    least = scheme.grid.min - (scheme.offset.min if isinstance(scheme.offset, Grid) else 0)
    size = scheme.block if type(scheme.block) is int else codes.shape[1]
    operands = (codes, np.float32(least), -(-size // LANES), *scales(q), *offsets(q))
    return Packed(q.shape, 1, operands, _dot, _unpack, order)


@compiled
def _block(least, factors, zero, o, b):
    """(shift, factor): a weight of block b in row o is (code + shift) * factor, plus an offset."""
    shift = least if zero is None else least - np.float32(zero[o, b])
    return splat(shift), splat(factors[b])


@compiled
def _weights(byte, shift, factor, offset, o, b):
    weights = (floats(byte) + shift) * factor
    return weights if offset is None else weights + splat(offset[o, b])


@compiled
def _dot(codes, least, vectors, scale, table, zero, offset, planes, y, start, stop):
    """y [rows, out] from codes [out, bytes] and planes [rows, 1, bytes]."""
    whole, factors = codes.shape[1] // LANES * LANES, np.empty(scale.shape[1], np.float32)
    for o in range(start, stop):
        row = codes[o]
        read_row(scale, table, o, factors)
        for r in range(len(planes)):
            x, sums = planes[r, 0], splat(np.float32(0))
            # Four sums take turns, because an addition waits for the one before it.
            second = third = fourth = sums
            for b in range(len(factors)):
                shift, factor = _block(least, factors, zero, o, b)
                first = b * vectors * LANES
                for i in range(first, min(first + vectors * LANES, whole), LANES):
                    prefetch(row, i + AHEAD)
                    weights = _weights(load_bytes(row, i), shift, factor, offset, o, b)
                    sums += weights * load(x, i)
                    sums, second, third, fourth = second, third, fourth, sums
                if whole < len(row) and first + vectors * LANES > whole:
                    weights = _weights(read_bytes(row, whole), shift, factor, offset, o, b)
                    sums += weights * load(x, whole)
            y[r, o] = total(sums + second + third + fourth)


@compiled
def _unpack(codes, least, vectors, scale, table, zero, offset, chunk, first, start, stop):
    """chunk [rows, 1, bytes] = weights of the rows first + start, ..., first + stop - 1."""
    factors = np.empty(scale.shape[1], np.float32)
    for o in range(start, stop):
        row = codes[first + o]
        read_row(scale, table, first + o, factors)
        for b in range(len(factors)):
            shift, factor = _block(least, factors, zero, first + o, b)
            at = b * vectors * LANES
            for i in range(at, min(at + vectors * LANES, len(row)), LANES):
                weights = _weights(read_bytes(row, i), shift, factor, offset, first + o, b)
                store(chunk[o, 0], i, weights)
