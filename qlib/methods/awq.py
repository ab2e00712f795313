"""AWQ: give the input channels that carry large activations finer steps, by rescaling them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..block import Block, Stats
from ..fold import Fold, folds_before, rescale
from ..qtensor import QTensor
from ..scheme import Scheme

SHRINKS = torch.linspace(1.0, 0.5, 20).tolist()
# No channel's magnitude is taken as smaller than this, however rarely it is active.
LEAST_MAGNITUDE = 1e-4

Weight = Float[Tensor, "out in"]
Hessian = Float[Tensor, "in in"]


@torch.no_grad()
def awq(
    block: Block, formats: Mapping[str, Scheme], clip: bool = False, grid: int = 20
) -> dict[str, QTensor]:
    """Rescale the channels of a block where that lowers its output error, then round to nearest.

    A weight that is multiplied by s before it is rounded and divided by s afterwards has its error
    divided by s, as long as it does not widen the range of its group. For every place in the block
    where s can be folded into what comes before, s = mean|x|^r, and a grid search finds r.

    Args:
        block: a decoder block with calibration calls. Its norms, value and up projections are
            changed to carry 1/s, and the weights s: the result is an ordinary checkpoint.
        formats: the Scheme of every linear layer that is to be quantized, by its name in the block.
        clip: also search how far to shrink the range of every block of weights.
        grid: how many exponents to try: r = 0, 1/grid, 2/grid, ...; 0 is round-to-nearest.

    Warns of layers whose input channels cannot be rescaled; they are only rounded to nearest, or
    clipped. Raises ValueError if `grid` is below 1, and for formats that cannot be clipped.

    Source: Lin et al., arXiv 2306.00978, section 3.2, equations 4 and 5.
    """
    _check(formats, clip, grid)
    stats = block.stats()
    hessians = {name: stats[name].hessian for name in formats}
    found = folds_before(block, formats.keys(), "awq cannot rescale", "rounded")
    # The order does not matter: a fold changes nothing that the layers of another one read, and
    # dividing a row of v or up by s divides its scales and its rounding error by s, too.
    for fold in found:
        scales = search_scales(fold, formats, stats[fold.consumers[0]], grid)
        rescale(fold, scales)
        columns = scales[fold.columns]
        for name in formats.keys() & {*fold.consumers}:
            hessians[name] = hessians[name] / columns / columns.unsqueeze(1)
    weights = {name: block.linears[name].weight for name in formats}
    if clip:
        return {n: clip_ranges(w, formats[n], hessians[n]) for n, w in weights.items()}
    return {name: formats[name].quantize(weight) for name, weight in weights.items()}


def search_scales(
    fold: Fold, formats: Mapping[str, Scheme], stats: Stats, grid: int = 20
) -> Float[Tensor, " channels"]:
    """The scales s = mean|x|^r of least output error, summed over the layers that read them.

    The error of a layer is tr(E H E^T), where E is what rounding does to its weight: its mean
    squared output error over all calibration tokens, exact however they are batched.

    Args:
        fold: whose consumers are measured, those of them that `formats` names.
        formats: as in `awq`.
        stats: what the consumers read.
        grid: as in `awq`.
    """
    names = [name for name in fold.consumers if name in formats]
    layers = [(fold.module.get_submodule(name).weight, formats[name]) for name in names]
    magnitude = _magnitude(fold, stats).clamp(min=LEAST_MAGNITUDE)
    best, least = None, math.inf
    for step in range(grid):
        scales = magnitude ** (step / grid)
        scales = scales / (scales.max() * scales.min()).sqrt()
        columns = scales[fold.columns]
        errors = (_rounding_error(w, format, columns) for w, format in layers)
        loss = sum(output_error(error, stats.hessian).sum().item() for error in errors)
        if loss < least:
            best, least = scales, loss
    return best


def output_error(error: Weight, hessian: Hessian) -> Float[Tensor, " out"]:
    """Mean squared output error of every row, e H e^T, in float64."""
    return ((error @ hessian) * error).sum(dim=1, dtype=torch.float64)


def clip_ranges(
    weight: Weight, format: Scheme, hessian: Hessian, shrinks: Sequence[float] = SHRINKS
) -> QTensor:
    """Round to nearest after clamping every block of weights to the best part of its range.

    A block's candidates are judged by e H e^T of the block alone, its own square of the Hessian.
    A row whose blocks together do worse than without clipping is left as it was, so that the
    error of the whole layer is never above that of round-to-nearest.

    Args:
        weight: [out, in]; hessian: [in, in], of the inputs of this weight.
        format: any Scheme; the result is an ordinary tensor of it.
        shrinks: the shares of a range to try.
    """
    weight = weight.float()
    plain = format.quantize(weight)
    size = format.block if type(format.block) is int else weight.shape[1]
    blocks, grams = _blocks(weight, size), _diagonal_blocks(hessian, size)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    if format.offset is None:
        high = torch.maximum(high, -low)
        low = -high
    best, least = blocks, torch.full(blocks.shape[:2], math.inf, device=weight.device)
    for shrink in shrinks:
        clamped = blocks.clamp(low * shrink, high * shrink)
        q = format.quantize(clamped.flatten(1)[:, : weight.shape[1]])
        error = blocks - _blocks(q.dequantize(), size)
        loss = torch.einsum("rgi,gij,rgj->rg", error, grams, error)
        best = torch.where((loss < least).unsqueeze(-1), clamped, best)
        least = torch.minimum(loss, least)
    return _better_rows(weight, best.flatten(1)[:, : weight.shape[1]], plain, format, hessian)


def _better_rows(
    weight: Weight, clamped: Weight, plain: QTensor, format: Scheme, hessian: Hessian
) -> QTensor:
    def losses(q: QTensor) -> Tensor:
        return output_error(weight - q.dequantize(), hessian)

    worse = losses(format.quantize(clamped)) > losses(plain)
    mixed = format.quantize(torch.where(worse.unsqueeze(1), weight, clamped))
    # Where rows share a scale, one row's choice moves the others.
    return min(mixed, plain, key=lambda q: losses(q).sum().item())


def _rounding_error(weight: Tensor, format: Scheme, columns: Float[Tensor, " in"]) -> Weight:
    """What rounding does to the weight if `rescale` has multiplied its columns first."""
    # The model's own type may round the scaled weight, too.
    scaled = (weight.float() * columns).to(weight.dtype)
    return weight.float() - format.quantize(scaled).dequantize() / columns


def _magnitude(fold: Fold, stats: Stats) -> Float[Tensor, " channels"]:
    """mean|x| of every channel, over all the columns that read it."""
    total = stats.mean_abs.new_zeros(fold.channels)
    readers = len(fold.columns) / fold.channels
    return total.index_add_(0, fold.columns, stats.mean_abs) / readers


def _blocks(weight: Weight, size: int) -> Float[Tensor, "out blocks size"]:
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def _diagonal_blocks(hessian: Hessian, size: int) -> Float[Tensor, "blocks size size"]:
    tail = -len(hessian) % size
    grid = F.pad(hessian, (0, tail, 0, tail)).unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _check(formats: Mapping[str, Scheme], clip: bool, grid: int) -> None:
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    for name, format in formats.items():
        if clip and not isinstance(format, Scheme):
            raise ValueError(f"{name}: clipping needs a Scheme, got {format}; use method='awq'")
