"""Errors of products with packed weights, what they may be, and a wrong weight to compare with."""

from __future__ import annotations

import torch

import qlib
from qlib.qtensor import QTensor


def randn(*shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(shape, format) -> QTensor:
    weight = randn(*shape, seed=100)
    weight.view(-1)[0] = 1.5  # so that a flipped first code is far off in every format
    return qlib.quantize(weight, format)


def error(x, q: QTensor, y) -> float:
    """Largest error of `y` as `x @ q.dequantize().T`."""
    return (y.double() - x.double() @ q.dequantize().double().T).abs().max().item()


def budget(x, q: QTensor) -> float:
    """Twice the largest error of torch's own product in that dtype, `x` and 64 more rows."""
    x = torch.cat([x.reshape(-1, x.shape[-1]), randn(64, x.shape[-1], dtype=x.dtype, seed=9)])
    return 2 * error(x, q, x @ q.dequantize().to(x.dtype).T)


def flip(q: QTensor) -> QTensor:
    """`q` with its first code changed as much as it can be."""
    name = "blocks" if "blocks" in q.parts else "codes"
    codes = q.parts[name].clone()
    if name == "blocks":
        codes[0, 16] ^= 0x88
    elif len(getattr(q.format.grid, "points", [])) == 3:
        codes[0, 0] = codes[0, 0] + 1 if codes[0, 0] % 3 < 2 else codes[0, 0] - 2
    else:
        codes[0, 0] ^= 1 << (q.format.grid.bits - 1)
    return QTensor(q.format, q.shape, {**q.parts, name: codes})
