"""One decoder block with its calibration calls, and statistics of what its linear layers read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .activations import Inputs
from .linear import read_by
from .structure import linears


@dataclass(eq=False)
class Stats:
    """What calibration saw at the input x of a linear layer, over `tokens` tokens.

    Args:
        hessian: mean of x x^T, float32 [in, in]; half the Hessian of the layer's mean squared
            output error in any row of its weight (GPTQ, arXiv 2210.17323, eq. 1).
        mean_abs: mean of |x|, [in].
        low, high: smallest and largest x of every channel in each window of text, [windows, in].
        tokens: how many input vectors were seen.

    >>> stats = Stats.of(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> stats.hessian
    tensor([[5., 1.],
            [1., 2.]])
    >>> stats.mean_square, stats.tokens
    (tensor([5., 2.]), 2)
    """

    hessian: Float[Tensor, "in in"]
    mean_abs: Float[Tensor, " in"]
    low: Float[Tensor, "windows in"]
    high: Float[Tensor, "windows in"]
    tokens: int = 0

    @classmethod
    def of(cls, x: Float[Tensor, "*windows tokens in"]) -> Stats:
        """Statistics of the inputs `x`, of one window [tokens, in] or of several."""
        windows = (x if x.ndim > 2 else x[None]).detach().float().flatten(0, -3)
        x = windows.flatten(0, 1)
        n = max(1, len(x))
        low, high = windows.aminmax(dim=1) if len(x) else x.new_zeros(2, 0, x.shape[1])
        return cls((x.T @ x).div_(n), x.abs().sum(0).div_(n), low, high, len(x))

    def merge(self, other: Stats) -> None:
        """Take the inputs that `other` saw into the means."""
        tokens = self.tokens + other.tokens
        share = other.tokens / max(1, tokens)
        self.hessian.lerp_(other.hessian, share)
        self.mean_abs.lerp_(other.mean_abs, share)
        self.low = torch.cat([self.low, other.low])
        self.high = torch.cat([self.high, other.high])
        self.tokens = tokens

    @property
    def amax(self) -> Float[Tensor, " in"]:
        """Largest |x| of every input channel, 0 where no token was seen."""
        ends = torch.cat([self.low, self.high, torch.zeros_like(self.mean_abs)[None]])
        return ends.abs().amax(0)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest x of a window, averaged over the windows: the range of static
        activations, which one rare token is not to decide."""
        return self.low.amin(1).mean().item(), self.high.amax(1).mean().item()

    @property
    def mean_square(self) -> Float[Tensor, " in"]:
        """Mean of x^2 for every input channel: what llama.cpp calls the importance matrix."""
        return self.hessian.diagonal()


@dataclass(eq=False)
class Call:
    """One recorded call of a decoder block: its hidden states and its other arguments."""

    hidden: Float[Tensor, "batch time hidden"]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Block:
    """One decoder block and the calls that calibration makes of it.

    Args:
        name: its name in the model, such as "model.layers.3".
        module: the block itself.
        calls: one call for every batch of windows; empty without calibration.
        targets: for every call, the hidden states that the original model has after the block;
            None if they were not asked for.
        activations: how the linear layers will quantize what they read, by their names in it.
    """

    name: str
    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    targets: list[Float[Tensor, "batch time hidden"]] | None = None
    activations: Mapping[str, Inputs] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The block's linear layers by their names in it, such as "mlp.up_proj"."""
        return linears(self.module)

    @torch.no_grad()
    def run(self, call: Call) -> Float[Tensor, "batch time hidden"]:
        """The hidden states after the block, as it is now."""
        found = self.module(call.hidden, *call.args, **call.kwargs)
        return found[0] if isinstance(found, tuple) else found

    def outputs(self) -> list[Float[Tensor, "batch time hidden"]]:
        """`run` of all calls. Raises ValueError if a result is not finite."""
        found = [self.run(call) for call in self.calls]
        if not all(bool(x.isfinite().all()) for x in found):
            raise ValueError(f"{self.name}: its output on the calibration text is not finite")
        return found

    def stats(self) -> dict[str, Stats]:
        """Statistics of what every linear layer reads; layers that read the same share one object.

        A layer that no token reached has `tokens` 0. Raises ValueError naming the first layer whose
        inputs are not finite.
        """
        layers = self.linears
        found = {name: _nothing(layer) for name, layer in layers.items()}
        seen: list[tuple[Tensor, Stats]] = []

        def see(name: str, x: Tensor) -> None:
            # q, k and v read one tensor: its statistics are computed once.
            same = [stats for other, stats in seen if other is x]
            if not same:
                self._check(name, x)
                same = [Stats.of(x)]
                seen.append((x, same[0]))
            found[name].merge(same[0])

        with _listening(layers, see):
            for call in self.calls:
                self.run(call)
                seen.clear()
        return _shared(found)

    def reached(self) -> set[str]:
        """Names of the linear layers that at least one token reaches."""
        names: set[str] = set()
        layers = self.linears
        with _listening(layers, lambda name, x: names.add(name) if x.numel() else None):
            # Usually one short call reaches all of them.
            for call in sorted(self.calls, key=lambda call: call.hidden.numel()):
                if len(names) < len(layers):
                    self.run(call)
        return names

    def inputs(self, name: str) -> Iterator[tuple[tuple, dict[str, Any]]]:
        """(args, kwargs) with which every call reaches the submodule called `name`."""
        caught: list[tuple[tuple, dict]] = []
        module = self.module.get_submodule(name)

        def catch(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append((args, kwargs))

        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for call in self.calls:
                self.run(call)
                yield from caught
                caught.clear()
        finally:
            handle.remove()

    def _check(self, name: str, x: Tensor) -> None:
        # A finite sum has finite terms; only a suspicious one costs a full look.
        if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).sum())
            raise ValueError(
                f"{self.name}.{name}: {bad} NaN or infinite inputs on the calibration text; "
                "a weight before it is broken, or the model overflows: load it in float32"
            )


def _nothing(layer: nn.Linear) -> Stats:
    return Stats.of(torch.empty(0, layer.in_features, device=layer.weight.device))


def _shared(stats: dict[str, Stats]) -> dict[str, Stats]:
    """The same statistics, equal ones as one object."""
    distinct: list[Stats] = []
    shared = {}
    for name, one in stats.items():
        equal = (other for other in distinct if torch.equal(other.hessian, one.hessian))
        shared[name] = next(equal, one)
        if shared[name] is one:
            distinct.append(one)
    return shared


@contextlib.contextmanager
def _listening(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]):
    """While open, `see(name, x)` is called with the input x of every layer that runs."""
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: see(name, read_by(layer, args[0]))
        )
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
