"""Reordered: a scheme whose blocks are sets of columns that need not be neighbors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .qtensor import QTensor
from .scheme import Layout, Scheme, checked


@dataclass(frozen=True)
class Reordered:
    """`scheme` applied to the weight with its columns in another order, which is stored with it.

    GPTQ with act-order (arXiv 2210.17323, the authors' later code) takes the columns by falling
    activation and lets those that it takes together share a scale. The order belongs to one weight
    and not to the format: it is the part "order", int32 [1, in], by which `weight[:, order]` is
    what the scheme stores.

    Args:
        scheme: cuts each row of the reordered weight into blocks, of a number of columns.

    Raises ValueError if the blocks are whole rows or the whole weight, which have no order.

    >>> import qlib
    >>> format = Reordered(qlib.format("int8-g2"))
    >>> weight = torch.tensor([[1.0, 50.0, 0.5, 100.0]])
    >>> format.quantize(weight, order=torch.tensor([0, 2, 1, 3])).dequantize()
    tensor([[  0.9999,  49.6187,   0.5039, 100.0249]])
    """

    scheme: Scheme

    def __post_init__(self):
        if type(self.scheme.block) is not int:
            raise ValueError(f"a block {self.scheme.block!r} holds the same columns in any order")

    def __str__(self) -> str:
        return f"{self.scheme}, columns reordered"

    def quantize(
        self,
        weight: Float[Tensor, "out in"],
        importance: Tensor | None = None,
        order: Int[Tensor, " in"] | None = None,
    ) -> QTensor:
        """Round every weight to the nearest value that the format can store.

        Args:
            weight: [out, in]; importance: weight of each squared error, broadcastable to it.
            order: the columns, block after block; by default as they are.

        Raises ValueError for an order that does not name every column once, and where
        `Scheme.quantize` does.
        """
        inner = self._columns(weight.shape)
        order = torch.arange(inner, device=weight.device) if order is None else order.view(-1)
        if not is_permutation(order, inner):
            raise ValueError(f"order must name each of the {inner} columns of the weight once")
        if importance is not None:
            importance = importance.expand(weight.shape)[:, order.long()]
        return self.of(self.scheme.quantize(checked(weight)[:, order.long()], importance), order)

    def of(self, reordered: QTensor, order: Int[Tensor, " in"]) -> QTensor:
        """The weight of which `weight[:, order]` is `reordered`, a QTensor of `scheme`."""
        parts = {**reordered.parts, "order": order.to(torch.int32).view(1, -1)}
        return QTensor(self, reordered.shape, parts)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "out in"]:
        """The weights that `parts` mean, float32."""
        values = self.scheme.decode(parts, shape)
        return values[:, parts["order"][0].long().argsort()]

    def layout(self, shape) -> Layout:
        """dtype and shape of every tensor that a weight of `shape` is stored as."""
        return {**self.scheme.layout(shape), "order": (torch.int32, (1, self._columns(shape)))}

    def nbytes(self, shape) -> int:
        """Bytes that a weight of `shape` will take, known before it is touched."""
        return self.scheme.nbytes(shape) + 4 * self._columns(shape)

    def _columns(self, shape) -> int:
        if len(shape) != 2:
            raise ValueError(f"a weight {list(shape)} has no columns; Reordered needs [out, in]")
        return shape[1]


def is_permutation(order: Int[Tensor, "*shape"], n: int) -> bool:
    """Whether `order` holds each of 0, ..., n - 1 once."""
    return torch.equal(order.reshape(-1).sort().values.long(), torch.arange(n).to(order.device))
