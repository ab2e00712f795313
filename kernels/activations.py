"""Activations in few bits too: quantize them on their way, and multiply two quantized tensors.

Where both sides are in eight bits, or in microscaling formats on a GPU that multiplies them, no
side is dequantized: codes are multiplied, and sums rescaled. What has no such product here is
dequantized on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

from qlib.qtensor import Format, QTensor

from . import dequantize, dispatch


def quantize(x: Float[Tensor, "*batch in"], format: Format) -> QTensor:
    """`format.quantize(x)` [rows, in], on a GPU by one kernel where there is one.

    >>> import qlib
    >>> x = quantize(torch.tensor([[1.0, -2.0, 0.5, 0.0]]), qlib.format("int8-row"))
    >>> x.shape, (x.parts["codes"].int() - 128).tolist()
    ((1, 4), [[64, -127, 32, 0]])
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.is_cuda and not dispatch.missing("gpu"):
        encode = import_module(".gpu.encode", __package__)
        if encode.why_not(rows, format) is None:
            return encode.encode(rows, format)
    return format.quantize(rows)


def product(x: QTensor, w: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`x.dequantize() @ w.dequantize().T` by the best product of codes that fits.

    Args:
        x: activations [rows, in]; w: weight [out, in], on the same device.
        dtype: of the result [rows, out].

    Raises ValueError if shapes or devices do not match.
    """
    _check(x, w)
    for name, reason in _candidates(x, w):
        if reason is None:
            return import_module(f".{name}", __package__).scaled_product(x, w, dtype)
    return dequantize.gemm(x.dequantize(), w).to(dtype)


def multiplies_codes(x: QTensor, w: QTensor) -> bool:
    """Whether `product(x, w)` multiplies codes; otherwise it dequantizes both sides."""
    return any(reason is None for _, reason in _candidates(x, w))


def explain(x: QTensor, w: QTensor) -> str:
    """What `product(x, w)` would run, and for each other product of codes why it does not apply."""
    _check(x, w)
    chosen, skipped = "dequantize.gemm", []
    for name, reason in _candidates(x, w):
        if reason is None:
            chosen = f"{name}.scaled_product"
            break
        skipped.append(f"not {name}: {reason}")
    return "\n".join([f"{chosen}, {x.format} by {w.format}", *skipped])


def _candidates(x: QTensor, w: QTensor) -> Iterator[tuple[str, str | None]]:
    device = dispatch.device_of(_device(w))
    if device not in dispatch.NEEDS:
        return
    for name in ("gpu.w8a8", "gpu.scaled") if device == "gpu" else ("cpu.w8a8",):
        if device == "gpu" and (reason := dispatch.missing("gpu")):
            yield name, reason
        elif device == "gpu":
            major, minor = torch.cuda.get_device_capability(_device(w))
            module = import_module(f".{name}", __package__)
            yield name, module.why_not(x, w, 10 * major + minor)
        else:
            yield name, import_module(f".{name}", __package__).why_not(x, w)


def _device(q: QTensor) -> torch.device:
    return next(iter(q.parts.values())).device


def _check(x: QTensor, w: QTensor) -> None:
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"matmul: x is {list(x.shape)}, weight is {list(w.shape)}: inputs differ")
    if _device(x) != _device(w):
        raise ValueError(f"matmul: x is on {_device(x)}, the weight on {_device(w)}")
    for q in (x, w):
        dispatch.check_parts(q, _device(w))
