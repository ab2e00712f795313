"""The kernel for every format and device: dequantize some rows of the weight, multiply, repeat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from qlib.double import DoubleQuant
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

# Weights dequantized at a time: 16 MiB of float32.
CHUNK_WEIGHTS = 1 << 22


def gemm(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """`x @ q.dequantize().T` in the dtype of `x`, without the whole weight at full width.

    Differentiable in `x`. A format whose rows are not independent is dequantized as a whole.
    """
    pieces = row_chunks(q, max(1, CHUNK_WEIGHTS // q.shape[1]))
    return torch.cat([x @ piece.dequantize().to(x.dtype).T for piece in pieces], dim=1)


def input_gradient(gradient: Float[Tensor, "*batch out"], q: QTensor) -> Float[Tensor, "*batch in"]:
    """`gradient @ q.dequantize()`: what `x` in `x @ q.dequantize().T` gets for `gradient`."""
    pieces = list(row_chunks(q, max(1, CHUNK_WEIGHTS // q.shape[1])))
    gradients = gradient.split([piece.shape[0] for piece in pieces], dim=-1)
    return sum(g @ piece.dequantize().to(g.dtype) for g, piece in zip(gradients, pieces))


def row_chunks(q: QTensor, rows: int) -> Iterator[QTensor]:
    """`q` [out, in] as QTensors of at most `rows` rows each, views of the same bytes."""
    out, columns = q.shape
    # Blocks of doubly quantized scales do not end where rows do.
    whole = not isinstance(q.format, Scheme) or isinstance(q.format.scale, DoubleQuant)
    if whole or rows >= out:
        yield q
        return
    for start in range(0, out, rows):
        shape = (min(rows, out - start), columns)
        parts = {}
        for name, (_, size) in q.format.layout(shape).items():
            # A part that is shared by all rows (the scale of a tensor, a learned grid) has the
            # same layout for any number of them.
            shared = size == tuple(q.parts[name].shape)
            parts[name] = q.parts[name] if shared else q.parts[name][start : start + size[0]]
        yield QTensor(q.format, shape, parts)
