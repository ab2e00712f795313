"""Normal floats, bitsandbytes' FP4 and double quantization, Lloyd-Max levels, MLX's affine formats.

bitsandbytes puts the first weight of a byte in the high nibble and lets blocks run on from row to
row; qlib's blocks end with their row, so shapes here have rows of whole blocks.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import bitsandbytes.functional as bnb
import mlx.core as mx
import numpy as np
import pytest
import torch
from format_weights import WEIGHTS, gaussian

import qlib
from qlib import double, fit, grid, presets
from qlib.double import DoubleQuant
from qlib.metrics import snr_db
from qlib.pack import unpack
from qlib.scheme import Scheme

mx.set_default_device(mx.cpu)

SHAPES = [(64, 64), (7, 192), (1, 64), (3, 64 * 100), (130, 640), (257, 64)]


def bnb_codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)


def our_codes(q) -> torch.Tensor:
    return unpack(q.parts["codes"], 4, q.shape[1]).reshape(-1)


def one_zero(codes: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' FP4 has two zeros; it takes code 8 for positive weights that round to zero,
    qlib for negative ones."""
    return codes.masked_fill(codes == 8, 0)


# -- tables -----------------------------------------------------------------------------------


def test_tables_equal_those_of_bitsandbytes():
    assert torch.equal(grid.NF4.points, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(grid.BNB_FP4.points, bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(double.dynamic_points(), bnb.create_dynamic_map())
    assert not torch.equal(double.dynamic_points(), bnb.create_dynamic_map(max_exponent_bits=6))


def quantiles(bits: int, last: float) -> list[float]:
    """Normal float by the standard library: 2^(bits-1) steps above one half, one less below."""
    points = [0.0]
    for sign, count in ((1, 2 ** (bits - 1)), (-1, 2 ** (bits - 1) - 1)):
        steps = [last + (0.5 - last) * i / count for i in range(count)]
        points += [sign * NormalDist().inv_cdf(p) for p in steps]
    return sorted(x / max(points) for x in points)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_is_made_of_quantiles(bits):
    codes = 2**bits
    last = ((1 - 1 / (2 * codes)) + (1 - 1 / (2 * codes - 2))) / 2
    points = grid.normal_float(bits).points
    tolerance = 2e-7 if bits == 4 else 6e-8
    np.testing.assert_allclose(points, quantiles(bits, last), rtol=0, atol=tolerance)
    assert (points == 0).sum() == 1
    assert (points.min(), points.max(), len(points)) == (-1, 1, codes)
    # Another outermost probability gives another table.
    assert np.abs(points.numpy() - quantiles(bits, 1 - 1 / (2 * codes))).max() > 1e-5


def test_published_nf4_is_normal_float_with_a_probability_of_seven_digits():
    """bitsandbytes computed it from 0.9677083; the middle is 929/960, 2e-7 away."""
    np.testing.assert_allclose(grid.NF4.points, quantiles(4, 0.9677083), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(grid.NF4.points, quantiles(4, 929 / 960), rtol=0, atol=2e-7)
    assert not np.allclose(grid.NF4.points, quantiles(4, 929 / 960), rtol=0, atol=1.2e-7)
    assert np.abs(grid.NF4.points.numpy() - quantiles(4, 0.96771)).max() > 1e-6
    assert grid.normal_float(4) == grid.NF4


# Max 1960, table I: positive levels (four digits) and mean squared error for N = 2, 4, 8, 16.
MAX_1960 = {
    1: (0.3634, [0.7980]),
    2: (0.1175, [0.4528, 1.510]),
    3: (0.03454, [0.2451, 0.7560, 1.344, 2.152]),
    4: (0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
}


def gaussian_moments(low: float, high: float) -> tuple[float, float, float]:
    """Integrals of 1, x and x^2 over a cell of the Gaussian density."""
    normal = NormalDist()

    def edge(x):
        return (0.0, 0.0) if math.isinf(x) else (normal.pdf(x), x * normal.pdf(x))

    mass = normal.cdf(high) - normal.cdf(low)
    (p, xp), (q, xq) = edge(low), edge(high)
    return mass, p - q, mass + xp - xq


def distortion(levels: list[float]) -> tuple[float, float]:
    """(mean squared error on a Gaussian, largest distance of a level from its cell's mean)."""
    ends = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:])), math.inf]
    error, off = 0.0, 0.0
    for y, low, high in zip(levels, ends, ends[1:]):
        mass, first, second = gaussian_moments(low, high)
        error += second - 2 * y * first + y * y * mass
        off = max(off, abs(first / mass - y))
    return error, off


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_means_of_their_cells(bits):
    levels = grid.lloyd_max(bits).points.tolist()
    error, off = distortion(levels)
    assert off < 1e-5 if bits == 8 else off < 1e-6
    assert levels == sorted(levels)
    assert levels == [-x for x in reversed(levels)]
    # Panter and Dite's asymptote, sqrt(3) pi / 2 4^-bits, is approached from below.
    assert 0.5 < error / (math.sqrt(3) * math.pi / 2 * 4.0**-bits) < 1
    if bits in MAX_1960:
        published, positive = MAX_1960[bits]
        assert error == pytest.approx(published, rel=1e-3)
        np.testing.assert_allclose(levels[2 ** (bits - 1) :], positive, rtol=3e-4)
    for scale in (0.98, 1.02):
        moved, off = distortion([x * scale for x in levels])
        assert moved > error
        assert off > 1e-4


