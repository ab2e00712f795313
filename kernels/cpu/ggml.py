"""Q4_K, Q6_K and Q8_0 on the CPU, straight from ggml's bytes; `product` has the ladder.

Q4_K   256 weights: 2 float16 (step and offset of the whole), 8 scales and 8 minima of 6 bits in 12
       bytes, 128 bytes of codes. A sub-block of 32 knows sixteen weights: look up, as `nibbles`.
Q6_K   256 weights: 128 bytes with the lower four bits of the codes, 64 with the upper two, 16
       signed scales, 1 float16. A sub-block is 16 weights: one vector.
Q8_0   32 weights: 1 float16, 32 signed bytes.

The order of the weights inside the bytes is drawn in `qlib.ggml.kquants`.
"""

from __future__ import annotations

import numpy as np
import torch

from qlib.ggml.block import TYPES, BlockFormat
from qlib.qtensor import QTensor

from .nibbles import NUMBERS
from .product import Packed
from .scales import AHEAD, check, compiled
from .simd import LANES, floats, half, load, load_bytes, lookup, prefetch, splat, store
from .sums import ONE, nothing, plus, put, step_of, stride_of

# Bytes of a block.
Q4_K, Q6_K, Q8_0 = 144, 210, 34


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot take `q`, or None."""
    # A type of the same name with other sizes would be read beyond its end.
    known = [TYPES[name] for name in _functions()]
    if isinstance(q.format, BlockFormat) and q.format.kind in known:
        return None
    return "the format is not ggml's Q4_K, Q6_K or Q8_0"


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`: its bytes, and the same as float16 codes."""
    check("ggml", q, why_not(q))
    blocks = q.parts["blocks"].contiguous()
    operands = (blocks, blocks.view(torch.uint16))
    return Packed(q.shape, 1, operands, *_functions()[q.format.kind.name])


def _functions() -> dict[str, tuple]:
    return {
        "Q4_K": (_dot_q4_k, _unpack_q4_k),
        "Q6_K": (_dot_q6_k, _unpack_q6_k),
        "Q8_0": (_dot_q8_0, _unpack_q8_0),
    }


