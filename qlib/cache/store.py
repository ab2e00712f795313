"""Stores: the keys, or the values, of one layer, packed as they lie in memory.

A store has three parts, oldest tokens first: `sinks` in full precision, `packed` in a format, and
`recent`, the tokens that are not packed yet. A token moves to the right place once, and what is
packed is never touched again.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

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

    def append(self, x: Heads) -> None:
        """Round tokens and keep them; by channel they must be whole groups."""
        if self.group:
            x = x.unflatten(2, (-1, self.group)).transpose(-1, -2)
        parts = self.format.quantize(x.flatten(0, -2).float()).parts
        for name in parts.keys() - self.shared.keys():
            units = parts[name].reshape(*x.shape[:-1], *parts[name].shape[1:])
            self.buffers.setdefault(name, Buffer(units)).append(units)

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


class Store:
    """The keys or the values of one layer: sinks, packed tokens, recent tokens.

    Args:
        format: of the packed tokens, or None.
        axis, window, sinks, dtype: as in KVFormat.
        label: what messages call it, such as "layer 3: keys".
    """

    def __init__(self, format: Format | None, axis: str, window: int, sinks: int, dtype, label):
        self.format, self.axis, self.window, self.label = format, axis, window, label
        self.dtype, self.limit = dtype, sinks if format is not None else 0
        self.sinks = self.packed = self.recent = None

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    @property
    def nbytes(self) -> int:
        """Bytes in use of all stored tensors."""
        return sum(part.nbytes for part in self._parts())

    @property
    def parts(self) -> list[Buffer | Packed]:
        """Sinks, packed tokens, recent tokens, in this order: those of them that have any."""
        return [part for part in self._parts() if len(part)]

    def completes(self, tokens: int) -> bool:
        """Whether so many more tokens complete what is then packed by channel."""
        return self.axis == "channel" and self._due(len(self.recent) + tokens) > 0

    def append(self, x: Heads) -> None:
        """Keep tokens. No gradient flows through a store.

        Raises ValueError for other shapes than before, and for what cannot be rounded.
        """
        self._place(self._checked(x))

    def extend(self, x: Heads) -> Heads:
        """Append tokens and return all of them, as the queries of the same tokens read them.

        By token these read what is stored, themselves included. By channel they still read in full
        precision what they complete, as in KIVI: otherwise what a query reads would depend on
        how many tokens came with it. Raises what `append` raises.
        """
        x = self._checked(x)
        if self.axis == "token" or self.format is None:
            self._place(x)
            return self.read()
        seen = _joined([*self._read(), x])
        self._place(x)
        return seen

    def read(self) -> Heads:
        """All tokens as they are stored."""
        return _joined(self._read())

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order (beam search)."""
        for part in self._parts():
            part.select(rows)

    def _parts(self) -> list[Buffer | Packed]:
        return [part for part in (self.sinks, self.packed, self.recent) if part is not None]

    def _read(self) -> list[Heads]:
        parts = self.parts or [self.recent]
        return [part.read() if isinstance(part, Packed) else part.view for part in parts]

    def _place(self, x: Heads) -> None:
        first = self.limit - len(self.sinks)
        if first > 0:
            self.sinks.append(x[:, :, :first])
            x = x[:, :, first:]
        due = self._due(len(self.recent) + x.shape[2])
        old = self.recent.take(min(due, len(self.recent)))
        fresh = due - old.shape[2]
        if due:
            self.packed.append(torch.cat((old, x[:, :, :fresh]), dim=2))
        self.recent.append(x[:, :, fresh:])

    def _due(self, waiting: int) -> int:
        """How many of the tokens that are not packed are to be packed now."""
        if self.format is None:
            return 0
        if self.axis == "token":
            return max(0, waiting - self.window)
        residual = self.window or self.format.block
        return waiting // residual * residual

    def _checked(self, x: Heads) -> Heads:
        """`x` as it will be stored in full precision."""
        x = x.detach()
        stored = x.to(self.dtype or x.dtype)
        if self.recent is None:
            self._start(stored)
        have, want = list(x.shape), list(self.recent.data.shape)
        if have[:2] + have[3:] != want[:2] + want[3:]:
            want[2] = "n"
            raise ValueError(f"{self.label} {have} do not continue a cache of {want}")
        # Values that are kept as they arrive need no look; on a GPU it would be a wait.
        rounded = self.format is not None or stored.dtype != x.dtype
        if rounded and not bool(stored.isfinite().all()):
            self._refuse(x, stored.dtype)
        return stored

    def _start(self, like: Heads) -> None:
        if self.format is not None:
            try:
                self.packed = Packed(self.format, self.axis, like)
            except ValueError as error:
                raise ValueError(f"{self.label}: {error}") from error
        self.sinks, self.recent = Buffer(like), Buffer(like)

    def _refuse(self, x: Heads, dtype: torch.dtype) -> None:
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(f"{self.label} {list(x.shape)} hold {bad} NaN or infinite values")
        worst, name = x.abs().max().item(), str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{self.label}: a value of {worst:.3g} overflows {name}; use dtype=torch.float32"
        )


def _joined(parts: list[Heads]) -> Heads:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
