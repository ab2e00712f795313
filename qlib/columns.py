"""Columns: a scheme whose blocks run down the columns of a weight, across output channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .qtensor import QTensor
from .scheme import Layout, Scheme, checked


@dataclass(frozen=True)
class Columns:
    """`scheme` applied to the transposed weight: neighboring output channels share a scale.

    What the literature calls grouping along axis 0; a Scheme by itself groups along axis 1, the
    input. What is stored is the transposed weight.

    Args:
        scheme: cuts each column, instead of each row, into blocks.

    >>> import qlib, torch
    >>> weight = torch.tensor([[0.5, 70.0], [1.0, 10.0]])
    >>> Columns(qlib.format("int8-row")).quantize(weight).dequantize()
    tensor([[ 0.5039, 70.0112],
            [ 0.9999,  9.9229]])
    """

    scheme: Scheme

    def __str__(self) -> str:
        return f"{self.scheme}, down the columns"

    def quantize(
        self, weight: Float[Tensor, "out in"], importance: Tensor | None = None
    ) -> QTensor:
        """Round every weight to the nearest value that the format can store.

        Args:
            weight: [out, in]; importance: weight of each squared error, broadcastable to it.

        Raises ValueError for a weight that has no columns, and where `Scheme.quantize` does.
        """
        if importance is not None:
            importance = self.turn(importance.expand(weight.shape))
        return self.of(self.scheme.quantize(self.turn(checked(weight)), importance))

    def turn(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "in out"]:
        """The transposed weight, which `scheme` cuts into blocks. Raises ValueError if not 2-D."""
        self._turned(weight.shape)
        return weight.T.contiguous()

    def of(self, turned: QTensor) -> QTensor:
        """The weight whose transpose is `turned`, a QTensor of `scheme`."""
        return QTensor(self, self._turned(turned.shape), turned.parts)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "out in"]:
        """The weights that `parts` mean, float32."""
        return self.scheme.decode(parts, self._turned(shape)).T.contiguous()

    def layout(self, shape) -> Layout:
        """dtype and shape of every tensor that a weight of `shape` is stored as."""
        return self.scheme.layout(self._turned(shape))

    def nbytes(self, shape) -> int:
        """Bytes that a weight of `shape` will take, known before it is touched."""
        return self.scheme.nbytes(self._turned(shape))

    def _turned(self, shape) -> tuple[int, int]:
        if len(shape) != 2:
            raise ValueError(f"a weight {list(shape)} has no columns; Columns needs [out, in]")
        return (shape[1], shape[0])
