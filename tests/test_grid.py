"""Grids against ml_dtypes, torch, numpy and a float64 search: all codes, ties, a million values."""

from __future__ import annotations

import re
import warnings
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib import grid
from qlib.grid import FLOATS, GRIDS, NF4, TERNARY, FloatFormat, Grid, int_grid

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
TORCH = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
BY_NAME = {format.name: format for format in FLOATS}
SIGNED = [format for format in FLOATS if format.signed and format.bits <= 16]
SMALL = [format for format in SIGNED if format.bits <= 8]
INTEGERS = [int_grid(bits, signed) for bits in range(1, 9) for signed in (True, False)]
floats = pytest.mark.parametrize("format", SIGNED, ids=lambda format: format.name)
small_floats = pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
VISIBLE = 2.0**-20
integers = pytest.mark.parametrize("levels", INTEGERS, ids=lambda levels: levels.name)


def integer_type(format: FloatFormat):
    return {8: np.uint8, 16: np.uint16, 32: np.uint32}[max(8, format.bits)]


def oracle_decode(format: FloatFormat, codes: np.ndarray) -> np.ndarray:
    patterns = codes.astype(integer_type(format)).view(DTYPES[format.name])
    with np.errstate(invalid="ignore"):
        return patterns.astype(np.float64)


def oracle_round(format: FloatFormat, x: torch.Tensor) -> torch.Tensor:
    """The library's cast. It overflows to NaN or infinity, so the saturation is written here."""
    largest = float(ml_dtypes.finfo(DTYPES[format.name]).max)
    codes = x.clamp(-largest, largest).numpy().astype(DTYPES[format.name])
    return torch.from_numpy(codes.view(integer_type(format)).astype(np.int64))


def midpoints(points: torch.Tensor) -> torch.Tensor:
    """Every finite point, every midpoint of neighbors, and the float32 values beside them."""
    points = points[points.isfinite()].double().unique()
    exact = torch.cat([points, (points[1:] + points[:-1]) / 2]).float()
    beside = [exact.nextafter(torch.full_like(exact, to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([exact, *beside])


def million(largest: float, smallest: float) -> torch.Tensor:
    """A quarter each: uniform, beyond the range, log-uniform below it, any float32 at all."""
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(500_000, generator=generator) * 2 - 1) * largest
    uniform[:250_000] *= 4
    low, high = np.log2(smallest) - 3, np.log2(largest) + 1
    octave = torch.rand(250_000, generator=generator) * (high - low) + low
    tiny = torch.exp2(octave) * (torch.randint(2, (250_000,), generator=generator) * 2 - 1)
    patterns = torch.randint(-(2**31), 2**31, (250_000,), generator=generator)
    anything = patterns.to(torch.int32).view(torch.float32).nan_to_num(nan=-0.0)
    return torch.cat([uniform, tiny, anything])


def hard_values(format: FloatFormat) -> torch.Tensor:
    signs = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-45])
    ties = midpoints(format.grid.points)
    return torch.cat([signs, ties, -ties, million(format.max, format.min_subnormal)])


