"""Q2_K to Q6_K: 256 weights, cut into sub-blocks whose scales are themselves quantized.

A weight is d * scale * code - dmin * min (Q2_K, Q4_K, Q5_K) or d * scale * code with signed codes
(Q3_K, Q6_K). Scales and mins are small integers; d and dmin are float16. Q8_K is what llama.cpp
quantizes activations to before it multiplies them with these. [n] counts bytes:

Q2_K  scales[16] qs[64] d dmin             sub-blocks of 16; a scale is min << 4 | scale
Q3_K  hmask[32] qs[64] scales[12] d        16; code - 4, scale - 32
Q4_K  d dmin scales[12] qs[128]            32
Q5_K  d dmin scales[12] qh[32] qs[128]     32
Q6_K  ql[128] qh[64] scales[16] d          16; code - 32, int8 scales
Q8_K  d (float32) qs[256] bsums[32]        int8 codes and the int16 sums of each 16

Bits, least significant last. The codes of a block lie in 8 runs of 32, a ... h:

nibbles, Q4_K and Q5_K: byte i of a 32    b[i] a[i]      then d c, f e, h g
nibbles, Q6_K                             c[i] a[i]      then d b, g e, h f
crumbs, Q2_K, Q3_K and the qh of Q6_K     d[i] c[i] b[i] a[i]    then h g f e
bits, hmask of Q3_K and qh of Q5_K        h[i] g[i] ... a[i]
"""

from __future__ import annotations

import numpy as np

from . import search
from .block import TYPES, BlockFormat
from .legacy import half

BLOCK = 256
# fit_affine's trials where an importance is given.
WEIGHTED = (-0.9, 0.05, 36)
SHIFTS = np.arange(8, dtype=np.uint8)[:, None]


def write_q2_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    w = None if importance is None else weights(x, importance, 16, 1)
    values = search.columns(x, 16)
    if w is None:
        fitted = search.fit_affine(values, np.abs(values), 3, (-0.5, 0.1, 15), absolute=True)
    else:
        fitted = search.fit_affine(values, w, 3, WEIGHTED)
    d, dmin, scales, mins, codes = store_affine(values, w, *fitted, 3, 15)
    return joined(x, scales | mins << 4, to_crumbs(codes), d, dmin)


def write_q4_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, dmin, scales, mins, codes = affine_32(x, importance, 15, (-1, 0.1, 20))
    return joined(x, d, dmin, to_six_bits(scales, mins), to_nibbles(codes, 32))


def write_q5_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, dmin, scales, mins, codes = affine_32(x, importance, 31, (-0.5, 0.1, 15))
    six = to_six_bits(scales, mins)
    return joined(x, d, dmin, six, to_bits(codes >> 4), to_nibbles(codes, 32))


def affine_32(x: np.ndarray, importance: np.ndarray | None, top: int, trials: tuple):
    """What Q4_K and Q5_K share: codes to `top` in sub-blocks of 32; see `store_affine`."""
    values = search.columns(x, 32)
    if importance is None:
        plain = np.sqrt(search.total(values * values) / np.float32(32)) + np.abs(values)
        fitted = search.fit_affine(values, plain, top, trials)
        return store_affine(values, None, *fitted, top, 63)
    w = weights(x, importance, 32, 2)
    return store_affine(values, w, *search.fit_affine(values, w, top, WEIGHTED), top, 63)


def weights(x: np.ndarray, importance: np.ndarray, n: int, times: int) -> np.ndarray:
    """importance * sqrt(times * mean of squares + x * x), in columns of n."""
    blocks = x.reshape(-1, BLOCK)
    squares = blocks * blocks
    sums = np.add.accumulate(squares, axis=1)[:, -1:] * np.float32(times / BLOCK)
    return search.columns(importance.reshape(-1, BLOCK) * np.sqrt(sums + squares), n)


def store_affine(values, w, scale, depth, codes, top: int, scale_top: int):
    """Quantize scales and mins of fitted sub-blocks, then round the weights under what is stored.

    Args:
        values: float32 [n, sub-blocks]; w: their weights if there is an importance.
        scale, depth, codes: what `search.fit_affine` found.
        top, scale_top: the largest code and the largest stored scale.

    Returns d and dmin float16 [blocks, 1], scales and mins uint8 [blocks, 256 / n] and codes uint8
    [blocks, 256].
    """
    count = BLOCK // len(values)
    sums = None if w is None else search.columns(search.total(w), count)
    d, scales = shared(search.columns(scale, count), sums, scale_top)
    dmin, mins = shared(search.columns(depth, count), sums, scale_top)
    step, offset = ((f.astype(np.float32) * i).ravel() for f, i in ((d, scales), (dmin, mins)))
    again = search.to_levels((values + offset) / step, 0, top)
    # Without a scale, as of values below all float16, the codes of the search stay.
    again[:, step == 0] = codes[:, step == 0]
    return d, dmin, scales, mins, rows(again, BLOCK)


