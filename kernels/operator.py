"""The product as an operator of torch, so that `torch.compile` keeps it in its graph as it is.

The compiler sees tensors, a name and a shape; what the name stands for is registered here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from qlib.qtensor import QTensor

from . import dequantize, dispatch

_NAMES: dict[Hashable, str] = {}
_NAMED: dict[str, Hashable] = {}


def name_of(what: Hashable) -> str:
    """The name by which operators know a format or a layer's `Inputs` in this process."""
    if what not in _NAMES:
        name = f"{what} ({len(_NAMES)})"
        _NAMES[what], _NAMED[name] = name, what
    return _NAMES[what]


def named(name: str) -> Any:
    """What has this name from `name_of`."""
    return _NAMED[name]


def _weight(parts: list[Tensor], name: str, shape: list[int]) -> QTensor:
    format, shape = named(name), tuple(shape)
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
