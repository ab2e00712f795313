"""PolarQuant: densities of angles, codes against numpy, distortion against its closed form."""

from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache

import numpy as np
import pytest
import sphere_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import betainc

import qlib
from qlib import polarquant, sphere
from qlib.polarquant import PolarQuant, from_polar, to_polar


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def density(run: int):
    return lambda psi: math.sin(2 * psi) ** (run - 1)


# Angles


def angle_share(level: int):
    """The distribution of an angle: sin(psi)^2 of two independent chi-squares is a beta."""
    if level == 1:
        return lambda psi: (psi + math.pi) / math.tau
    half = 2 ** (level - 1) / 2
    tables = np.linspace(0, 1, 2001)
    values = [float(betainc(half, half, 0, x, regularized=True)) for x in tables]
    return lambda psi: np.interp(np.sin(psi) ** 2, tables, values)


def rotated_spikes(seeds: int = 250) -> torch.Tensor:
    """One vector, far from Gaussian, under many rotations."""
    spike = torch.linspace(-1, 1, 32)[None] ** 3
    spike[0, 5] = 30
    return torch.cat([sphere.rotate(spike, "qr", seed) for seed in range(seeds)])


def test_angles_have_the_published_densities():
    angles, _ = to_polar(rotated_spikes(), 5)
    for level, angle in enumerate(angles, 1):
        samples = angle.flatten().double().numpy()
        assert reference.kolmogorov(samples, angle_share(level)) < 1.95
        # The density two levels away is another.
        if level > 1:
            other = angle_share(level + 2 if level < 4 else level - 2)
            assert reference.kolmogorov(samples, other) > 2.5


def test_angles_without_a_rotation_have_others():
    vectors = torch.linspace(-1, 1, 32)[None] ** 3 + 0.01 * normal(250, 32)
    for level, angle in enumerate(to_polar(vectors, 5)[0], 1):
        assert reference.kolmogorov(angle.flatten().double().numpy(), angle_share(level)) > 3


@pytest.mark.parametrize("run", [2, 4, 8, 64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_the_means_of_their_cells(run, bits):
    levels = sphere.angle_grid(run, bits).points.double().numpy()
    means, _ = reference.centroids(density(run), 0, math.pi / 2, levels)
    assert np.allclose(means, levels, atol=1e-6, rtol=0)
    levels[0] *= 0.98
    means, _ = reference.centroids(density(run), 0, math.pi / 2, levels)
    assert not np.allclose(means, levels, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_coordinates_are_turned_back(dtype):
    x = normal(20, 48).to(dtype)
    x[3, :16] = 0
    angles, radius = to_polar(x, 4)
    assert [a.shape[1] for a in angles] == [24, 12, 6, 3]
    assert torch.allclose(radius[:, 0], x[:, :16].norm(dim=1))
    assert torch.allclose(from_polar(angles, radius), x, atol=20 * torch.finfo(dtype).eps, rtol=0)
    angles[2][0, 0] += 0.01
    assert not torch.allclose(from_polar(angles, radius), x, atol=1e-3)


# Codes


def numpy_parts(x: np.ndarray, format: PolarQuant) -> dict[str, np.ndarray]:
    """What `format` stores for rows `x` of whole blocks, one angle after the other."""
    lengths, parts = x @ reference.rotation(x.shape[1], format.seed).T, {}
    for level, bits in enumerate(format.bits, 1):
        first, second = lengths[:, ::2], lengths[:, 1::2]
        angles = [[math.atan2(b, a) for a, b in zip(*row)] for row in zip(first, second)]
        if level == 1:
            levels = (np.arange(2**bits) + 0.5) * math.tau / 2**bits
            codes = [[int(np.argmax(np.cos(levels - a))) for a in row] for row in angles]
        else:
            shape = np.vectorize(density(2 ** (level - 1)))
            codes = reference.nearest(angles, reference.lloyd(shape, 0, math.pi / 2, bits, 300))
        parts[f"angles{level}"] = reference.packed(np.array(codes), bits)
        lengths = np.sqrt(first**2 + second**2)
    return parts | {"radius": lengths.astype(np.float16)}


@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (1,), (3, 1), (2, 3, 1)])
def test_codes_are_those_of_numpy(bits):
    format, x = PolarQuant(bits, seed=2), 3 * normal(6, 16)
    q, kept = format.quantize(x), numpy_parts(x.double().numpy(), PolarQuant(bits, seed=2))
    assert set(q.parts) == set(kept)
    for name, part in q.parts.items():
        if name == "radius":
            assert np.allclose(part.numpy(), kept[name], rtol=1e-3)
        else:
            assert np.array_equal(part.numpy(), kept[name]), name
    other = numpy_parts(x.double().numpy(), PolarQuant(bits, seed=3))
    assert not np.array_equal(q.parts["angles1"].numpy(), other["angles1"])


def test_decoded_blocks_have_their_stored_radius():
    q = PolarQuant().quantize(normal(5, 64))
    blocks = sphere.rotate(q.dequantize(), "qr", 0).unflatten(1, (-1, 16))
    assert torch.allclose(blocks.norm(dim=-1), q.parts["radius"].float(), rtol=1e-5)


def test_one_flipped_bit_of_a_code_turns_one_angle():
    q = PolarQuant().quantize(normal(4, 32))
    before = q.dequantize()
    code = int(q.parts["angles4"][2, 0]) & 3
    q.parts["angles4"][2, 0] ^= 1
    change = q.dequantize() - before
    points = sphere.angle_grid(8, 2).points
    # Two points of a circle around the origin: the chord.
    chord = 2 * math.sin(abs(points[code ^ 1] - points[code]).item() / 2)
    expected = chord * q.parts["radius"][2, 0].item()
    assert change[2].norm().item() == pytest.approx(expected, rel=1e-4)
    assert change[[0, 1, 3]].abs().max() == 0


# Distortion


@lru_cache
def mean_cosine(level: int, bits: int) -> float:
    """Of an angle minus its nearest level."""
    if level == 1:
        return math.sin(math.pi / 2**bits) / (math.pi / 2**bits)
    run = 2 ** (level - 1)
    levels = sphere.angle_grid(run, bits).points.double().numpy()
    return reference.expectation(math.cos, density(run), levels, 0, math.pi / 2)


def computed_distortion(bits: tuple[int, ...]) -> float:
    """E |x - decoded|^2 / |x|^2: the cosine between the two is a product, as angles are
    independent."""
    return 2 * (1 - math.prod(mean_cosine(level, count) for level, count in enumerate(bits, 1)))


@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (3, 2, 2, 3, 2), (2, 1, 1, 1, 2), (5,), (3, 3)])
def test_distortion_is_the_computed_one(bits):
    x = normal(3000, 128)
    blocks = x.norm(dim=1).square()
    error = (PolarQuant(bits).quantize(x).dequantize() - x).square().sum(1) / blocks
    expected, standard_error = computed_distortion(bits), error.std() / math.sqrt(3000)
    assert abs(error.mean() - expected) < 3 * standard_error
    other = (bits[0] + 1, *bits[1:])
    assert abs(error.mean() - computed_distortion(other)) > 3 * standard_error


