"""QLinear: a linear layer that keeps and computes from the packed tensor.

What it reads may be moved to another basis first, and quantized as well.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .qtensor import QTensor

try:
    from .activations import Inputs, rounded
    from .kernels import operator
    from .kernels.dequantize import input_gradient
    from .kernels.dispatch import Product
    from .transform import Buffers, Transform
except ImportError as error:
    # In a checkout the folder kernels/ lies beside qlib/, and only an installation joins the two.
    message = "qlib.kernels is missing: install the checkout with `pip install -e .` (make does so)"
    raise ImportError(message) from error


class _Differentiable(torch.autograd.Function):
    """`layer(x)`; what the gradient needs is kept packed (QLoRA, section 3).

    The gradient passes the rounding of inputs as if it were not there (straight through).
    """

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*batch in"], layer: QLinear) -> Float[Tensor, "*batch o"]:
        q = layer.weight
        ctx.format, ctx.shape, ctx.names = q.format, q.shape, tuple(q.parts)
        ctx.save_for_backward(*q.parts.values())
        return layer.multiply(x.detach())

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "*batch o"]) -> tuple[Tensor, None]:
        q = QTensor(ctx.format, ctx.shape, dict(zip(ctx.names, ctx.saved_tensors)))
        return input_gradient(gradient, q), None


class _Reading:
    """How a layer quantizes what it reads: as an object, and by the name of torch's operator."""

    @property
    def inputs(self) -> Inputs | None:
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: Inputs | None) -> None:
        name = None if inputs is None else operator.name_of(inputs)
        self._inputs, self._rounding = inputs, name

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # Another process has other names.
        self.inputs = self._inputs


class QLinear(_Reading, Buffers):
    """`x @ weight.T + bias` with a quantized weight, differentiable in `x`.

    The parts of the weight are buffers, so they move between devices with the module; unlike
    other buffers they never change dtype, because their dtype is part of the format.

    Args:
        weight: QTensor of shape [out, in].
        bias: [out] or None.
        transform: the basis that the weight is in; inputs are moved to it in every call.
        inputs: how inputs are quantized then; None leaves them as they are.
    """

    def __init__(
        self, weight: QTensor, bias: Float[Tensor, " out"] | None = None,
        transform: Transform | None = None, inputs: Inputs | None = None,
    ):  # fmt: skip
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"a linear weight is [out, in], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.format, self._format_name = weight.format, operator.name_of(weight.format)
        # Buffer names may not hold dots; part names ("scale.codes") do.
        self._names = {part: part.replace(".", "_") for part in weight.format.layout(weight.shape)}
        for part, name in self._names.items():
            self.register_buffer(name, weight.parts[part])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.transform, self.inputs = transform, inputs
        self._product, self._product_of = None, ()

    @property
    def weight(self) -> QTensor:
        """The quantized weight, made of the module's own buffers."""
        parts = {part: getattr(self, name) for part, name in self._names.items()}
        return QTensor(self.format, (self.out_features, self.in_features), parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix product by the fastest kernel that knows the format."""
        x = x if self.transform is None else self.transform.input(x)
        if torch.compiler.is_compiling():
            q = self.weight
            x = x if self.inputs is None else rounded(x, self._rounding)
            y = operator.matmul(x, list(q.parts.values()), self._format_name, list(q.shape))
        elif x.requires_grad and torch.is_grad_enabled():
            y = _Differentiable.apply(x, self)
        else:
            y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product of the quantized inputs and the weight, without transform and bias."""
        if self.inputs is None:
            return self._ready()(x)
        rows = x.reshape(-1, x.shape[-1])
        return self.inputs.product(rows, self._ready()).view(*x.shape[:-1], self.out_features)

    def _ready(self) -> Product:
        """The product with the weight that the buffers hold now."""
        now = [(b.data_ptr(), b._version) for b in self._buffers.values()]
        if now != self._product_of:
            self._product, self._product_of = Product(self.weight), now
        return self._product

    def __getstate__(self) -> dict:
        # What is ready for this process is of no use to a copy.
        return self.__dict__ | {"_product": None, "_product_of": ()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._format_name = operator.name_of(self.format)

    def extra_repr(self) -> str:
        size = f"{self.in_features}, {self.out_features}, {self.format}"
        return size if self.inputs is None else f"{size}, inputs {self.inputs}"


class DenseLinear(_Reading, nn.Linear):
    """nn.Linear that moves its inputs to another basis, and quantizes them, as QLinear does.

    Arguments as for QLinear; weight [out, in] and bias are parameters, taken as they are.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None = None,
        transform: Transform | None = None, inputs: Inputs | None = None,
    ):  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.bias = weight, bias
        self.transform, self.inputs = transform, inputs

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        x = x if self.transform is None else self.transform.input(x)
        x = x if self.inputs is None else rounded(x, self._rounding)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        size = super().extra_repr()
        return size if self.inputs is None else f"{size}, inputs {self.inputs}"


def dequantized(layer: QLinear) -> nn.Linear:
    """The float32 layer that computes the same function as `layer`, an ordinary one if one can."""
    weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    if layer.transform is not None or layer.inputs is not None:
        return DenseLinear(weight, layer.bias, layer.transform, layer.inputs)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, layer.bias
    return linear


def read_by(layer: nn.Linear | QLinear, x: Float[Tensor, "*batch in"]) -> Tensor:
    """What `layer` multiplies its weight with when it is given `x`, before it is quantized."""
    transform = getattr(layer, "transform", None)
    return x if transform is None else transform.input(x)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `model` has a submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
