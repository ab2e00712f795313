"""The scales of blocks: how a kernel of `product` finds and applies those of a tile.

A tile is cut into units, so small that all weights of one share a scale: the size of a unit is a
power of two that divides the size of a block, and blocks begin at multiples of their size. A block
of 48 has three units of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlib.qtensor import QTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def stored(q: QTensor) -> tuple[tuple[Tensor, ...], int, int]:
    """(stored tensors of the scales, how many a row has, how many weights share one).

    A row has 0 of its own if the tensor shares one, and 0 weights are the whole row.
    """
    names = ("scale", "scale.codes", "scale.scale", "scale.offset")
    parts = tuple(q.parts[name].contiguous() for name in names if name in q.parts)
    block = q.format.block
    stride = 0 if block == "tensor" else parts[0].shape[1]
    return parts, stride, block if type(block) is int else 0


@triton.jit
def units(n, outputs, k, inputs, BLOCK: tl.constexpr, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):
    """(row, block, whether it exists) of each unit of a tile, to be broadcast: [BLOCK_N, units].

    A unit has up to LARGEST inputs. BLOCK is 0 for the whole row.
    """
    UNIT: tl.constexpr = min(BLOCK & -BLOCK, LARGEST) if BLOCK else BLOCK_K
    first = k + UNIT * tl.arange(0, BLOCK_K // UNIT)
    block = first // BLOCK if BLOCK else first * 0
    inside = (n < outputs)[:, None] & (first < inputs)[None, :]
    return n.to(tl.int64)[:, None], block[None, :], inside


@triton.jit
def rescaled(values, scale, add=None):
    """`values` [BLOCK_N, BLOCK_K] * scale + add, which are [BLOCK_N, units]."""
    UNITS: tl.constexpr = scale.shape[1]
    split = tl.reshape(values, [values.shape[0], UNITS, values.shape[1] // UNITS])
    split = split * scale[:, :, None]
    if add is not None:
        split += add[:, :, None]
    return tl.reshape(split, values.shape)