def nearest(points: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Nearest finite point in float64, among equals the even code, then the lower value.

    On consecutive integers the even one of two equals is the even integer, as in BitNet's rounding.
    Beside a point near one, float64 cannot see a value below `VISIBLE`; beside a value of 1e20,
    it cannot see the points, which all lie below a million.
    """
    table = points.double().numpy()
    codes = np.flatnonzero(np.isfinite(table))
    integers = np.array_equal(table, np.round(table[0]) + np.arange(len(table)))
    odd = (table[codes] if integers else codes) % 2
    codes = codes[np.lexsort((table[codes], odd))]
    distance = np.abs(x.double().clamp(-1e6, 1e6).numpy()[:, None] - table[codes])
    return torch.from_numpy(codes[distance.argmin(axis=1)])


def visible(x: torch.Tensor) -> torch.Tensor:
    return x[(x == 0) | (x.abs() >= VISIBLE)]


def disagreements(levels: Grid, x: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The values of `x` that the grid rounds to another code than expected."""
    return x[levels.round(x).long() != expected]


def nudged(levels: Grid, code: int) -> Grid:
    """The same grid with one positive point, and its negative, moved an eighth of a gap."""
    points, half = levels.points.clone(), len(levels.points) // 2
    step = (points[code] - points[code - 1]) / 8
    points[code] += step
    points[code + half] -= step
    return Grid("nudged", points)


# -- small floats: every code, every tie, a million values -----------------------------------------


@pytest.mark.parametrize("format", FLOATS, ids=lambda format: format.name)
def test_format_is_what_ml_dtypes_says(format):
    info = ml_dtypes.finfo(DTYPES[format.name])
    assert (format.bits, format.mantissa) == (info.bits, info.nmant)
    assert (format.exponent, format.max) == (info.nexp, float(info.max))
    assert format.min_normal == float(info.smallest_normal)
    # ml_dtypes calls E8M0's smallest power of two a normal, and so do we.
    assert format.min_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("format", FLOATS[1:], ids=lambda format: format.name)
def test_every_code_decodes_as_in_ml_dtypes(format):
    codes = np.arange(2**format.bits)
    expected = oracle_decode(format, codes)
    ours = format.decode(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(np.signbit(ours[~np.isnan(ours)]), signs(expected))
    table = format.grid.decode(torch.from_numpy(codes))
    assert table.dtype == torch.float32
    np.testing.assert_array_equal(table.double().numpy(), expected)


def signs(values: np.ndarray) -> np.ndarray:
    return np.signbit(values[~np.isnan(values)])


@pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
def test_any_flipped_code_bit_decodes_differently(format):
    codes = np.arange(2**format.bits)
    expected = oracle_decode(format, codes)
    for bit in range(format.bits):
        ours = format.decode(torch.from_numpy(codes ^ 1 << bit)).numpy()
        same = (ours == expected) & (np.signbit(ours) == np.signbit(expected))
        assert not same.any()


def test_float32_codes_decode_as_in_numpy():
    codes = torch.randint(0, 2**32, (10_000,), generator=torch.Generator().manual_seed(0))
    codes[:4] = torch.tensor([1, 0x007FFFFF, 0x7F800000, 0xFFC00000])
    ours, theirs = grid.FP32.decode(codes).numpy(), oracle_decode(grid.FP32, codes.numpy())
    np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(grid.FP32.decode(codes ^ 1).numpy(), theirs)


@floats
def test_round_agrees_with_ml_dtypes(format):
    x = hard_values(format)
    assert disagreements(format.grid, x, oracle_round(format, x)).numel() == 0


@pytest.mark.parametrize("name", TORCH)
def test_round_agrees_with_torch(name):
    format = BY_NAME[name]
    x = hard_values(format)
    patterns = x.clamp(-format.max, format.max).to(TORCH[name])
    expected = patterns.view(torch.uint8 if format.bits == 8 else torch.int16).long()
    assert disagreements(format.grid, x, expected % 2**format.bits).numel() == 0


@small_floats
def test_round_notices_any_moved_point(format):
    x = midpoints(format.grid.points)
    expected = oracle_round(format, x)
    for code in range(1, int(format.grid.round(torch.tensor(format.max))) + 1):
        found = disagreements(nudged(format.grid, code), x, expected)
        assert found.numel() > 0
        # Only values next to the moved point change their code.
        gap = format.decode(torch.tensor([code])) - format.decode(torch.tensor([code - 1]))
        away = found.abs() - format.decode(torch.tensor([code]))
        assert bool((away.abs() <= 2 * gap).all())


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_round_notices_a_moved_point_of_16_bits(name):
    format = BY_NAME[name]
    x = midpoints(format.grid.points)
    expected = oracle_round(format, x)
    for code in (1, 2**format.mantissa, 12345, 2**15 - 2**format.mantissa - 1):
        assert disagreements(nudged(format.grid, code), x, expected).numel() > 0


@floats
def test_decoded_codes_round_to_themselves(format):
    codes = torch.arange(2**format.bits)
    finite = format.grid.points.isfinite()
    assert torch.equal(format.grid.round(format.grid.points[finite]).long(), codes[finite])


@floats
def test_ties_go_to_the_even_code(format):
    points = format.grid.points
    positive = points[: len(points) // 2]
    positive = positive[positive.isfinite()].double()
    middle = ((positive[1:] + positive[:-1]) / 2).float()
    codes = format.grid.round(middle).long()
    assert bool((codes % 2 == 0).all())
    assert torch.equal(codes // 2 * 2, (torch.arange(len(middle)) + 1) // 2 * 2)
    assert bool((format.grid.round(middle.nextafter(positive[:-1].float())).diff() == 1).all())


@floats
def test_overflow_saturates(format):
    top = int(format.grid.round(torch.tensor(format.max)))
    beyond = torch.tensor([format.max * 1.5, 3.4e38, torch.inf])
    assert format.grid.round(beyond).tolist() == [top] * 3
    assert format.grid.round(-beyond).tolist() == [top + 2 ** (format.bits - 1)] * 3
    assert format.grid.max == format.max == -format.grid.min


def test_libraries_overflow_differently():
    """Why `oracle_round` clamps: what each cast does just beyond its format's range."""
    x = np.array([464.0, 465.0, np.inf], dtype=np.float32)
    codes = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert codes.tolist() == [0x7E, 0x7F, 0x7F]
    x = np.array([61439.0, 61440.0], dtype=np.float32)
    assert x.astype(ml_dtypes.float8_e5m2).view(np.uint8).tolist() == [0x7B, 0x7C]
    x = np.array([100.0, -np.inf], dtype=np.float32)
    assert x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist() == [7, 15]


# -- E8M0: an exponent alone -----------------------------------------------------------------------


def e8m0_values() -> tuple[torch.Tensor, torch.Tensor]:
    """(values that are no tie, ties): between the smallest and the largest power of two."""
    x = torch.cat([midpoints(grid.E8M0.points), million(grid.E8M0.max, 2.0**-126).abs()])
    x = x[(x >= 2.0**-127) & (x <= 2.0**127)]
    tie = torch.frexp(x)[0] == 0.75
    return x[~tie], x[tie].unique()


def test_e8m0_rounds_as_ml_dtypes_and_torch_except_ties():
    x, _ = e8m0_values()
    x = x[x >= 2.0**-126]
    expected = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)).long()
    assert disagreements(grid.E8M0, x, expected).numel() == 0
    assert torch.equal(x.to(torch.float8_e8m0fnu).view(torch.uint8).long(), expected)
    points = grid.E8M0.points.clone()
    points[100] *= 1.01
    assert disagreements(Grid("nudged", points), x, expected).numel() > 0


def test_e8m0_rounds_subnormal_floats_to_the_nearest_where_both_libraries_go_up():
    x = torch.tensor([1.0, 1.001, 1.49, 1.51, 1.999]) * 2.0**-127
    assert grid.E8M0.round(x).tolist() == [0, 0, 0, 1, 1]
    assert x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist() == [0, 1, 1, 1, 1]
    assert x.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [0, 1, 1, 1, 1]


def test_e8m0_ties_go_to_the_even_code_where_ml_dtypes_goes_up():
    _, ties = e8m0_values()
    lower = torch.frexp(ties)[1] - 1 + 127
    assert len(ties) == 254
    assert torch.equal(grid.E8M0.round(ties).long(), (lower + lower % 2).long())
    theirs = ties.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert theirs.tolist() == (lower + 1).tolist()


def test_e8m0_has_no_zero_and_no_sign():
    x = torch.tensor([0.0, -0.0, -1.0, -torch.inf, 1e-45, 3e38, torch.inf])
    assert grid.E8M0.round(x).tolist() == [0, 0, 0, 0, 0, 254, 254]
    assert bool(grid.E8M0.decode(torch.tensor([255])).isnan())


# -- integers, NF4, ternary, learned grids ---------------------------------------------------------


def integer_oracle(levels: Grid, x: torch.Tensor) -> torch.Tensor:
    """numpy's rounding of values to even integers, clipped, as an unsigned code."""
    low, high = float(levels.points[0]), float(levels.points[-1])
    if levels.name == "int1":
        return torch.from_numpy((x.numpy() > 0).astype(np.int64))
    rounded = np.clip(np.rint(x.double().numpy()), low, high)
    return torch.from_numpy((rounded - low).astype(np.int64))


@integers
def test_integers_round_as_numpy(levels):
    ties = midpoints(levels.points)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.0**31, -(2.0**63)])
    x = torch.cat([special, ties, -ties, million(2.0**levels.bits, 2**-10)])
    expected = integer_oracle(levels, x)
    assert disagreements(levels, x, expected).numel() == 0
    seen = visible(ties)
    assert torch.equal(levels.round(seen).long(), nearest(levels.points, seen))
    points = levels.points.clone()
    points[-1] += 0.25
    assert disagreements(Grid("nudged", points), x, expected).numel() > 0


