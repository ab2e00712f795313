"""Which kernel multiplies activations by a quantized weight, and why not a faster one.

The order is: Triton on a GPU, numba on a CPU, and for everything else dequantize a few rows of the
weight at a time and leave the product to torch. All of them compute `x @ q.dequantize().T`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from ..grid import GRIDS, Grid
from ..qtensor import QTensor
from ..scheme import Scheme

# Weights dequantized at a time: 16 MiB of float32.
CHUNK_WEIGHTS = 1 << 22


def matmul(x: Float[Tensor, "*batch in"], q: QTensor) -> Float[Tensor, "*batch out"]:
    """The product `x @ q.dequantize().T` in the dtype of `x`, by the fastest kernel that fits.

    Args:
        x: activations, floating point, on the device of `q`.
        q: weight [out, in].

    Raises ValueError if shapes, dtype or devices do not match. Only the fallback has a gradient
    for `x`, so it runs where one is needed.

    >>> import qlib
    >>> q = qlib.quantize(torch.eye(4), "int8")
    >>> qlib.kernels.matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), q).round()
    tensor([[1., 2., 3., 4.]])
    """
    _check(x, q)
    rows = x.reshape(-1, x.shape[-1])
    if _why_not_triton(rows, q) is None:
        from . import w4a16_triton

        with torch.cuda.device(x.device):
            y = w4a16_triton.matmul(rows, q)
    elif _why_not_numba(rows, q) is None:
        from . import w4_numba

        y = w4_numba.matmul(rows, q)
    else:
        y = _dequantize_matmul(rows, q)
    return y.view(*x.shape[:-1], q.shape[0])


def explain(x: Float[Tensor, "*batch in"], q: QTensor) -> str:
    """The kernel that `matmul(x, q)` would run, and for each faster one why it does not apply.

    >>> import qlib
    >>> print(qlib.kernels.explain(torch.ones(2, 64), qlib.quantize(torch.ones(8, 64), "nf4")))
    dequantize in row chunks, then torch.matmul
    not triton: x is on the CPU
    not numba: the grid nf4 is not an integer grid of 4 or 8 bits
    """
    _check(x, q)
    rows = x.reshape(-1, x.shape[-1])
    no_triton = _why_not_triton(rows, q)
    if no_triton is None:
        rung = "gemv, one row" if len(rows) == 1 else f"gemm, {len(rows)} rows"
        return f"triton w4a16 ({rung})"
    no_numba = _why_not_numba(rows, q)
    if no_numba is None:
        from .w4_numba import GEMV_ROWS

        how = "straight from the bytes" if len(rows) <= GEMV_ROWS else "unpacked in chunks"
        return f"numba ({how}, {len(rows)} rows)\nnot triton: {no_triton}"
    last = "dequantize in row chunks, then torch.matmul"
    return f"{last}\nnot triton: {no_triton}\nnot numba: {no_numba}"
