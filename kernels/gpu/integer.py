"""Integer codes of 2 to 8 bits with 16-bit activations (W4A16 and its kind): how a tile decodes.

The stored bytes are read as they are: a row is a little-endian stream of bits, and 32 codes fill
as many words of 32 bits as a code has bits (where a row is not whole words, 8 codes and bytes).
Codes of 2, 4 and 8 bits never cross the end of a word; of the other widths some do, and are put
together from two neighbors.

No instruction converts a code to floating point. Its bits become the highest bits of the mantissa
of a float32 between 1 and 2, so that 2**bits * (that - 1) is the code, and one multiply-add
applies the scale, takes off the 1, and applies the zero point or the offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlib.grid import Grid
from qlib.qtensor import QTensor
from qlib.reordered import Reordered
from qlib.scheme import Scheme

from .product import Packed, words
from .scales import FLOATS, rescaled, units

# The exponent of 1.0 in float32. The kernel takes it as an argument and shifts it into place: with
# two constants (code & mask) | one would be two instructions, with one known late it is one.
BIAS = 127


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot read `q`, or None if they can."""
    scheme = q.format.scheme if isinstance(q.format, Reordered) else q.format
    if not isinstance(scheme, Scheme):
        return f"{type(scheme).__name__} is not a Scheme"
    integers = {f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")}
    if scheme.grid.name not in integers or not scheme.is_standard:
        return f"the grid {scheme.grid.name} is not an integer grid of 2 to 8 bits"
    if type(scheme.block) is int and scheme.block % 16:
        return f"blocks of {scheme.block} are not a multiple of 16"
    if scheme.scale not in FLOATS:
        return "the scale is not float16, bfloat16 or float32"
    return _why_not_offset(scheme)


def _why_not_offset(scheme: Scheme) -> str | None:
    offset, bits = scheme.offset, scheme.grid.bits
    if isinstance(offset, Grid) and offset.name not in (f"int{bits}", f"uint{bits}"):
        return f"the zero point is stored as {offset.name}, not in {bits} bits"
    if offset is None or isinstance(offset, Grid) or offset in FLOATS:
        return None
    return "the offset is not an integer zero point, float16, bfloat16 or float32"


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`, if `why_not(q)` is None."""
    order = q.parts["order"][0] if isinstance(q.format, Reordered) else None
    scheme = q.format if order is None else q.format.scheme
    (outputs, inputs), bits = q.shape, scheme.grid.bits
    (codes, word, row_words), scale = words(q.parts["codes"]), q.parts["scale"].contiguous()
    stored = isinstance(scheme.offset, Grid)
    offset = q.parts.get("zero_point" if stored else "offset", scale).contiguous()
    block = scheme.block if type(scheme.block) is int else 0
    strides = tuple(0 if len(part) == 1 else part.shape[1] for part in (scale, offset))
    zero = int(scheme.offset.min - scheme.grid.min if stored else -scheme.grid.min)
    kind = "none" if scheme.offset is None else "zero" if stored else "offset"
    parts = (codes, scale, offset, row_words, *strides, inputs, BIAS)
    return Packed((outputs, inputs), parts, decode, (bits, word, block, kind, zero), 1024, order)


@triton.jit
def decode(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights of the rows `n` and the inputs k, ..., k + BLOCK_K - 1, as `Packed` asks for."""
    codes, scale, offset, row_words, scale_stride, offset_stride, inputs, bias = parts
    BITS: tl.constexpr = OPTIONS[0]
    values = _mantissas(codes, n, outputs, k, row_words, bias << 23, BITS, OPTIONS[1], BLOCK_K)
    # A unit is no more than a thread decodes, so that it loads its own scale and waits for none.
    OWN: tl.constexpr = min(32 if BITS & (BITS - 1) else 128 // BITS, BLOCK_K)
    row, block, inside = units(n, outputs, k, inputs, OPTIONS[2], OWN, BLOCK_K)
    s = tl.load(scale + row * scale_stride + block, inside, other=0.0).to(tl.float32)
    if OPTIONS[3] == "offset":
        add = tl.load(offset + row * offset_stride + block, inside, other=0.0).to(tl.float32)
        add -= s * (OPTIONS[4] + 2**BITS)
    else:
        zero = OPTIONS[4] + 2.0**BITS
        if OPTIONS[3] == "zero":
            zero += _zeros(offset + row * offset_stride, block, inside, BITS)
        add = -s * zero
    return rescaled(values, s * 2**BITS, add)


@triton.jit
def _mantissas(
    codes, n, outputs, k, row_words, one,
    BITS: tl.constexpr, WORD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 + code / 2**BITS of the same weights."""
    # A run of codes fills `WORDS` words: one, or as many as it takes to end where a word ends.
    WORDS: tl.constexpr = BITS if BITS & (BITS - 1) else 1
    RUN: tl.constexpr = WORD * WORDS // BITS
    first = (k // RUN + tl.arange(0, BLOCK_K // RUN)) * WORDS
    row = codes + n.to(tl.int64)[:, None] * row_words
    words = ()
    for i in tl.static_range(WORDS):
        inside = (n < outputs)[:, None] & (first + i < row_words)[None, :]
        words += (tl.load(row + (first + i)[None, :], inside).to(tl.uint32),)
    return _spread(words, one, 0, 1, RUN, BITS, WORD)


@triton.jit
def _spread(
    words, one, FIRST: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Codes FIRST, FIRST + STEP, ... of every run, each as a mantissa, in their order."""
    if STEP == RUN:
        return _mantissa(words, one, FIRST, BITS, WORD)
    else:
        even = _spread(words, one, FIRST, 2 * STEP, RUN, BITS, WORD)
        odd = _spread(words, one, FIRST + STEP, 2 * STEP, RUN, BITS, WORD)
        return tl.interleave(even, odd)


@triton.jit
def _mantissa(words, one, PLACE: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr):
    """1 + code / 2**BITS of the code at PLACE in a run."""
    AT: tl.constexpr = PLACE * BITS // WORD
    SHIFT: tl.constexpr = PLACE * BITS % WORD
    word = words[AT]
    if SHIFT + BITS > WORD:
        code = (word >> SHIFT | words[AT + 1] << (WORD - SHIFT)) << (23 - BITS)
    elif SHIFT + BITS > 23:
        code = word >> (SHIFT + BITS - 23)
    else:
        code = word << (23 - BITS - SHIFT)
    mask = (2**BITS - 1) << (23 - BITS)
    return (code & mask | one.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _zeros(row, block, inside, BITS: tl.constexpr):
    """Zero points, float32, out of as many bits as a code has."""
    at, shift = block * BITS // 8, block * BITS % 8
    byte = tl.load(row + at, inside, other=0).to(tl.int32)
    if BITS & (BITS - 1):
        after = inside & (shift + BITS > 8)
        byte |= tl.load(row + at + 1, after, other=0).to(tl.int32) << 8
    return (byte >> shift & (2**BITS - 1)).to(tl.float32)