@integers
def test_integers_decode_in_code_order(levels):
    bits, signed = levels.bits, not levels.name.startswith("u")
    assert len(levels.points) == 2**bits
    codes = torch.arange(2**bits)
    expected = codes - 2 ** (bits - 1) * signed
    if levels.name == "int1":
        expected = torch.tensor([-1, 1])
    assert torch.equal(levels.decode(codes), expected.float())
    assert not torch.equal(levels.decode(codes ^ 1), expected.float())


@pytest.mark.parametrize("levels", [NF4, TERNARY], ids=lambda levels: levels.name)
def test_tables_round_to_the_nearest_point(levels):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    x = visible(torch.cat([special, midpoints(levels.points), million(1.0, 2**-10)]))
    expected = torch.cat([nearest(levels.points, part) for part in x.split(100_000)])
    assert disagreements(levels, x, expected).numel() == 0
    for code in range(len(levels.points)):
        points = levels.points.clone()
        points[code] += 1e-3
        assert disagreements(Grid("nudged", points), x, expected).numel() > 0


def test_the_smallest_float_decides_a_tie():
    x = torch.tensor([1e-45, 0.0, -0.0, -1e-45, torch.inf, -torch.inf])
    assert int_grid(1).round(x).tolist() == [1, 0, 0, 0, 1, 0]
    assert Grid("odd", torch.tensor([1.0, -1.0])).round(x).tolist() == [0, 0, 0, 1, 0, 1]