def shared(parts: np.ndarray, sums: np.ndarray | None, top: int) -> tuple[np.ndarray, np.ndarray]:
    """parts [n, blocks] ~ d * i: float16 d [blocks, 1] and integers i to `top`, [blocks, n]."""
    if sums is None:
        # Minus zero, the depth of a block without negative values, is stored as zero.
        peak = parts.max(0) + np.float32(0)
        inverse = np.where(peak > 0, np.float32(top) / peak, 0)
        d, levels = peak / np.float32(top), search.to_levels(parts * inverse, 0, top)
    else:
        d, levels = search.fit_positive(parts, sums, top)
    return d[:, None].astype("<f2"), rows(levels, len(parts))


def write_q3_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    values = search.columns(x, 16)
    if importance is None:
        scale, codes = search.fit_signed_in_turn(values, 4)
        d, levels = shared_signed(search.columns(scale, 16), -32, 31)
        levels = np.where(d == 0, 0, levels + np.float32(32))
    else:
        w = weights(x, importance, 16, 2)
        scale, codes = search.fit_signed(values, w, 4)
        sums = search.columns(search.total(w), 16)
        d, levels = search.fit_signed(search.columns(scale, 16), sums, 32)
    d, scales = d[:, None].astype("<f2"), rows(levels, 16)
    codes = round_signed(values, d, scales.view(np.int8) - np.int8(32), codes, 4)
    six = (to_nibbles(scales, 8), to_crumbs(scales >> 4, 4))
    return joined(x, to_bits(codes >> 2), to_crumbs(codes & 3), *six, d)


def write_q6_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    values = search.columns(x, 16)
    w = values * values if importance is None else search.columns(importance, 16)
    scale, codes = search.fit_signed(values, w, 32)
    scale = search.columns(scale, 16)
    zero = np.abs(scale).max(0) < search.TINY
    d, levels = shared_signed(np.where(zero, 0, scale), -128, 127)
    d, scales = d[:, None].astype("<f2"), rows(levels, 16)
    codes = round_signed(values, d, scales.view(np.int8), codes, 32)
    codes[zero] = 0
    return joined(x, to_nibbles(codes, 64), to_crumbs(codes >> 4), scales, d)


def shared_signed(parts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """parts [k, blocks] ~ d * l, where the largest gets l = low; d is float32 [blocks]."""
    peak = search.largest(parts)
    inverse = np.float32(low) / peak
    levels = search.to_levels(parts * inverse, low, high)
    return np.where(peak == 0, 0, np.float32(1) / inverse), np.where(peak == 0, 0, levels)


def round_signed(values, d, scales, codes, n: int) -> np.ndarray:
    """uint8 codes [blocks, 256] of values [16, sub-blocks] under what is stored.

    `codes` of the search stay where the scale is 0.
    """
    step = (d.astype(np.float32) * scales).ravel()
    again = search.to_levels(values / step, -n, n - 1)
    again += np.float32(n)
    again[:, step == 0] = codes[:, step == 0]
    return rows(again, BLOCK)


def write_q8_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """An importance changes nothing."""
    values = search.columns(x, BLOCK)
    d, levels = shared_signed(values, -127, 127)
    codes = rows(levels, BLOCK).view(np.int8)
    sums = codes.reshape(-1, 16, 16).sum(2, dtype="<i2")
    return joined(x, d[:, None].astype("<f4"), codes, sums)


def rows(levels: np.ndarray, width: int) -> np.ndarray:
    """Levels in columns -> the same integers in rows of `width`, as uint8."""
    return np.ascontiguousarray(levels.astype(np.int8).T).view(np.uint8).reshape(-1, width)


def joined(x: np.ndarray, *fields: np.ndarray) -> np.ndarray:
    """The fields of each block, one after another: uint8 [rows of x, bytes]."""
    parts = [np.ascontiguousarray(field).view(np.uint8) for field in fields]
    return np.concatenate(parts, axis=1).reshape(len(x), -1)


def to_nibbles(codes: np.ndarray, run: int) -> np.ndarray:
    """Codes of 4 bits [blocks, n] -> bytes: a run gets the low nibbles, the next the high ones."""
    runs = codes.reshape(len(codes), -1, 2, run)
    return (runs[:, :, 0] & 15 | runs[:, :, 1] << 4).reshape(len(codes), -1)


def from_nibbles(qs: np.ndarray, run: int) -> np.ndarray:
    runs = qs.reshape(len(qs), -1, 1, run)
    return np.concatenate((runs & 15, runs >> 4), axis=2).reshape(len(qs), -1)


def to_crumbs(codes: np.ndarray, run: int = 32) -> np.ndarray:
    """Codes of 2 bits [blocks, n] -> bytes that hold one code of each of four runs."""
    a, b, c, d = codes.reshape(len(codes), -1, 4, run).transpose(2, 0, 1, 3)
    return (a | b << 2 | c << 4 | d << 6).reshape(len(codes), -1)


def from_crumbs(qs: np.ndarray, run: int = 32) -> np.ndarray:
    return (qs.reshape(len(qs), -1, 1, run) >> SHIFTS[::2] & 3).reshape(len(qs), -1)


def to_bits(codes: np.ndarray) -> np.ndarray:
    """Codes of 1 bit [blocks, 256] -> 32 bytes that hold one code of each of eight runs."""
    return np.bitwise_or.reduce(codes.reshape(-1, 8, 32) << SHIFTS, axis=1)


def from_bits(qh: np.ndarray) -> np.ndarray:
    return (qh[:, None] >> SHIFTS & 1).reshape(-1, BLOCK)


def to_six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """The scales of Q4_K and Q5_K. Low nibbles of the last four, pairwise, are bytes 8 to 11:

    bytes 0-3   scale i + 4: bits 5 4 | scale i: 6 bits
    bytes 4-7   min   i + 4: bits 5 4 | min   i: 6 bits
    bytes 8-11  min   i + 4: bits 3-0 | scale i + 4: bits 3-0
    """
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, mins)]
    return np.concatenate((*first, scales[:, 4:] & 15 | mins[:, 4:] << 4), axis=1)


