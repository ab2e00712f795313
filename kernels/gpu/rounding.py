"""Device functions that round as `qlib.grid` and `qlib.storage` do, bit for bit.

Three habits make that so:
- every division is the correctly rounded one (`tl.div_rn`); plain `/` is allowed two units of
  error, and torch on a GPU multiplies by the reciprocal of a number such as 127;
- a product is only added to where one of its factors is a power of two: in compiled code a * b + c
  is rounded once, in torch twice;
- exponents are read from the bits of a float32, not from its logarithm.

A grid is (mantissa bits, lowest exponent, largest value); without a mantissa, it is a range of
integers: (0, lowest, highest).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlib.grid import FLOATS, GRIDS

ELEMENTS = {f.name: (f.mantissa, 1 - f.bias, f.max) for f in FLOATS}
ELEMENTS = {name: ELEMENTS[name] for name in ("e2m1", "e4m3", "e5m2")}
ELEMENTS |= {n: (0, int(GRIDS[n].min), int(GRIDS[n].max)) for n in "int4 int8 uint4 uint8".split()}


@triton.jit
def power_of_two(bits, LARGEST: tl.constexpr):
    """(E8M0 byte, value) of 2^(floor(log2 amax) - floor(log2 LARGEST)), from the bits of amax."""
    largest = tl.full(bits.shape, LARGEST, tl.float32).to(tl.int32, bitcast=True)
    byte = tl.maximum((bits >> 23) - (largest >> 23) + 127, 0)
    byte = tl.where(bits < 0x7F800000, byte, 255)
    # Byte 0 is 2^-127, which float32 has only as a subnormal number.
    value = tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
    return byte.to(tl.uint8), value


@triton.jit
def nested(scale, of_tensor):
    """(E4M3 byte, value) of block scales in units of the tensor's scale."""
    code = float_code(tl.div_rn(scale, tl.where(of_tensor == 0, 1.0, of_tensor)), (3, -6, 448), 8)
    lost = (e4m3_value(code) * of_tensor == 0) & (scale > 0)
    # A scale that rounds to zero would erase its block: it becomes the value next to zero.
    code = tl.where(lost, 1, code)
    return code.to(tl.uint8), e4m3_value(code) * of_tensor


@triton.jit
def e4m3_value(code):
    """The bits in their place in a float32, whose exponent is then 120 too low."""
    return (code << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0


@triton.jit
def positive(scale, DTYPE: tl.constexpr):
    """`scale` in DTYPE; what rounds to zero and is not becomes the least number, with bits 1."""
    INTEGER: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    bits = scale.to(DTYPE).to(INTEGER, bitcast=True)
    return tl.maximum(bits, (scale > 0).to(INTEGER)).to(DTYPE, bitcast=True)


@triton.jit
def float_code(x, GRID: tl.constexpr, BITS: tl.constexpr):
    """Sign, exponent, mantissa of the nearest value, ties to the even code; the largest saturates.

    The spacing of the values around x is 2^(exponent - mantissa), down to the lowest exponent; in
    units of it x rounds to an integer, which counts codes from the start of its octave.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), GRID[2])
    octave = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127 - GRID[1], 0)
    unit = (127 + GRID[0] - GRID[1] - octave << 23).to(tl.float32, bitcast=True)
    code = (octave << GRID[0]) + rint(size * unit).to(tl.int32)
    return code | (bits >> 31 & 1) << BITS - 1


@triton.jit
def integer_code(x, zero, GRID: tl.constexpr):
    """The nearest integer that the grid has after `zero` is added, counted from its lowest."""
    x = tl.minimum(tl.maximum(x, GRID[1] - zero), GRID[2] - zero)
    return (rint(x) + zero - GRID[1]).to(tl.int32)


@triton.jit
def rint(x):
    """The nearest integer, ties to even, up to 2^22: next to 1.5 * 2^23 only integers exist."""
    return (x + 12582912.0) - 12582912.0