@pytest.mark.parametrize(("name", "size"), [("polar3", 3), ("polar2", 2)])
def test_no_choice_of_five_levels_has_less_error_for_its_size(name, size):
    choices = itertools.product(range(1, 5), repeat=5)
    counts = [16, 8, 4, 2, 1]
    fit = [c for c in choices if 16 + sum(n * b for n, b in zip(counts, c)) <= 32 * size]
    assert min(fit, key=computed_distortion) == polarquant.NAMED[name]
    assert len(fit) > 1


# Storage


def test_bits_per_weight():
    sizes = {name: polarquant.format(name) for name in polarquant.NAMED}
    found = {name: f.quantize(normal(10, 128)).bits_per_weight for name, f in sizes.items()}
    assert found == {"polar": 3.875, "polar3": 3.0, "polar2": 2.0}
    assert PolarQuant().quantize(normal(3, 64)).bits_per_weight == 3.875
    # One block: the 2 bits of the last level take a byte of their own.
    assert PolarQuant().quantize(normal(3, 16)).bits_per_weight == (32 + 8 + 8 + 8 + 16) / 16
    assert PolarQuant(radius=torch.float32).quantize(normal(3, 64)).bits_per_weight == 4.875


@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (1,), (8, 8), (2, 1, 1, 1, 2)])
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 7), (5,), (4, 1), (1, 17), ()])
def test_parts_are_what_the_layout_says(bits, shape):
    format = PolarQuant(bits)
    q = format.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = {part: (t.dtype, tuple(t.shape)) for part, t in q.parts.items()}
    assert found == format.layout(shape)
    assert q.nbytes == format.nbytes(shape)
    assert q.dequantize().shape == shape
    assert q.dequantize().isfinite().all()


def test_rows_of_other_widths_are_lengthened_by_zeros():
    x = normal(50, 21)
    wide = torch.nn.functional.pad(x, (0, 11))
    q, whole = PolarQuant().quantize(x), PolarQuant().quantize(wide)
    assert all(torch.equal(q.parts[name], whole.parts[name]) for name in whole.parts)
    assert torch.equal(q.dequantize(), whole.dequantize()[:, :21])


