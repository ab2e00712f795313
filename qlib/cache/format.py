"""Formats of a KV cache: how keys and values are stored, along which axis, and what stays exact.

A cache holds keys and values [batch, heads, tokens, head_dim]. Any format of weights stores them,
along one of two axes:

- by "token": a row is one token's vector of head_dim values, rounded alone when it arrives;
- by "channel": a row is one channel of consecutive tokens, as many as a block of the format has.
  Those tokens wait in full precision until the group is complete (KIVI's keys, whose outliers keep
  to a few channels).

Besides that the first tokens (`sinks`) and the newest (`window`) may stay in full precision, and
heads may be rotated first (`rotate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import Grid
from ..pack import pack, packed_bytes, unpack
from ..qtensor import Format, QTensor

AXES = ("token", "channel")
ROTATIONS = (None, "keys", "keys+values")


@dataclass(frozen=True)
class KVFormat:
    """How a cache stores keys and values.

    Args:
        keys, values: formats of the stored rows; None keeps full precision.
        key_axis, value_axis: "token" or "channel"; by channel a format needs blocks of n tokens.
        window: newest tokens kept in full precision. By token it slides: exactly so many are kept,
            and each token is rounded when it leaves. By channel it fills and empties: when so many
            have accumulated, all of them are rounded, since a group needs its tokens at once (KIVI,
            arXiv 2402.02750, section 3.2, where it is the residual length R).
        sinks: first tokens kept in full precision for good (StreamingLLM, arXiv 2309.17453).
        rotate: "keys" or "keys+values": heads are stored in a Hadamard basis, which attention
            undoes, so that only the rounding changes.
        dtype: of all that stays in full precision, and of what is rounded; None keeps the dtype of
            the arriving tensors.

    Raises ValueError for axes, rotations and windows that do not exist or do not fit, and TypeError
    for names of formats.

    >>> from qlib import Scheme, fit
    >>> from qlib.grid import GRIDS
    >>> kivi = Scheme(GRIDS["uint2"], 32, fit.own_range, offset=torch.float16)
    >>> KVFormat(kivi, kivi, key_axis="channel", window=128).bits(head_dim=64)
    (3.0, 3.0)
    """

    keys: Format | None = None
    values: Format | None = None
    key_axis: str = "token"
    value_axis: str = "token"
    window: int = 0
    sinks: int = 0
    rotate: str | None = None
    dtype: torch.dtype | None = torch.float16

    def __post_init__(self):
        if self.rotate not in ROTATIONS:
            raise ValueError(f'rotate must be None, "keys" or "keys+values", got {self.rotate!r}')
        for name, count in (("window", self.window), ("sinks", self.sinks)):
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} must be a number of tokens, got {count!r}")
        for name, format, axis in self._halves():
            if format is not None and not hasattr(format, "layout"):
                raise TypeError(f"{name} must be a Format, got {format!r}; use kv_format(name)")
            if axis not in AXES:
                raise ValueError(f'the axis of {name} must be "token" or "channel", got {axis!r}')
            if axis == "channel" and format is not None:
                self._check_group(name, getattr(format, "block", None))

    def _check_group(self, name: str, size: int | str | None) -> None:
        if type(size) is not int:
            raise ValueError(f"{name} by channel need blocks of n tokens, not block {size!r}")
        if self.window % size:
            fits = self.window // size * size + size
            raise ValueError(
                f"{name} by channel: window {self.window} is not a multiple of the block {size}; "
                f"use window={fits} (in a name: -w{fits})"
            )

    def _halves(self) -> list[tuple[str, Format | None, str]]:
        return [("keys", self.keys, self.key_axis), ("values", self.values, self.value_axis)]

    def bits(self, head_dim: int) -> tuple[float, float]:
        """Bits of each key and value that is neither sink nor recent, scales included.

        A dtype of None counts as float32.
        """
        found = []
        for _, format, axis in self._halves():
            shape = (1, format.block) if axis == "channel" and format else (1, head_dim)
            full = 8.0 * (self.dtype or torch.float32).itemsize
            found.append(full if format is None else 8 * _row_bytes(format, shape) / shape[1])
        return tuple(found)


def _row_bytes(format: Format, shape: tuple[int, int]) -> int:
    """What one row adds to a tensor; what all rows share, such as a codebook, adds nothing."""
    layouts = (format.layout((rows, shape[1])) for rows in (1, 2))
    one, two = (
        sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())
        for layout in layouts
    )
    return two - one


@dataclass(frozen=True)
class Constant:
    """Codes of a grid under one constant scale, which is not stored: value = grid[code] * scale.

    vLLM's FP8 cache: a scale for a whole tensor, 1.0 without calibration; what lies outside the
    grid saturates.

    >>> from qlib.grid import E4M3
    >>> Constant(E4M3).quantize(torch.tensor([[1.0, 500.0]])).dequantize()
    tensor([[  1., 448.]])
    """

    grid: Grid
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.grid.name}, scale {self.scale:g} for all"

    def layout(self, shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of the codes of rows [rows, cols]."""
        return {"codes": (torch.uint8, (shape[0], packed_bytes(shape[1], len(self.grid.points))))}

    def quantize(self, x: Tensor, importance: Tensor | None = None) -> QTensor:
        """Round every value of rows [rows, cols] to the nearest code. Raises ValueError for NaN."""
        codes = pack(self.grid.round(x.float() / self.scale), self.grid.bits)
        return QTensor(self, tuple(x.shape), {"codes": codes})

    def decode(self, parts, shape) -> Tensor:
        """The values of the codes, float32."""
        codes = unpack(parts["codes"], self.grid.bits, shape[1])
        return self.grid.decode(codes) * self.scale
