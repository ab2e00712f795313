"""Both sides in eight bits (W8A8): which operands the products of codes take, on CPU and GPU."""

from __future__ import annotations

from functools import lru_cache

import torch

from qlib.qtensor import Format, QTensor
from qlib.scheme import Scheme

GRIDS = ("int8", "e4m3")
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(x: QTensor, w: QTensor) -> str | None:
    """Why codes of `x` and `w` cannot be multiplied and their sums rescaled, or None if they can.

    Args:
        x: activations [rows, in]; w: weight [out, in].
    """
    return _why_not(x.format, w.format, tuple(x.shape), tuple(w.shape))


@lru_cache(maxsize=256)
def _why_not(x: Format, w: Format, x_shape: tuple, w_shape: tuple) -> str | None:
    for name, format in (("x", x), ("the weight", w)):
        if not isinstance(format, Scheme):
            return f"{name} is {type(format).__name__}, not a Scheme"
        if format.grid.name not in GRIDS or not format.is_standard or format.offset is not None:
            return f"{name} is {format}: not int8 or e4m3 without an offset"
        if format.block not in ("row", "tensor") or format.scale not in SCALES:
            return f"{name} is {format}: not one floating-point scale for a row or the tensor"
    if x.grid.name != w.grid.name:
        return f"x has {x.grid.name} codes, the weight {w.grid.name}"
    if len(x_shape) != 2 or len(w_shape) != 2 or x_shape[1] != w_shape[1]:
        return f"x is {list(x_shape)}, the weight {list(w_shape)}: inputs differ"
    return None
