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

import numpy as np
import torch
from jaxtyping import Float
from numba import types
from torch import Tensor

from .native import kind_of, machine_code, words
from .scales import compiled
from .simd import LANES
from .sums import FOUR
from .threads import by_rows, run

# Weights unpacked at a time: 16 MiB of float32. Fewer rows of weights cost torch more.
CHUNK_WEIGHTS = 1 << 22
FLOATS2, FLOATS3 = types.float32[:, ::1], types.float32[:, :, ::1]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the compiled functions see it.

    Args:
        shape: [out, in] of the weight.
        per_byte: codes that share a byte, and belong to neighboring inputs.
        operands: what both functions read: tensors, numbers and None.
        dot: (*operands, group, planes, y, start, stop) writes y[:, start:stop], the products of
            rows of activations (`dealt_inputs`) with some rows of weights; `group` as in `sums`.
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
    def words(self) -> list[int]:
        """The operands as machine code reads them."""
        return words(*self.operands)

    @cached_property
    def of_one(self) -> int:
        """`dot` for rows of activations one by one, as machine code."""
        return self._machine_code(None)

    @cached_property
    def of_four(self) -> int:
        """`dot` for rows of activations four by four, as machine code."""
        return self._machine_code(FOUR)

    def _machine_code(self, group: np.int64 | None) -> int:
        kinds = (*map(kind_of, (*self.operands, group)), FLOATS3, FLOATS2)
        return machine_code(self.dot, kinds)


def gemv(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product straight from the bytes, which are unpacked again for every row of `x`, or from
    three rows on, for every four.

    Args:
        x: activations on the CPU, floating point. The sums are float32, in an order that is
            another for one row than for four.

    Raises ValueError as `dealt_inputs` does.
    """
    # A fourth row of zeros costs less than to unpack three times.
    few = len(x) < FOUR - 1
    inputs, outputs = dealt_inputs(x, weight, 1 if few else int(FOUR)), weight.shape[0]
    y = inputs.new_empty(len(inputs), outputs)
    code, group = (weight.of_one, None) if few else (weight.of_four, FOUR)
    operands = [*weight.words, *words(group, inputs, y)]
    run(code, operands, outputs, inputs.numel() * outputs)
    return y[: len(x)].to(x.dtype)


def gemm(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """The product by torch, from rows of the weight that are unpacked a few at a time.

    Arguments as for `gemv`.
    """
    dealt, outputs = dealt_inputs(x, weight), weight.shape[0]
    inputs = dealt.flatten(1).T
    step = max(1, min(outputs, max(16, CHUNK_WEIGHTS // max(1, len(inputs)))))
    # What no code stands for stays zero.
    chunk, y = dealt.new_zeros(step, *dealt.shape[1:]), dealt.new_empty(outputs, len(x))
    for first in range(0, outputs, step):
        count, operands = min(step, outputs - first), (*weight.operands, chunk, first)
        by_rows(weight.unpack, operands, count, count * len(inputs))
        torch.mm(chunk[:count].flatten(1), inputs, out=y[first : first + count])
    return y.T.to(x.dtype).contiguous()


def dealt_inputs(x: Tensor, weight: Packed, group: int = 1) -> Float[Tensor, "rows per_byte bytes"]:
    """`x` [rows, in] dealt out to the codes that share a byte, float32.

    Plane j has what meets code j of every byte, so that an inner loop over bytes reads all its
    operands in order. Each plane is padded with zeros to whole vectors, and the rows to a multiple
    of `group`. Raises ValueError if `x` has not the inputs of the weight, or is not floating point
    on the CPU.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"product: x is {list(x.shape)}, weight is {list(weight.shape)}")
    if not (x.is_cpu and x.is_floating_point()):
        raise ValueError(f"product: x is {x.dtype} on {x.device}, need floating point on the CPU")
    x = x if weight.order is None else x[:, weight.order]
    x = x.detach().float().contiguous().resolve_neg()
    width = -(-x.shape[1] // (weight.per_byte * LANES)) * LANES
    if weight.per_byte == 1 and width == x.shape[1] and len(x) % group == 0:
        return x[:, None]
    dealt = x.new_empty(-(-len(x) // group) * group, weight.per_byte, width)
    _deal(x.numpy(), dealt.numpy())
    return dealt


@compiled
def _deal(x, planes):
    per_byte = planes.shape[1]
    for r in range(len(x)):
        for j in range(per_byte):
            inputs = max(0, (x.shape[1] - j + per_byte - 1) // per_byte)
            for i in range(inputs):
                planes[r, j, i] = x[r, i * per_byte + j]
            planes[r, j, inputs:] = 0
    planes[len(x) :] = 0
