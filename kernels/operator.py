"""The product as an operator of torch, so that `torch.compile` keeps it in its graph as it is.

The compiler sees tensors, a name and a shape; what the name stands for is registered here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlib.qtensor import Format, QTensor

from . import dequantize, dispatch

_NAMES: dict[Format, str] = {}
_FORMATS: dict[str, Format] = {}


def name_of(format: Format) -> str:
    """The name by which `matmul` knows a format in this process."""
    if format not in _NAMES:
        name = f"{format} ({len(_NAMES)})"
        _NAMES[format], _FORMATS[name] = name, format
    return _NAMES[format]


def _weight(parts: list[Tensor], name: str, shape: list[int]) -> QTensor:
    format, shape = _FORMATS[name], tuple(shape)
    return QTensor(format, shape, dict(zip(format.layout(shape), parts, strict=True)))


@torch.library.custom_op("qlib::matmul", mutates_args=())
def matmul(x: Tensor, parts: list[Tensor], format: str, shape: list[int]) -> Tensor:
    """`dispatch.matmul` of x [..., in] and the weight [out, in] that is stored as `parts`.

    Args:
        format: from `name_of`.
    """
    return dispatch.matmul(x.detach(), _weight(parts, format, shape))


@matmul.register_fake
def _(x: Tensor, parts: list[Tensor], format: str, shape: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("qlib::matmul_input_gradient", mutates_args=())
def input_gradient(gradient: Tensor, parts: list[Tensor], format: str, shape: list[int]) -> Tensor:
    """What `x` gets for the gradient [..., out] of `matmul(x, ...)`."""
    return dequantize.input_gradient(gradient, _weight(parts, format, shape))


@input_gradient.register_fake
def _(gradient: Tensor, parts: list[Tensor], format: str, shape: list[int]) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    _, parts, ctx.format, ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx, gradient: Tensor) -> tuple:
    parts = list(ctx.saved_tensors)
    found = input_gradient(gradient, parts, ctx.format, ctx.shape)
    return found, [None] * len(parts), None, None


matmul.register_autograd(_backward, setup_context=_remember)
