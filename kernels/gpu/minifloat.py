"""Weights that are small floats (MXFP4, MXFP8, NVFP4, FP8), decoded by arithmetic on their bits.

A small float is a float32 with most bits left out. Its sign moves to the top, and its exponent and
mantissa to the place where those of a float32 meet: the bits then say the same number, but for the
difference of the two biases, a power of two that one multiplication makes good. Subnormal codes
become subnormals of float32, so the product is exact for them as well. No instruction for 8-bit
floats is needed: GPUs have them from compute capability 8.9 on.

    E2M1     s eem                        0.5 is the code 0001, a subnormal
    float32  s 000000ee m0000...          the same bits say 2^-127; times 2^126 it is 0.5

Scales are floats; E8M0 bytes, the exponent of a float32 as it is (but for 2^-127 and NaN); or E4M3
bytes that one float of the tensor multiplies, or divides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlib.grid import E4M3, E8M0, FP4_E2M1, FP8_E4M3, FP8_E5M2, FloatFormat
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

from .product import Packed, words
from .scales import FLOATS, rescaled, stored, units

FORMATS = {float.name: float for float in (FP4_E2M1, FP8_E4M3, FP8_E5M2)}


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot read `q`, or None if they can."""
    scheme = q.format
    if not isinstance(scheme, Scheme):
        return f"{type(scheme).__name__} is not a Scheme"
    if scheme.grid.name not in FORMATS or not scheme.is_standard:
        return f"the grid {scheme.grid.name} is not e2m1, e4m3 or e5m2"
    if type(scheme.block) is int and scheme.block % 16:
        return f"blocks of {scheme.block} are not a multiple of 16"
    if scheme.offset is not None:
        return "the weights have an offset"
    if kind(scheme.scale) is None:
        return "the scale is not float16, bfloat16, float32, e8m0, or e4m3 in units of one float"
    return None


def kind(scale) -> str | None:
    """How the scale of a Scheme is stored: "float", "e8m0", "e4m3", "e4m3 over" (a divisor)."""
    if scale in FLOATS:
        return "float"
    if scale == E8M0:
        return "e8m0"
    if not isinstance(scale, Scheme) or scale.grid != E4M3 or scale.offset is not None:
        return None
    if scale.block != "tensor":
        return None
    divides = isinstance(scale.scale, Divisor)
    dtype = scale.scale.dtype if divides else scale.scale
    return ("e4m3 over" if divides else "e4m3") if dtype in FLOATS else None


def packed(q: QTensor) -> Packed:
    """`q` [out, in] for `product`, if `why_not(q)` is None."""
    # Codes that a product loads 16 bytes at a time have to be words of memory.
    codes, word, row_words = words(q.parts["codes"])
    scale, stride, block = stored(q)
    options = (word, *layout(FORMATS[q.format.grid.name]), kind(q.format.scale), block)
    parts = (codes, scale, row_words, stride, q.shape[1])
    # Two levels of scales for every 16 weights take many registers.
    unroll = 1 if block == 16 else 2
    return Packed(tuple(q.shape), parts, decode, options, 1024, unroll=unroll)


def layout(float: FloatFormat) -> tuple[int, int, int, float]:
    """(bits, mantissa bits, bias, the magnitude from which on codes mean infinity or NaN, or 0)."""
    special = {"none": 0.0, "nan": float.max * 15 / 14, "ieee": 2.0 ** (float.bias + 1)}
    return float.bits, float.mantissa, float.bias, special[float.specials]


@triton.jit
def decode(parts, n, outputs, k, OPTIONS: tl.constexpr, BLOCK_K: tl.constexpr):
    codes, scale, row_words, stride, inputs = parts
    RUN: tl.constexpr = OPTIONS[0] // OPTIONS[1]
    j = k // RUN + tl.arange(0, BLOCK_K // RUN)
    inside = (n < outputs)[:, None] & (j < row_words)[None, :]
    word = tl.load(codes + n.to(tl.int64)[:, None] * row_words + j[None, :], inside, other=0)
    values = _spread(word.to(tl.int32), 0, 1, RUN, OPTIONS[1], OPTIONS[2], OPTIONS[3], OPTIONS[4])
    row, block, inside = units(n, outputs, k, inputs, OPTIONS[6], BLOCK_K, BLOCK_K)
    return rescaled(values, _scales(scale, row * stride + block, inside, OPTIONS[5]))


@triton.jit
def _spread(
    word, FIRST: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Codes FIRST, FIRST + STEP, ... of every word, which holds RUN of them, in their order."""
    if STEP == RUN:
        return widened(word << (32 - BITS - BITS * FIRST), BITS, MANTISSA, BIAS, SPECIAL)
    else:
        even = _spread(word, FIRST, 2 * STEP, RUN, BITS, MANTISSA, BIAS, SPECIAL)
        odd = _spread(word, FIRST + STEP, 2 * STEP, RUN, BITS, MANTISSA, BIAS, SPECIAL)
        return tl.interleave(even, odd)


@triton.jit
def widened(
    top, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SPECIAL: tl.constexpr
):
    """The values, float32, of the codes in the highest bits of `top`, int32."""
    # The shift repeats the sign, so that one mask keeps it and the other bits of the code.
    MASK: tl.constexpr = (2 ** (BITS - 1) - 1 << 23 - MANTISSA) - 2**31
    bits = top >> (9 - BITS + MANTISSA) & MASK
    values = bits.to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
    if SPECIAL > 0:
        # An exponent of all ones: infinity if the mantissa is zero, else NaN.
        special = (bits | 0x7F800000).to(tl.float32, bitcast=True)
        values = tl.where(tl.abs(values) >= SPECIAL, special, values)
    return values


@triton.jit
def _scales(parts, at, inside, KIND: tl.constexpr):
    stored = tl.load(parts[0] + at, inside, other=0)
    if KIND == "float":
        return stored.to(tl.float32)
    elif KIND == "e8m0":
        # Exponent 0 is 2^-127, a subnormal of float32; 255 is NaN, not infinity.
        end = (stored == 0) | (stored == 255)
        bits = stored.to(tl.uint32) << 23 | tl.where(end, 0x400000, 0)
        return bits.to(tl.float32, bitcast=True)
    else:
        blocks = widened(stored.to(tl.int32) << 24, 8, 3, 7, 480.0)
        whole = tl.load(parts[1]).to(tl.float32)
        return tl.div_rn(blocks, whole) if KIND == "e4m3 over" else blocks * whole
