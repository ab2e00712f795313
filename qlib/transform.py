"""Changes of basis that leave a linear layer's product as it is.

A layer computes x @ w.T. Any invertible T gives the same as (x @ T) @ (w @ T^-T).T, and the two
factors may be easier to quantize than x and w were. A `Transform` is one such T: `input` does its
part to the activations, `weight` to the columns of the weight, and the law is

    input(x) @ weight(w).T == x @ w.T.

T is diagonal in SmoothQuant and AWQ (channels of activations shrink, columns of weights grow), a
permutation where the neighbors in a block are chosen, and a rotation in QuaRot and SpinQuant.
"""

from __future__ import annotations

import random

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .hadamard import base_matrix, hadamard
from .reordered import is_permutation

# How far from the identity the entries of matrix @ matrix.T may be.
ORTHOGONAL = 1e-4


class Buffers(nn.Module):
    """A module whose buffers move with it but keep their dtype, and which gradients may use."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._leave_inference()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._leave_inference()

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if moved is not None and moved.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(moved.device)
        self._leave_inference()
        return self

    def _leave_inference(self) -> None:
        """Tensors of inference mode do not count their versions, and autograd refuses them."""
        made_there = [n for n, b in self._buffers.items() if b is not None and b.is_inference()]
        with torch.inference_mode(False):
            self._buffers.update({name: self._buffers[name].clone() for name in made_there})


class Transform(Buffers):
    """A change of basis of `size` channels, of which a subclass has the `_input` and `_weight`."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def input(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """The activations in the new basis, in their dtype; differentiable.

        Raises ValueError unless the rows have `size` numbers.
        """
        return self._input(self._checked(x, "inputs"))

    def weight(self, w: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        """The weight that reads them: computed in float64, returned in its dtype.

        Raises ValueError unless its rows have `size` numbers.
        """
        return self._weight(self._checked(w, "weights").double()).to(w.dtype)

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """`input`: a transform can stand before a layer."""
        return self.input(x)

    def extra_repr(self) -> str:
        return str(self.size)

    def _checked(self, x: Tensor, what: str) -> Tensor:
        got = x.shape[-1] if x.ndim else 0
        if got != self.size:
            raise ValueError(f"{type(self).__name__} of {self.size} got {what} of {got}")
        return x


class Diagonal(Transform):
    """Inputs are divided by scales, the columns of the weight multiplied.

    Args:
        scales: one for every channel, finite and not 0.

    Raises ValueError for other scales.

    >>> Diagonal(torch.tensor([2.0, 4.0])).input(torch.tensor([6.0, 4.0]))
    tensor([3., 1.])
    """

    def __init__(self, scales: Float[Tensor, " n"]):
        if scales.ndim != 1 or not bool((scales.isfinite() & (scales != 0)).all()):
            raise ValueError(f"scales {list(scales.shape)} must be [n], finite and not 0")
        super().__init__(len(scales))
        self.register_buffer("scales", scales.detach().clone())

    def _input(self, x: Tensor) -> Tensor:
        return (x / self.scales).to(x.dtype)

    def _weight(self, w: Tensor) -> Tensor:
        return w * self.scales


class Permute(Transform):
    """Channel i of the new basis is channel order[i] of the old one.

    Args:
        order: every channel once.

    Raises ValueError if it is not a permutation.

    >>> Permute(torch.tensor([2, 0, 1])).input(torch.tensor([5.0, 6.0, 7.0]))
    tensor([7., 5., 6.])
    """

    def __init__(self, order: Int[Tensor, " n"]):
        if order.ndim != 1 or order.is_floating_point() or not is_permutation(order, len(order)):
            raise ValueError(f"order {list(order.shape)} must name each of its channels once")
        super().__init__(len(order))
        self.register_buffer("order", order.detach().long().clone())

    def _input(self, x: Tensor) -> Tensor:
        return x[..., self.order]

    _weight = _input


class Hadamard(Transform):
    """Both are multiplied by a normalized Hadamard matrix, which spreads outliers over channels.

    Args:
        size: of a matrix that `hadamard_matrix` can build.
        signs: 1 and -1 for every channel, multiplied first: a randomized transform.

    Raises ValueError for other sizes or signs.

    >>> Hadamard(4).input(torch.tensor([8.0, 0.0, 0.0, 0.0]))
    tensor([4., 4., 4., 4.])
    """

    def __init__(self, size: int, signs: Float[Tensor, " n"] | None = None):
        base_matrix(size)
        if signs is not None and (signs.shape != (size,) or not bool((signs.abs() == 1).all())):
            raise ValueError(f"signs {list(signs.shape)} must be {size} numbers, each 1 or -1")
        super().__init__(size)
        self.register_buffer("signs", None if signs is None else signs.detach().clone())

    @classmethod
    def random(cls, size: int, seed: int) -> Hadamard:
        """With random signs; a seed gives the same ones on every machine and torch version."""
        rng = random.Random(seed)
        return cls(size, torch.tensor([1.0 if rng.random() < 0.5 else -1.0 for _ in range(size)]))

    def _input(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs)

    _weight = _input

    def extra_repr(self) -> str:
        return f"{self.size}{'' if self.signs is None else ', randomized'}"


class Orthogonal(Transform):
    """Both are multiplied by an orthogonal matrix, such as one that was learned.

    Args:
        matrix: matrix @ matrix.T is the identity within 1e-4.

    Raises ValueError if it is not.
    """

    def __init__(self, matrix: Float[Tensor, "n n"]):
        shape = list(matrix.shape)
        if matrix.ndim != 2 or shape[0] != shape[1]:
            raise ValueError(f"an orthogonal matrix is [n, n], got {shape}")
        wide = matrix.detach().double()
        error = (wide @ wide.T - torch.eye(len(wide), device=wide.device)).abs().max().item()
        # Not `>`: an error that is no number is refused too.
        if not error <= ORTHOGONAL:
            message = f"matrix {shape} is not orthogonal: matrix @ matrix.T is off by {error:.1e}"
            raise ValueError(f"{message}; take the Q of torch.linalg.qr(matrix)")
        super().__init__(len(matrix))
        self.register_buffer("matrix", matrix.detach().clone(memory_format=torch.contiguous_format))

    def _input(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype)

    def _weight(self, w: Tensor) -> Tensor:
        return w @ self.matrix.double()
