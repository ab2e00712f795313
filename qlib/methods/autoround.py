"""AutoRound: learn, block by block, which weights to round up and which to round down.

Rounding to nearest decides for every weight alone. Here all linear layers of a decoder block decide
together, by signed gradient descent on the block's output error, and so do the ends of the ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from ..block import Block, Call
from ..grid import Grid
from ..progress import bar
from ..qtensor import QTensor
from ..scheme import Scheme

Weight = Float[Tensor, "out in"]
Blocks = Float[Tensor, "rows blocks size"]

# A range may shrink to half of what was fitted. It never grows, so no scale can overflow.
CLIP = (0.5, 1.0)


@torch.no_grad()
def autoround(
    block: Block, formats: Mapping[str, Scheme], steps: int = 200,
    learning_rate: float | None = None, batch: int = 4, seed: int = 0, ranges: bool = True,
    progress: bool = False,
) -> dict[str, QTensor]:  # fmt: skip
    """Learn the rounding and the ranges of a block's weights from the block's output error.

    The error is measured against `block.targets`, what the block puts out in the original model, or
    without them against what it puts out for its calibration calls before its weights are rounded.

    Args:
        block: a decoder block with calibration calls.
        formats: name of a linear layer in the block -> Scheme.
        steps: signed gradient steps, each on `batch` random windows of the calibration, run
            together; how the block's calls batch them does not matter.
        learning_rate: how far the first step moves a rounding offset, in steps of the grid, and a
            clip factor; it falls to zero linearly. The default, 1 / steps, adds up to half a step.
        seed: of the draws; ranges: learn the clip factors too; progress: show a bar over the steps.

    The result is the best over all windows of round-to-nearest, the last step, and the step with
    the least error on its own windows relative to round-to-nearest's. Raises ValueError for
    settings below 1, formats that are not a Scheme, and blocks without calls or finite output.

    Source: Cheng et al., arXiv 2309.05516, section 3 (SignRound).
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"need steps >= 1 and batch >= 1, got steps={steps}, batch={batch}")
    for name, format in formats.items():
        if not isinstance(format, Scheme):
            raise ValueError(f"{name}: autoround needs a Scheme, got {format}; use method='rtn'")
    linears, generator = block.linears, torch.Generator().manual_seed(seed)
    nearest = {name: format.quantize(linears[name].weight) for name, format in formats.items()}
    layers = {name: Rounding(linears[name].weight, format) for name, format in formats.items()}
    windows = [one for call in block.calls for one in _windows(call)]
    given = [row for output in block.targets or () for row in output.split(1)]
    pairs = list(zip(windows, given or map(block.run, windows)))
    if not pairs:
        raise ValueError("autoround needs calibration: calibrated_blocks(model, calibration)")
    if not all(bool(target.isfinite().all()) for _, target in pairs):
        raise ValueError("the block's output on the calibration text is not finite")
    start, found, least = _errors(block, nearest, pairs, batch), nearest, 1.0
    for step in bar(range(steps), "rounding", "step", progress):
        # In order, so that windows of one length lie together.
        chosen = sorted(torch.randperm(len(pairs), generator=generator)[:batch].tolist())
        weights = {name: layer.quantize().requires_grad_() for name, layer in layers.items()}
        with torch.enable_grad():
            loss = _errors(block, weights, [pairs[i] for i in chosen], batch).sum()
        loss.backward(inputs=[*weights.values()])
        ratio = loss / start[chosen].sum()
        if ratio < least:
            found, least = {name: layer.qtensor() for name, layer in layers.items()}, ratio
        rate = (1 / steps if learning_rate is None else learning_rate) * (1 - step / steps)
        for name, layer in layers.items():
            # An expert that these windows do not reach has no gradient.
            if weights[name].grad is not None:
                layer.move(weights[name].grad, rate, rate if ranges else 0.0)
    last = {name: layer.qtensor() for name, layer in layers.items()}
    totals = [(_errors(block, each, pairs, batch).sum(), each) for each in (found, last)]
    return min([(start.sum(), nearest), *totals], key=lambda total: total[0])[1]


