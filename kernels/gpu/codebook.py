"""Codes of 4 bits that look up their value in a table (NF4, bitsandbytes' FP4, learned grids).

The stored bytes are read as they are: two codes to a byte, the lower half first, and value
table[code] * scale. A byte looks up both of its codes at once, in a table of the 256 pairs of
float32 that a byte can mean: one address and one load of 8 bytes for two weights, and no
instruction takes the byte apart. The pairs are 2 KiB that every program reads, so they stay in
the L1 cache. They are made once for a grid and a device.

Scales are floats, or 8-bit codes of bitsandbytes' double quantization: these look up a table too,
and multiply and add numbers that are shared by a block of scales, and by all of them.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlib.double import DYNAMIC, DoubleQuant
from qlib.grid import Grid
from qlib.pack import unpack
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .product import Packed
from .scales import FLOATS, rescaled, stored, units


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot read `q`, or None if they can."""
    scheme = q.format
    if not isinstance(scheme, Scheme):
        return f"{type(scheme).__name__} is not a Scheme"
    if scheme.grid.bits != 4 or not bool(scheme.grid.points.isfinite().all()):
        return f"the grid {scheme.grid.name} is not a table of 9 to 16 numbers"
    if type(scheme.block) is int and scheme.block % 16:
        return f"blocks of {scheme.block} are not a multiple of 16"
    if scheme.offset is not None:
        return "the weights have an offset"
    if scheme.scale not in FLOATS and not isinstance(scheme.scale, DoubleQuant):
        return "the scale is not float16, bfloat16, float32 or double quantization"
    return None


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`, if `why_not(q)` is None."""
    codes, (scale, stride, block) = q.parts["codes"].contiguous(), stored(q)
    double = q.format.scale.block if isinstance(q.format.scale, DoubleQuant) else 0
    if double:
        scale += (dynamic(codes.device),)
    table = pairs(q.format.grid, codes.device)
    parts = (codes, table, scale, codes.shape[1], stride, q.shape[1])
    return Packed(tuple(q.shape), parts, decode, (block, double), 1024)


@lru_cache(maxsize=256)
def pairs(grid: Grid, device: torch.device) -> Tensor:
    """The values of the two codes in every byte, float32 [512], on `device`."""
    values = torch.nn.functional.pad(grid.points, (0, 16 - len(grid.points)))
    bytes = torch.arange(256, dtype=torch.uint8)[:, None]
    return values[unpack(bytes, 4, 2).long()].view(-1).to(device)


@cache
def dynamic(device: torch.device) -> Tensor:
    """The values of the codes that double quantization makes of scales, on `device`."""
    return DYNAMIC.points.to(device)


@triton.jit
def decode(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    codes, pairs, scale, row_bytes, stride, inputs = parts
    j = k // 2 + tl.arange(0, BLOCK_K // 2)
    inside = (n < outputs)[:, None] & (j < row_bytes)[None, :]
    byte = tl.load(codes + n.to(tl.int64)[:, None] * row_bytes + j[None, :], inside, other=0)
    pair = tl.load(pairs.to(tl.pointer_type(tl.uint64), bitcast=True) + byte.to(tl.int32))
    first = pair.to(tl.uint32).to(tl.float32, bitcast=True)
    second = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    row, block, inside = units(n, outputs, k, inputs, OPTIONS[0], BLOCK_K, BLOCK_K)
    at = row * stride + block
    if OPTIONS[1]:
        s = _doubly_quantized(scale, at, inside, OPTIONS[1])
    else:
        s = tl.load(scale[0] + at, inside, other=0.0).to(tl.float32)
    return rescaled(tl.interleave(first, second), s)


@triton.jit
def _doubly_quantized(parts, at, inside, BLOCK: tl.constexpr):
    codes, scale, offset, values = parts
    value = tl.load(values + tl.load(codes + at, inside, other=0).to(tl.int32))
    return value * tl.load(scale + at // BLOCK, inside, other=0.0) + tl.load(offset)
