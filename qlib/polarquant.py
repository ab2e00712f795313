"""PolarQuant: vectors as one radius and a tree of angles, after a random rotation.

Han, Kacham, Karbasi, Mirrokni and Zandieh, arXiv 2502.02617. Neighboring coordinates become a
length and an angle, neighboring lengths a length and an angle, and so on: after L levels a block of
2^L coordinates is one radius and 2^L - 1 angles. A random rotation beforehand makes all of these
angles independent, with densities known in advance: uniform on the circle at level 1, proportional
to sin(2 psi)^(2^(l-1) - 1) on [0, pi/2] at level l, ever closer to pi/4. So the levels of every
angle are fixed (Lloyd-Max, `qlib.sphere`), and only the radius is data.

The paper's choice is 4 levels of 4, 2, 2 and 2 bits: with a float16 radius 62 bits for 16
coordinates, 3.875 each. A decoded block has exactly its radius, so nothing shrinks; its squared
error relative to the radius is 2 (1 - product over the levels of E cos(angle - its level)).

Stored for each row: "radius", one for each block, and "angles1", "angles2", ..., packed level by
level. Rows that are not whole blocks are lengthened by zeros before the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .pack import pack, packed_bytes, unpack
from .qtensor import Format, QTensor
from .scheme import checked
from .sphere import angle_grid, check_rotation, check_width, matrix_shape, rotate
from .storage import Layout, store

MAX_LEVELS = 10
# "polar" is the paper's; the others have the least error for their size in blocks of 32, found by
# trying every choice of bits.
NAMED = {"polar": (4, 2, 2, 2), "polar3": (3, 2, 2, 3, 2), "polar2": (2, 1, 1, 1, 2)}


@dataclass(frozen=True)
class PolarQuant(Format):
    """Blocks of 2^len(bits) rotated coordinates as one radius and a tree of angles.

    Args:
        bits: bits of the angles of each level, 1 to 8, from pairs of coordinates upwards.
        rotation, seed: the random rotation, as for `qlib.turboquant.TurboQuant`.
        radius: how radii are stored, torch.float16 or torch.float32.

    Raises ValueError for values outside these.

    >>> PolarQuant().quantize(torch.ones(10, 128)).bits_per_weight
    3.875
    """

    bits: tuple[int, ...] = (4, 2, 2, 2)
    rotation: str = "qr"
    seed: int = 0
    radius: torch.dtype = torch.float16

    def __post_init__(self):
        if not isinstance(self.bits, Iterable):
            need = "bits are those of each level, such as (4, 2, 2, 2)"
            raise ValueError(f"{need}; got {self.bits!r}")
        object.__setattr__(self, "bits", tuple(self.bits))
        known = all(type(bits) is int and 1 <= bits <= 8 for bits in self.bits)
        if not known or not 1 <= len(self.bits) <= MAX_LEVELS:
            need = f"1 to {MAX_LEVELS} levels of 1 to 8 bits"
            raise ValueError(f"PolarQuant has {need}, got {self.bits}")
        if self.radius not in (torch.float16, torch.float32):
            raise ValueError(f"radii are stored as float16 or float32, got {self.radius!r}")
        check_rotation(self.rotation, self.seed)

    def __str__(self) -> str:
        bits = ", ".join(map(str, self.bits))
        return f"PolarQuant of {bits} bits, {self.rotation} rotation {self.seed}"

    def quantize(
        self, weight: Float[Tensor, "*shape"], importance: Tensor | None = None
    ) -> QTensor:
        """Quantize every row on its own, with the arguments and errors of `TurboQuant.quantize`."""
        rows, width = matrix_shape(weight.shape)
        x = checked(weight).reshape(rows, width)
        x = torch.nn.functional.pad(x, (0, self._padded(width) - width))
        angles, radius = to_polar(rotate(x, self.rotation, self.seed), len(self.bits))
        parts = store("radius", radius, self.radius)
        for name, bits, run, angle in zip(self._names(), self.bits, self._runs(), angles):
            parts[name] = pack(_round(angle, run, bits), bits)
        return QTensor(self, tuple(weight.shape), parts)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "*shape"]:
        """The rows that `parts` mean, float32."""
        width = matrix_shape(shape)[1]
        padded = self._padded(width)
        angles = [
            _values(unpack(parts[name], bits, padded // (2 * run)), run, bits)
            for name, bits, run in zip(self._names(), self.bits, self._runs())
        ]
        rotated = from_polar(angles, parts["radius"].float())
        rows = rotate(rotated, self.rotation, self.seed, inverse=True)
        return rows[:, :width].reshape(shape)

    def layout(self, shape) -> Layout:
        """dtype and shape of every tensor that rows of `shape` are stored as.

        Raises ValueError for rows that cannot be rotated.
        """
        rows, width = matrix_shape(shape)
        padded = self._padded(width)
        check_width(padded, self.rotation)
        parts: Layout = {"radius": (self.radius, (rows, padded >> len(self.bits)))}
        for name, bits, run in zip(self._names(), self.bits, self._runs()):
            parts[name] = (torch.uint8, (rows, packed_bytes(padded // (2 * run), 2**bits)))
        return parts

    def _names(self) -> list[str]:
        return [f"angles{level}" for level in range(1, len(self.bits) + 1)]

    def _runs(self) -> list[int]:
        """Coordinates in each of the two lengths that an angle of a level compares."""
        return [2**level for level in range(len(self.bits))]

    def _padded(self, width: int) -> int:
        return width + -width % 2 ** len(self.bits)


def to_polar(
    x: Float[Tensor, "rows width"], levels: int
) -> tuple[list[Float[Tensor, "rows angles"]], Float[Tensor, "rows blocks"]]:
    """The angles of each level, level 1 in (-pi, pi] and the others in [0, pi/2], and the radii.

    Section 3 of the paper, definition of the recursive polar transformation.
    """
    angles, lengths = [], x
    for _ in range(levels):
        first, second = lengths.unflatten(1, (-1, 2)).unbind(-1)
        angles.append(torch.atan2(second, first))
        lengths = torch.hypot(first, second)
    return angles, lengths


def from_polar(
    angles: Sequence[Float[Tensor, "rows angles"]], radius: Float[Tensor, "rows blocks"]
) -> Float[Tensor, "rows width"]:
    """The coordinates of angles and radii as `to_polar` returns them."""
    lengths = radius
    for angle in reversed(angles):
        lengths = torch.stack([lengths * angle.cos(), lengths * angle.sin()], -1).flatten(1)
    return lengths


def _round(angle: Tensor, run: int, bits: int) -> Int[Tensor, "rows angles"]:
    if run > 1:
        return angle_grid(run, bits).round_finite(angle)
    # Equal arcs of the circle, the last of which ends where the first begins.
    return torch.floor(angle * (2**bits / math.tau)).to(torch.int16).remainder_(2**bits)


def _values(codes: Tensor, run: int, bits: int) -> Float[Tensor, "rows angles"]:
    if run > 1:
        return angle_grid(run, bits).decode(codes)
    return (codes.float() + 0.5) * (math.tau / 2**bits)


def format(name: str) -> PolarQuant:
    """The format called polar, polar3 or polar2. Raises ValueError for other names.

    >>> format("polar3").quantize(torch.ones(10, 128)).bits_per_weight
    3.0
    """
    if name not in NAMED:
        raise ValueError(f"unknown format {name!r}: PolarQuant is {', '.join(NAMED)}")
    return PolarQuant(NAMED[name])
