"""QLinear: a linear layer that keeps and computes from the packed tensor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .qtensor import QTensor

try:
    from .kernels import operator
    from .kernels.dequantize import input_gradient
    from .kernels.dispatch import Product
except ImportError as error:
    # In a checkout the folder kernels/ lies beside qlib/, and only an installation joins the two.
    message = "qlib.kernels is missing: install the checkout with `pip install -e .` (make does so)"
    raise ImportError(message) from error


class _Differentiable(torch.autograd.Function):
    """`x @ q.dequantize().T`; what the gradient needs is kept packed (QLoRA, section 3)."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*batch in"], product: Product) -> Float[Tensor, "*batch o"]:
        q = product.q
        ctx.format, ctx.shape, ctx.names = q.format, q.shape, tuple(q.parts)
        ctx.save_for_backward(*q.parts.values())
        return product(x.detach())

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "*batch o"]) -> tuple[Tensor, None]:
        q = QTensor(ctx.format, ctx.shape, dict(zip(ctx.names, ctx.saved_tensors)))
        return input_gradient(gradient, q), None


class QLinear(nn.Module):
    """`x @ weight.T + bias` with a quantized weight, differentiable in `x`.

    The parts of the weight are buffers, so they move between devices with the module; unlike
    other buffers they never change dtype, because their dtype is part of the format.

    Args:
        weight: QTensor of shape [out, in].
        bias: [out] or None.
    """

    def __init__(self, weight: QTensor, bias: Float[Tensor, " out"] | None = None):
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
        self._product, self._product_of = None, ()

    @property
    def weight(self) -> QTensor:
        """The quantized weight, made of the module's own buffers."""
        parts = {part: getattr(self, name) for part, name in self._names.items()}
        return QTensor(self.format, (self.out_features, self.in_features), parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix product by the fastest kernel that knows the format."""
        if torch.compiler.is_compiling():
            q = self.weight
            y = operator.matmul(x, list(q.parts.values()), self._format_name, list(q.shape))
        elif x.requires_grad and torch.is_grad_enabled():
            y = _Differentiable.apply(x, self._ready())
        else:
            y = self._ready()(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _ready(self) -> Product:
        """The product with the weight that the buffers hold now."""
        buffers = [getattr(self, name) for name in self._names.values()]
        now = [(b.data_ptr(), 0 if b.is_inference() else b._version) for b in buffers]
        if now != self._product_of:
            self._product, self._product_of = Product(self.weight), now
        return self._product

    def __getstate__(self) -> dict:
        # What is ready for this process is of no use to a copy.
        return self.__dict__ | {"_product": None, "_product_of": ()}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"

    def _apply(self, fn, recurse: bool = True):
        dtypes = {name: getattr(self, name).dtype for name in self._names.values()}
        before = {name: getattr(self, name) for name in self._names.values()}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(moved.device))
        return self


def dequantized(layer: QLinear) -> nn.Linear:
    """The ordinary float32 layer that computes the same function as `layer`."""
    weight = layer.weight.dequantize()
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `model` has a submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
