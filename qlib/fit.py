"""How a block's scale and offset are found.

A fit is a plain function `fit(blocks, grid, importance) -> (scale, offset)`: `blocks` [n, size]
holds one block a row, `scale` [n] maps grid values to weights, and `offset` [n] is the weight that
grid value zero stands for (None for symmetric fits). How precisely both are *stored* is not
decided here but by the Scheme.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .grid import Grid

Blocks = Float[Tensor, "n size"]
Scales = Float[Tensor, " n"]
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
    return _exp2(exponent - 1 + carry.int() - _emax(grid)), None


def pow2_rceil(
    blocks: Blocks, grid: Grid, importance: Blocks | None = None
) -> tuple[Scales, Scales | None]:
    """2^ceil(log2(amax / grid max)): the smallest power of two that clips nothing."""
    return _exp2(_ceil_log2(_amax(blocks) / grid.max)), None


FITS: dict[str, Fit] = {
    fit.__name__: fit
    for fit in (
        *(absmax, absmax_signed, minmax, mse, minmax_mse, absmean),
        *(pow2_floor, pow2_ceil, pow2_even, pow2_rceil),
    )
}


def _amax(blocks: Tensor) -> Tensor:
    low, high = blocks.aminmax(dim=1)
    return torch.maximum(high, -low)


def _search(base: Fit, blocks: Tensor, grid: Grid, importance: Tensor | None):
    """Try 60 ranges from all of `base`'s down to a tenth of it; keep each block's best."""
    full_scale, full_offset = base(blocks, grid, None)
    best = torch.full_like(full_scale, torch.inf)
    scale, offset = full_scale.clone(), None if full_offset is None else full_offset.clone()
    for shrink in torch.linspace(1.0, 0.1, 60).tolist():
        s = full_scale * shrink
        o = None if full_offset is None else full_offset * shrink
        error = _squared_error(blocks, grid, s, o, importance)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        if o is not None:
            offset = torch.where(better, o, offset)
    return scale, offset


def _squared_error(blocks, grid, scale, offset, importance) -> Tensor:
    safe = scale.masked_fill(scale == 0, 1).unsqueeze(1)
    # An integer zero point is what will be stored, so the search rounds it too.
    shift = 0 if offset is None else torch.round(-offset.unsqueeze(1) / safe)
    x = blocks / safe
    error = (grid.decode(grid.round_finite(x + shift)) - shift - x).mul_(safe).square_()
    return (error if importance is None else error * importance).sum(dim=1)


def _floor_log2(x: Tensor) -> Tensor:
    """Exact: read from the exponent field, never from a floating-point logarithm."""
    return torch.frexp(x).exponent - 1


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).int()


def _exp2(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-127, 127))


def _emax(grid: Grid) -> int:
    return int(_floor_log2(torch.tensor(grid.max)))


def _mantissa_bits(grid: Grid) -> int:
    """Explicit mantissa bits: an octave of a float grid holds 2^mantissa values."""
    octave = grid.points[(grid.points >= 1) & (grid.points < 2)]
    return len(octave).bit_length() - 1
