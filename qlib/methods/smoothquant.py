"""SmoothQuant: hand the outliers of activations to the weights, which are easier to round.

A channel in which activations are large is divided by s, and the weights that read it are
multiplied by s. Where s is folded into what writes the channel, the function of the model and its
cost stay the same; what changes is which of the two sides has the wide range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..activations import Inputs
from ..block import Block, Stats
from ..fold import Fold, folds_before, rescale
from ..qtensor import Format, QTensor

ALPHAS = tuple(step / 10 for step in range(10))
SEARCH_TOKENS = 512
# The authors' code takes no scale as smaller than this.
LEAST_SCALE = 1e-5

Rows = Float[Tensor, "tokens in"]
Rounding = Callable[[Tensor, Format, Stats], QTensor]


@torch.no_grad()
def smoothquant(
    block: Block, formats: Mapping[str, Format], alpha: float | None = 0.5,
    norms_only: bool = False, rounding: Rounding | None = None,
) -> dict[str, QTensor]:  # fmt: skip
    """Move the range of large activations into the weights of a block, then round the weights.

    Args:
        block: a decoder block with calibration calls. Its norms, value and up projections are
            changed to carry 1/s, and the weights s: the result is an ordinary checkpoint.
        formats: the format of every linear layer that is to be quantized, by its name in the block.
        alpha: how much of the range moves: at 0 all weights of a layer get one range, at 1 all
            activations do. None searches for the best in every fold (`search_alpha`).
        norms_only: fold into norms alone, as the paper does; what o and down read stays as it is.
        rounding: chooses the codes of (weight, format, stats), with the statistics of the smoothed
            inputs; None rounds to nearest.

    Warns of layers whose inputs cannot be smoothed; they are quantized as they are. Raises
    ValueError unless `alpha` is between 0 and 1.

    Source: Xiao et al., arXiv 2211.10438, section 4, equations 3 and 4.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, or None to search, got {alpha}")
    stats, layers = block.stats(), formats.keys() | block.activations.keys()
    found = folds_before(block, layers, "smoothquant cannot smooth", "quantized")
    # What divides rows of v and up comes first: the norms before them see the new ranges.
    for fold in sorted(found, key=_is_after_norm):
        if norms_only and not _is_after_norm(fold):
            continue
        seen = stats[fold.consumers[0]]
        strength = search_alpha(fold, block, formats, seen) if alpha is None else alpha
        scales = smoothing_scales(fold, seen, strength)
        rescale(fold, scales)
        stats |= dict.fromkeys(fold.consumers, _smoothed(seen, scales[fold.columns]))
    rounding = rounding or (lambda weight, format, _: format.quantize(weight))
    return {n: rounding(block.linears[n].weight, f, stats[n]) for n, f in formats.items()}


def smoothing_scales(fold: Fold, stats: Stats, alpha: float) -> Float[Tensor, " channels"]:
    """s = max|x|^alpha / max|w|^(1 - alpha) of every channel, over all the weights that read it.

    Channels that are always zero, or that no weight reads, get 1.

    Args:
        fold: whose consumers' weights are looked at.
        stats: what the consumers read.
        alpha: as in `smoothquant`.

    Source: Xiao et al., arXiv 2211.10438, equation 4.
    """
    weights = [fold.module.get_submodule(name).weight.float() for name in fold.consumers]
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    inputs, columns = _per_channel(fold, stats.amax), _per_channel(fold, columns)
    scales = (inputs**alpha / columns ** (1 - alpha)).clamp(min=LEAST_SCALE)
    return scales.where((inputs > 0) & (columns > 0), 1.0)


def search_alpha(fold: Fold, block: Block, formats: Mapping[str, Format], stats: Stats) -> float:
    """The alpha of `ALPHAS` with which the layers that read the fold have the least output error.

    Weights are rounded to nearest in `formats`, and inputs as `block.activations` says. Every token
    counts by its error relative to its own output, as the next norm sees it: a first token of
    a thousand times the size would otherwise decide alone. Calibration gives the first
    `SEARCH_TOKENS` tokens, and `stats` the range of static inputs.
    """
    x, losses = _first_tokens(block, fold.consumers[0]), {}
    weights = {name: block.linears[name].weight for name in fold.consumers}
    outputs = {name: x @ weight.float().T for name, weight in weights.items()}
    for alpha in ALPHAS:
        columns = smoothing_scales(fold, stats, alpha)[fold.columns]
        losses[alpha] = 0.0
        for name, weight in weights.items():
            inputs = _ready(block.activations.get(name), stats, columns)
            y = _output(weight, formats.get(name), inputs, x, columns)
            losses[alpha] += _relative_error(y, outputs[name])
    return min(losses, key=losses.__getitem__)


def _output(
    weight: Tensor, format: Format | None, inputs: Inputs | None, x: Rows,
    columns: Float[Tensor, " in"],
) -> Float[Tensor, "tokens out"]:  # fmt: skip
    """What the quantized layer puts out if columns of its weight, and x, are rescaled first."""
    # The model's own type may round the rescaled weight, too.
    weight, x = (weight.float() * columns).to(weight.dtype), x / columns
    rounded = weight.float() if format is None else format.quantize(weight).dequantize()
    return (x if inputs is None else inputs.rounded(x)) @ rounded.T


def _relative_error(y: Tensor, original: Tensor) -> float:
    """The mean over tokens of the squared error relative to the token's own output."""
    size = original.square().sum(dim=1).clamp(min=torch.finfo(y.dtype).tiny)
    return ((y - original).square().sum(dim=1) / size).mean().item()


def _ready(inputs: Inputs | None, stats: Stats, columns: Float[Tensor, " in"]) -> Inputs | None:
    if inputs is None or inputs.is_ready:
        return inputs
    return inputs.observed(*_smoothed(stats, columns).ends)


def _first_tokens(block: Block, name: str) -> Rows:
    rows, count = [], 0
    for args, _ in block.inputs(name):
        rows.append(args[0].flatten(0, -2).float())
        count += len(rows[-1])
        if count >= SEARCH_TOKENS:
            break
    return torch.cat(rows)[:SEARCH_TOKENS]


def _smoothed(stats: Stats, columns: Float[Tensor, " in"]) -> Stats:
    """The statistics of x / columns."""
    hessian = stats.hessian / columns / columns.unsqueeze(1)
    sizes = (x / columns for x in (stats.mean_abs, stats.low, stats.high))
    return Stats(hessian, *sizes, stats.tokens)


def _per_channel(fold: Fold, columns: Float[Tensor, " in"]) -> Float[Tensor, " channels"]:
    """The largest over all the columns that read a channel."""
    found = columns.new_zeros(fold.channels)
    return found.scatter_reduce_(0, fold.columns, columns, "amax")


def _is_after_norm(fold: Fold) -> bool:
    return not isinstance(fold.module.get_submodule(fold.producer), nn.Linear)