class Rounding:
    """One weight and what is learned about it: V (`shift`), and alpha and beta (`clip`).

    `shift` is added to weight / scale before rounding, in gaps between grid points; `clip` holds
    factors on the low and the high end of every block's range, one for both if it is symmetric.
    """

    def __init__(self, weight: Weight, format: Scheme):
        self.format, self.shape, grid = format, tuple(weight.shape), format.grid
        self.weight = _blocks(format, weight.detach().float())
        self.scale, self.offset = format.fit_blocks(format.rows(weight.detach().float()))
        base = torch.zeros_like(self.scale) if self.offset is None else self.offset
        self.ends = torch.stack([base + grid.min * self.scale, base + grid.max * self.scale])
        self.shift = torch.zeros_like(self.weight)
        self.clip = torch.ones_like(self.ends[: 1 if self.offset is None else 2])
        self.gap = _gap(grid, (self.weight - base[..., None]) / self.scale[..., None])

    def stored(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The parts that store the clipped ranges; scale and offset as read back from them."""
        # As changes, so that factors of one leave exactly what was fitted.
        (low, high), grid = self.ends * (self.clip - 1), self.format.grid
        change = (high - low) / (grid.max - grid.min)
        offset = None if self.offset is None else self.offset + low - grid.min * change
        parts = self.format.store(self.scale + change, offset)
        return parts, *self.format.read(parts, self.shape)

    def codes(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """The nearest grid points after the shift, in the arrangement of `format.rows`."""
        moved = torch.addcmul(self.weight, self.shift, self.gap * scale[..., None])
        rows = moved.flatten(1)[:, : math.prod(self.shape) // len(moved)]
        return self.format.round(rows, scale, offset)

    def qtensor(self) -> QTensor:
        """The weight as it is stored."""
        parts, scale, offset = self.stored()
        parts["codes"] = self.format.pack(self.codes(scale, offset), self.shape)
        names = self.format.layout(self.shape)
        return QTensor(self.format, self.shape, {name: parts[name] for name in names})

    def quantize(self) -> Weight:
        """What `qtensor().dequantize()` gives, without packing; `gradients` belong to it."""
        _, scale, offset = self.stored()
        value = self.format.values(self.codes(scale, offset), scale, offset).view(self.shape)
        base = torch.zeros_like(scale) if offset is None else offset
        self.last = value, scale, -base * scale if isinstance(self.format.offset, Grid) else base
        return value

    def gradients(self, gradient: Weight) -> tuple[Blocks, Float[Tensor, "ends rows blocks"]]:
        """Gradients by `shift` and by `clip` of a loss whose gradient by `quantize()` is given.

        value = q * scale + base, with rounding as the identity. A clipped weight follows its end: q
        by the scale, 1 by the base. Others: (value - w) / scale by the scale, and scale by V.
        """
        grid, (value, scale, base) = self.format.grid, self.last
        middle, reach = (grid.max + grid.min) / 2 * scale, (grid.max - grid.min) / 2 * scale.abs()
        inside = (self.weight - (base + middle)[..., None]).abs_().le_(reach[..., None])
        every = _blocks(self.format, gradient)
        free = inside.mul_(every)
        by_base = every.sum(-1) - free.sum(-1)
        moments = (every * _blocks(self.format, value)).addcmul_(free, self.weight, value=-1)
        by_scale = (moments.sum(-1) - base * by_base) / scale.masked_fill(scale == 0, 1)
        by_high = (by_scale - grid.min * by_base) / (grid.max - grid.min)
        by_clip = torch.stack([by_base - by_high, by_high]) * self.ends
        return free.mul_(self.gap * scale[..., None]), by_clip.sum_to_size(self.clip.shape)

    def move(self, gradient: Weight, rate: float, clip_rate: float) -> None:
        """One step of signed gradient descent."""
        by_shift, by_clip = self.gradients(gradient)
        self.shift.sub_(by_shift.sign_(), alpha=rate).clamp_(-0.5, 0.5)
        self.clip.sub_(by_clip.sign_(), alpha=clip_rate).clamp_(*CLIP)


def _blocks(format: Scheme, x: Tensor) -> Blocks:
    """`x` cut into blocks of one size: a ragged tail is filled up with zeros."""
    rows = format.rows(x)
    size = format.block if type(format.block) is int else rows.shape[1]
    tail = -rows.shape[1] % size
    return (F.pad(rows, (0, tail)) if tail else rows).unflatten(1, (-1, size))


def _gap(grid: Grid, x: Blocks) -> Tensor:
    """The distance of the two grid points around x: one number on an even grid."""
    points = grid.points[grid.points.isfinite()].unique().to(x.device)
    gaps = points.diff()
    uneven = bool((gaps != gaps[0]).any())
    return gaps[torch.bucketize(x, points).clamp_(1, len(gaps)) - 1] if uneven else gaps[0]


def _mapped(change: Callable[..., Tensor], *calls: Call) -> Call:
    """A call of what `change` makes of everything in `calls` that has a batch dimension."""

    def each(x, *others):
        if isinstance(x, tuple):
            return tuple(map(each, x, *others))
        # Tables [time, features] have none, even if the batch is as large as the window.
        has_batch = isinstance(x, Tensor) and x.ndim > 2 and len(x) == len(calls[0].hidden)
        return change(x, *others) if has_batch else x

    kwargs = {k: each(*(call.kwargs[k] for call in calls)) for k in calls[0].kwargs}
    return Call(*(each(*x) for x in zip(*((call.hidden, call.args) for call in calls))), kwargs)


def _windows(call: Call) -> list[Call]:
    """Every window of a call as a call of its own."""
    return [_mapped(lambda x, i=i: x[i : i + 1], call) for i in range(len(call.hidden))]


def _together(pairs: list, most: int) -> Iterator[tuple[Call, Tensor]]:
    """Neighboring (window, target) pairs of one length as one, at most `most` at a time."""
    for _, same in groupby(pairs, lambda pair: pair[0].hidden.shape):
        calls, targets = zip(*same)
        for some in (slice(i, i + most) for i in range(0, len(calls), most)):
            yield _mapped(lambda *x: torch.cat(x), *calls[some]), torch.cat(targets[some])


def _errors(block: Block, weights: Mapping, pairs: list, most: int) -> Float[Tensor, " pairs"]:
    """The squared error of the block's output in every (window, target) pair, `most` at once."""
    named, errors = {}, []
    for name, weight in weights.items():
        value = weight.dequantize() if isinstance(weight, QTensor) else weight
        named[f"{name}.weight"] = value.to(block.module.get_submodule(name).weight.dtype)
    for call, target in _together(pairs, most):
        output = functional_call(block.module, named, (call.hidden, *call.args), call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        error = F.mse_loss(output.float(), target.float(), reduction="none")
        errors.append(error.flatten(1).sum(1))
    return torch.cat(errors)
