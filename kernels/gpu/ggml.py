"""ggml's blocks as they lie in a GGUF file, with 16-bit activations: what a tile decodes to.

A row of weights is a run of blocks, and a block holds its scales among its codes. [n] counts bytes
from the start of the block, v is the place of a value in it:

Q4_0   d[2] qs[16]                             18   nibble v / 16 of byte v % 16
Q8_0   d[2] qs[32]                             34   byte v
Q4_K   d[2] dmin[2] scales[12] qs[128]         144  nibble v / 32 % 2 of byte 32 (v / 64) + v % 32
Q5_K   d[2] dmin[2] scales[12] qh[32] qs[128]  176  so, and above it bit v / 32 of qh[v % 32]
Q6_K   ql[128] qh[64] scales[16] d[2]          210  nibble v / 64 % 2 of 64 (v / 128) + v % 64, and
                                                    above it two bits of qh, as in TQ2_0
TQ2_0  qs[64] d[2]                             66   bits 2 (v / 32 % 4) of 32 (v / 128) + v % 32

A byte has a nibble of two runs of values, 16, 32 or 64 apart. Blocks of 144 and 176 bytes, whole
multiples of 16, are read as words of four bytes, four to a load; the others, multiples of 2, as
pairs. No instruction converts a code: its bits become the highest of the mantissa of a float from
1 to 2. All products are exact in float32, so the values are those of `qlib.ggml`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qlib.ggml import TYPES, BlockFormat
from qlib.qtensor import QTensor

from .product import Packed

# The bits of 1.0, an argument: with two constants, (code & mask) | one would be two instructions.
ONE = 0x3F800000


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`, if `why_not(q)` is None: its bytes, in three views."""
    raw, kind = q.parts["blocks"].contiguous(), q.format.kind
    words = raw.view(torch.float16 if kind.size % 4 else torch.int32)
    parts = (raw, raw.view(torch.float16), words, raw.shape[1], ONE)
    return Packed(tuple(q.shape), parts, DECODERS[kind.name], (), 256)


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot read `q`, or None if they can."""
    # A type of the same name with other sizes would be read beyond its end.
    known = [TYPES[name] for name in DECODERS]
    if isinstance(q.format, BlockFormat) and q.format.kind in known:
        return None
    return f"{q.format} is not one of ggml's {', '.join(DECODERS)}"


@triton.jit
def decode_q4_k(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    _, halves, words, row_bytes, one = parts
    block, inside = (n.to(tl.int64) * row_bytes + k // 256 * 144)[:, None], (n < outputs)[:, None]
    word = tl.load(words + block // 4 + 4 + _numbers(k, 4, 32, BLOCK_K), inside, other=0)
    codes = _runs(word, word >> 4, one, k, 4, 4, 32, BLOCK_K)
    return _affine(halves, words, block, inside, k, codes, 4, BLOCK_K)


@triton.jit
def decode_q5_k(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    _, halves, words, row_bytes, one = parts
    block, inside = (n.to(tl.int64) * row_bytes + k // 256 * 176)[:, None], (n < outputs)[:, None]
    i = _numbers(k, 4, 32, BLOCK_K)
    word = tl.load(words + block // 4 + 12 + i, inside, other=0)
    fifth = tl.load(words + block // 4 + 4 + i % 8, inside, other=0) >> (i // 8 * 2)
    low = word & 0x0F0F0F0F | (fifth & 0x01010101) << 4
    high = word >> 4 & 0x0F0F0F0F | (fifth & 0x02020202) << 3
    codes = _runs(low, high, one, k, 5, 4, 32, BLOCK_K)
    return _affine(halves, words, block, inside, k, codes, 5, BLOCK_K)


@triton.jit
def _affine(halves, words, block, inside, k, codes, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """d * scale * code - dmin * min; 32 values share a scale and a min of 6 bits each.

    Bytes 4 to 7 have the low 6 bits of four scales, and above these the high bits of the other
    four, whose low bits are the low nibbles of bytes 12 to 15. Mins: bytes 8 to 11, high nibbles.
    """
    j = (k % 256 // 32 + tl.arange(0, BLOCK_K // 32))[None, :]
    low = tl.load(words + block // 4 + 1, inside, other=0) >> j % 4 * 8
    lower = tl.load(words + block // 4 + 2, inside, other=0) >> j % 4 * 8
    rest = tl.load(words + block // 4 + 3, inside, other=0) >> j % 4 * 8
    scale = tl.where(j < 4, low & 63, rest & 15 | low >> 2 & 48).to(tl.float32)
    depth = tl.where(j < 4, lower & 63, rest >> 4 & 15 | lower >> 2 & 48).to(tl.float32)
    d = tl.load(halves + block // 2, inside, other=0.0).to(tl.float32)
    dmin = tl.load(halves + block // 2 + 1, inside, other=0.0).to(tl.float32)
    return (codes - 1) * _each(d * scale * 2**BITS, 32) - _each(dmin * depth, 32)


@triton.jit
def decode_q6_k(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    raw, halves, words, row_bytes, one = parts
    block, inside = (n.to(tl.int64) * row_bytes + k // 256 * 210)[:, None], (n < outputs)[:, None]
    low = _pairs(words + block // 2 + _numbers(k, 2, 64, BLOCK_K), inside)
    high = _crumbs(words + block // 2 + 64, inside, k, BLOCK_K)
    first = low & 0x0F0F | (high & 0x0303) << 4
    second = low >> 4 & 0x0F0F | high & 0x3030
    codes = _runs(first, second, one, k, 6, 2, 64, BLOCK_K)
    j = (k % 256 // 16 + tl.arange(0, BLOCK_K // 16))[None, :]
    scale = tl.load(raw + block + 192 + j, inside, other=0).to(tl.int8, bitcast=True)
    d = tl.load(halves + block // 2 + 104, inside, other=0.0).to(tl.float32)
    return (codes - 1.5) * _each(d * scale.to(tl.float32) * 64, 16)


@triton.jit
def decode_tq2_0(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    _, halves, words, row_bytes, one = parts
    block, inside = (n.to(tl.int64) * row_bytes + k // 256 * 66)[:, None], (n < outputs)[:, None]
    pairs = _crumbs(words + block // 2, inside, k, BLOCK_K)
    codes = _runs(pairs, pairs >> 4, one, k, 2, 2, 64, BLOCK_K)
    d = tl.load(halves + block // 2 + 32, inside, other=0.0).to(tl.float32)
    return codes * (4 * d) - 5 * d


@triton.jit
def _crumbs(words, inside, k, BLOCK_K: tl.constexpr):
    """Pairs of bytes: codes of values v are in bits 0 and 1, those of v + 64 in bits 4 and 5."""
    i = _numbers(k, 2, 64, BLOCK_K)
    return _pairs(words + i // 32 * 16 + i % 16, inside) >> (i // 16 % 2 * 2)


@triton.jit
def decode_q4_0(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    pairs, d = _thirty_twos(parts, n, outputs, k, 8, BLOCK_K)
    codes = _runs(pairs, pairs >> 4, parts[4], k, 4, 2, 16, BLOCK_K)
    return codes * (16 * d) - 24 * d


@triton.jit
def decode_q8_0(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    pairs, d = _thirty_twos(parts, n, outputs, k, 16, BLOCK_K)
    # With the sign bit turned over, -128 to 127 are 0 to 255.
    return _bytes(pairs ^ 0x8080, parts[4], 8, 2) * (256 * d) - 384 * d


@triton.jit
def _thirty_twos(parts, n, outputs, k, PAIRS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The codes of blocks of 32 values, PAIRS pairs of bytes after a d, and the d of each value."""
    halves, row_pairs = parts[1], parts[3] // 2
    row, inside = (n.to(tl.int64) * row_pairs)[:, None], (n < outputs)[:, None]
    block = ((k // 32 + tl.arange(0, BLOCK_K // 32)) * (PAIRS + 1))[None, :]
    d = tl.load(halves + row + block, inside & (block < row_pairs), other=0.0).to(tl.float32)
    i = tl.arange(0, BLOCK_K // 32 * PAIRS)[None, :]
    i = (k // 32 + i // PAIRS) * (PAIRS + 1) + 1 + i % PAIRS
    return _pairs(halves + row + i, inside & (i < row_pairs)), _each(d, 32)


@triton.jit
def _pairs(at, inside):
    return tl.load(at, inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _numbers(k, BYTES: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The numbers of the words of a block whose nibbles are the values of a tile, [1, words]."""
    first = tl.multiple_of(k % 256, BLOCK_K) // (2 * RUN) * (RUN // BYTES)
    if BLOCK_K <= RUN:
        first += k % RUN // BYTES
    return (first + tl.arange(0, max(BLOCK_K // 2, min(BLOCK_K, RUN)) // BYTES))[None, :]


@triton.jit
def _runs(
    first, second, one, k, BITS: tl.constexpr, BYTES: tl.constexpr, RUN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 + code / 2**BITS: RUN codes out of the bytes of `first`, RUN of `second`, and so on."""
    if BLOCK_K <= RUN:
        return _bytes(tl.where(k // RUN % 2 == 0, first, second), one, BITS, BYTES)
    else:
        both = tl.join(_bytes(first, one, BITS, BYTES), _bytes(second, one, BITS, BYTES))
        both = tl.reshape(both, [first.shape[0], BLOCK_K // 2 // RUN, RUN, 2])
        return tl.reshape(tl.permute(both, [0, 1, 3, 2]), [first.shape[0], BLOCK_K])


@triton.jit
def _bytes(words, one, BITS: tl.constexpr, BYTES: tl.constexpr):
    """1 + code / 2**BITS for the codes in the low bits of the bytes of `words`, lowest first."""
    even, odd = _byte(words, one, 0, BITS), _byte(words, one, 1, BITS)
    if BYTES == 4:
        even = tl.interleave(even, _byte(words, one, 2, BITS))
        odd = tl.interleave(odd, _byte(words, one, 3, BITS))
    return tl.interleave(even, odd)


@triton.jit
def _byte(words, one, i: tl.constexpr, BITS: tl.constexpr):
    SHIFT: tl.constexpr = 23 - BITS - 8 * i
    code = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
    return (code & ((2**BITS - 1) << (23 - BITS)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _each(part, TIMES: tl.constexpr):
    """[rows, parts] -> [rows, parts * TIMES]: every entry TIMES times."""
    wide = tl.broadcast_to(part[:, :, None], [part.shape[0], part.shape[1], TIMES])
    return tl.reshape(wide, [part.shape[0], part.shape[1] * TIMES])


DECODERS = {"Q4_0": decode_q4_0, "Q8_0": decode_q8_0, "TQ2_0": decode_tq2_0}
DECODERS |= {"Q4_K": decode_q4_k, "Q5_K": decode_q5_k, "Q6_K": decode_q6_k}