@pytest.mark.parametrize(
    ("make", "bits", "message"),
    [
        (grid.normal_float, 1, "normal floats have 2 to 8 bits, got 1"),
        (grid.lloyd_max, 9, "Lloyd-Max grids have 1 to 8 bits, got 9"),
    ],
)
def test_impossible_widths(make, bits, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(bits)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_lloyd_formats_reach_the_distortion_on_gaussian_weights(bits, error):
    weight = gaussian(64, 4096, seed=bits)
    wide = qlib.quantize(weight, f"lloyd{bits}-g4096")
    assert (wide.dequantize() - weight).square().mean().item() == pytest.approx(error, rel=0.05)
    huge = Scheme(grid.lloyd_max(4), 64, fit.rms, scale=torch.float32)
    assert torch.equal(
        huge.quantize(weight * 2.0**120).parts["codes"], huge.quantize(weight).parts["codes"]
    )


# -- bitsandbytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_blocks_equal_bitsandbytes(name, kind):
    weight = WEIGHTS[name]()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    q = qlib.quantize(weight, {"nf4": "nf4", "fp4": "fp4_bnb"}[kind])
    ours, theirs = our_codes(q), bnb_codes(packed)
    if kind == "fp4":
        ours, theirs = one_zero(ours), one_zero(theirs)
    assert torch.equal(q.parts["scale"].view(-1), state.absmax)
    differ = ours != theirs
    assert bool(differ.any()) == (kind == "fp4" and name in ("ties", "real"))
    assert name == "ties" or differ.float().mean() < 1e-3
    # qlib divides by absmax and bitsandbytes multiplies by its reciprocal: the last bit of that
    # decides weights at the middle of two points.
    x = (weight.view(-1, 64) / state.absmax.clamp(min=1e-38)[:, None]).view(-1)[differ]
    middle = (q.format.grid.decode(ours[differ]) + q.format.grid.decode(theirs[differ])) / 2
    torch.testing.assert_close(middle, x, rtol=2**-22, atol=0)
    values = bnb.dequantize_4bit(packed, state)
    assert torch.equal(q.dequantize().view(-1)[~differ], values.view(-1)[~differ])
    q.parts["codes"][0, 0] ^= 1
    assert not torch.equal(our_codes(q), theirs)


def test_ties_of_bitsandbytes_go_down():
    """Where x is the middle of two points, bitsandbytes takes the lower, qlib the even code."""
    points = grid.NF4.points.double()
    middles = ((points[1:] + points[:-1]) / 2).float()
    exact = middles.double() * 2 == points[1:] + points[:-1]
    weight = torch.cat([torch.ones(1), middles, torch.zeros(48)])[None]
    packed, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs, ours = (
        x[1:16].int() for x in (bnb_codes(packed), our_codes(qlib.quantize(weight, "nf4")))
    )
    lower = torch.arange(15)
    assert torch.equal(theirs[exact], lower[exact].int())
    assert torch.equal(ours[exact], (lower + lower % 2)[exact].int())
    assert exact.sum() > 0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_equals_bitsandbytes(shape, kind):
    weight = gaussian(*shape, seed=sum(shape))
    weight *= torch.linspace(0.1, 3, shape[0])[:, None]
    arguments = {"blocksize": 64, "quant_type": kind, "compress_statistics": True}
    packed, state = bnb.quantize_4bit(weight, **arguments)
    q = qlib.quantize(weight, {"nf4": "nf4-dq", "fp4": "fp4_bnb-dq"}[kind])
    ours, theirs = our_codes(q), bnb_codes(packed)
    if kind == "fp4":
        ours, theirs = one_zero(ours), one_zero(theirs)
    assert torch.equal(ours, theirs)
    assert torch.equal(q.parts["scale.codes"].view(-1), state.absmax)
    assert torch.equal(q.parts["scale.scale"].view(-1), state.state2.absmax)
    assert torch.equal(q.parts["scale.offset"], state.offset.view(1))
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))
    q.parts["scale.codes"][0, 0] ^= 2
    assert not torch.equal(q.parts["scale.codes"].view(-1), state.absmax)
    if state.state2.absmax[0] > 0:
        assert not torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name", ["zero blocks", "outliers", "1e30", "1e-30", "real"])
