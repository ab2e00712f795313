"""QTensor: a format, a shape, and the stored tensors, packed exactly as they lie in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Format(Protocol):
    """What a QTensor needs of its format. Scheme is one; codebook formats are others."""

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The weights that the stored tensors mean, float32."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """dtype and shape of every stored tensor."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of `shape` will take, known before it is touched."""
        return sum(dtype.itemsize * math.prod(size) for dtype, size in self.layout(shape).values())


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight.

    Args:
        format: how the parts are to be read (usually a Scheme).
        shape: shape of the weight that the parts stand for.
        parts: the stored tensors by name: "codes", "scale", "zero_point", "scale.codes", ...

    >>> import qlib
    >>> q = qlib.quantize(torch.ones(2, 256), "int4-g128")
    >>> q.nbytes, q.bits_per_weight        # 2 * (128 bytes of codes + 2 float16 scales)
    (264, 4.125)
    """

    format: Format
    shape: tuple[int, ...]
    parts: dict[str, Tensor]

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The weight that this tensor stands for, float32. Every kernel and file agrees with it."""
        return self.format.decode(self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / weights: padding, scales and learned codebooks all count."""
        return 8 * self.nbytes / math.prod(self.shape)

    def tobytes(self) -> bytes:
        """All parts in the order of the format's layout, little-endian, nothing between them."""
        names = self.format.layout(self.shape)
        tensors = (self.parts[name].detach().cpu().contiguous() for name in names)
        return b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)

    def to(self, device) -> QTensor:
        """The same tensor with its parts on `device`."""
        return QTensor(self.format, self.shape, {k: v.to(device) for k, v in self.parts.items()})

    def split(self, rows: Sequence[int]) -> list[QTensor]:
        """The tensor cut into pieces of so many rows each.

        Raises ValueError if its rows share a stored tensor, such as the scale of a whole matrix.
        """
        shared = [name for name, part in self.parts.items() if len(part) != self.shape[0]]
        if shared:
            raise ValueError(f"{self.format}: all rows share {shared[0]!r}, so they stay together")
        pieces = {name: part.split(list(rows)) for name, part in self.parts.items()}
        return [
            QTensor(self.format, (n, *self.shape[1:]), {k: p[i].clone() for k, p in pieces.items()})
            for i, n in enumerate(rows)
        ]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically: the parts as they are, the format as metadata."""
        from .files import native

        native.save_tensors(path, {"": self})

    @staticmethod
    def load(path: str | os.PathLike) -> QTensor:
        """Read what `save` wrote. Raises FormatError if the file is not exactly that."""
        from .files import native

        return native.load_tensors(path, [""])[""]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        size = f"{self.nbytes:,} bytes, {self.bits_per_weight:.4g} bpw"
        return f"QTensor({self.format}, {shape}, {size})"
