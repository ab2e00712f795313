"""Both sides in eight bits (W8A8) on a CPU: y[m, n] = x.scale[m] * w.scale[n] * codes times codes.

torch has the integer product, `torch._int_mm`, but it does not always compute it: where the
processor has no instruction that sums bytes in 32 bits (VNNI and its kin), oneDNN sums pairs in 16
bits, which overflow, and one input or the stride of a single row give wrong numbers (pytorch
issues 136746 and 195066). So it is tried once on codes that would overflow, and where it fails,
floats do the work: sums of 1024 products of bytes are integers up to 2^24, which float32 holds.

The weight's bytes, code + 128, are multiplied as they are stored; 128 times the sum of a row of
activations is then too much, and is taken off.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from qlib.qtensor import QTensor

from ..eight_bits import why_not

# 1024 products of magnitude up to 2^14 have a sum of magnitude up to 2^24.
EXACT_IN_FLOAT32 = 1024
# Up to here a sum of products of 255 and -128 fits in int32.
INT32_INPUTS = (1 << 31) // (255 * 128)


def scaled_product(x: QTensor, w: QTensor, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    """`x.dequantize() @ w.dequantize().T`, from int8 codes by integers, rescaled once.

    Args:
        x: activations [rows, in], int8 or E4M3 codes with one scale for a row (dynamic) or for the
            tensor (static).
        w: weight [out, in] with codes of the same kind.
        dtype: of the result; scales are multiplied in float32.

    Raises ValueError with the reason of `why_not`.
    """
    if reason := why_not(x, w):
        raise ValueError(f"scaled_product: {reason}")
    if w.format.grid.name == "e4m3":
        return (x.dequantize() @ w.dequantize().T).to(dtype)
    sums = code_product((x.parts["codes"] ^ 128).view(torch.int8), w.parts["codes"])
    scales = x.parts["scale"].float() * w.parts["scale"].float().T
    return (sums.float() * scales).to(dtype)


def code_product(x: Int8[Tensor, "rows in"], w: UInt8[Tensor, "out in"]) -> Int[Tensor, "rows out"]:
    """x @ (w - 128).T, exactly: int32, or int64 where a sum might not fit.

    Raises ValueError if that is not what `x` and `w` are.
    """
    if (x.dtype, w.dtype) != (torch.int8, torch.uint8) or x.shape[1:] != w.shape[1:] or x.ndim != 2:
        got = f"{x.dtype} {list(x.shape)} and {w.dtype} {list(w.shape)}"
        raise ValueError(f"code_product: got {got}, need int8 [rows, in] and uint8 [out, in]")
    inputs = x.shape[1]
    if 1 < inputs <= INT32_INPUTS and int_mm_is_exact():
        sums = torch._int_mm(_dense(w), _dense(x).T).T
        return sums - 128 * x.sum(1, keepdim=True, dtype=torch.int32)
    total = x.new_zeros(len(x), len(w), dtype=torch.int64)
    for start in range(0, inputs, EXACT_IN_FLOAT32):
        columns = slice(start, start + EXACT_IN_FLOAT32)
        total += (x[:, columns].float() @ (w[:, columns].float() - 128).T).long()
    return total


@cache
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` takes unsigned bytes here, and sums them without saturation.

    In 16 bits, a pair of these products overflows; zeros and ones would pass everywhere.
    """
    codes = torch.full((64, 64), 255, dtype=torch.uint8, device="cpu")
    try:
        sums = torch._int_mm(codes, torch.full_like(codes, 127, dtype=torch.int8))
    except RuntimeError:
        return False
    return bool((sums == 64 * 255 * 127).all())


def _dense(codes: Tensor) -> Tensor:
    """`codes` with the strides of a new tensor: `contiguous` leaves a single row's as they are, and
    oneDNN computes nothing if that stride is zero."""
    return codes.contiguous().as_strided(codes.shape, (codes.shape[1], 1))
