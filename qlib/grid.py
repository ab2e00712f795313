"""Grid: the finite set of values that a code can mean.

A scalar format is nothing more than a table from code to value. Integers, minifloats, NF4 and
ternary differ only in that table; the rounding rule is the same for all of them:
**nearest value, ties to even, saturate at the ends.** Even means the even code, except on grids of
consecutive integers, where it means the even integer (for int8 and all its kind that is the same).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .gaussian import lloyd_max_levels, normal_quantiles

# Up to this many boundaries are faster compared one after the other than searched.
FEW_BOUNDARIES = 15


@dataclass(frozen=True, eq=False)
class Grid:
    """A named table of values: `points[code]` is the value that `code` stands for.

    Args:
        name: the field's name for the grid ("int4", "e2m1", "nf4"); learned grids use any other.
        points: value of each code, float32 [codes]; NaN and infinity mark special codes.

    >>> E2M1.decode(torch.tensor([1, 5, 15]))
    tensor([ 0.5000,  3.0000, -6.0000])
    >>> E2M1.round(torch.tensor([0.25, 0.75, 2.5, 100.0]))   # ties go to the even code
    tensor([0, 2, 4, 7], dtype=torch.uint8)
    """

    name: str
    points: Tensor

    def __post_init__(self):
        points = torch.as_tensor(self.points, dtype=torch.float32)
        if points.ndim != 1 or not 2 <= len(points) <= 65536:
            raise ValueError(f"grid {self.name}: need 2 to 65536 points, got {list(points.shape)}")
        if points.isfinite().sum() < 2:
            raise ValueError(f"grid {self.name}: needs at least two finite points")
        object.__setattr__(self, "points", points)

    def __repr__(self) -> str:
        return f"Grid({self.name}, {len(self.points)} codes)"

    def __eq__(self, other) -> bool:
        if self is other:
            return True
        # The name counts too: with another one, the points of a standard grid are stored.
        same = isinstance(other, Grid) and self.name == other.name
        return same and torch.equal(*(g.points.nan_to_num(nan=1e30) for g in (self, other)))

    def __hash__(self) -> int:
        return hash((self.name, len(self.points), self.min, self.max))

    @property
    def bits(self) -> int:
        """Bits that one code needs when stored on its own."""
        return math.ceil(math.log2(len(self.points)))

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return self.points[self.points.isfinite()].max().item()

    @cached_property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return self.points[self.points.isfinite()].min().item()

    def decode(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of `codes`, float32, same shape."""
        if self._is_integer:
            return codes.float().add_(self.min)
        table = self.points.to(codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def round(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Codes of the grid points nearest to `x`: uint8, or int32 on grids of over 256 codes.

        `x` is taken as float32 (float64 is rounded to it first). Infinities saturate.
        Raises ValueError if `x` holds NaN.
        """
        x = x.float()
        if bool(torch.isnan(x).any()):
            raise ValueError(f"cannot round NaN to the grid {self.name}")
        return self.round_finite(x)

    def round_finite(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """`round` without the NaN check, for callers that have already made it."""
        if self._is_integer:
            # Clamping before rounding keeps the subtraction exact for any input.
            return x.clamp(self.min, self.max).round_().sub_(self.min).to(torch.uint8)
        if self._is_mirrored:
            sign = torch.signbit(x).to(self._codes.dtype) * (len(self.points) // 2)
            return self._nearest(x.abs()) + sign
        return self._nearest(x)

    def _nearest(self, x: Tensor) -> Tensor:
        rank = self._rank(x)
        if self._codes_are_ranks:
            return rank.to(self._codes.dtype)
        return self._codes.to(x.device).index_select(0, rank.reshape(-1).int()).view(x.shape)

    def _rank(self, x: Tensor) -> Tensor:
        """How many boundaries lie below `x`: the place of the nearest point."""
        if len(self._boundaries) > FEW_BOUNDARIES:
            return torch.bucketize(x.contiguous(), self._boundaries.to(x.device), out_int32=True)
        rank = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        above = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for boundary in self._boundaries.tolist():
            rank += torch.gt(x, boundary, out=above).view(torch.uint8)
        return rank

    @cached_property
    def _is_integer(self) -> bool:
        """Consecutive integers, at most 256: arithmetic rounds them, ties to even integers."""
        steps = self.points.diff()
        whole = bool((self.points == self.points.round()).all())
        return len(self.points) <= 256 and bool((steps == 1).all()) and whole

    @cached_property
    def _is_mirrored(self) -> bool:
        """The upper half of the codes is the lower half with a sign bit, so -0 has a code."""
        lower, upper = self.points.tensor_split(2)
        lower, upper = lower.nan_to_num(nan=1e30), -upper.nan_to_num(nan=-1e30)
        same = len(self.points) % 2 == 0 and bool((lower == upper).all())
        return same and bool(lower[0] == 0) and bool((lower >= 0).all())

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        points = self.points[: len(self.points) // 2] if self._is_mirrored else self.points
        codes = torch.arange(len(points))[points.isfinite()]
        order = points[codes].argsort(stable=True)
        return points[codes][order].double(), codes[order]

    @cached_property
    def _codes(self) -> Tensor:
        return self._sorted[1].to(torch.uint8 if len(self.points) <= 256 else torch.int32)

    @cached_property
    def _codes_are_ranks(self) -> bool:
        return torch.equal(self._sorted[1], torch.arange(len(self._sorted[1])))

    @cached_property
    def _boundaries(self) -> Tensor:
        """float32 thresholds t such that `x > t` selects the upper neighbor, ties included.

        The midpoint of two points need not be a float32. The largest float32 not above it decides
        correctly; where the midpoint is exact and the upper code is the even one, one step lower.
        """
        points, codes = self._sorted
        middle = (points[1:] + points[:-1]) / 2
        below = middle.float()
        down = torch.full_like(below, -math.inf)
        below = torch.where(below.double() > middle, below.nextafter(down), below)
        tie_goes_up = (below.double() == middle) & (codes[1:] % 2 == 0) & (codes[:-1] % 2 == 1)
        return torch.where(tie_goes_up, below.nextafter(down), below)


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point layout: sign, exponent and mantissa bits, and its special codes.

    Args:
        name: field name, as in ml_dtypes where it has one.
        exponent: exponent bits; mantissa: mantissa bits; signed formats add one sign bit.
        bias: subtracted from the stored exponent.
        specials: "ieee" (top exponent is infinity or NaN), "nan" (only the all-ones code is NaN),
            "none" (every code is a number).

    Sources: IEEE 754-2019 section 3; OCP OFP8 v1.0 section 5; OCP MX v1.0 section 5.3.

    >>> FP8_E4M3.max, FP8_E4M3.min_subnormal == 2**-9
    (448.0, True)
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    specials: str

    @property
    def signed(self) -> bool:
        """All formats but E8M0, which is an exponent alone."""
        return self.mantissa > 0

    @property
    def bits(self) -> int:
        """Stored bits of one value."""
        return self.signed + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        """Largest finite value."""
        top = 2 ** (self.exponent + self.mantissa) - 1
        if self.specials == "ieee":
            top -= 2**self.mantissa
        return self.decode(torch.tensor([top - (self.specials == "nan")])).item()

    @property
    def min_normal(self) -> float:
        """Smallest positive value with an implicit leading one."""
        return 2.0 ** ((1 if self.signed else 0) - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return self.min_normal * 2.0**-self.mantissa

    def decode(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of the bit patterns `codes`, as float64 (exact for every format here)."""
        codes = codes.long()
        mantissa = (codes & (2**self.mantissa - 1)).double() / 2**self.mantissa
        exponent = codes >> self.mantissa & (2**self.exponent - 1)
        if not self.signed:
            value = torch.exp2((exponent - self.bias).double())
            return value.masked_fill(exponent == 2**self.exponent - 1, math.nan)
        # A zero exponent field means: no implicit one, same scale as exponent field one.
        normal = (exponent > 0).double()
        value = (normal + mantissa) * torch.exp2((exponent.clamp(min=1) - self.bias).double())
        value = torch.where(codes >> (self.bits - 1) == 1, -value, value)
        return self._mark_specials(value, codes, exponent)

    def _mark_specials(self, value: Tensor, codes: Tensor, exponent: Tensor) -> Tensor:
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        if self.specials == "nan":
            return value.masked_fill(magnitude == 2 ** (self.bits - 1) - 1, math.nan)
        if self.specials == "ieee":
            top = exponent == 2**self.exponent - 1
            value = torch.where(top, torch.copysign(torch.full_like(value, math.inf), value), value)
            return value.masked_fill(top & (codes & (2**self.mantissa - 1) != 0), math.nan)
        return value

    @property
    def grid(self) -> Grid:
        """The format as a table; formats of over 16 bits have too many codes for one."""
        if self.bits > 16:
            raise ValueError(f"{self.name}: {self.bits} bits are too many for a table of values")
        return Grid(self.name, self.decode(torch.arange(2**self.bits)).float())


FP32 = FloatFormat("float32", 8, 23, 127, "ieee")
FP16 = FloatFormat("float16", 5, 10, 15, "ieee")
BF16 = FloatFormat("bfloat16", 8, 7, 127, "ieee")
FP8_E4M3 = FloatFormat("e4m3", 4, 3, 7, "nan")
FP8_E5M2 = FloatFormat("e5m2", 5, 2, 15, "ieee")
FP6_E2M3 = FloatFormat("e2m3", 2, 3, 1, "none")
FP6_E3M2 = FloatFormat("e3m2", 3, 2, 3, "none")
FP4_E2M1 = FloatFormat("e2m1", 2, 1, 1, "none")
FP_E8M0 = FloatFormat("e8m0", 8, 0, 127, "nan")
FLOATS = (FP32, FP16, BF16, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E2M1, FP_E8M0)


def int_grid(bits: int, signed: bool = True) -> Grid:
    """Integers of `bits` bits (1..8); a signed code is offset binary, `code - 2**(bits-1)`.

    One signed bit is the pair -1, +1, since two's complement would have no positive value.

    >>> int_grid(4).points[[0, 8, 15]]
    tensor([-8.,  0.,  7.])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"integer grids have 1 to 8 bits, got {bits}")
    name = f"int{bits}" if signed else f"uint{bits}"
    if signed and bits == 1:
        return Grid(name, torch.tensor([-1.0, 1.0]))
    low = -(2 ** (bits - 1)) if signed else 0
    return Grid(name, torch.arange(low, low + 2**bits).float())


E4M3, E5M2 = FP8_E4M3.grid, FP8_E5M2.grid
E2M3, E3M2, E2M1, E8M0 = FP6_E2M3.grid, FP6_E3M2.grid, FP4_E2M1.grid, FP_E8M0.grid
TERNARY = Grid("ternary", torch.tensor([-1.0, 0.0, 1.0]))

# QLoRA (arXiv 2305.14314), section 3; the float32 constants are those of bitsandbytes.
NF4 = Grid(
    "nf4",
    torch.tensor(
        (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        )
    ),
)


def normal_float(bits: int) -> Grid:
    """NF of `bits` bits (2..8): quantiles of a Gaussian (QLoRA, arXiv 2305.14314, section 3).

    Four bits are the published constants, which differ from computed quantiles by 2e-7 at most.

    >>> normal_float(3).points
    tensor([-1.0000, -0.5350, -0.2469,  0.0000,  0.1833,  0.3820,  0.6230,  1.0000])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"normal floats have 2 to 8 bits, got {bits}")
    return NF4 if bits == 4 else Grid(f"nf{bits}", normal_quantiles(bits))


def lloyd_max(bits: int) -> Grid:
    """The 2^bits levels (1..8 bits) of least squared error for a Gaussian of variance 1 (Max 1960).

    >>> lloyd_max(1).points          # plus and minus sqrt(2 / pi)
    tensor([-0.7979,  0.7979])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"Lloyd-Max grids have 1 to 8 bits, got {bits}")
    return Grid(f"lloyd{bits}", lloyd_max_levels(bits))


# bitsandbytes' FP4: a sign and one of eight magnitudes, in the order of its codes (zero has two).
_SIZES = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
BNB_FP4 = Grid("bnb_fp4", torch.cat([_SIZES, 0 - _SIZES]))
# OCP MX v1.0, section 5.3.4: two's complement in units of 1/64. -128, which has no positive twin,
# is not used: here it is no number.
_BYTES = torch.arange(256)
MXINT8 = Grid("mxint8", torch.where(_BYTES == 128, math.nan, ((_BYTES + 128) % 256 - 128) / 64))

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        *(int_grid(bits, signed) for bits in range(1, 9) for signed in (True, False)),
        *(E4M3, E5M2, E2M3, E3M2, E2M1, E8M0, TERNARY, BNB_FP4, MXINT8),
        *(kind(bits) for bits in range(2, 9) for kind in (normal_float, lloyd_max)),
    )
}
