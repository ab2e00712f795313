"""Which kernel multiplies by which quantized tensor."""

from __future__ import annotations

from torch import Tensor


def matmul(x: Tensor, q) -> Tensor:
    """x @ q.dequantize().T."""
    return x @ q.dequantize().to(x.dtype).T
