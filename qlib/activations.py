"""What becomes of a layer's inputs: the A of W8A8.

Activations [tokens, in] are stored by the same formats as weights [out, in], so a block lies along
a token: "row" is one scale for each token, "tensor" one for all tokens of a call, "g32" one for
32 channels of a token. Scales are dynamic (every call finds its own) or static (found once, on
calibration text, which only a format with one scale for the tensor allows).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels import activations
from .kernels.dispatch import Product
from .kernels.operator import named
from .presets import format as named_format
from .qtensor import Format, QTensor
from .scheme import Scheme, checked

Rows = Float[Tensor, "rows in"]
STATIC = "-static"
NOT_FINITE = (
    "NaN or infinite values: a layer before this one overflows, so load the model in float32"
)


class Inputs(Protocol):
    """How a layer quantizes what it reads. Dynamic and Static are two; LLM.int8() is another.

    Those that need no calibration inherit what they say of it.
    """

    def rounded(self, x: Rows) -> Rows:
        """The values that the layer computes with instead of `x`, in the dtype of `x`."""

    def product(self, x: Rows, weight: Product) -> Float[Tensor, "rows out"]:
        """`rounded(x)` times the weight, from the codes of both where a kernel multiplies them."""

    @property
    def is_ready(self) -> bool:
        """Whether inputs can be quantized without having seen calibration text."""
        return True

    def observed(self, low: float, high: float) -> Inputs:
        """The same after calibration has seen inputs between `low` and `high`."""
        return self


@dataclass(frozen=True)
class Dynamic(Inputs):
    """Inputs in `format`, with the scales that every call finds for itself.

    >>> Dynamic(named_format("int8-row")).rounded(torch.tensor([[1.0, -2.0], [0.01, 0.0]]))
    tensor([[ 1.0078, -1.9999],
            [ 0.0100,  0.0000]])
    """

    format: Format

    def quantize(self, x: Rows) -> QTensor:
        """`x` as stored. Raises ValueError for values that are not finite."""
        try:
            return self._quantize(x)
        except ValueError as error:
            if bad := int((~x.isfinite()).sum()):
                raise ValueError(f"inputs {list(x.shape)} hold {bad} {NOT_FINITE}") from error
            raise

    def _quantize(self, x: Rows) -> QTensor:
        return activations.quantize(x, self.format)

    def rounded(self, x: Rows) -> Rows:
        return self.quantize(x).dequantize().to(x.dtype) if x.numel() else x.clone()

    def product(self, x: Rows, weight: Product) -> Float[Tensor, "rows out"]:
        if not x.numel():
            return weight(x)
        q = self.quantize(x)
        if activations.multiplies_codes(q, weight.q):
            return activations.product(q, weight.q, x.dtype)
        return weight(q.dequantize().to(x.dtype))

    def __str__(self) -> str:
        return f"{self.format}, dynamic"


@dataclass(frozen=True)
class Static(Dynamic):
    """Inputs in a format with one scale for the tensor, found beforehand: what is larger saturates.

    The scale may be that of other scales, as in NVFP4.

    Args:
        low, high: the range that the scale was made for; None until calibration has seen one.
        scale: the scale itself, as it is stored, where a file has it; None makes it from the range.

    >>> static = Static(named_format("int8-tensor")).observed(-1.0, 1.0)
    >>> static.rounded(torch.tensor([[0.5, -3.0]]))
    tensor([[ 0.5039, -1.0078]])
    """

    low: float | None = None
    high: float | None = None
    scale: float | None = None

    def __post_init__(self):
        if not isinstance(self.format, Scheme) or _of_tensor(self.format) is None:
            message = "has scales for parts of the tensor; static inputs have one"
            raise ValueError(f"{self.format} {message}, as int8-tensor does")

    def _quantize(self, x: Rows) -> QTensor:
        if not self.is_ready:
            raise ValueError("static inputs have no range yet: calibrate, or use dynamic ones")
        scheme, x = self.format, checked(x)
        if scheme.block == "tensor":
            parts = scheme.store(*scheme.fit_blocks(x.new_tensor([[self.low, self.high]])))
            if self.scale is not None:
                parts["scale"].fill_(self.scale)
        else:
            # NVFP4: blocks find their own scales, in units of the one of the tensor.
            largest = max(-self.low, self.high) / scheme.grid.max
            whole = Static(scheme.scale, 0.0, largest, self.scale)
            scales = whole.quantize(scheme.fit_blocks(x)[0])
            parts = {f"scale.{name}": part for name, part in scales.parts.items()}
        read = (s if s is None else s.expand(len(x), -1) for s in scheme.read(parts, x.shape))
        parts["codes"] = scheme.pack(scheme.round(x, *read), x.shape)
        return QTensor(
            scheme, tuple(x.shape), {name: parts[name] for name in scheme.layout(x.shape)}
        )

    @property
    def is_ready(self) -> bool:
        return self.low is not None

    def observed(self, low: float, high: float) -> Inputs:
        return replace(self, low=low, high=high, scale=None)

    def __str__(self) -> str:
        ends = f", {self.low:.4g} to {self.high:.4g}" if self.is_ready else ""
        return f"{self.format}, static{ends}"


def _of_tensor(scheme: Scheme) -> Scheme | None:
    """The scheme that has one scale for the tensor: this one, or the one of its block scales."""
    if scheme.block == "tensor":
        return scheme
    return _of_tensor(scheme.scale) if isinstance(scheme.scale, Scheme) else None


def inputs(name: str | Format | Inputs | None) -> Inputs | None:
    """The inputs called `name`: a format of `qlib.formats()`, dynamic unless "-static" follows.

    Raises ValueError for names that no format has, and for static formats of several scales,
    TypeError for what is none of these.

    >>> str(inputs("int8-tensor-static"))
    'int8, block tensor, absmax, scale float16, static'
    """
    if isinstance(name, str):
        format = named_format(name.removesuffix(STATIC))
        return Static(format) if name.endswith(STATIC) else Dynamic(format)
    if hasattr(name, "layout"):
        return Dynamic(name)
    if name is not None and not hasattr(name, "rounded"):
        raise TypeError(f"activations must be a name, a format or Inputs, got {name!r}")
    return name


@torch.library.custom_op("qlib::rounded", mutates_args=())
def rounded(x: Tensor, name: str) -> Tensor:
    """`inputs.rounded` of x [..., in] as an operator of torch, which `torch.compile` leaves alone.

    The gradient passes the rounding as if it were not there (straight through).

    Args:
        name: from `kernels.operator.name_of`.
    """
    if not x.numel():
        return x.new_empty(x.shape)
    return named(name).rounded(x.detach().reshape(-1, x.shape[-1])).view(x.shape)


@rounded.register_fake
def _(x: Tensor, name: str) -> Tensor:
    # Whatever the strides of x are.
    return x.new_empty(x.shape)


rounded.register_autograd(lambda ctx, gradient: (gradient, None))
