"""Stores: the keys, or the values, of one layer, packed as they lie in memory.

A store has three parts, oldest tokens first: `sinks` in full precision, `packed` in a format, and
`recent`, the tokens that are not packed yet. A token moves to the right place once, and what is
packed is never touched again.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..hadamard import hadamard
from ..qtensor import Format
from .buffer import Buffer, joined
from .packed import Heads, Packed


class New(NamedTuple):
    """What a store adds for new tokens, and how many of its recent ones go into `parts` too."""

    all: Heads
    sinks: Heads
    parts: dict[str, Tensor]
    recent: Heads
    leaving: int


class Store:
    """The keys or the values of one layer: sinks, packed tokens, recent tokens.

    Args:
        format: of the packed tokens, or None.
        axis, window, sinks, dtype: as in KVFormat.
        label: what messages call it, such as "layer 3: keys".
        rotate: whether tokens are stored in the Hadamard basis.
    """

    def __init__(
        self,
        format: Format | None,
        axis: str,
        window: int,
        sinks: int,
        dtype: torch.dtype | None,
        label: str,
        rotate: bool = False,
    ):
        self.format, self.axis, self.window = format, axis, window
        self.label, self.rotate = label, rotate
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

    def rounded(self, x: Heads) -> New:
        """New tokens as they will be stored, without a gradient; the store stays as it is.

        Raises ValueError for other shapes than before, and for what cannot be rounded.
        """
        x, waiting = self._checked(x), len(self.recent)
        first = min(x.shape[2], self.limit - len(self.sinks))
        due = self._due(waiting + x.shape[2] - first)
        leaving = min(due, waiting)
        fresh = due - leaving
        sinks, new, recent = x.split_with_sizes([first, fresh, x.shape[2] - first - fresh], dim=2)
        return New(x, sinks, self._parts_of(new, leaving) if due else {}, recent, leaving)

    def append(self, new: New) -> None:
        """Keep what `rounded` has just returned."""
        self.sinks.append(new.sinks)
        self.recent.drop(new.leaving)
        if new.parts:
            self.packed.append(new.parts)
        self.recent.append(new.recent)

    def extend(self, new: New) -> Heads:
        """Append tokens and return all of them, as the queries of the same tokens read them.

        By token these read what is stored, themselves included. By channel they still read in full
        precision what they complete, as in KIVI: otherwise what a query reads would depend on
        how many tokens came with it.
        """
        if self.axis == "token" or self.format is None:
            self.append(new)
            return self.read()
        seen = joined([*self._read(), new.all], 2)
        self.append(new)
        return seen

    def read(self) -> Heads:
        """All tokens as they are stored."""
        return joined(self._read(), 2)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order (beam search)."""
        for part in self._parts():
            part.select(rows)

    def _parts(self) -> list[Buffer | Packed]:
        return [part for part in (self.sinks, self.packed, self.recent) if part is not None]

    def _read(self) -> list[Heads]:
        parts = self.parts or [self.recent]
        return [part.read() if isinstance(part, Packed) else part.view for part in parts]

    def _parts_of(self, new: Heads, leaving: int) -> dict[str, Tensor]:
        """What is packed of new tokens, and before them of so many recent ones."""
        if leaving:
            new = torch.cat((self.recent.view[:, :, :leaving], new), dim=2)
        with _named(self.label):
            return self.packed.rounded(new)

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
        if x.ndim != 4:
            need = "must be [batch, heads, tokens, head_dim]"
            raise ValueError(f"{self.label} {need}, got {list(x.shape)}")
        wide, empty = x.detach(), not len(self)
        if self.rotate:
            with _named(self.label):
                wide = rotated(wide)
        stored = wide.to(self.dtype or (x.dtype if empty else self.recent.data.dtype))
        if empty:
            self._start(stored)
        have, want = list(x.shape), list(self.recent.data.shape)
        if have[:2] + have[3:] != want[:2] + want[3:]:
            want[2] = "n"
            raise ValueError(f"{self.label} {have} do not continue a cache of {want}")
        # Values that are kept as they arrive need no look; on a GPU it would be a wait.
        rounded = self.format is not None or stored.dtype != wide.dtype
        if rounded and not bool(stored.isfinite().all()):
            self._refuse(x, wide, stored.dtype)
        return stored

    def _start(self, like: Heads) -> None:
        if self.format is not None:
            with _named(self.label):
                self.packed = Packed(self.format, self.axis, like)
        self.sinks, self.recent = Buffer(like), Buffer(like)

    def _refuse(self, x: Heads, wide: Heads, dtype: torch.dtype) -> None:
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(f"{self.label} {list(x.shape)} hold {bad} NaN or infinite values")
        worst, name = wide.abs().max().item(), str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{self.label}: a value of {worst:.3g} overflows {name}; use dtype=torch.float32"
        )


@contextmanager
def _named(label: str):
    """What is raised within says where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def rotated(x: Tensor, back: bool = False) -> Tensor:
    """`x` in the Hadamard basis of its last axis, or `back` from it; float32 at least."""
    return hadamard(x if x.dtype == torch.float64 else x.float(), transpose=back)
