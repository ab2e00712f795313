"""Which kernel multiplies activations by a quantized weight, and why not a faster one.

The order is: Triton on a GPU, numba on a CPU, and for everything else dequantize a few rows of the
weight at a time and leave the product to torch. All of them compute `x @ q.dequantize().T`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from qlib.grid import Grid
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

# Up to this many rows of activations, unpacking a weight again for every row costs less than
# writing it out once. Measured from 16 x 64 to 4096 x 4096: 4 to 8 rows break even.
NUMBA_GEMV_ROWS = 4


def matmul(x: Float[Tensor, "*batch in"], q: QTensor) -> Float[Tensor, "*batch out"]:
    """The product `x @ q.dequantize().T` in the dtype of `x`, by the fastest kernel that fits.

    Args:
        x: activations, floating point, on the device of `q`.
        q: weight [out, in].

    Raises ValueError if shapes, dtype or devices do not match. Only the fallback has a gradient
    for `x`, so it runs where one is needed.

    >>> import qlib
    >>> q = qlib.quantize(torch.eye(2), "int8")
    >>> qlib.kernels.matmul(torch.tensor([3.0, 5.0]), q).round()
    tensor([3., 5.])
    """
    _check(x, q)
    rows = x.reshape(-1, x.shape[-1])
    module, rung = next((m, r) for m, r, why_not in _candidates(rows, q) if why_not is None)
    return _kernel(module, rung)(rows, q).view(*x.shape[:-1], q.shape[0])


def explain(x: Float[Tensor, "*batch in"], q: QTensor) -> str:
    """The kernel that `matmul(x, q)` would run, and for each faster one why it does not apply.

    >>> import qlib
    >>> print(qlib.kernels.explain(torch.ones(2, 64), qlib.quantize(torch.ones(8, 64), "nf4")))
    dequantize.gemm, 2 rows of activations
    not w4a16_triton: x is on the CPU
    not w4_numba: the grid nf4 is not an integer grid of 4 or 8 bits
    """
    _check(x, q)
    rows, skipped = x.reshape(-1, x.shape[-1]), []
    for module, rung, why_not in _candidates(rows, q):
        if why_not is None:
            count = f"{len(rows)} row{'s' * (len(rows) != 1)} of activations"
            return "\n".join([f"{module}.{rung}, {count}", *skipped])
        skipped.append(f"not {module}: {why_not}")
    raise AssertionError("the last candidate always applies")


@cache
def _kernel(module: str, rung: str) -> Callable[[Tensor, QTensor], Tensor]:
    return getattr(import_module(f".{module}", __package__), rung)


def _candidates(x: Tensor, q: QTensor) -> Iterator[tuple[str, str, str | None]]:
    """(module, function, why it does not apply), fastest first."""
    yield "w4a16_triton", "gemv" if len(x) == 1 else "gemm", _why_not_triton(x, q)
    yield "w4_numba", "gemv" if len(x) <= NUMBA_GEMV_ROWS else "gemm", _why_not_numba(x, q)
    yield "dequantize", "gemm", None


def _why_not_triton(x: Tensor, q: QTensor) -> str | None:
    if not x.is_cuda:
        return "x is on the CPU" if x.device.type == "cpu" else f"x is on {x.device}"
    if not _installed("triton"):
        return "triton is not installed"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {_name(x.dtype)}, it takes float16 or bfloat16"
    capability = torch.cuda.get_device_capability(x.device)
    if len(x) > 1 and capability < (8, 0):
        # Triton would compile the product for older ones without tensor cores.
        return f"the product needs tensor cores of cc 8.0, this is {capability[0]}.{capability[1]}"
    return _why_not_rows(x) or _why_not_format(q.format, (4,)) or _why_not_stored(q.format)


def _why_not_numba(x: Tensor, q: QTensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if not _installed("numba"):
        return "numba is not installed"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {_name(x.dtype)}, it takes float16, bfloat16 or float32"
    return _why_not_rows(x) or _why_not_format(q.format, (4, 8))


def _why_not_rows(x: Tensor) -> str | None:
    if x.requires_grad and torch.is_grad_enabled():
        return "x needs a gradient"
    return None if len(x) else "x has no rows"


def _why_not_format(format, bits: tuple[int, ...]) -> str | None:
    if not isinstance(format, Scheme):
        return f"{type(format).__name__} is not a Scheme"
    return _why_not_scheme(format, bits)


@lru_cache(maxsize=256)
def _why_not_scheme(scheme: Scheme, bits: tuple[int, ...]) -> str | None:
    integers = {f"{sign}int{b}" for b in bits for sign in ("", "u")}
    if scheme.grid.name not in integers or not scheme.is_standard:
        widths = " or ".join(map(str, bits))
        return f"the grid {scheme.grid.name} is not an integer grid of {widths} bits"
    if scheme.offset is not None and not isinstance(scheme.offset, Grid):
        return "the offset is not an integer zero point"
    if type(scheme.block) is int and scheme.block * scheme.grid.bits % 8:
        return f"blocks of {scheme.block} codes of {scheme.grid.bits} bits do not end at a byte"
    return None


def _why_not_stored(scheme: Scheme) -> str | None:
    """What the Triton kernels ask beyond `_why_not_scheme`: they read scale and zero as stored."""
    if type(scheme.block) is int and scheme.block % 16:
        return f"blocks of {scheme.block} are not a multiple of 16"
    if scheme.scale not in (torch.float16, torch.bfloat16, torch.float32):
        return "the scale is not float16, bfloat16 or float32"
    if scheme.offset is not None and scheme.offset.name not in ("int4", "uint4"):
        return f"the zero point is stored as {scheme.offset.name}, not in 4 bits"
    return None


def _check(x: Tensor, q: QTensor) -> None:
    shape = list(q.shape)
    if len(shape) != 2:
        raise ValueError(f"matmul: weight is {shape}, need [out, in]")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        features = f"{x.shape[-1]} input features" if x.ndim else "no dimensions"
        raise ValueError(f"matmul: x has {features}, weight is {shape}")
    if not x.is_floating_point():
        raise ValueError(f"matmul: x is {_name(x.dtype)}, need floating point")
    for name, (dtype, size) in _layout(q).items():
        part = q.parts[name]
        # Compiled code checks no bounds: a part of another size must not reach it.
        if part.dtype != dtype or part.shape != size:
            stored, need = f"{_name(part.dtype)} {list(part.shape)}", f"{_name(dtype)} {list(size)}"
            raise ValueError(f"matmul: {name} is {stored}, a weight of {shape} has {need}")
        if part.device != x.device:
            raise ValueError(f"matmul: x is on {x.device}, {name} is on {part.device}")


def _layout(q: QTensor) -> dict:
    if isinstance(q.format, Scheme):
        return _scheme_layout(q.format, tuple(q.shape))
    return q.format.layout(q.shape)


@lru_cache(maxsize=256)
def _scheme_layout(scheme: Scheme, shape: tuple[int, ...]) -> dict:
    return scheme.layout(shape)


@cache
def _installed(name: str) -> bool:
    return find_spec(name) is not None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
