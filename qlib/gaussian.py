"""Points that suit Gaussian weights: quantiles (NF4 and its kind) and the Lloyd-Max quantizer."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def normal_quantiles(bits: int) -> Float[Tensor, " points"]:
    """2^bits quantiles of a Gaussian with an exact zero, divided by the largest, ascending.

    QLoRA, arXiv 2305.14314, section 3: evenly spaced probabilities, one more above zero than below.
    The outermost probability is bitsandbytes' choice: half way between 1 - 1 / 2n and
    1 - 1 / 2(n - 1) with n = 2^bits, the middles of the last of n and of n - 1 equal shares.

    >>> normal_quantiles(2)
    tensor([-1.0000,  0.0000,  0.4358,  1.0000])
    """
    codes = 2**bits
    last = 1 - (1 / (2 * codes) + 1 / (2 * codes - 2)) / 2
    above, below = (_falling_quantiles(last, count) for count in (codes // 2, codes // 2 - 1))
    points = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (points / points.max()).float()


def _falling_quantiles(last: float, count: int) -> Tensor:
    """Gaussian quantiles of `count` even steps of probability from `last` down to above 1/2."""
    return torch.special.ndtri(torch.linspace(last, 0.5, count + 1, dtype=torch.float64)[:-1])


def lloyd_max_levels(bits: int) -> Float[Tensor, " points"]:
    """The 2^bits levels of least mean squared error for a Gaussian of variance 1, ascending.

    Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM",
    1982: every level is the mean of the values that are rounded to it. Newton's iteration on those
    equations starts at the asymptotic levels (Panter and Dite, 1951: a density as the cube root of
    the Gaussian's), from which five steps reach float64's precision.

    >>> lloyd_max_levels(2)
    tensor([-1.5104, -0.4528,  0.4528,  1.5104])
    """
    count = 2 ** (bits - 1)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri(0.5 + shares / 2)
    for _ in range(5):
        means, slope = _cell_means(levels)
        identity = torch.eye(count, dtype=torch.float64)
        levels = levels - torch.linalg.solve(identity - slope, levels - means)
    return torch.cat([-levels.flip(0), levels]).float()


def _cell_means(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each positive cell of a Gaussian, and its derivative by each level."""
    middles = (levels[1:] + levels[:-1]) / 2
    ends = torch.cat([torch.zeros_like(levels[:1]), middles, torch.full_like(levels[:1], math.inf)])
    density = torch.exp(-(ends**2) / 2) / math.sqrt(2 * math.pi)
    mass = -torch.special.ndtr(-ends).diff()
    means = -density.diff() / mass
    # A middle moves by half of what either of its levels moves.
    by_upper = density[1:-1] * (middles - means[:-1]) / mass[:-1] / 2
    by_lower = density[1:-1] * (means[1:] - middles) / mass[1:] / 2
    slope = torch.diag(by_upper, 1) + torch.diag(by_lower, -1)
    slope[:-1, :-1] += torch.diag(by_upper)
    slope[1:, 1:] += torch.diag(by_lower)
    return means, slope