def from_six_bits(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [blocks, 12] -> scales and mins, uint8 [blocks, 8]."""
    low, last = raw[:, :8].reshape(-1, 2, 4), raw[:, 8:]
    rest = low >> 6 << 4 | np.stack((last & 15, last >> 4), axis=1)
    both = np.concatenate((low & 63, rest), axis=2)
    return both[:, 0], both[:, 1]


def affine(codes, step, offset, out: np.ndarray) -> None:
    """out = step * code - offset, with a step and an offset for each sub-block."""
    step, offset = step[:, :, None], offset[:, :, None]
    shape = (*step.shape[:2], -1)
    blocks = out.reshape(shape)
    np.multiply(codes.reshape(shape), step, out=blocks)
    blocks -= offset


def read_q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales = blocks[:, :16]
    step, offset = half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4)
    affine(from_crumbs(blocks[:, 16:80]), step, offset, out)


def read_q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, mins = from_six_bits(blocks[:, 4:16])
    codes = from_nibbles(blocks[:, 16:144], 32)
    affine(codes, half(blocks, 0) * scales, half(blocks, 2) * mins, out)


def read_q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, mins = from_six_bits(blocks[:, 4:16])
    codes = from_nibbles(blocks[:, 48:176], 32) | from_bits(blocks[:, 16:48]) << 4
    affine(codes, half(blocks, 0) * scales, half(blocks, 2) * mins, out)


def read_q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    six = from_nibbles(blocks[:, 96:104], 8) | from_crumbs(blocks[:, 104:108], 4) << 4
    codes = from_crumbs(blocks[:, 32:96]) | from_bits(blocks[:, :32]) << 2
    signed(codes, 4, half(blocks, 108) * (six.view(np.int8) - np.int8(32)), out)


def read_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = from_nibbles(blocks[:, :128], 64) | from_crumbs(blocks[:, 128:192]) << 4
    signed(codes, 32, half(blocks, 208) * blocks[:, 192:208].view(np.int8), out)


def signed(codes: np.ndarray, zero: int, step: np.ndarray, out: np.ndarray) -> None:
    """out = step * (code - zero), with a step for each sub-block of 16."""
    levels = codes.view(np.int8) - np.int8(zero)
    np.multiply(levels.reshape(-1, 16, 16), step[:, :, None], out=out.reshape(-1, 16, 16))


def read_q8_k(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 4:260].view(np.int8), blocks[:, :4].view("<f4"), out=out)


_FUNCTIONS = {
    "Q2_K": (write_q2_k, read_q2_k),
    "Q3_K": (write_q3_k, read_q3_k),
    "Q4_K": (write_q4_k, read_q4_k),
    "Q5_K": (write_q5_k, read_q5_k),
    "Q6_K": (write_q6_k, read_q6_k),
    "Q8_K": (write_q8_k, read_q8_k),
}
FORMATS = {
    name.lower(): BlockFormat(TYPES[name], write, read)
    for name, (write, read) in _FUNCTIONS.items()
}