@compiled
def _read_scales(row, halves, block, steps, offsets):
    """steps[sub] and offsets[sub] of the eight sub-blocks: weight = step * code - offset."""
    step, offset = half(halves[block * Q4_K // 2]), half(halves[block * Q4_K // 2 + 1])
    at = block * Q4_K + 4
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
def _dot_q4_k(blocks, codes, group, planes, y, start, stop):
    """y [rows, out]; 32 bytes hold two sub-blocks, the first in their lower halves."""
    steps, offsets = np.empty(8, np.float32), np.empty(8, np.float32)
    stride = stride_of(planes, group)
    for o in range(start, stop):
        row, halves = blocks[o], codes[o]
        for r in range(0, len(planes), step_of(stride)):
            x, of_low, of_high = planes[r, 0], nothing(), nothing()
            for block in range(len(row) // Q4_K):
                _read_scales(row, halves, block, steps, offsets)
                for sub in range(0, 8, 2):
                    low, high = _weights(steps, offsets, sub), _weights(steps, offsets, sub + 1)
                    at, to = block * Q4_K + 16 + sub * 16, block * 256 + sub * 32
                    prefetch(row, at + AHEAD)
                    for i in range(0, 32, LANES):
                        byte = load_bytes(row, at + i)
                        of_low = plus(of_low, lookup(low, byte), x, to + i, stride)
                        of_high = plus(of_high, lookup(high, byte >> 4), x, to + 32 + i, stride)
            put(of_low, of_high, y, r, o, ONE, stride)


@compiled
def _unpack_q4_k(blocks, codes, chunk, first, start, stop):
    """chunk [rows, 1, in] = weights of the rows first + start, ..., first + stop - 1."""
    steps, offsets = np.empty(8, np.float32), np.empty(8, np.float32)
    for o in range(start, stop):
        row, halves, weights = blocks[first + o], codes[first + o], chunk[o, 0]
        for block in range(len(row) // Q4_K):
            _read_scales(row, halves, block, steps, offsets)
            for sub in range(0, 8, 2):
                low, high = _weights(steps, offsets, sub), _weights(steps, offsets, sub + 1)
                at, to = block * Q4_K + 16 + sub * 16, block * 256 + sub * 32
                for i in range(0, 32, LANES):
                    byte = load_bytes(row, at + i)
                    store(weights, to + i, lookup(low, byte))
                    store(weights, to + 32 + i, lookup(high, byte >> 4))


@compiled
def _q6_k(row, start, step, side, part):
    """Sub-blocks of a Q6_K block that share their bytes: 8 * side + part, + 2, + 4 and + 6."""
    at, scales = start + 64 * side + 16 * part, start + 192 + 8 * side + part
    first, second = load_bytes(row, at), load_bytes(row, at + 32)
    high = load_bytes(row, start + 128 + 32 * side + 16 * part)
    return (
        _levels(first & 15, high & 3, step, row[scales]),
        _levels(second & 15, (high >> 2) & 3, step, row[scales + 2]),
        _levels(first >> 4, (high >> 4) & 3, step, row[scales + 4]),
        _levels(second >> 4, high >> 6, step, row[scales + 6]),
    )


@compiled
def _levels(low, high, step, scale):
    codes = floats(low + high * 16) - splat(np.float32(32))
    return codes * splat(step * np.float32(np.int8(scale)))


@compiled
def _dot_q6_k(blocks, codes, group, planes, y, start, stop):
    """y [rows, out], four vectors of sixteen weights at a time."""
    stride = stride_of(planes, group)
    for o in range(start, stop):
        row, halves = blocks[o], codes[o]
        for r in range(0, len(planes), step_of(stride)):
            x, sums, others = planes[r, 0], nothing(), nothing()
            for block in range(len(row) // Q6_K):
                at = block * Q6_K
                step = half(halves[(at + 208) >> 1])
                for side in range(2):
                    prefetch(row, at + 64 * side + AHEAD)
                    for part in range(2):
                        weights = _q6_k(row, at, step, side, part)
                        to = block * 256 + side * 128 + part * LANES
                        sums = plus(sums, weights[0], x, to, stride)
                        others = plus(others, weights[1], x, to + 32, stride)
                        sums = plus(sums, weights[2], x, to + 64, stride)
                        others = plus(others, weights[3], x, to + 96, stride)
            put(sums, others, y, r, o, ONE, stride)


@compiled
def _unpack_q6_k(blocks, codes, chunk, first, start, stop):
    for o in range(start, stop):
        row, halves, to = blocks[first + o], codes[first + o], chunk[o, 0]
        for block in range(len(row) // Q6_K):
            step = half(halves[(block * Q6_K + 208) >> 1])
            for side in range(2):
                for part in range(2):
                    weights = _q6_k(row, block * Q6_K, step, side, part)
                    i = block * 256 + side * 128 + part * LANES
                    store(to, i, weights[0])
                    store(to, i + 32, weights[1])
                    store(to, i + 64, weights[2])
                    store(to, i + 96, weights[3])


@compiled
def _q8_0(row, halves, block, side):
    """Sixteen weights of a Q8_0 block; a byte b is the number (b + 128) % 256 - 128."""
    byte = load_bytes(row, block * Q8_0 + 2 + side * LANES)
    levels = floats((byte + 128) & 255) - splat(np.float32(128))
    return levels * splat(half(halves[block * Q8_0 // 2]))


@compiled
def _dot_q8_0(blocks, codes, group, planes, y, start, stop):
    """y [rows, out], a vector of sixteen weights after the other."""
    stride = stride_of(planes, group)
    for o in range(start, stop):
        row, halves = blocks[o], codes[o]
        for r in range(0, len(planes), step_of(stride)):
            x, sums, others = planes[r, 0], nothing(), nothing()
            for block in range(len(row) // Q8_0):
                prefetch(row, block * Q8_0 + AHEAD)
                to = block * 32
                sums = plus(sums, _q8_0(row, halves, block, 0), x, to, stride)
                others = plus(others, _q8_0(row, halves, block, 1), x, to + LANES, stride)
            put(sums, others, y, r, o, ONE, stride)


@compiled
def _unpack_q8_0(blocks, codes, chunk, first, start, stop):
    for o in range(start, stop):
        row, halves = blocks[first + o], codes[first + o]
        for block in range(len(row) // Q8_0):
            for side in range(2):
                weights = _q8_0(row, halves, block, side)
                store(chunk[o, 0], block * 32 + side * LANES, weights)
