"""Scheme: a grid, a block, a fit, and how scale and offset are stored.

The value rule is `grid[code] * scale + offset`, or `(grid[code] - zero_point) * scale` where an
integer zero point is stored. A scale may itself be stored by a Scheme (NVFP4's second level) or by
another format of scales (`qlib.double`), so two-level formats need no code of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Union

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .double import DoubleQuant
from .fit import Fit
from .grid import GRIDS, Grid
from .pack import pack, pack_trits, packed_bytes, unpack, unpack_trits
from .qtensor import Format, QTensor
from .storage import Divisor, Layout, describe, layout, read, store

__all__ = ["Divisor", "Layout", "Scheme", "Storage", "check_finite", "checked", "checked_kind"]

Storage = Union[torch.dtype, Grid, Divisor, DoubleQuant, "Scheme"]

# Rows are processed a few at a time, so that what one step writes the next finds in cache.
CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Scheme(Format):
    """A storage format: which values exist, which weights share a scale, how the scale is kept.

    Args:
        grid: the values that a code can mean.
        block: weights that share one scale: a number of consecutive weights of a row (the last
            block of a row may be shorter), "row" (one output channel) or "tensor".
        fit: finds a block's scale and offset (`qlib.fit`).
        scale: how scales are stored: a torch dtype, a Divisor, a Grid (E8M0), another Scheme or
            DoubleQuant.
        offset: None for symmetric formats; an integer Grid stores a zero point in units of the
            scale; a dtype or Scheme stores the offset itself.

    >>> from qlib import fit, grid
    >>> mx = Scheme(grid.E2M1, 32, fit.pow2_floor, scale=grid.E8M0)
    >>> mx.quantize(torch.ones(1, 64)).bits_per_weight       # (32 * 4 + 8) / 32
    4.25
    """

    grid: Grid
    block: int | str
    fit: Fit
    scale: Storage = torch.float16
    offset: Storage | None = None

    def __post_init__(self):
        whole = self.block in ("row", "tensor")
        if not whole and (type(self.block) is not int or self.block < 1):
            raise ValueError(f'block must be a positive int, "row" or "tensor", got {self.block!r}')
        if isinstance(self.offset, Grid) and not self.grid.name.startswith(("int", "uint")):
            raise ValueError(f"an integer zero point needs an integer grid, got {self.grid.name}")
        if 8 < self.grid.bits < 16:
            raise ValueError(f"codes have 1 to 8 or 16 bits, got a grid of {self.grid.bits}")
        divides = [isinstance(storage, Divisor) for storage in (self.scale, self.offset)]
        if divides[1] or (divides[0] and self.offset is not None):
            raise ValueError("a Divisor stores the scale of a format without offsets")
        for storage in (self.scale, self.offset):
            if isinstance(storage, Grid) and (storage.name == "ternary" or not _is_known(storage)):
                raise ValueError(f"scales and offsets cannot be stored on the grid {storage.name}")
            if isinstance(storage, Scheme) and not storage.is_standard:
                raise ValueError("scales and offsets cannot be stored on a learned grid")

    def __str__(self) -> str:
        parts = [self.grid.name, f"block {self.block}", self.fit.__name__]
        parts.append(f"scale {describe(self.scale)}")
        if self.offset is not None:
            kind = "zero point" if isinstance(self.offset, Grid) else "offset"
            parts.append(f"{kind} {describe(self.offset)}")
        return ", ".join(parts)

    def quantize(
        self, weight: Float[Tensor, "*shape"], importance: Tensor | None = None
    ) -> QTensor:
        """Round every weight to the nearest value that the format can store.

        Args:
            weight: floating point, any shape; blocks run along the last axis.
            importance: weight of each squared error, broadcastable to `weight` (the searching
                fits use it).

        Raises ValueError for empty, non-floating or non-finite weights and for scales that
        overflow their storage.
        """
        w = self.rows(checked(weight))
        if importance is not None:
            importance = self.rows(importance.float().expand(weight.shape))
        fitted = self.fit_blocks(w, importance)
        parts = self.store(*fitted)
        # Codes belong to the scales that will be read; bitsandbytes compresses scales afterwards.
        late = isinstance(self.scale, DoubleQuant)
        codes = self.round(w, *(fitted if late else self.read(parts, weight.shape)))
        parts["codes"] = self.pack(codes, weight.shape)
        parts = {name: parts[name] for name in self.layout(weight.shape)}
        return QTensor(self, tuple(weight.shape), parts)

    def fit_blocks(self, w: Tensor, importance: Tensor | None = None):
        """(scale, offset) of `w` from `rows`, each [rows, blocks], before they are stored."""
        scale, offset = _by_rows(self._fit_rows, w, importance)
        if self.offset is None and offset is not None:
            raise ValueError(f"fit {self.fit.__name__} finds an offset: say how to store it")
        if self.offset is not None and offset is None:
            offset = torch.zeros_like(scale)
        return scale, offset

    def _fit_rows(self, w: Tensor, importance: Tensor | None):
        found = []
        for columns, _, size in self._pieces(w.shape[1]):
            blocks = w[:, columns].reshape(-1, size)
            weights = None if importance is None else importance[:, columns].reshape(-1, size)
            fitted = self.fit(blocks, self.grid, weights)
            found.append([None if x is None else x.view(len(w), -1) for x in fitted])
        return [None if x[0] is None else torch.cat(x, dim=1) for x in zip(*found)]

    def store(self, scale: Tensor, offset: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors of fitted scales and offsets, [rows, blocks] each."""
        parts = store("scale", scale, self.scale)
        if isinstance(self.scale, Scheme) and self.scale.offset is None:
            parts["scale.codes"] = self.scale._revived(parts, scale)
        if not self.is_standard:
            parts["grid"] = self.grid.points.clone()
        if isinstance(self.offset, Grid):
            # The zero point belongs to the scale that will be read back, not to the fitted one.
            kept = read("scale", parts, self.scale, scale.shape)
            zero_point = torch.round(-offset / kept.masked_fill(kept == 0, 1))
            parts |= store("zero_point", zero_point, self.offset)
        elif self.offset is not None:
            parts |= store("offset", offset, self.offset)
        return parts

    def _revived(self, parts: Mapping[str, Tensor], scales: Tensor) -> Tensor:
        """The codes of stored `scales`: one that rounds to zero would erase its block, so it gets
        the value next to zero instead."""
        lost = (read("scale", parts, self, scales.shape) == 0) & (scales != 0)
        if not bool(lost.any()):
            return parts["scale.codes"]
        sizes = self.grid.points.nan_to_num(nan=0).abs()
        nearest = self.grid.round(scales.sign() * sizes[sizes > 0].min())
        codes = self.unpack(parts["scale.codes"], scales.shape)
        return self.pack(torch.where(lost, nearest, codes), scales.shape)

    def round(self, w: Tensor, scale: Tensor, offset: Tensor | None) -> Int[Tensor, "rows cols"]:
        """Codes of `w` [rows, cols] under scales as `read` returns them, [rows, blocks]."""
        return _by_rows(self._round_rows, w, scale, offset)[0]

    def _round_rows(self, w: Tensor, scale: Tensor, offset: Tensor | None):
        codes = []
        # A block of zeros may have scale 0: any scale codes it exactly.
        scale = scale.masked_fill(scale == 0, 1)
        for columns, blocks, size in self._pieces(w.shape[1]):
            x = w[:, columns].unflatten(1, (-1, size))
            if isinstance(self.scale, Divisor):
                x = x * scale[:, blocks, None]
            elif isinstance(self.offset, Grid):
                x = (x / scale[:, blocks, None]).round_().add_(offset[:, blocks, None])
            elif offset is not None:
                x = (x - offset[:, blocks, None]).div_(scale[:, blocks, None])
            else:
                x = x / scale[:, blocks, None]
            codes.append(self.grid.round_finite(x).flatten(1))
        return codes if len(codes) == 1 else [torch.cat(codes, dim=1)]

    def read(self, parts: Mapping[str, Tensor], shape) -> tuple[Tensor, Tensor | None]:
        """(scale, offset) as stored, float32 [rows, blocks]; an integer zero point stays one, and
        a Divisor's scale is what divides."""
        at = self._scale_shape(shape)
        scale = read("scale", parts, self.scale, at)
        return scale, None if self.offset is None else read(self._offset, parts, self.offset, at)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "*shape"]:
        """The weights that `parts` mean, float32: the one definition of every layer's values."""
        rows, cols = _matrix_shape(shape)
        # One scale of the whole tensor is the scale of every row.
        scale, offset = (x if x is None else x.expand(rows, -1) for x in self.read(parts, shape))
        values = _empty((rows, cols), scale.device)
        step = max(1, CHUNK_WEIGHTS // cols)
        for chunk in (slice(i, i + step) for i in range(0, rows, step)):
            self._decode_codes(parts["codes"][chunk], values[chunk])
            self._rescale(values[chunk], scale[chunk], None if offset is None else offset[chunk])
        return values.view(shape)

    def _decode_codes(self, packed: Tensor, values: Tensor) -> None:
        """Grid values of packed codes, into `values` [rows, cols]."""
        cols = values.shape[1]
        if self.grid.bits == 4 and cols % 2 == 0:
            pairs, at = _pairs(self.grid, packed.device), packed.reshape(-1).int()
            torch.index_select(pairs, 0, at, out=values.view(-1).view(torch.float64))
        else:
            values.copy_(self.grid.decode(self.unpack(packed, (len(values), cols))))

    def values(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Weights of `codes` [rows, cols] under scales as `read` returns them: undoes `round`."""
        return self._rescale(self.grid.decode(codes), scale, offset)

    def _rescale(self, values: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Grid values [rows, cols] to weights, in place."""
        for columns, blocks, size in self._pieces(values.shape[1]):
            block = values[:, columns].unflatten(1, (-1, size))
            if isinstance(self.scale, Divisor):
                block.div_(scale[:, blocks, None])
            elif isinstance(self.offset, Grid):
                block.sub_(offset[:, blocks, None]).mul_(scale[:, blocks, None])
            else:
                block.mul_(scale[:, blocks, None])
                if offset is not None:
                    block.add_(offset[:, blocks, None])
        return values

    def layout(self, shape) -> Layout:
        """dtype and shape of every tensor that a weight of `shape` is stored as."""
        rows, cols = _matrix_shape(shape)
        parts = {"codes": (torch.uint8, (rows, packed_bytes(cols, len(self.grid.points))))}
        parts |= layout("scale", self.scale, self._scale_shape(shape))
        if self.offset is not None:
            parts |= layout(self._offset, self.offset, self._scale_shape(shape))
        if not self.is_standard:
            parts["grid"] = (torch.float32, tuple(self.grid.points.shape))
        return parts

    @property
    def is_standard(self) -> bool:
        """False for a learned grid: its points are stored, and count, with every tensor."""
        return _is_known(self.grid)

    def rows(self, x: Tensor) -> Tensor:
        """`x` as the matrix whose rows are cut into blocks."""
        return x.reshape(1, -1) if self.block == "tensor" else x.reshape(_matrix_shape(x.shape))

    def pack(self, codes: Tensor, shape) -> Tensor:
        """Codes in any arrangement of `shape`, packed row by row."""
        codes, bits = codes.reshape(_matrix_shape(shape)), self.grid.bits
        ternary = len(self.grid.points) == 3
        return _by_rows(lambda x: [pack_trits(x) if ternary else pack(x, bits)], codes)[0]

    def unpack(self, packed: Tensor, shape) -> Int[Tensor, "rows cols"]:
        """Codes [rows, cols] of the packed tensor."""
        cols = _matrix_shape(shape)[1]
        if len(self.grid.points) == 3:
            return unpack_trits(packed, cols)
        return unpack(packed, self.grid.bits, cols)

    @property
    def _offset(self) -> str:
        return "zero_point" if isinstance(self.offset, Grid) else "offset"

    def _scale_shape(self, shape) -> tuple[int, int]:
        if self.block == "tensor":
            return (1, 1)
        rows, cols = _matrix_shape(shape)
        return (rows, 1 if self.block == "row" else math.ceil(cols / self.block))

    def _pieces(self, cols: int) -> Iterator[tuple[slice, slice, int]]:
        """(columns, their blocks, block size): the whole blocks, then the ragged tail if any."""
        size = self.block if type(self.block) is int else cols
        whole = cols // size
        if whole:
            yield slice(0, whole * size), slice(0, whole), size
        if cols % size:
            yield slice(whole * size, cols), slice(whole, whole + 1), cols % size


def _is_known(grid: Grid) -> bool:
    return GRIDS.get(grid.name) == grid


@lru_cache(maxsize=256)
def _pairs(grid: Grid, device: torch.device) -> Tensor:
    """The two float32 values that each byte of 4-bit codes stands for, as one float64."""
    codes = unpack(torch.arange(256, dtype=torch.uint8)[:, None], 4, 2)
    values = grid.points.new_zeros(16)
    values[: len(grid.points)] = grid.points
    return values[codes.long()].view(torch.float64).view(-1).to(device)


def checked(weight: Tensor) -> Tensor:
    """`weight` as float32; ValueError for another kind of tensor and for values not finite."""
    weight = checked_kind(weight)
    check_finite(weight)
    return weight


def checked_kind(weight: Tensor) -> Tensor:
    shape = list(weight.shape)
    if not weight.is_floating_point():
        raise ValueError(f"weight {shape} has dtype {weight.dtype}; quantize takes floating point")
    if weight.numel() == 0:
        raise ValueError(f"weight {shape} is empty: there is nothing to quantize")
    return weight.detach().float()


def check_finite(weight: Tensor) -> None:
    # Finite values that cannot overflow have a finite sum; only a suspicious sum costs a full look.
    if not math.isfinite(weight.sum().item()) and not bool(weight.isfinite().all()):
        shape, bad = list(weight.shape), int((~weight.isfinite()).sum())
        raise ValueError(f"weight {shape} holds {bad} NaN or infinite values; repair them first")


def _empty(shape: tuple[int, int], device: torch.device) -> Float[Tensor, "rows cols"]:
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    # On Linux numpy asks for large pages, and to touch them takes a fraction of the time.
    return torch.from_numpy(np.empty(shape, np.float32))


def _matrix_shape(shape) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def _by_rows(f: Callable, first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Apply `f` to a few rows at a time of all tensors and concatenate each of its results."""
    step = max(1, CHUNK_WEIGHTS // first.shape[1])
    if step >= len(first):
        return f(first, *others)
    starts = range(0, len(first), step)
    results = [f(*(x if x is None else x[i : i + step] for x in (first, *others))) for i in starts]
    return [None if x[0] is None else torch.cat(x) for x in zip(*results)]