def test_rows_can_be_taken_apart():
    q = PolarQuant().quantize(normal(6, 32))
    pieces = q.split([1, 5])
    assert torch.allclose(torch.cat([p.dequantize() for p in pieces]), q.dequantize(), atol=1e-6)


# Edges


def test_rows_of_zeros_stay_zero():
    x = normal(3, 20)
    x[1] = 0
    decoded = PolarQuant().quantize(x).dequantize()
    assert decoded[1].abs().max() == 0
    assert decoded[[0, 2]].abs().amax(1).min() > 0


def test_angles_at_the_seam_of_the_circle():
    angles = torch.tensor([[math.pi, -math.pi, 0.0, -0.0, -1e-30, math.pi / 2]])
    codes = polarquant._round(angles, 1, 2)
    assert codes.tolist() == [[2, 2, 0, 0, 3, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken_as_float32(dtype):
    x = normal(3, 20).to(dtype)
    q, same = PolarQuant().quantize(x), PolarQuant().quantize(x.float())
    assert all(torch.equal(q.parts[name], same.parts[name]) for name in q.parts)


@given(st.integers(1, 40), st.integers(-8, 8), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_powers_of_two_change_only_the_radius(width, exponent, seed):
    x = normal(2, width, seed)
    q, scaled = PolarQuant((4, 2, 2)).quantize(x), PolarQuant((4, 2, 2)).quantize(x * 2.0**exponent)
    assert all(torch.equal(scaled.parts[k], q.parts[k]) for k in q.parts if k != "radius")
    assert torch.allclose(scaled.dequantize(), q.dequantize() * 2.0**exponent, rtol=1e-3, atol=1e-5)


def test_hadamard_rotation():
    x = normal(2000, 64)
    error = (PolarQuant(rotation="hadamard").quantize(x).dequantize() - x).square().sum(1)
    assert (error / x.square().sum(1)).mean() == pytest.approx(0.0321, rel=0.02)


def raises(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_what_cannot_be_stored_is_refused():
    with raises("weight [1, 2] holds 1 NaN or infinite values; repair them first"):
        PolarQuant().quantize(torch.tensor([[math.nan, 1.0]]))
    with raises("weight [0, 4] is empty: there is nothing to quantize"):
        PolarQuant().quantize(torch.empty(0, 4))
    with raises("a radius of 1e+05 overflows float16; store it as torch.float32"):
        PolarQuant().quantize(torch.tensor([[1e5, 0.0]]))
    large = PolarQuant(radius=torch.float32).quantize(torch.tensor([[1e30, 1e30]]))
    assert large.dequantize().mean().item() == pytest.approx(1e30, rel=0.3)
    with raises("rows of 8193 are wider than a rotation of 8192: reshape it to shorter ones"):
        PolarQuant().layout((1 << 40, 8193))


def test_what_does_not_exist_is_refused():
    with raises("PolarQuant has 1 to 10 levels of 1 to 8 bits, got ()"):
        PolarQuant(())
    with raises("PolarQuant has 1 to 10 levels of 1 to 8 bits, got (4, 9)"):
        PolarQuant((4, 9))
    for bits in (4, None, 2.5):
        with raises(f"bits are those of each level, such as (4, 2, 2, 2); got {bits}"):
            PolarQuant(bits)
    with raises("rotation is one of qr, hadamard, got None"):
        PolarQuant(rotation=None)
    with raises("seed is an int from 0 to 2**32 - 1, got 4294967296"):
        PolarQuant(seed=2**32)
    with raises("radii are stored as float16 or float32, got torch.bfloat16"):
        PolarQuant(radius=torch.bfloat16)
    with raises("radii are stored as float16 or float32, got 'float16'"):
        PolarQuant(radius="float16")
    with raises("unknown format 'polar4': PolarQuant is polar, polar3, polar2"):
        polarquant.format("polar4")


def test_names():
    assert polarquant.format("polar") == PolarQuant() == PolarQuant([4, 2, 2, 2])
    assert str(polarquant.format("polar2")) == "PolarQuant of 2, 1, 1, 1, 2 bits, qr rotation 0"


def test_is_a_format_like_any_other():
    x = normal(4, 64)
    q = qlib.quantize(x, PolarQuant(), importance=torch.ones(4, 64))
    assert torch.equal(q.dequantize(), PolarQuant().quantize(x).dequantize())
    assert len(q.tobytes()) == q.nbytes == 4 * 31
