"""Packed tokens: new ones are rounded to a format, which may fail, and then kept, which cannot.

Rounding looks at one token alone or, by channel, at one group of tokens, so what was packed earlier
never changes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..kernels.dispatch import missing
from ..qtensor import Format, QTensor
from .buffer import Buffer

Heads = Float[Tensor, "batch heads tokens head_dim"]


class Packed:
    """Rows of a format that grow: one row per token, or per channel and group of tokens.

    `parts` are the stored tensors [batch, heads, units, ...]. A unit is a token, whose part is one
    row; or a group, whose part is head_dim rows, one per channel.

    Raises ValueError for formats whose rows share something that depends on the data.
    """

    def __init__(self, format: Format, axis: str, like: Heads):
        self.format, self.head_dim = format, like.shape[3]
        self.group = format.block if axis == "channel" else 0
        self.buffers: dict[str, Buffer] = {}
        width = self.group or self.head_dim
        one, two = format.layout((1, width)), format.layout((2, width))
        names = [name for name in one if one[name][1] == two[name][1]]
        tries = (format.quantize(torch.full((1, width), x)).parts for x in (1.0, 3.0))
        first, second = ({name: parts[name] for name in names} for parts in tries)
        for name in names:
            if not torch.equal(first[name], second[name]):
                raise ValueError(f"{format}: all rows share {name!r}, so tokens cannot be added")
        self.shared = {name: part.to(like.device) for name, part in first.items()}

    def __len__(self) -> int:
        """Tokens."""
        units = len(next(iter(self.buffers.values()))) if self.buffers else 0
        return units * (self.group or 1)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed tensors [batch, heads, units, ...], without a copy."""
        return {name: buffer.view for name, buffer in self.buffers.items()}

    @property
    def nbytes(self) -> int:
        own = sum(buffer.nbytes for buffer in self.buffers.values())
        return own + sum(part.numel() * part.element_size() for part in self.shared.values())

    def rounded(self, x: Heads) -> dict[str, Tensor]:
        """The parts of new tokens, which are not kept yet; by channel they must be whole groups."""
        if self.group:
            x = x.unflatten(2, (-1, self.group)).transpose(-1, -2)
        parts = self._parts_of(x.flatten(0, -2).float())
        own = {name: part for name, part in parts.items() if name not in self.shared}
        return {n: part.reshape(*x.shape[:-1], *part.shape[1:]) for n, part in own.items()}

    def append(self, parts: dict[str, Tensor]) -> None:
        """Keep what `rounded` returned."""
        for name, units in parts.items():
            if name not in self.buffers:
                self.buffers[name] = Buffer(units)
            self.buffers[name].append(units)

    def _parts_of(self, rows: Tensor) -> dict[str, Tensor]:
        if rows.device.type == "cpu" and not missing("cpu"):
            from ..kernels.cpu.rounding import rounded

            if parts := rounded(rows, self.format):
                return parts
        return self.format.quantize(rows).parts

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for buffer in self.buffers.values():
            buffer.select(rows)

    def tensor(self) -> QTensor:
        """All packed tokens as the one quantized matrix that they are."""
        parts = {name: part.flatten(0, 3 if self.group else 2) for name, part in self.parts.items()}
        rows = len(next(iter(parts.values())))
        return QTensor(self.format, (rows, self.group or self.head_dim), parts | self.shared)

    def read(self) -> Heads:
        """All packed tokens, float32."""
        batch, heads = next(iter(self.parts.values())).shape[:2]
        x = self.tensor().dequantize()
        if not self.group:
            return x.view(batch, heads, -1, self.head_dim)
        x = x.view(batch, heads, -1, self.head_dim, self.group)
        return x.transpose(-1, -2).flatten(2, 3)
