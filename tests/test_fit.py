"""Fits against formulas written a second time, in numpy and in whole numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib import fit, grid

SEEDS = st.integers(0, 2**32 - 1)
examples = settings(max_examples=40, deadline=None, derandomize=True)

ELEMENT_MAX_EXPONENT = {"e4m3": 8, "e5m2": 15, "e2m3": 2, "e3m2": 4, "e2m1": 2}
MANTISSA = {"e4m3": 3, "e5m2": 2, "e2m3": 3, "e3m2": 2, "e2m1": 1}
RULES = ["floor", "ceil", "even", "rceil"]


def random_blocks(seed: int, rows: int = 5, size: int = 16) -> torch.Tensor:
    blocks = np.random.default_rng(seed).normal(size=(rows, size))
    blocks[0, 0] *= 20
    blocks[-1] = np.abs(blocks[-1]) + 1
    return torch.from_numpy(blocks).float()


def exponent_by_search(rule: str, amax: float, name: str) -> int:
    """The rules as sentences about integers, found by counting up; no logarithm anywhere."""
    emax, width = ELEMENT_MAX_EXPONENT[name], MANTISSA[name]
    if rule == "rceil":
        return next(e for e in range(-150, 150) if amax / grid.GRIDS[name].max <= 2.0**e)
    floor = next(e for e in range(-150, 150) if amax < 2.0 ** (e + 1))
    if rule == "even":
        kept = math.floor(amax / 2.0 ** (floor - width) + 0.5)
        floor += kept == 2 ** (width + 1)
    exact = amax == 2.0**floor
    return floor - emax + (rule == "ceil" and not exact)


def squared_error(blocks, points, scale, offset=None, importance=1.0) -> np.ndarray:
    """Error of the best rounding, by comparing with every point, in float64.

    An offset is what a zero point can express: a whole number of steps.
    """
    x, s = blocks.double().numpy(), scale.double().numpy()[:, None]
    shift = 0 if offset is None else np.round(-offset.double().numpy()[:, None] / s)
    values = (points.double().numpy() - np.asarray(shift)[..., None]) * s[..., None]
    nearest = np.abs(x[..., None] - values).min(-1)
    return (nearest**2 * importance).sum(1)


@examples
@given(seed=SEEDS, bits=st.integers(2, 8))
def test_absmax_and_signed_extreme(seed, bits):
    blocks, levels = random_blocks(seed), grid.int_grid(bits)
    extreme = np.array([max(row, key=abs) for row in blocks.numpy()])
    top = np.float32(2 ** (bits - 1))
    np.testing.assert_array_equal(fit.absmax(blocks, levels)[0], np.abs(extreme) / (top - 1))
    np.testing.assert_array_equal(fit.absmax_signed(blocks, levels)[0], extreme / -top)
    assert not np.array_equal(fit.absmax(blocks, levels)[0], np.abs(extreme) / top)


def test_signed_extreme_reaches_the_lowest_code():
    levels, blocks = grid.int_grid(4), torch.tensor([[5.0, -1.0], [-5.0, 1.0]])
    scale, _ = fit.absmax_signed(blocks, levels)
    assert scale.tolist() == [-0.625, 0.625]
    assert levels.round(blocks / scale[:, None])[:, 0].tolist() == [0, 0]


@examples
@given(seed=SEEDS, bits=st.integers(1, 8), signed=st.booleans())
def test_minmax_spans_the_range_and_zero(seed, bits, signed):
    blocks, levels = random_blocks(seed), grid.int_grid(bits, signed and bits > 1)
    scale, offset = fit.minmax(blocks, levels)
    low, high = np.minimum(blocks.numpy().min(1), 0), np.maximum(blocks.numpy().max(1), 0)
    ends = offset[:, None] + scale[:, None] * torch.tensor([levels.min, levels.max])
    np.testing.assert_allclose(ends[:, 0], low, atol=1e-5 * (high - low).max())
    np.testing.assert_allclose(ends[:, 1], high, atol=1e-5 * (high - low).max())
    assert low[-1] == 0 < blocks[-1].min()


def test_absmean():
    blocks = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert fit.absmean(blocks, grid.TERNARY)[0].tolist() == [1.5, 0.0]


@examples
@given(seed=SEEDS, name=st.sampled_from(["int3", "int8", "e2m1", "nf3", "bnb_fp4", "mxint8"]))
def test_mse_is_never_worse_than_absmax(seed, name):
    blocks, levels = random_blocks(seed), grid.GRIDS[name]
    points = levels.points[levels.points.isfinite()]
    full = squared_error(blocks, points, fit.absmax(blocks, levels)[0])
    best = squared_error(blocks, points, fit.mse(blocks, levels)[0])
    assert (best <= full * (1 + 1e-5)).all()


@examples
@given(seed=SEEDS, bits=st.integers(1, 8))
def test_minmax_mse_is_never_worse_than_minmax(seed, bits):
    blocks, levels = random_blocks(seed), grid.int_grid(bits, signed=False)
    full = squared_error(blocks, levels.points, *fit.minmax(blocks, levels))
    best = squared_error(blocks, levels.points, *fit.minmax_mse(blocks, levels))
    assert (best <= full * (1 + 1e-4) + 1e-12).all()


@examples
@given(seed=SEEDS, name=st.sampled_from(["e2m1", "e4m3", "mxint8"]), weighted=st.booleans())
def test_pow2_mse_is_the_best_of_its_exponents(seed, name, weighted):
    blocks, levels = random_blocks(seed), grid.GRIDS[name]
    importance = np.random.default_rng(seed + 1).exponential(size=blocks.shape) ** 3
    tensor = torch.from_numpy(importance).float() if weighted else None
    points = levels.points[levels.points.isfinite()]
    args = {"importance": importance if weighted else 1.0}
    found = fit.pow2_mse(blocks, levels, tensor)[0]
    best = squared_error(blocks, points, found, **args)
    floor = fit.pow2_floor(blocks, levels)[0]
    errors = [squared_error(blocks, points, floor * 2.0**k, **args) for k in (-1, 0, 1, 2)]
    np.testing.assert_allclose(best, np.min(errors, axis=0), rtol=1e-4)
    assert (torch.frexp(found).mantissa == 0.5).all()
    assert not np.allclose(errors[0], best, rtol=1e-4)


def test_four_over_six_by_hand():
    """3 and 6 are values under amax / 6; under amax / 4 so are 4.5 and 6."""
    blocks = torch.tensor([[6.0, 3.0], [6.0, 4.5], [6.0, 4.4], [0.0, 0.0]])
    assert fit.four_over_six(blocks, grid.E2M1)[0].tolist() == [1.0, 1.5, 1.5, 0.0]
    # Importance decides between two weights that want different scales.
    both = torch.tensor([[6.0, 4.5, 4.0]] * 2)
    importance = torch.tensor([[1.0, 9.0, 1.0], [1.0, 1.0, 9.0]])
    assert fit.four_over_six(both, grid.E2M1, importance)[0].tolist() == [1.5, 1.0]
    # Scales keep four significant bits: 6.7 / 6 becomes 1.125, a little more.
    assert fit.four_over_six(torch.tensor([[6.7, 3.3]]), grid.E2M1)[0].tolist() == [1.125]


def test_rms_gives_every_block_the_variance_one():
    blocks = torch.tensor([[3.0, -4.0], [0.0, 0.0], [3e38, 3e38], [1e-30, -1e-30]])
    scale, offset = fit.rms(blocks, grid.GRIDS["lloyd4"])
    assert offset is None
    torch.testing.assert_close(scale, torch.tensor([12.5**0.5, 0, 3e38, 1e-30]), rtol=1e-6, atol=0)


@examples
@given(seed=SEEDS, bits=st.integers(1, 8), signed=st.booleans())
def test_zero_anchored_keeps_an_end_and_a_zero(seed, bits, signed):
    blocks, levels = random_blocks(seed), grid.int_grid(bits, signed and bits > 1)
    scale, offset = (x.double() for x in fit.zero_anchored(blocks, levels))
    low, high = blocks.aminmax(dim=1)
    end = torch.where(low.abs() > high.abs(), low, high).double()
    first = offset + levels.min * scale
    zero = -first / scale
    anchored = zero.round().abs() > 0
    torch.testing.assert_close(first[anchored], end[anchored], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zero, zero.round(), rtol=0, atol=1e-3)
    assert (scale.sign() == -end.sign()).all()


def test_mse_can_lose_when_its_scale_is_changed():
    """The twin of the two tests above: the comparison does notice a worse scale."""
    blocks, levels = random_blocks(3), grid.int_grid(3)
    full = squared_error(blocks, levels.points, fit.absmax(blocks, levels)[0])
    worse = squared_error(blocks, levels.points, fit.mse(blocks, levels)[0] * 0.3)
    assert not (worse <= full).all()


@examples
@given(seed=SEEDS, name=st.sampled_from(["int2", "int4", "e2m1"]))
def test_importance_lowers_the_weighted_error(seed, name):
    blocks, levels = random_blocks(seed), grid.GRIDS[name]
    importance = np.random.default_rng(seed + 1).exponential(size=blocks.shape) ** 3
    weighted = fit.mse(blocks, levels, torch.from_numpy(importance).float())[0]
    plain = fit.mse(blocks, levels)[0]
    args = (blocks, levels.points)
    found = squared_error(*args, weighted, importance=importance)
    assert (found <= squared_error(*args, plain, importance=importance) * (1 + 1e-5)).all()


def test_importance_decides_who_is_served():
    """One large weight, three small ones: importance chooses between the outlier and the rest."""
    blocks = torch.tensor([[7.0, 2.0, 2.0, 2.0]])
    levels, ones = grid.int_grid(2), torch.ones(1, 4)
    outlier, rest = torch.tensor([[1e6, 1, 1, 1]]), torch.tensor([[1e-6, 1, 1, 1]])
    scales = [fit.mse(blocks, levels, x)[0].item() for x in (outlier, rest)]
    assert scales[0] == 7.0 > scales[1]
    assert torch.equal(fit.mse(blocks, levels)[0], fit.mse(blocks, levels, ones)[0])
    assert fit.mse(blocks, levels, torch.zeros(1, 4))[0].item() == 7.0


@pytest.mark.parametrize("name", MANTISSA)
@pytest.mark.parametrize("rule", RULES)
def test_pow2_rules_at_and_around_powers_of_two(rule, name):
    marks = [1.0, 2.0**-20, 2.0**20, 1.25, 1.5, 1.75, 1.875, 1.9375, grid.GRIDS[name].max, 0.1]
    exact = torch.tensor(marks)
    amax = torch.cat([exact, exact.nextafter(torch.tensor(0.0)), exact.nextafter(2 * exact)])
    blocks = torch.stack([-amax, amax / 3], dim=1)
    scale = getattr(fit, f"pow2_{rule}")(blocks, grid.GRIDS[name])[0]
    expected = [2.0 ** exponent_by_search(rule, x, name) for x in amax.double().tolist()]
    assert scale.tolist() == expected


@pytest.mark.parametrize(("amax", "scale"), [(3.4, 0.5), (3.5, 1), (6, 1), (7, 2)])
def test_even_rule_by_hand(amax, scale):
    """FP4 keeps one mantissa bit: from 1.75 on, the leading digits round up to 2."""
    assert fit.pow2_even(torch.tensor([[amax, 0.0]]), grid.E2M1)[0].item() == scale


def test_floor_saturates_and_ceil_does_not():
    blocks = torch.tensor([[7.9, 1.0]])
    assert fit.pow2_floor(blocks, grid.E2M1)[0].item() == 1
    for rule in ("ceil", "rceil"):
        assert 7.9 / getattr(fit, f"pow2_{rule}")(blocks, grid.E2M1)[0].item() <= grid.E2M1.max


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("amax", [3.4e38, 1e-44, 0.0])
def test_pow2_rules_at_the_ends_of_float32(rule, amax):
    scale = getattr(fit, f"pow2_{rule}")(torch.tensor([[amax, 0.0]]), grid.E2M1)[0].item()
    assert 2.0**-127 <= scale <= 2.0**127
    assert math.frexp(scale)[0] == 0.5
    assert amax <= 8 * scale


@pytest.mark.parametrize("name", sorted(fit.FITS))
def test_zero_constant_and_single_weight_blocks(name):
    offset_found = name in ("minmax", "minmax_mse", "zero_anchored")
    levels = grid.int_grid(4, signed=not offset_found)
    levels = grid.E2M1 if name.startswith("pow2") else levels
    blocks = torch.stack([torch.zeros(8), torch.full((8,), -0.3), torch.full((8,), 2.0)])
    for columns in (8, 1):
        scale, offset = fit.FITS[name](blocks[:, :columns], levels, None)
        assert bool(scale.isfinite().all())
        assert scale.shape == (3,)
        assert (scale[1:] != 0).all()
        assert (offset is not None) == offset_found
        assert offset is None or offset[0] == 0


def test_names_are_function_names():
    assert all(name == function.__name__ for name, function in fit.FITS.items())
