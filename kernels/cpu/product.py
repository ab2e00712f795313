"""Activations times a packed weight on the CPU, whatever its format: what all formats share.

1. `dequantize.gemm`: a few rows of the weight at full width, then torch's product.
2. `gemv` multiplies straight from the packed bytes: for a few rows of activations.
3. `gemm` unpacks a part of the weight by compiled code, for torch's product: for many.

A format hands over a `Packed`: its stored bytes, and two compiled functions that read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from numba import types
from torch import Tensor

from .native import kind_of, machine_code, words
from .scales import compiled
from .simd import LANES
from .threads import by_rows, run

# Weights unpacked at a time: 16 MiB of float32. Fewer rows of weights cost torch more.
CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the compiled functions see it.

    Args:
        shape: [out, in] of the weight.
        per_byte: codes that share a byte, and belong to neighboring inputs.
        operands: what both functions read: tensors, numbers and None.
        dot: (*operands, planes, y, start, stop) writes y[:, start:stop], the products of rows of
            activations (`dealt_inputs`) with some rows of weights.
        unpack: (*operands, chunk, first, start, stop) writes the weights of the rows
            first + start, ..., first + stop - 1, dealt as the inputs are, to chunk[start:stop].
        order: which column of the weight each stored column is, [in], if they are reordered.
    """

    shape: tuple[int, int]
    per_byte: int
    operands: tuple
    dot: Callable
    unpack: Callable
    order: Tensor | None = None

    @cached_property
    def ready(self) -> tuple[int, list[int]]:
        """`dot` as machine code, and its operands as the words that it reads."""
        kinds = (*map(kind_of, self.operands), types.float32[:, :, ::1], types.float32[:, ::1])
        return machine_code(self.dot, kinds), words(*self.operands)


def gemv(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product straight from the bytes; its time grows with every row of `x`.

    Args:
        x: activations on the CPU, floating point; the sums are float32.

    Raises ValueError as `dealt_inputs` does.
    """
    inputs, outputs = dealt_inputs(x, weight), weight.shape[0]
    y = inputs.new_empty(len(inputs), outputs)
    code, operands = weight.ready
    run(code, [*operands, *words(inputs, y)], outputs, inputs.numel() * outputs)
    return y.to(x.dtype)


def gemm(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product by torch, from rows of the weight that are unpacked a few at a time.

    Arguments as for `gemv`.
    """
    dealt, outputs = dealt_inputs(x, weight), weight.shape[0]
    inputs = dealt.flatten(1).T
    step = min(outputs, max(16, CHUNK_WEIGHTS // len(inputs)))
    # What no code stands for stays zero.
    chunk, y = dealt.new_zeros(step, *dealt.shape[1:]), dealt.new_empty(outputs, len(x))
    for first in range(0, outputs, step):
        count, operands = min(step, outputs - first), (*weight.operands, chunk, first)
        by_rows(weight.unpack, operands, count, count * len(inputs))
        torch.mm(chunk[:count].flatten(1), inputs, out=y[first : first + count])
    return y.T.to(x.dtype).contiguous()


def dealt_inputs(x: Tensor, weight: Packed) -> Float[Tensor, "rows per_byte bytes"]:
    """`x` [rows, in] dealt out to the codes that share a byte, float32.

    Plane j has what meets code j of every byte, so that an inner loop over bytes reads all its
    operands in order. Each plane is padded with zeros to whole vectors. Raises ValueError if `x`
    has not the inputs of the weight, or is not floating point on the CPU.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"product: x is {list(x.shape)}, weight is {list(weight.shape)}")
    if not (x.is_cpu and x.is_floating_point()):
        raise ValueError(f"product: x is {x.dtype} on {x.device}, need floating point on the CPU")
    x = x if weight.order is None else x[:, weight.order]
    x = x.detach().float().contiguous().resolve_neg()
    width = -(-x.shape[1] // (weight.per_byte * LANES)) * LANES
    if weight.per_byte == 1 and width == x.shape[1]:
        return x[:, None]
    dealt = x.new_empty(len(x), weight.per_byte, width)
    _deal(x.numpy(), dealt.numpy())
    return dealt


@compiled
def _deal(x, planes):
    per_byte = planes.shape[1]
    for r in range(len(planes)):
        for j in range(per_byte):
            inputs = max(0, (x.shape[1] - j + per_byte - 1) // per_byte)
            for i in range(inputs):
                planes[r, j, i] = x[r, i * per_byte + j]
            planes[r, j, inputs:] = 0
