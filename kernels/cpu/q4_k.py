"""Q4_K on the CPU, straight from ggml's bytes (layout: `qlib.ggml.kquants`).

A superblock of 256 weights is 144 bytes: two float16 (step and offset of the whole), eight scales
and eight minima of 6 bits, and 128 bytes of codes. Each of its eight sub-blocks of 32 knows only
sixteen weights, so that the table lookup of `nibbles` serves here too. `product` has the ladder.
"""

from __future__ import annotations

import numpy as np
import torch

from qlib.ggml.block import BlockFormat
from qlib.qtensor import QTensor

from .nibbles import NUMBERS
from .product import Packed
from .scales import AHEAD, all_halves, compiled
from .simd import LANES, load, load_bytes, lookup, prefetch, splat, store, total

SIZE = 144


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    if isinstance(q.format, BlockFormat) and q.format.kind.name == "Q4_K":
        return None
    return "the format is not ggml's Q4_K"


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`: its bytes, the same as float16 codes, and what those mean."""
    blocks = q.parts["blocks"].contiguous()
    operands = (blocks.numpy(), blocks.view(torch.uint16).numpy(), all_halves().numpy())
    return Packed(q.shape, 1, operands, _dot, _unpack)


@compiled
def _read_scales(row, halves, table, block, steps, offsets):
    """steps[sub] and offsets[sub] of the eight sub-blocks: weight = step * code - offset."""
    step, offset = table[halves[block * SIZE // 2]], table[halves[block * SIZE // 2 + 1]]
    at = block * SIZE + 4
    for i in range(4):
        low, middle, high = row[at + i], row[at + 4 + i], row[at + 8 + i]
        steps[i] = step * np.float32(low & 63)
        offsets[i] = offset * np.float32(middle & 63)
        steps[4 + i] = step * np.float32((high & 15) | (low >> 6) << 4)
        offsets[4 + i] = offset * np.float32((high >> 4) | (middle >> 6) << 4)


@compiled
def _weights(steps, offsets, sub):
    """The sixteen weights of a sub-block."""
    return load(NUMBERS, 0) * splat(steps[sub]) - splat(offsets[sub])


@compiled
def _dot(blocks, codes, table, planes, y, start, stop):
    """y [rows, out]; 32 bytes hold two sub-blocks, the first in their lower halves."""
    steps, offsets = np.empty(8, np.float32), np.empty(8, np.float32)
    for o in range(start, stop):
        row, halves = blocks[o], codes[o]
        for r in range(len(planes)):
            x = planes[r, 0]
            sum_low = sum_high = splat(np.float32(0))
            for block in range(len(row) // SIZE):
                _read_scales(row, halves, table, block, steps, offsets)
                for sub in range(0, 8, 2):
                    low, high = _weights(steps, offsets, sub), _weights(steps, offsets, sub + 1)
                    at, first = block * SIZE + 16 + sub * 16, block * 256 + sub * 32
                    prefetch(row, at + AHEAD)
                    for i in range(0, 32, LANES):
                        byte = load_bytes(row, at + i)
                        sum_low += lookup(low, byte & 15) * load(x, first + i)
                        sum_high += lookup(high, byte >> 4) * load(x, first + 32 + i)
            y[r, o] = total(sum_low + sum_high)


@compiled
def _unpack(blocks, codes, table, chunk, first, start, stop):
    """chunk [rows, 1, in] = weights of the rows first + start, ..., first + stop - 1."""
    steps, offsets = np.empty(8, np.float32), np.empty(8, np.float32)
    for o in range(start, stop):
        row, halves, weights = blocks[first + o], codes[first + o], chunk[o, 0]
        for block in range(len(row) // SIZE):
            _read_scales(row, halves, table, block, steps, offsets)
            for sub in range(0, 8, 2):
                low, high = _weights(steps, offsets, sub), _weights(steps, offsets, sub + 1)
                at, to = block * SIZE + 16 + sub * 16, block * 256 + sub * 32
                for i in range(0, 32, LANES):
                    byte = load_bytes(row, at + i)
                    store(weights, to + i, lookup(low, byte & 15))
                    store(weights, to + 32 + i, lookup(high, byte >> 4))
