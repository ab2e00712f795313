"""Rounding new tokens on a CPU, in one call: torch's two dozen take longer than the work itself.

Each block of a row gets the range from its smallest to its largest value, and the codes say where
in that range its values lie (`qlib.fit.own_range`). What is stored is, byte for byte, what
the format itself would store: every step is the same float32 operation, in the same order.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numba import types
from torch import Tensor

from qlib.fit import own_range
from qlib.qtensor import Format

from .attention import why_not
from .scales import compiled
from .simd import half, half_bits
from .threads import machine_code, run, words

_codes, _halves = types.uint8[:, ::1], types.uint16[:, ::1]
KINDS = (types.float32[:, ::1], types.float32, _codes, _halves, _halves, types.int64[::1])
# All of these bits are set in a float16 that is not finite.
EXPONENT = np.uint16(0x7C00)
ONE, ZERO = np.float32(1), np.float32(0)


def rounded(x: Float[Tensor, "rows cols"], format: Format) -> dict[str, Tensor] | None:
    """The parts of `format.quantize(x)`, or None where that has to be called.

    Args:
        x: on the CPU, computed in float32.

    None is for formats without a kernel, and for what the format refuses: numbers that are not
    finite, scales and offsets that overflow a float16. Raises ValueError if x is not on the CPU.
    """
    if x.ndim != 2 or not x.is_floating_point() or why_not(format, x.shape[1]):
        return None
    if format.fit is not own_range or format.grid.min:
        return None
    x, bits, (rows, cols) = x.float().contiguous().resolve_neg(), format.grid.bits, x.shape
    codes = x.new_empty(rows, cols * bits // 8, dtype=torch.uint8)
    kept = x.new_empty(2, rows, cols // format.block, dtype=torch.int16)
    scale, offset = (part.view(torch.uint16) for part in kept)
    refused = x.new_zeros(1, dtype=torch.int64)
    operands = words(x, np.float32(2**bits - 1), codes, scale, offset, refused)
    run(_code(), operands, rows, x.numel())
    if refused.item():
        return None
    scale, offset = kept.view(torch.float16)
    return {"codes": codes, "scale": scale, "offset": offset}


@cache
def _code() -> int:
    return machine_code(_round, KINDS)


@compiled
def _round(x, last, codes, scale, offset, refused, start, stop):
    size = x.shape[1] // scale.shape[1]
    for r in range(start, stop):
        for b in range(scale.shape[1]):
            low = high = x[r, b * size]
            for i in range(b * size, b * size + size):
                low, high = min(low, x[r, i]), max(high, x[r, i])
                if x[r, i] != x[r, i]:
                    refused[0] = 1
            scale[r, b], offset[r, b] = _kept((high - low) / last), _kept(low)
            for bits in (scale[r, b], offset[r, b]):
                if bits & EXPONENT == EXPONENT:
                    refused[0] = 1
            step, origin = half(scale[r, b]), half(offset[r, b])
            # A block of equal values has the scale 0: any other codes it exactly.
            step = ONE if step == ZERO else step
            for i in range(b * size, b * size + size):
                code = np.uint8(np.rint(min(max((x[r, i] - origin) / step, ZERO), last)))
                if len(codes[r]) == x.shape[1]:
                    codes[r, i] = code
                elif i % 2:
                    codes[r, i // 2] |= code << 4
                else:
                    codes[r, i // 2] = code


@compiled
def _kept(number):
    """The bits of a float16. What is not zero stays at least the smallest one."""
    bits = half_bits(number)
    return bits | np.uint16(bits & 0x7FFF == 0 and number != ZERO)