def test_nf4_is_made_of_gaussian_quantiles():
    """QLoRA: quantiles of both halves of a Gaussian, one more above zero, scaled to end at one."""
    quantile, outer = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(outer, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outer, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(NF4.points.numpy(), expected, rtol=0, atol=1e-6)
    # One more above zero than below: the mirror image is another table.
    assert not np.allclose(-NF4.points.flip(0).numpy(), expected, rtol=0, atol=1e-3)


def test_ternary_ties_go_to_zero_as_in_bitnet():
    x = torch.tensor([-0.5, 0.5, 0.51, -0.51, -0.0])
    assert TERNARY.round(x).tolist() == [1, 1, 2, 0, 1]
    assert TERNARY.round(x).tolist() == (x.round().clamp(-1, 1) + 1).tolist()


def test_a_mirrored_table_in_any_order_rounds_to_the_nearest_point():
    """The upper half negates the lower one, but its sign bit is not the sign of the value."""
    points = torch.tensor([0.0, 1.0, -2.0, 0.0, -1.0, 2.0])
    x = torch.tensor([1.9, -1.9, 0.9, -0.9, 0.1])
    assert Grid("learned", points).decode(Grid("learned", points).round(x)).tolist() == [
        *(2.0, -2.0, 1.0, -1.0, 0.0)
    ]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(size=st.integers(2, 40), seed=st.integers(0, 2**32 - 1), whole=st.booleans())
def test_learned_grids_round_to_the_nearest_point(size, seed, whole):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(size, generator=generator) * 8
    if whole:
        # Whole numbers make exact ties frequent.
        points = torch.randperm(4 * size, generator=generator)[:size].float() - size
    if size > 4:
        # A code in the middle that stands for no number.
        points[size // 2] = torch.nan
    learned = Grid("learned", points)
    x = visible(torch.cat([midpoints(points), torch.randn(200, generator=generator) * 20]))
    expected = nearest(points, x)
    assert disagreements(learned, x, expected).numel() == 0
    assert disagreements(learned, x, expected ^ 1).numel() == len(x)


# -- shapes, dtypes, errors ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4)])
@pytest.mark.parametrize("levels", [grid.E2M1, int_grid(4), NF4, grid.FP16.grid], ids=str)
def test_shapes_are_kept_and_input_is_untouched(levels, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    codes = levels.round(x)
    assert codes.shape == levels.decode(codes).shape == x.shape
    assert codes.dtype == (torch.int32 if levels.bits == 16 else torch.uint8)
    assert torch.equal(x, before)


@pytest.fixture
def every_warning():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_transposed_inputs(dtype):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = grid.E4M3.round(x.float())
    assert torch.equal(grid.E4M3.round(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(grid.E4M3.round(x.T), expected.T)
    assert torch.equal(grid.E4M3.decode(expected.T), grid.E4M3.decode(expected).T)


def test_names_lead_to_their_grids():
    assert all(levels.name == name for name, levels in GRIDS.items())
    assert len(GRIDS) == 39
    assert all(GRIDS[format.name] == format.grid for format in FLOATS if format.bits <= 8)
    assert repr(grid.E2M1) == "Grid(e2m1, 16 codes)"


def test_equal_grids_have_equal_names_and_points():
    assert Grid("a", NF4.points) != NF4
    assert Grid("a", NF4.points) == Grid("a", NF4.points.clone())
    assert Grid("nf4", NF4.points.clone()) == NF4
    assert Grid("nf4", NF4.points.flip(0)) != NF4
    assert grid.FP8_E4M3.grid == grid.E4M3
    assert grid.E4M3 != grid.E5M2
    assert NF4 != "nf4"
    assert len({Grid("nf4", NF4.points), NF4, grid.E4M3, grid.FP8_E4M3.grid}) == 2


@pytest.mark.parametrize("levels", [grid.E2M1, int_grid(4), NF4, grid.E8M0], ids=str)
def test_nan_is_refused(levels):
    x = torch.tensor([[0.0, torch.nan]])
    with pytest.raises(ValueError, match=f"^cannot round NaN to the grid {levels.name}$"):
        levels.round(x)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(1), "grid odd: need 2 to 65536 points, got [1]"),
        (torch.zeros(2, 2), "grid odd: need 2 to 65536 points, got [2, 2]"),
        (torch.zeros(65537), "grid odd: need 2 to 65536 points, got [65537]"),
        (torch.tensor([1.0, torch.nan, torch.inf]), "grid odd: needs at least two finite points"),
    ],
)
def test_impossible_grids_are_refused(points, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Grid("odd", points)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_integers_have_one_to_eight_bits(bits):
    with pytest.raises(ValueError, match=f"^integer grids have 1 to 8 bits, got {bits}$"):
        int_grid(bits)


def test_float32_is_no_table():
    message = "float32: 32 bits are too many for a table of values"
    with pytest.raises(ValueError, match=f"^{message}$"):
        _ = grid.FP32.grid


@pytest.mark.parametrize("code", [16, -1])
def test_code_beyond_the_grid_is_refused(code):
    with pytest.raises(IndexError):
        grid.E2M1.decode(torch.tensor([code]))