def test_double_quantization_of_extremes(name):
    weight = WEIGHTS[name]()
    arguments = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    packed, state = bnb.quantize_4bit(weight, **arguments)
    q = qlib.quantize(weight, "nf4-dq")
    assert torch.equal(our_codes(q), bnb_codes(packed))
    assert torch.equal(q.parts["scale.codes"].view(-1), state.absmax)
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


def test_many_remainders_get_bitsandbytes_codes():
    """Also those near the middle of two points, where its table of 65536 places decides."""
    values = gaussian(64, 1024, seed=9).abs()
    values -= values.mean()
    codes, state = bnb.quantize_blockwise(values, blocksize=256)
    blocks = values.view(-1, 256)
    x = blocks / state.absmax[:, None]
    assert torch.equal(double._nearest_place(x), codes.view(-1, 256))
    nearest = double.DYNAMIC.round(x)
    assert 0 < (nearest != codes.view(-1, 256)).sum() < 200


def test_bits_of_double_quantization_are_counted():
    shape = (4096, 4096)
    exact = 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2
    assert 8 * presets.NF4_DQ.nbytes(shape) / 4096**2 == exact
    assert round(exact, 3) == 4.127
    weight = gaussian(64, 256)
    q, plain = qlib.quantize(weight, "nf4-dq"), qlib.quantize(weight, "nf4")
    assert len(q.tobytes()) == q.nbytes == 64 * 128 + 256 + 4 + 4
    assert 0.99 < snr_db(weight, q.dequantize()) / snr_db(weight, plain.dequantize()) < 1


def test_double_quantization_refuses():
    for block in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"^block must be a positive int, got {block}$"):
            DoubleQuant(block)
    message = r"^scales up to 3\.4e\+38 overflow their float32 mean$"
    with pytest.raises(ValueError, match=message):
        qlib.quantize(torch.full((4, 64), 3.4e38), "nf4-dq")


# -- MLX --------------------------------------------------------------------------------------


def mlx_affine(weight: torch.Tensor, bits: int, size: int):
    """(packed rows, scales, biases), the latter two as float32."""
    dtype = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}
    array = mx.array(weight.float().numpy()).astype(dtype[weight.dtype])
    codes, *rest = mx.quantize(array, group_size=size, bits=bits)
    packed = torch.from_numpy(np.array(codes).view(np.uint8)).view(len(weight), -1)
    return packed, *(torch.from_numpy(np.array(x.astype(mx.float32))) for x in rest)


def as_mlx(bits: int, size: int, dtype: torch.dtype) -> Scheme:
    return dataclasses.replace(qlib.format(f"mlx{bits}-g{size}"), scale=dtype, offset=dtype)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_equals_mlx(bits, size):
    for name in ("gaussian", "zero blocks", "outliers", "1e30", "ties", "real"):
        weight = WEIGHTS[name]()
        packed, scale, bias = mlx_affine(weight, bits, size)
        q = as_mlx(bits, size, torch.float32).quantize(weight)
        assert torch.equal(q.parts["scale"], scale)
        assert torch.equal(q.parts["offset"], bias)
        assert torch.equal(q.parts["codes"], packed)
        q.parts["codes"][1, 1] ^= 1
        assert not torch.equal(q.parts["codes"], packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_in_sixteen_bits(bits, dtype):
    """Scales and biases are MLX's. Codes belong to them as stored, while MLX rounds weights under
    those it had before storing: few codes differ, and the error here is not larger."""
    weight = gaussian(16, 512, seed=bits).to(dtype)
    packed, scale, bias = mlx_affine(weight, bits, 64)
    q = as_mlx(bits, 64, dtype).quantize(weight)
    assert torch.equal(q.parts["scale"].float(), scale)
    assert torch.equal(q.parts["offset"].float(), bias)
    ours, theirs = (unpack(x, bits, 512).int() for x in (q.parts["codes"], packed))
    assert (ours - theirs).abs().max() <= 1
    wrong = dataclasses.replace(q, parts=q.parts | {"codes": packed}).dequantize()
    assert (q.dequantize() - weight).square().sum() <= (wrong - weight).square().sum()
    assert (ours != theirs).float().mean() < (0.25 if bits == 8 else 0.01)


def test_affine_keeps_zero_and_the_larger_end():
    weight = torch.tensor([[-1.0, 14.5, 0.0, 3.0] + [0.0] * 28])
    q = as_mlx(4, 32, torch.float32).quantize(weight)
    assert q.parts["offset"].item() == 14.5
    assert q.parts["scale"].item() == np.float32(-14.5) / np.float32(14)
    values = q.dequantize()[0]
    assert values[1] == 14.5
    assert values[2].abs() < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bits_of_mlx_are_counted(bits):
    assert 8 * qlib.format(f"mlx{bits}").nbytes((64, 1024)) / 2**16 == bits + 32 / 64
