"""Codes of 1 to 8 bits on the CPU, which share bytes as `qlib.pack` lays them: bit after bit.

Eight codes of b bits fill b bytes, so sixteen are two words of 64 bits, shifted by a multiple of b
in every lane and cut off. Codes of 8 bits need none of that: they are read as they lie. What a code
means is looked up if there are sixteen meanings or fewer; longer ones are integers or small floats,
and arithmetic does. Codes of 4 bits have more to gain, in `nibbles`; `product` has the ladder.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import types
from numba.extending import overload

from qlib.grid import E2M3, E3M2, E4M3, E5M2, Grid
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

from .product import Packed
from .scales import (
    AHEAD,
    check,
    compiled,
    offsets,
    read_row,
    scales,
    scheme_of,
    stored,
    why_not_zero_point,
)  # fmt: skip
from .simd import (
    LANES,
    first_lanes,
    floats,
    load,
    load_bytes,
    load_codes,
    lookup,
    minifloat,
    prefetch,
    splat,
    store,
)  # fmt: skip
from .sums import ONE, nothing, plus, put, step_of, stride_of

# Bits of the exponent of the small floats.
EXPONENT = {grid.name: bits for grid, bits in ((E2M3, 2), (E3M2, 3), (E4M3, 4), (E5M2, 5))}
# The end of a row is copied where there is room behind it: it has bits + 7 bytes at most, and what
# reads the last of them touches no more than 32.
ROOM = 32


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    scheme = scheme_of(q.format)
    return _why_not(scheme) if scheme else f"{type(q.format).__name__} is not a Scheme"


@lru_cache(maxsize=256)
def _why_not(scheme: Scheme) -> str | None:
    grid = scheme.grid
    if len(grid.points) == 3 or grid.bits > 8:
        return f"the grid {grid.name} does not have codes of 1 to 8 bits"
    if grid.bits > 4 and not (scheme.is_standard and _computed(grid)):
        return f"the grid {grid.name} has over 16 values, neither integers nor small floats"
    if isinstance(scheme.scale, Divisor):
        return "the scale divides"
    if type(scheme.block) is int and scheme.block % LANES:
        return f"blocks of {scheme.block} are not a multiple of {LANES}"
    if grid.bits > 4 and grid.name in EXPONENT and scheme.offset is not None:
        return "small floats have an offset"
    return why_not_zero_point(scheme)


def _computed(grid: Grid) -> bool:
    return grid.name in (f"int{grid.bits}", f"uint{grid.bits}", *EXPONENT)


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`. A block's weights are (value - zero) * scale + offset."""
    check("bitstream", q, why_not(q))
    q, order = stored(q)
    scheme, codes = q.format, q.parts["codes"].contiguous()
    size = scheme.block if type(scheme.block) is int else max(1, q.shape[1])
    bits = None if scheme.grid.bits == 8 else scheme.grid.bits
    first = (codes, bits, _values(scheme), q.shape[1], -(-size // LANES))
    operands = (*first, *scales(q), *offsets(q))
    return Packed(q.shape, 1, operands, _dot, _unpack, order)


def _values(scheme: Scheme) -> torch.Tensor | np.number:
    """What codes mean, in a type that chooses the arithmetic: for small floats the bits of the
    exponent, uint8; for integers the one of code 0, float32; a table for all others. The least zero
    point is subtracted already."""
    grid = scheme.grid
    least = scheme.offset.min if isinstance(scheme.offset, Grid) else 0
    if grid.bits > 4:
        exponent = EXPONENT.get(grid.name)
        return np.float32(grid.min - least) if exponent is None else np.uint8(exponent)
    return torch.nn.functional.pad(grid.points - least, (0, LANES - len(grid.points)))


def block(values, factor, zero, added):
    """Inside numba: what the weights of a block have in common, for `weights`: three vectors, of
    which a table needs one and small floats, which have no zero point or offset, two."""


def weights(code, bits, values, common):
    """Inside numba: the weights (value - zero) * factor + added of sixteen codes."""


@overload(block)
def _block(values, factor, zero, added):
    def table(values, factor, zero, added):
        levels = (load(values, 0) - splat(zero)) * splat(factor) + splat(added)
        return levels, levels, levels

    def small_floats(values, factor, zero, added):
        # What float16 reads is too small by its bias less theirs.
        gain = np.float32(1 << (16 - (1 << (values - 1))))
        return splat(gain), splat(factor), splat(factor)

    def integers(values, factor, zero, added):
        return splat(values - zero), splat(factor), splat(added)

    return {types.float32: integers, types.uint8: small_floats}.get(values, table)


@overload(weights)
def _weights(code, bits, values, common):
    def table(code, bits, values, common):
        return lookup(common[0], code)

    def small_floats(code, bits, values, common):
        return minifloat(code, _width(bits), values) * common[0] * common[1]

    def integers(code, bits, values, common):
        return (floats(code) + common[0]) * common[1] + common[2]

    return {types.float32: integers, types.uint8: small_floats}.get(values, table)


@compiled
def _width(bits):
    return 8 if bits is None else bits


@compiled
def _codes(row, at, bits):
    """The sixteen codes from byte `at` on."""
    prefetch(row, at + AHEAD)
    return load_bytes(row, at) if bits is None else load_codes(row, at, bits)


@compiled
def _common(values, factors, bits, zero, offset, o, b):
    """`block` of block b of row o; its zero point is in a stream of bits, too."""
    point = np.float32(0)
    if zero is not None:
        first = b * _width(bits)
        at, last = first >> 3, zero.shape[1] - 1
        word = zero[o, at] | zero[o, min(at + 1, last)] << 8
        point = np.float32(word >> (first & 7) & ((1 << _width(bits)) - 1))
    added = np.float32(0) if offset is None else offset[o, b]
    return block(values, factors[b], point, added)


@compiled
def _end(row, bits, vectors, end):
    """How many of the vectors of a row are read where they lie; the bytes of the others: `end`."""
    width = _width(bits)
    inside = max(0, min(vectors, (len(row) - width - 8) // (2 * width) + 1))
    at = inside * 2 * width
    for i in range(at, len(row)):
        end[i - at] = row[i]
    return inside


@compiled
def _dot(
    codes, bits, values, inputs, vectors, scale, table, zero, offset, group, planes, y, start, stop
):
    """y [rows, out] from codes [out, bytes] and planes [rows, 1, inputs]."""
    factors, end = np.empty(scale.shape[1], np.float32), np.zeros(ROOM, np.uint8)
    every, step, stride = planes.shape[2] // LANES, 2 * _width(bits), stride_of(planes, group)
    for o in range(start, stop):
        row = codes[o]
        read_row(scale, table, o, factors)
        inside = _end(row, bits, every, end)
        whole = inside // vectors
        for r in range(0, len(planes), step_of(stride)):
            x, v = planes[r, 0], 0
            sums = others = nothing()
            for b in range(whole):
                common = _common(values, factors, bits, zero, offset, o, b)
                for _ in range(vectors):
                    some = weights(_codes(row, v * step, bits), bits, values, common)
                    sums = plus(sums, some, x, v * LANES, stride)
                    sums, others = others, sums
                    v += 1
            for b in range(whole, len(factors)):
                common = _common(values, factors, bits, zero, offset, o, b)
                last = min((b + 1) * vectors, every)
                for v in range(b * vectors, min(last, inside)):
                    some = weights(_codes(row, v * step, bits), bits, values, common)
                    sums = plus(sums, some, x, v * LANES, stride)
                for v in range(max(b * vectors, inside), last):
                    some = weights(_codes(end, (v - inside) * step, bits), bits, values, common)
                    # Behind the last input is a zero of x, but a code that may mean infinity.
                    some = first_lanes(some, inputs - v * LANES)
                    sums = plus(sums, some, x, v * LANES, stride)
            put(sums, others, y, r, o, ONE, stride)


@compiled
def _unpack(
    codes, bits, values, inputs, vectors, scale, table, zero, offset, chunk, first, start, stop
):
    """chunk [rows, 1, inputs] = weights of the rows first + start, ..., first + stop - 1."""
    factors, end = np.empty(scale.shape[1], np.float32), np.zeros(ROOM, np.uint8)
    every, step = chunk.shape[2] // LANES, 2 * _width(bits)
    for o in range(start, stop):
        row, out = codes[first + o], chunk[o, 0]
        read_row(scale, table, first + o, factors)
        inside = _end(row, bits, every, end)
        for b in range(len(factors)):
            common = _common(values, factors, bits, zero, offset, first + o, b)
            last = min((b + 1) * vectors, every)
            for v in range(b * vectors, min(last, inside)):
                some = weights(_codes(row, v * step, bits), bits, values, common)
                store(out, v * LANES, some)
            for v in range(max(b * vectors, inside), last):
                some = weights(_codes(end, (v - inside) * step, bits), bits, values, common)
                store(out, v * LANES, first_lanes(some, inputs - v * LANES))
