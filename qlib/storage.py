"""How scales and offsets are kept: in a dtype, as divisors, on a grid, or in a format of their own.

A format here is anything that quantizes, decodes and lays out a matrix of scales as Scheme does;
its stored tensors appear under the prefix "scale." or "offset.".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grid import Grid
from .pack import pack, packed_bytes, unpack

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Divisor:
    """The stored number divides: value = grid[code] / stored.

    compressed-tensors keeps the second scale of NVFP4 in this way, 2688 / amax of the tensor.
    Where the scale is zero (all weights are), the divisor is one; where it is too small for its
    reciprocal, the divisor is the largest finite number.

    Args:
        dtype: how the divisor is stored.

    >>> from qlib import fit, grid, Scheme
    >>> scheme = Scheme(grid.E4M3, "tensor", fit.absmax, scale=Divisor(torch.float32))
    >>> q = scheme.quantize(torch.tensor([[224.0, 3.0]]))
    >>> q.parts["scale"], q.dequantize()
    (tensor([[2.]]), tensor([[224.,   3.]]))
    """

    dtype: torch.dtype

    def __str__(self) -> str:
        return f"divisor {_dtype_name(self.dtype)}"


def store(name: str, values: Tensor, storage: Any) -> dict[str, Tensor]:
    """The stored tensors of scales or offsets. Raises ValueError for what overflows its storage."""
    if hasattr(storage, "layout"):
        inner = storage.quantize(values)
        return {f"{name}.{part}": tensor for part, tensor in inner.parts.items()}
    if isinstance(storage, Grid):
        return {name: pack(storage.round(values), storage.bits)}
    if isinstance(storage, Divisor):
        return {name: _divisors(name, values, storage.dtype)}
    stored = values.to(storage)
    if not bool(stored.isfinite().all()):
        raise _overflow(name, values, _dtype_name(storage), "torch.float32")
    # A scale that rounds to zero would erase its block: keep the smallest positive value instead.
    info = torch.finfo(storage)
    floor = (info.smallest_normal * info.eps * values.sign()).to(storage)
    return {name: torch.where((stored == 0) & (values != 0), floor, stored)}


def _divisors(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    stored = values.reciprocal().masked_fill(values == 0, 1).clamp(-largest, largest).to(dtype)
    if not bool(stored.all()):
        raise _overflow(name, values, f"a {Divisor(dtype)}", "Divisor(torch.float32)")
    return stored


def _overflow(name: str, values: Tensor, storage: str, remedy: str) -> ValueError:
    worst = values.abs().max().item()
    what = f"an {name}" if name == "offset" else f"a {name}"
    return ValueError(f"{what} of {worst:.3g} overflows {storage}; store it as {remedy}")


def read(name: str, parts: Mapping[str, Tensor], storage: Any, shape) -> Tensor:
    """Scales or offsets of `shape` as stored, float32; a Divisor's are what divides."""
    if hasattr(storage, "layout"):
        prefix = f"{name}."
        inner = {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}
        return storage.decode(inner, shape)
    if isinstance(storage, Grid):
        return storage.decode(unpack(parts[name], storage.bits, shape[1]))
    return parts[name].float()


def layout(name: str, storage: Any, shape) -> Layout:
    """dtype and shape of every tensor that scales or offsets of `shape` are stored as."""
    if hasattr(storage, "layout"):
        return {f"{name}.{part}": spec for part, spec in storage.layout(shape).items()}
    if isinstance(storage, Grid):
        return {name: (torch.uint8, (shape[0], packed_bytes(shape[1], len(storage.points))))}
    dtype = storage.dtype if isinstance(storage, Divisor) else storage
    return {name: (dtype, tuple(shape))}


def describe(storage: Any) -> str:
    """A storage in words, as part of a Scheme's."""
    if isinstance(storage, Grid):
        return storage.name
    if isinstance(storage, torch.dtype):
        return _dtype_name(storage)
    return str(storage) if isinstance(storage, Divisor) else f"({storage})"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
