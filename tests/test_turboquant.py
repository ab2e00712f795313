"""TurboQuant: levels against quadrature, codes against numpy, distortions against theory."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import pytest
import sphere_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlib
from qlib import sphere, turboquant
from qlib.gaussian import lloyd_max_levels
from qlib.turboquant import TurboQuant

# Levels for a Gaussian of variance 1 (Max, 1960, table I), the limit of many dimensions.
GAUSSIAN = {
    1: [0.797885],
    2: [0.452780, 1.510418],
    3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}
GAUSSIAN_ERROR = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


def density(width: int):
    return lambda x: (1 - x * x) ** ((width - 3) / 2)


def means_and_error(width: int, levels) -> tuple[np.ndarray, float]:
    # Beyond twelve standard deviations there is nothing.
    end = min(1, 12 / math.sqrt(width))
    return reference.centroids(density(width), -end, end, np.asarray(levels, float))


@lru_cache
def computed_distortion(width: int, bits: int) -> float:
    """E |x - decoded|^2 of unit vectors: `width` coordinates of equal error."""
    return width * means_and_error(width, sphere.coordinate_grid(width, bits).points)[1]


def units(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def within(samples: torch.Tensor, expected: float, errors: float = 3) -> bool:
    standard_error = samples.double().std().item() / math.sqrt(len(samples))
    return abs(samples.double().mean().item() - expected) <= errors * standard_error


# Levels


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_in_many_dimensions_are_the_gaussian_ones(bits):
    levels = sphere.coordinate_grid(8192, bits).points * math.sqrt(8192)
    published = torch.tensor([-x for x in GAUSSIAN[bits][::-1]] + GAUSSIAN[bits])
    assert torch.allclose(levels, published, atol=1e-3, rtol=0)
    assert torch.allclose(levels, lloyd_max_levels(bits), atol=1e-3, rtol=0)
    assert not torch.allclose(
        sphere.coordinate_grid(64, bits).points * 8, published, atol=1e-3, rtol=0
    )
    assert computed_distortion(8192, bits) == pytest.approx(GAUSSIAN_ERROR[bits], rel=1e-3)


def test_levels_of_128_dimensions():
    levels = sphere.coordinate_grid(128, 2).points[2:] * math.sqrt(128)
    assert torch.allclose(levels, torch.tensor([0.45245, 1.50519]), atol=5e-6, rtol=0)
    assert computed_distortion(128, 2) == pytest.approx(0.1160, abs=5e-5)
    assert computed_distortion(128, 4) == pytest.approx(0.00932, abs=1e-5)


@pytest.mark.parametrize("width", [3, 4, 5, 16, 128, 1000])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_levels_are_the_means_of_their_cells(width, bits):
    levels = sphere.coordinate_grid(width, bits).points.double().numpy()
    assert np.allclose(means_and_error(width, levels)[0], levels, atol=1e-6, rtol=0)
    levels[0] *= 0.98
    assert not np.allclose(means_and_error(width, levels)[0], levels, atol=1e-6, rtol=0)


def test_levels_of_few_dimensions():
    """One dimension: only -1 and 1. Two: the arcsine law. Three: uniform (Archimedes)."""
    assert sphere.coordinate_grid(1, 1).points.tolist() == [-1, 1]
    assert sphere.coordinate_grid(1, 3).points[[0, -1]].tolist() == [-1, 1]
    assert sphere.coordinate_grid(2, 1).points[1].item() == pytest.approx(2 / math.pi)
    levels = sphere.coordinate_grid(2, 4).points.double().numpy()
    ends = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
    means = -np.diff(np.sqrt(1 - ends**2)) / np.diff(np.arcsin(ends))
    assert np.allclose(means, levels, atol=1e-6, rtol=0)
    uniform = torch.linspace(-7 / 8, 7 / 8, 8)
    assert torch.allclose(sphere.coordinate_grid(3, 3).points, uniform, atol=1e-7)


# The rotation


def test_rotation_is_orthogonal_and_that_of_gram_schmidt():
    x = torch.eye(24)
    turned = sphere.rotate(x, "qr", 5)
    assert np.allclose(turned.numpy(), reference.rotation(24, 5).T, atol=1e-6)
    assert torch.allclose(turned @ turned.T, x, atol=1e-6)
    assert torch.allclose(sphere.rotate(turned, "qr", 5, inverse=True), x, atol=1e-6)
    assert not torch.allclose(turned, sphere.rotate(x, "qr", 6), atol=0.1)
    assert not torch.allclose(sphere.rotate(turned, "qr", 5), x, atol=0.1)


def test_seeds_mean_the_same_on_every_machine():
    q = TurboQuant(4, qjl=True, seed=3).quantize(torch.arange(1.0, 17)[None])
    assert q.parts["norm"].item() == 38.6875
    assert q.parts["codes"].tolist() == [[175, 148, 78, 128, 70, 205]]
    assert q.parts["residual"].item() == pytest.approx(0.1831, abs=1e-3)
    assert q.parts["signs"].tolist() == [[82, 160]]


@pytest.mark.parametrize("width", [1, 2, 12, 64, 128])
def test_hadamard_rotation_turns_back(width):
    x = units(5, width)
    turned = sphere.rotate(x, "hadamard", 1)
    assert torch.allclose(turned.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(sphere.rotate(turned, "hadamard", 1, inverse=True), x, atol=1e-6)
    if width > 2:
        assert not torch.allclose(sphere.rotate(turned, "hadamard", 1), x, atol=1e-2)
        assert not torch.allclose(sphere.rotate(x, "hadamard", 2), turned, atol=1e-2)


# Codes


def numpy_parts(x: np.ndarray, format: TurboQuant) -> tuple[dict, np.ndarray]:
    """What `format` stores for rows `x`, and what that decodes to, in float64."""
    width = x.shape[1]
    turn, kept = reference.rotation(width, format.seed), {}
    kept["norm"] = np.linalg.norm(x, axis=1, keepdims=True).astype(np.float16)
    rest = (x / kept["norm"].astype(np.float64)) @ turn.T
    decoded = np.zeros_like(rest)
    if levels := format.bits - format.qjl:
        points = reference.lloyd(density(width), -1, 1, levels)
        codes = reference.nearest(rest, points)
        kept["codes"] = reference.packed(codes, levels)
        decoded = points[codes]
    if format.qjl:
        rest = rest - decoded
        matrix = reference.gaussian(format.seed, 1, (width, width))
        kept["residual"] = np.linalg.norm(rest, axis=1, keepdims=True).astype(np.float16)
        kept["signs"] = reference.packed((rest @ matrix.T > 0).astype(int), 1)
        size = kept["residual"].astype(np.float64) * math.sqrt(math.pi / 2) / width
        decoded = decoded + size * (np.sign(rest @ matrix.T) @ matrix)
    return kept, decoded @ turn * kept["norm"]


@pytest.mark.parametrize("qjl", [False, True])
@pytest.mark.parametrize(("bits", "width"), [(1, 8), (2, 13), (3, 24), (4, 5)])
def test_codes_and_rows_are_those_of_numpy(bits, width, qjl):
    format = TurboQuant(bits, qjl, seed=bits)
    x = 3 * torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    q = format.quantize(x)
    kept, decoded = numpy_parts(x.double().numpy(), format)
    assert set(kept) == set(q.parts)
    for name, part in q.parts.items():
        if name == "residual":
            assert np.allclose(part.numpy(), kept[name], rtol=1e-3)
        else:
            assert np.array_equal(part.numpy(), kept[name]), name
    assert np.allclose(q.dequantize().numpy(), decoded, atol=5e-3 * x.norm(dim=1).max().item() / 4)
    other, _ = numpy_parts(x.double().numpy(), TurboQuant(bits, qjl, seed=bits + 1))
    codes = "signs" if bits == 1 and qjl else "codes"
    assert not np.array_equal(q.parts[codes].numpy(), other[codes])


def test_one_flipped_bit_of_a_code_moves_one_coordinate_of_one_row():
    q = TurboQuant(2).quantize(units(4, 16))
    before, points = q.dequantize(), sphere.coordinate_grid(16, 2).points
    code = int(q.parts["codes"][2, 0]) & 3
    q.parts["codes"][2, 0] ^= 2
    change = q.dequantize() - before
    step = (points[code ^ 2] - points[code]).abs() * q.parts["norm"][2].float()
    assert change[2].norm().item() == pytest.approx(step.item(), rel=1e-5)
    assert change[[0, 1, 3]].abs().max() == 0


def test_one_flipped_sign_moves_the_row_by_one_row_of_the_sketch():
    q = TurboQuant(3, qjl=True, seed=4).quantize(units(4, 16))
    before = q.dequantize()
    q.parts["signs"][1, 0] ^= 8
    change = q.dequantize() - before
    row = np.linalg.norm(reference.gaussian(4, 1, (16, 16))[3])
    size = 2 * math.sqrt(math.pi / 2) / 16 * q.parts["residual"][1] * q.parts["norm"][1]
    assert change[1].norm().item() == pytest.approx(row * size.item(), rel=1e-3)
    assert change[[0, 2, 3]].abs().max() == 0


# Distortion and inner products


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [3, 64, 128])
def test_distortion_is_the_computed_one_and_below_the_bound(bits, width):
    x = units(4000, width, seed=bits)
    error = (TurboQuant(bits).quantize(x).dequantize() - x).square().sum(1)
    assert within(error, computed_distortion(width, bits))
    # The levels of the next width up are not far, those of another number of bits are.
    assert not within(error, computed_distortion(width, bits + 1))
    # Theorem 1 of the paper, and theorem 3 from below.
    if width > 3:
        assert 4.0**-bits < error.mean() < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_distortion_does_not_depend_on_the_data():
    """One vector, as far from a Gaussian as can be, under many rotations."""
    spike = torch.eye(64)[:1]
    seeds = range(400)
    errors = [(TurboQuant(2, seed=s).quantize(spike).dequantize() - spike).norm() for s in seeds]
    assert within(torch.stack(errors).square(), computed_distortion(64, 2))
    # Random signs before a Hadamard transform leave a spike with 64 equal magnitudes.
    fixed = TurboQuant(2, rotation="hadamard").quantize(spike).dequantize()
    assert (fixed - spike).square().sum() > 2 * computed_distortion(64, 2)


def products(format, seeds: int, rows: int = 16, width: int = 32):
    """Estimated inner products <y, x> = 0.8 of unit vectors, averaged over rows, seed by seed."""
    x = units(rows, width, seed=1)
    across = units(rows, width, seed=2)
    across = across - (across * x).sum(1, keepdim=True) * x
    y = 0.8 * x + 0.6 * across / across.norm(dim=1, keepdim=True)
    decoded = (format(seed).quantize(x).dequantize() for seed in range(seeds))
    return torch.stack([(y * rows).sum(1).mean() for rows in decoded])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_inner_products_are_unbiased_only_with_the_sketch(bits):
    assert within(products(lambda seed: TurboQuant(bits, True, seed=seed), 300), 0.8)
    shrunk = products(lambda seed: TurboQuant(bits, seed=seed), 100)
    assert not within(shrunk, 0.8, errors=10)
    assert within(shrunk, 0.8 * (1 - computed_distortion(32, bits)))


def test_factors_of_shrinking_are_the_published_ones():
    """In many dimensions 2 / pi at one bit, 0.88 at two."""
    factors = [1 - computed_distortion(8192, bits) for bits in (1, 2, 3)]
    assert factors == pytest.approx([2 / math.pi, 0.88, 0.97], abs=5e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_variance_of_inner_products(bits):
    """d E[error^2]: pi / 2 times the distortion of one bit less, or times 1 where no bit is left.

    The paper prints 1.57, 0.56, 0.18 and 0.047; the last is pi / 2 times 0.03, the distortion of 3
    bits in one digit. 0.034 gives 0.053.
    """
    errors = []
    for seed in range(4):
        x, y = units(3000, 128, seed=2 * seed), units(3000, 128, seed=2 * seed + 1)
        q = TurboQuant(bits, qjl=True, seed=seed).quantize(x)
        errors.append(128 * ((q.dequantize() - x) * y).sum(1).square())
    errors = torch.cat(errors)
    left = computed_distortion(128, bits - 1) if bits > 1 else 1.0
    assert within(errors, math.pi / 2 * left)
    assert errors.mean().item() == pytest.approx([1.57, 0.56, 0.18, 0.053][bits - 1], rel=0.04)
    assert 4.0**-bits < errors.mean() < math.sqrt(3) * math.pi**2 * 4.0**-bits
    assert not within(errors, math.pi / 2 * left * 1.1)


# Storage


@pytest.mark.parametrize("name", ["turbo1", "turbo2", "turbo3-qjl", "turbo1-qjl", "turbo8"])
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 7), (5,), (4, 1), (1, 2), (2, 3), ()])
def test_parts_are_what_the_layout_says(name, shape):
    format = turboquant.format(name)
    q = format.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = {part: (t.dtype, tuple(t.shape)) for part, t in q.parts.items()}
    assert found == format.layout(shape)
    assert q.nbytes == format.nbytes(shape)
    assert q.dequantize().shape == shape
    assert q.dequantize().isfinite().all()


def test_bits_per_weight_counts_lengths_and_padding():
    x = units(10, 128)
    assert TurboQuant(4).quantize(x).bits_per_weight == 4 + 16 / 128
    assert TurboQuant(4, qjl=True).quantize(x).bits_per_weight == 4 + 32 / 128
    assert TurboQuant(4, norm=torch.float32).quantize(x).bits_per_weight == 4 + 32 / 128
    # 13 codes of 3 bits are 5 bytes.
    assert TurboQuant(3).quantize(units(2, 13)).bits_per_weight == (40 + 16) / 13


def test_rows_can_be_taken_apart():
    x = units(6, 32)
    q = TurboQuant(3, qjl=True).quantize(x)
    pieces = q.split([1, 5])
    assert torch.allclose(torch.cat([p.dequantize() for p in pieces]), q.dequantize(), atol=1e-6)


# Edges


@pytest.mark.parametrize("format", [TurboQuant(2), TurboQuant(2, qjl=True), TurboQuant(1, True)])
def test_rows_of_zeros_stay_zero(format):
    x = units(3, 10)
    x[1] = 0
    decoded = format.quantize(x).dequantize()
    assert decoded[1].abs().max() == 0
    assert decoded[[0, 2]].abs().amax(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken_as_float32(dtype):
    x = units(3, 20).to(dtype)
    q, same = TurboQuant(3, qjl=True).quantize(x), TurboQuant(3, qjl=True).quantize(x.float())
    assert all(torch.equal(q.parts[name], same.parts[name]) for name in q.parts)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(-8, 8), st.booleans(), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_powers_of_two_change_only_the_norm(width, bits, exponent, qjl, seed):
    x, format = units(2, width, seed), TurboQuant(bits, qjl)
    q, scaled = format.quantize(x), format.quantize(x * 2.0**exponent)
    assert torch.equal(scaled.parts["norm"].float(), q.parts["norm"].float() * 2.0**exponent)
    assert all(torch.equal(scaled.parts[k], q.parts[k]) for k in q.parts if k != "norm")


def test_width_one_is_exact():
    x = torch.tensor([[2.5], [-0.25], [0.0]])
    for format in (TurboQuant(1), TurboQuant(3), TurboQuant(3, qjl=True)):
        assert torch.equal(format.quantize(x).dequantize(), x)


def test_lengths_too_small_for_float16_become_the_smallest():
    q = TurboQuant(4).quantize(torch.full((1, 8), 1e-12))
    assert q.parts["norm"].item() == 2.0**-24
    assert q.dequantize().norm() < 2.0**-24
    kept = TurboQuant(4, norm=torch.float32).quantize(torch.full((1, 8), 1e-12))
    assert kept.dequantize().mean().item() == pytest.approx(1e-12, rel=0.3)


def raises(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_what_cannot_be_stored_is_refused():
    format = TurboQuant(2)
    with raises("weight [1, 2] holds 2 NaN or infinite values; repair them first"):
        format.quantize(torch.tensor([[math.nan, math.inf]]))
    with raises("weight [0, 4] is empty: there is nothing to quantize"):
        format.quantize(torch.empty(0, 4))
    with raises("weight [1, 4] has dtype torch.int64; quantize takes floating point"):
        format.quantize(torch.ones(1, 4, dtype=torch.long))
    with raises("a norm of 1e+05 overflows float16; store it as torch.float32"):
        format.quantize(torch.tensor([[1e5, 0.0]]))
    large = TurboQuant(8, norm=torch.float32).quantize(torch.tensor([[1e30, 1e30]]))
    assert large.dequantize().mean().item() == pytest.approx(1e30, rel=0.02)
    wide = "rows of 8193 are wider than a rotation of 8192: reshape it to shorter ones"
    with raises(wide):
        format.quantize(torch.ones(1, 8193))
    with raises(wide):
        format.layout((1 << 40, 8193))


def test_what_does_not_exist_is_refused():
    with raises("TurboQuant has 1 to 8 bits, got 9"):
        TurboQuant(9)
    with raises("TurboQuant has 1 to 8 bits, got True"):
        TurboQuant(True)
    with raises("qjl is True or False, got 1"):
        TurboQuant(3, qjl=1)
    with raises("rotation is one of qr, hadamard, got 'random'"):
        TurboQuant(3, rotation="random")
    with raises("seed is an int from 0 to 2**32 - 1, got -1"):
        TurboQuant(3, seed=-1)
    with raises("norms are stored as float16 or float32, got torch.bfloat16"):
        TurboQuant(3, norm=torch.bfloat16)
    with raises("norms are stored as float16 or float32, got 'float16'"):
        TurboQuant(3, norm="float16")
    with raises("unknown format 'turbo9': TurboQuant is turbo{1..8}[-qjl]"):
        turboquant.format("turbo9")


def test_names():
    assert turboquant.format("turbo3") == TurboQuant(3)
    assert turboquant.format("turbo2-qjl") == TurboQuant(2, qjl=True)
    assert str(TurboQuant(2, rotation="hadamard", seed=7)) == (
        "TurboQuant of 2 bits, hadamard rotation 7"
    )


def test_is_a_format_like_any_other():
    x = units(4, 64)
    q = qlib.quantize(x, TurboQuant(4), importance=torch.ones(4, 64))
    assert torch.equal(q.dequantize(), TurboQuant(4).quantize(x).dequantize())
    assert len(q.tobytes()) == q.nbytes == 4 * (2 + 32)
