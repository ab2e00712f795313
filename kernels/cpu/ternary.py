"""Weights -1, 0, 1 on the CPU, five trits to a byte, and whether additions beat multiplications.

1. `dequantize.gemm`: a few rows of the weight at full width, then torch's product.
2. `additions` multiplies nothing. A byte means one of 243 signed sums of five activations: all of
   them are added up once, and every byte of every row then costs one look into them and one
   addition for five weights. The idea is that of T-MAC (arXiv 2407.00088).
3. `product.gemv` with what `packed` gives it takes the trits of sixteen bytes apart in registers
   and multiplies. A fused multiply-add is one instruction, as an addition is, and it needs no walk
   through a table in memory.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from qlib.pack import TRITS_PER_BYTE
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .product import Packed, dealt_inputs
from .scales import check, compiled, read_bytes
from .simd import LANES, load, lookup, lookup_two, store
from .sums import nothing, plus, put, step_of, stride_of
from .threads import by_rows

# The three trits of a number 0..26, as weights, and the two of a number 0..8: the same tables.
TRITS = np.array([[i // 3**j % 3 - 1 for i in range(32)] for j in range(3)], np.float32)
# Bytes whose sums are used together: their table, 32 KB, stays in the first-level cache.
TOGETHER = 32


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    if not isinstance(q.format, Scheme) or len(q.format.grid.points) != 3:
        return "the weights are not ternary"
    if q.format.block not in ("tensor", "row") or q.format.offset is not None:
        return "the scale is not one for the tensor or one for a row"
    if not q.format.is_standard:
        return "the three values are not -1, 0, 1"
    return None


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`."""
    check("ternary", q, why_not(q))
    scale = q.format.read(q.parts, q.shape)[0]
    scale = scale[:, 0].expand(q.shape[0]).contiguous()
    operands = (q.parts["codes"].contiguous(), scale)
    return Packed(q.shape, TRITS_PER_BYTE, operands, _dot, _unpack)


def additions(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product by additions alone, but for the scale at the end. Arguments as `product.gemv`."""
    if weight.dot is not _dot:
        raise ValueError("additions: the weights are not ternary")
    codes, scale = weight.operands
    inputs = dealt_inputs(x, weight)
    y, sums = inputs.new_zeros(len(x), len(codes)), inputs.new_zeros(codes.shape[1], 256)
    for r in range(len(x)):
        _all_sums(inputs[r].numpy(), sums.numpy())
        by_rows(_add, (codes, scale, sums, y[r]), len(codes), codes.numel())
    return y.to(x.dtype)


@compiled
def _two_parts(byte):
    """A number 0..26 with the trits 0, 1 and 2 of a byte, and one 0..8 with its trits 3 and 4.

    19 / 512 is close enough to a 27th for every number up to 255.
    """
    high = (byte * 19) >> 9
    return byte - high * 27, high


@compiled
def _tables(factor):
    """factor * TRITS as vectors: three pairs."""
    t = TRITS * factor
    return (
        (load(t[0], 0), load(t[0], LANES)),
        (load(t[1], 0), load(t[1], LANES)),
        (load(t[2], 0), load(t[2], LANES)),
    )


@compiled
def _dot(codes, scale, group, planes, y, start, stop):
    """y [rows, out] from codes [out, bytes] and planes [rows, 5, bytes]."""
    t0, t1, t2 = _tables(np.float32(1))
    stride, width = stride_of(planes, group), planes.shape[2]
    for o in range(start, stop):
        row = codes[o]
        for r in range(0, len(planes), step_of(stride)):
            x, sums, others = planes[r, 0], nothing(), nothing()
            for i in range(0, len(row), LANES):
                low, high = _two_parts(read_bytes(row, i))
                sums = plus(sums, lookup_two(t0[0], t0[1], low), x, i, stride)
                others = plus(others, lookup_two(t1[0], t1[1], low), x, width + i, stride)
                sums = plus(sums, lookup_two(t2[0], t2[1], low), x, 2 * width + i, stride)
                others = plus(others, lookup(t0[0], high), x, 3 * width + i, stride)
                sums = plus(sums, lookup(t1[0], high), x, 4 * width + i, stride)
            put(sums, others, y, r, o, scale[o], stride)


@compiled
def _all_sums(x, sums):
    """sums[i, byte]: the activations x [5, bytes] with the signs of that byte's trits."""
    for i in range(len(sums)):
        sums[i, 0] = -(x[0, i] + x[1, i] + x[2, i] + x[3, i] + x[4, i])
        known = 1
        for j in range(5):
            for b in range(known):
                sums[i, known + b] = sums[i, b] + x[j, i]
                sums[i, 2 * known + b] = sums[i, known + b] + x[j, i]
            known *= 3


@compiled
def _add(codes, scale, sums, y, start, stop):
    """y [out] by one addition for each byte of codes [out, bytes]."""
    for at in range(0, codes.shape[1], TOGETHER):
        some = sums[at : at + TOGETHER]
        for o in range(start, stop):
            row = codes[o, at : at + TOGETHER]
            total = np.float32(0)
            for i in range(len(row)):
                total += some[i, row[i]]
            y[o] += total
    for o in range(start, stop):
        y[o] *= scale[o]


@compiled
def _unpack(codes, scale, chunk, first, start, stop):
    """chunk [rows, 5, bytes] = weights of the rows first + start, ..., first + stop - 1."""
    for o in range(start, stop):
        row, out = codes[first + o], chunk[o]
        t0, t1, t2 = _tables(scale[first + o])
        for i in range(0, len(row), LANES):
            low, high = _two_parts(read_bytes(row, i))
            store(out[0], i, lookup_two(t0[0], t0[1], low))
            store(out[1], i, lookup_two(t1[0], t1[1], low))
            store(out[2], i, lookup_two(t2[0], t2[1], low))
            store(out[3], i, lookup(t0[0], high))
            store(out[4], i, lookup(t1[0], high))
