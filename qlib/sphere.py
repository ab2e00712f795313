"""What a random rotation makes of a vector, and the best levels for it.

Rotated at random, any vector of length 1 is a point drawn uniformly from the sphere, so the
distribution of its coordinates, and of the angles between them, is known before any data is seen.
Both are functions of one angle t in [-pi/2, pi/2] whose density is proportional to cos(t)^n:

- a coordinate of the unit vector in d dimensions is sin(t) with n = d - 2; its own density is
  proportional to (1 - x^2)^((d - 3) / 2), close to a Gaussian of variance 1 / d;
- the angle between the lengths of two neighboring runs of m coordinates is pi/4 + t/2 with
  n = m - 1; its density is proportional to sin(2 psi)^(m - 1).

So one Lloyd-Max quantizer serves both. Random numbers come from numpy's RandomState, whose stream
numpy has frozen (NEP 19): a seed means the same rotation everywhere, up to rounding in the last
bits of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .hadamard import base_matrix, hadamard

ROTATIONS = ("qr", "hadamard")
# A d x d matrix has to be made and kept: 256 MiB at this width.
MAX_WIDTH = 8192
# Beyond so many standard deviations of t there is no mass that float64 could see.
REACH = 12
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Value:
    """What is to be quantized, as a function of t: itself, its inverse and its derivative."""

    of: Callable
    inverse: Callable
    rate: Callable


COORDINATE = Value(np.sin, np.arcsin, np.cos)
ANGLE = Value(np.positive, np.positive, np.ones_like)


@lru_cache(maxsize=128)
def coordinate_grid(width: int, bits: int) -> Grid:
    """The 2^bits levels of least mean squared error for one coordinate of a random unit vector.

    Args:
        width: dimensions of the vector, from 1; bits: 1 to 8.

    For width 1 the only coordinates are -1 and 1, and the outermost levels are exactly those.

    >>> coordinate_grid(128, 2).points * 128**0.5
    tensor([-1.5052, -0.4525,  0.4525,  1.5052])
    """
    if width == 1:
        levels = np.linspace(-1, 1, 2**bits)
    else:
        levels = _lloyd_max(width - 2, bits, COORDINATE)
    return Grid(f"sphere{width}", torch.from_numpy(levels))


@lru_cache(maxsize=128)
def angle_grid(run: int, bits: int) -> Grid:
    """The 2^bits levels of least mean squared error for the angle, 0 to pi/2, whose tangent is the
    ratio of the lengths of two neighboring runs of `run` coordinates.

    >>> angle_grid(2, 2).points
    tensor([0.3098, 0.6340, 0.9368, 1.2610])
    """
    levels = math.pi / 4 + _lloyd_max(run - 1, bits, ANGLE) / 2
    return Grid(f"angle{run}", torch.from_numpy(levels))


def _lloyd_max(power: int, bits: int, value: Value) -> np.ndarray:
    """The levels of `value`, for t of density cos(t)^power, that are the means of their cells.

    Newton's iteration from the asymptotic levels (Panter and Dite, 1951: a density as the cube root
    of the value's), as in `qlib.gaussian.lloyd_max_levels`.
    """
    reach = min(math.pi / 2, REACH / math.sqrt(max(power, 1)))
    t = np.linspace(-reach, reach, 4097)
    middles = (t[1:] + t[:-1]) / 2
    rate = value.rate(middles)
    # In steps of t: the cube root of the value's density, times the step of the value.
    share = np.append(0, np.cumsum(np.cbrt(np.cos(middles) ** power / rate) * rate))
    wanted = (np.arange(2**bits) + 0.5) / 2**bits
    levels = value.of(np.interp(wanted, share / share[-1], t))
    for _ in range(5):
        means, slope = _cell_means(levels, power, reach, value)
        levels = levels - np.linalg.solve(np.eye(2**bits) - slope, levels - means)
    return (levels - levels[::-1]) / 2


def _cell_means(levels: np.ndarray, power: int, reach: float, value: Value):
    """Mean value of each level's cell, and its derivative by each level."""
    middles = (levels[1:] + levels[:-1]) / 2
    inner = value.inverse(middles)
    ends = np.concatenate([[-reach], inner, [reach]])
    half = np.diff(ends)[:, None] / 2
    t = ends[:-1, None] + half * (1 + NODES)
    weights = WEIGHTS * half * np.cos(t) ** power
    mass = weights.sum(1)
    means = (weights * value.of(t)).sum(1) / mass
    density = np.cos(inner) ** power / value.rate(inner)
    # A middle moves by half of what either of its levels moves.
    by_upper = density * (middles - means[:-1]) / mass[:-1] / 2
    by_lower = density * (means[1:] - middles) / mass[1:] / 2
    slope = np.diag(by_upper, 1) + np.diag(by_lower, -1)
    return means, slope + np.diag(np.append(by_upper, 0) + np.append(0, by_lower))


def matrix_shape(shape) -> tuple[int, int]:
    """(rows, width) of a tensor of `shape` whose last axis holds the vectors.

    Raises ValueError beyond the width up to which rotations are made.
    """
    *rows, width = tuple(shape) or (1,)
    if width > MAX_WIDTH:
        remedy = "reshape it to shorter ones"
        raise ValueError(f"rows of {width} are wider than a rotation of {MAX_WIDTH}: {remedy}")
    return math.prod(rows), width


def check_rotation(rotation: str, seed: int) -> None:
    """Raises ValueError for anything but a known kind of rotation and a seed of 32 bits."""
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation is one of {', '.join(ROTATIONS)}, got {rotation!r}")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is an int from 0 to 2**32 - 1, got {seed!r}")


def check_width(width: int, rotation: str) -> None:
    """Raises ValueError where no rotation of this kind and width can be made."""
    if rotation == "hadamard":
        base_matrix(width)


def rotate(
    x: Float[Tensor, "rows width"], rotation: str, seed: int, inverse: bool = False
) -> Float[Tensor, "rows width"]:
    """Every row of `x` turned by the same random rotation, or turned back.

    Args:
        x: float32 [rows, width].
        rotation: "qr", uniform among all orthogonal matrices; or "hadamard", random signs before a
            Hadamard transform: less work, but only as random as its `width` signs.
        seed: which rotation.

    Raises ValueError where no Hadamard matrix of that width is known.
    """
    if rotation == "qr":
        matrix = _orthogonal(x.shape[1], seed, x.device)
        return x @ (matrix if inverse else matrix.T)
    signs = _signs(x.shape[1], seed, x.device)
    return hadamard(x, transpose=True) * signs if inverse else hadamard(x * signs)


@lru_cache(maxsize=8)
def gaussian(width: int, seed: int, device: torch.device) -> Float[Tensor, "width width"]:
    """A matrix of independent Gaussians of variance 1, independent of the seed's rotation."""
    return torch.from_numpy(_stream(seed, 1).standard_normal((width, width))).float().to(device)


@lru_cache(maxsize=8)
def _orthogonal(width: int, seed: int, device: torch.device) -> Tensor:
    q, r = np.linalg.qr(_stream(seed, 0).standard_normal((width, width)))
    # With a positive diagonal of r the factors are unique, and q is uniform (Mezzadri, 2007).
    return torch.from_numpy(q * np.sign(np.diag(r))).float().to(device)


@lru_cache(maxsize=8)
def _signs(width: int, seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.sign(_stream(seed, 2).standard_normal(width))).float().to(device)


def _stream(seed: int, use: int) -> np.random.RandomState:
    return np.random.RandomState([seed, use])
