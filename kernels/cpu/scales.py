"""What the kernels of blocks share: how a block's scale, zero point and offset reach numba."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from qlib.grid import Grid
from qlib.qtensor import Format, QTensor
from qlib.reordered import Reordered
from qlib.scheme import Scheme

from .simd import LANES, half, load_bytes, load_some_bytes, prefetch

# numba lets go of the interpreter while it runs, and keeps the compiled code beside the source. It
# notices a change of that source, not of `simd` or `sums`: then delete the folders __pycache__.
compiled = njit(nogil=True, cache=True)
# How far ahead of their use bytes are asked for.
AHEAD = 4096


def check(kernel: str, q: QTensor, reason: str | None) -> None:
    """Raise ValueError with a reason, or if `q` has not the tensors of its format.

    Compiled functions check no bounds. Matrices [count, rows, cols] have every part `count` times.
    """
    if reason:
        raise ValueError(f"{kernel}: {reason}")
    found = {name: (part.dtype, tuple(part.shape)) for name, part in q.parts.items()}
    if found != (need := _layout(q.format, tuple(q.shape))):
        raise ValueError(f"{kernel}: q of {list(q.shape)} has {found}, need {need}")


@lru_cache(maxsize=256)
def _layout(format: Format, shape: tuple[int, ...]) -> dict[str, tuple]:
    parts = format.layout(shape[-2:]).items()
    return {name: (dtype, (*shape[:-2], *size)) for name, (dtype, size) in parts}


def scheme_of(format: Format) -> Scheme | None:
    """The scheme that stores a weight, in its own order of columns or in another, or None."""
    format = format.scheme if isinstance(format, Reordered) else format
    return format if isinstance(format, Scheme) else None


def stored(q: QTensor) -> tuple[QTensor, Tensor | None]:
    """(the weight as its scheme has it, which column of `q` each of its columns is, or None)."""
    if not isinstance(q.format, Reordered):
        return q, None
    return QTensor(q.format.scheme, q.shape, q.parts), q.parts["order"][0].long()


def scales(q: QTensor) -> tuple[Tensor, Tensor]:
    """Scales [out, blocks] as stored (float16 as its bits), and what codes of 8 bits mean."""
    storage = q.format.scale
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")[None]
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    if storage is torch.float16:
        kept, table = q.parts["scale"].view(torch.uint16), none
    elif isinstance(storage, Grid) and storage.bits == 8:
        kept, table = q.parts["scale"], storage.decode(codes)[0]
    elif _is_two_level(storage):
        inner = {"codes": codes, "scale": q.parts["scale.scale"]}
        kept, table = q.parts["scale.codes"], storage.decode(inner, (1, 256))[0]
    else:
        kept, table = q.format.read(q.parts, q.shape)[0], none
    return _all_rows(kept, q), table


def _is_two_level(storage: Any) -> bool:
    return isinstance(storage, Scheme) and storage.grid.bits == 8 and storage.block == "tensor"


def offsets(q: QTensor) -> tuple[Tensor | None, Tensor | None]:
    """(packed zero points, offsets), [out, blocks]; None for what the format does not have."""
    if isinstance(q.format.offset, Grid):
        return _all_rows(q.parts["zero_point"], q), None
    if q.format.offset is not None:
        return None, _all_rows(q.format.read(q.parts, q.shape)[1], q)
    return None, None


def _all_rows(part: Tensor, q: QTensor) -> Tensor:
    """One scale of the whole tensor is the scale of every row."""
    return part.expand(q.shape[0], -1).contiguous()


def why_not_zero_point(scheme: Scheme) -> str | None:
    """Why a kernel cannot read the zero points of a scheme as integers of its bits, or None."""
    bits, offset = scheme.grid.bits, scheme.offset
    if not isinstance(offset, Grid) or offset.name in (f"int{bits}", f"uint{bits}"):
        return None
    return f"the zero point is stored as {offset.name}, not as an integer of {bits} bits"


def number(bits, table):
    """Inside numba: the float32 that a stored scale means."""


@overload(number)
def _number(bits, table):
    if bits is types.uint16:
        return lambda bits, table: half(bits)
    if bits is types.uint8:
        return lambda bits, table: table[bits]
    return lambda bits, table: bits


@compiled
def read_row(scale, table, o, factors):
    """factors[b] = scale b of row o. Read together, they are converted a vector at a time."""
    for b in range(len(factors)):
        factors[b] = number(scale[o, b], table)


@compiled
def read_bytes(row, i):
    """row[i : i + 16], with zeros for what lies behind its end."""
    prefetch(row, i + AHEAD)
    if i + LANES <= len(row):
        return load_bytes(row, i)
    return load_some_bytes(row, i, len(row) - i)
