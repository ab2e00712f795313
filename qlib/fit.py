"""How a block's scale and offset are found.

A fit is a plain function `fit(blocks, grid, importance) -> (scale, offset)`: `blocks` [n, size]
holds one block a row, `scale` [n] maps grid values to weights, and `offset` [n] is the weight that
grid value zero stands for (None for symmetric fits). How precisely both are *stored* is not
decided here but by the Scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from .grid import Grid

Blocks = Float[Tensor, "n size"]
Scales = Float[Tensor, " n"]
LOWEST = -1000  # an exponent below all that a float32 or a scale can have
Fit = Callable[[Tensor, Grid, Tensor | None], tuple[Tensor, Tensor | None]]


def absmax(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The largest magnitude lands on the grid's largest value: nothing is clipped.

    >>> from qlib.grid import int_grid
    >>> absmax(torch.tensor([[-7.0, 3.5]]), int_grid(4))[0]
    tensor([1.])
    """
    return _amax(blocks) / grid.max, None


def absmax_signed(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The largest magnitude, with its sign, lands on the grid's most negative value.

    A signed integer grid has one more value below zero than above; this spends it on the extreme
    weight (GGML's Q4_0 and Q5_0). The scale may be negative.
    """
    low, high = blocks.aminmax(dim=1)
    return torch.where(high > -low, high, low) / grid.min, None


def minmax(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The range from the smallest to the largest weight, zero included, spans the grid.

    Zero is included so that an integer zero point exists (Jacob et al., arXiv 1712.05877, eq. 1).
    """
    low, high = blocks.aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (grid.max - grid.min)
    return scale, low - grid.min * scale


def own_range(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The range from the smallest to the largest weight spans the grid, whether or not it holds 0.

    KIVI (arXiv 2402.02750, section 2.1): scale = (max - min) / (2^bits - 1), offset = min. A
    channel of keys far from zero loses nothing to its distance, which `minmax` would pay.

    >>> from qlib.grid import GRIDS
    >>> own_range(torch.tensor([[5.0, 6.0, 8.0]]), GRIDS["uint2"])
    (tensor([1.]), tensor([5.]))
    """
    low, high = blocks.aminmax(dim=1)
    scale = (high - low) / (grid.max - grid.min)
    return scale, low - grid.min * scale


def mse(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The shrunken `absmax` scale of least (importance-weighted) squared error."""
    return _search(absmax, blocks, grid, importance)


def minmax_mse(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The shrunken `minmax` range of least (importance-weighted) squared error."""
    return _search(minmax, blocks, grid, importance)


def absmean(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The mean magnitude is the scale (BitNet b1.58, arXiv 2402.17764, eq. 3)."""
    return blocks.abs().mean(dim=1), None


def rms(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The root of the mean square is the scale: every block gets the variance 1.

    This suits grids made for that variance (`qlib.grid.lloyd_max`): TurboQuant (arXiv 2504.19874,
    section 3.1) stores the norm of each vector and rounds the coordinates of what remains.
    """
    # Squares of the largest float32 overflow; those of the ratios to it do not.
    amax = _amax(blocks)
    ratios = blocks / amax.masked_fill(amax == 0, 1)[:, None]
    return amax * ratios.square().mean(dim=1).sqrt(), None


def zero_anchored(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The range spans the grid, moved so that zero and the end of larger magnitude are exact.

    MLX's affine rule (`mx.quantize`): a whole number of steps separates that end from zero. The end
    has code 0, so the scale is negative where it is the upper one; and unlike `minmax`, the range
    need not include zero, which is then a multiple of the scale away.

    >>> from qlib.grid import int_grid
    >>> zero_anchored(torch.tensor([[-1.0, 14.5]]), int_grid(4, signed=False))
    (tensor([-1.0357]), tensor([14.5000]))
    """
    low, high = blocks.aminmax(dim=1)
    below = low.abs() > high.abs()
    step = ((high - low) / (grid.max - grid.min)).clamp(min=1e-7)
    step, end = torch.where(below, step, -step), torch.where(below, low, high)
    steps = (end / step).round()
    scale = torch.where(steps == 0, step, end / steps)
    return scale, torch.where(steps == 0, 0, end) - grid.min * scale


def four_over_six(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The largest magnitude lands on the grid's largest value or on the one below: 6 or 4 for FP4.

    The scale of least (importance-weighted) squared error is kept, after rounding it to four
    significant bits. That is how E4M3 stores it if the scale of the whole tensor is a power of two
    (`pow2_rceil`) and the block's largest weight is at least 2^-13 of the tensor's, so errors are
    compared under the scales as stored. "Four Over Six", arXiv 2512.02010.
    """
    amax, values = _amax(blocks), grid.points[grid.points.isfinite()].unique()
    scales = [_four_significant_bits(amax / value) for value in values[[-1, -2]].tolist()]
    return _least(((scale, None) for scale in scales), blocks, grid, importance)


def pow2_floor(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """2^(floor(log2 amax) - emax): the OCP MX v1.0 rule (section 6.3); the top may be clipped."""
    return _exp2(_floor_log2(_amax(blocks)) - _emax(grid)), None


def pow2_ceil(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """2^(ceil(log2 amax) - emax): never clips, wastes up to one bit of range."""
    return _exp2(_ceil_log2(_amax(blocks)) - _emax(grid)), None


def pow2_even(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """As `pow2_floor`, after rounding amax to the element's mantissa width."""
    amax, bits = _amax(blocks), _mantissa_bits(grid)
    mantissa, exponent = torch.frexp(amax)
    # frexp's mantissa lies in [0.5, 1): if it rounds up to 1, the exponent grows by one.
    carry = (mantissa * 2 ** (bits + 1) + 0.5).floor() >= 2 ** (bits + 1)
    exponent = (exponent - 1 + carry.int()).masked_fill(amax == 0, LOWEST)
    return _exp2(exponent - _emax(grid)), None


def pow2_rceil(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """2^ceil(log2(amax / grid max)): the smallest power of two that clips nothing."""
    return _exp2(_ceil_log2(_amax(blocks) / grid.max)), None


def pow2_mse(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """The power of two of least (importance-weighted) squared error.

    The exponents from one below `pow2_floor`'s to one above `pow2_ceil`'s are tried.
    """
    exponent = _floor_log2(_amax(blocks)) - _emax(grid)
    tried = ((_exp2(exponent + more), None) for more in (-1, 0, 1, 2))
    return _least(tried, blocks, grid, importance)


FITS: dict[str, Fit] = {
    fit.__name__: fit
    for fit in (
        *(absmax, absmax_signed, minmax, mse, minmax_mse, absmean, rms, zero_anchored),
        *(four_over_six, pow2_floor, pow2_ceil, pow2_even, pow2_rceil, pow2_mse),
    )
}


def _amax(blocks: Tensor) -> Tensor:
    low, high = blocks.aminmax(dim=1)
    return torch.maximum(high.abs(), low.abs())


def _search(base: Fit, blocks: Tensor, grid: Grid, importance: Tensor | None):
    """Try 60 ranges from all of `base`'s down to a tenth of it; keep each block's best."""
    scale, offset = base(blocks, grid, None)
    shrinks = torch.linspace(1.0, 0.1, 60).tolist()
    tried = ((scale * x, None if offset is None else offset * x) for x in shrinks)
    return _least(tried, blocks, grid, importance)


def _least(
    tried: Iterable[tuple[Tensor, Tensor | None]], blocks: Tensor, grid: Grid,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Of the scales and offsets tried, each block's pair of least error, the first of equals."""
    scale = offset = least = None
    for s, o in tried:
        error = _squared_error(blocks, grid, s, o, importance)
        if least is None:
            scale, offset, least = s, o, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, s, scale)
        offset = None if o is None else torch.where(better, o, offset)
    return scale, offset


def _squared_error(blocks, grid, scale, offset, importance) -> Tensor:
    safe = scale.masked_fill(scale == 0, 1).unsqueeze(1)
    # An integer zero point is what will be stored, so the search rounds it too.
    shift = 0 if offset is None else torch.round(-offset.unsqueeze(1) / safe)
    x = blocks / safe
    error = (grid.decode(grid.round_finite(x + shift)) - shift - x).mul_(safe).square_()
    return (error if importance is None else error * importance).sum(dim=1)


def _four_significant_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)


def _floor_log2(x: Tensor) -> Tensor:
    """Exact: read from the exponent field, never from a floating-point logarithm. A block of zeros
    gets the lowest of all, as torchao and compressed-tensors have it."""
    return (torch.frexp(x).exponent - 1).masked_fill(x == 0, LOWEST)


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return (exponent - (mantissa == 0.5).int()).masked_fill(x == 0, LOWEST)


def _exp2(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-127, 127))


def _emax(grid: Grid) -> int:
    return int(_floor_log2(torch.tensor(grid.max)))


def _mantissa_bits(grid: Grid) -> int:
    """Explicit mantissa bits: an octave of a float grid holds 2^mantissa values."""
    octave = grid.points[(grid.points >= 1) & (grid.points < 2)]
    return len(octave).bit_length() - 1
