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
import torch
from jaxtyping import Float
from torch import Tensor

from qlib.pack import TRITS_PER_BYTE
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .product import Packed, planes
from .scales import compiled, read_bytes
from .simd import LANES, load, lookup, splat, store, total
from .threads import by_rows

# The two trits of a number 0..8, as weights.
FIRST = np.array([i % 3 - 1 for i in range(16)], np.float32)
SECOND = np.array([min(i // 3, 2) - 1 for i in range(16)], np.float32)
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
    scale = q.format.read(q.parts, q.shape)[0]
    scale = scale[:, 0].expand(q.shape[0]).contiguous()
    operands = (q.parts["codes"].contiguous().numpy(), scale.numpy())
    return Packed(q.shape, TRITS_PER_BYTE, operands, _dot, _unpack)


def additions(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product by additions alone, but for the scale at the end. Arguments as `product.gemv`."""
    codes, scale = weight.operands
    inputs, y = planes(x, TRITS_PER_BYTE).numpy(), torch.zeros(len(x), len(codes))
    sums = np.empty((codes.shape[1], 256), np.float32)
    for r in range(len(x)):
        _all_sums(inputs[r], sums)
        result = y[r].numpy()
        by_rows(lambda *rows, y=result: _add(codes, scale, sums, y, *rows), len(codes), codes.size)
    return y.to(x.dtype)


@compiled
def _trits(byte):
    """Three numbers that hold the trits of a byte: (0 and 1), (2 and 3), 4.

    57 / 512 is close enough to a ninth for every number up to 255.
    """
    rest = (byte * 57) >> 9
    last = (rest * 57) >> 9
    return byte - rest * 9, rest - last * 9, last


@compiled
def _dot(codes, scale, planes, y, start, stop):
    """y [rows, out] from codes [out, bytes] and planes [rows, 5, bytes]."""
    first, second = load(FIRST, 0), load(SECOND, 0)
    for o in range(start, stop):
        row = codes[o]
        for r in range(len(planes)):
            x = planes[r]
            s0 = s1 = s2 = s3 = s4 = splat(np.float32(0))
            for i in range(0, len(row), LANES):
                low, high, last = _trits(read_bytes(row, i))
                s0 += lookup(first, low) * load(x[0], i)
                s1 += lookup(second, low) * load(x[1], i)
                s2 += lookup(first, high) * load(x[2], i)
                s3 += lookup(second, high) * load(x[3], i)
                s4 += lookup(first, last) * load(x[4], i)
            y[r, o] = total(s0 + s1 + s2 + s3 + s4) * scale[o]


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
        row, factor, out = codes[first + o], splat(scale[first + o]), chunk[o]
        one, two = load(FIRST, 0) * factor, load(SECOND, 0) * factor
        for i in range(0, len(row), LANES):
            low, high, last = _trits(read_bytes(row, i))
            store(out[0], i, lookup(one, low))
            store(out[1], i, lookup(two, low))
            store(out[2], i, lookup(one, high))
            store(out[3], i, lookup(two, high))
            store(out[4], i, lookup(one, last))
