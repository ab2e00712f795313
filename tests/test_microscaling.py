"""MX and NVFP4 against torchao, MLX and compressed-tensors, extremes included.

Every disagreement with another library is stated by a test of its own.
"""

from __future__ import annotations

import logging
import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from format_weights import WEIGHTS, gaussian
from gptq_problems import losses, problem

import qlib
from qlib import fit, grid, presets
from qlib.methods.gptq import gptq
from qlib.pack import unpack
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

# torchao warns that its CUDA extensions were built for another torch.
logging.getLogger("torchao").setLevel(logging.ERROR)
from compressed_tensors.compressors.base import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize  # noqa: E402
from compressed_tensors.quantization.quant_scheme import NVFP4A16  # noqa: E402
from compressed_tensors.quantization.utils import (  # noqa: E402
    calculate_qparams,
    generate_gparam,
)
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize  # noqa: E402

mx.set_default_device(mx.cpu)

ELEMENTS = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp6_e2m3": "fp6_e2m3",
    "fp6_e3m2": "fp6_e3m2",
    "fp4": torch.float4_e2m1fn_x2,
}
RULES = ["floor", "ceil", "even", "rceil"]
NORMAL = [name for name in WEIGHTS if name != "subnormal"]


def torchao_mx(weight: torch.Tensor, element: str, rule: str):
    """(scale bytes, codes), one code each."""
    mode = getattr(ScaleCalculationMode, rule.upper())
    scale, codes = to_mx(weight, ELEMENTS[element], 32, mode)
    codes = codes.view(torch.uint8)
    return scale.view(torch.uint8), unpack(codes, 4, weight.shape[1]) if element == "fp4" else codes


def codes_of(q: QTensor) -> torch.Tensor:
    return unpack(q.parts["codes"], q.format.grid.bits, q.shape[1])


def unsigned_zeros(codes: torch.Tensor) -> torch.Tensor:
    """FP4 codes with both zeros as 0: MLX keeps the sign of some zeros only."""
    return codes.masked_fill(codes == 8, 0)


def for_nvfp4(name: str) -> torch.Tensor:
    """`WEIGHTS[name]`; ties stay ties where 2688 is the largest and the tensor's scale is one."""
    return WEIGHTS[name]() * (448 if name == "ties" else 1)


# -- MX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_equals_torchao(element, rule, name):
    weight = WEIGHTS[name]()
    scale, codes = torchao_mx(weight, element, rule)
    q = qlib.quantize(weight, f"mx{element}-{rule}")
    assert torch.equal(q.parts["scale"], scale)
    assert torch.equal(codes_of(q), codes)
    assert not torch.equal(codes_of(q) ^ (torch.arange(q.shape[1]) == 5), codes)
    assert not torch.equal(q.parts["scale"] ^ 1, scale)


@pytest.mark.parametrize("element", ELEMENTS)
def test_below_float32s_normal_range_torchao_divides_by_a_scale_it_does_not_store(element):
    """Byte 0 is 2^-127; torchao divides by 2^-126 there and so codes half of the weight."""
    weight = WEIGHTS["subnormal"]()
    scale, codes = torchao_mx(weight, element, "floor")
    q = qlib.quantize(weight, f"mx{element}")
    lowest = (scale == 0).repeat_interleave(32, 1)
    assert torch.equal(q.parts["scale"], scale)
    assert bool(lowest.any())
    assert torch.equal(codes_of(q)[~lowest], codes[~lowest])
    assert torch.equal(q.format.grid.round(weight * 2.0**126)[lowest], codes[lowest])
    error = (q.dequantize() - weight)[lowest].abs().max()
    assert error <= weight[lowest].abs().max() / 4


def test_mxint8_saturates_and_ties_go_to_the_even_element():
    weight = torch.tensor([[1.999, -1.999, 2.5 / 64, 3.5 / 64, -0.5 / 64] + [0.0] * 27])
    q = qlib.quantize(weight, "mxint8")
    assert (q.dequantize() * 64)[0, :5].tolist() == [127, -127, 2, 4, 0]
    assert (weight * 64).round()[0, :5].tolist() != [127, -127, 2, 4, 0]


def test_mxint8_is_twos_complement_without_its_lowest():
    codes = torch.tensor([0, 1, 127, 128, 129, 255])
    values = grid.MXINT8.decode(codes) * 64
    assert values.nan_to_num(nan=999).tolist() == [0, 1, 127, 999, -127, -1]
    expected = torch.arange(256, dtype=torch.uint8).view(torch.int8).float() / 64
    kept = torch.arange(256) != 128
    assert torch.equal(grid.MXINT8.points[kept], expected[kept])


@pytest.mark.parametrize("element", presets.ELEMENTS)
def test_mse_rule_is_the_best_of_its_four_exponents(element):
    weight = torch.cat([WEIGHTS[name]() for name in ("gaussian", "outliers", "real")])
    weights = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) + 0.01

    def errors(q):
        return ((q.dequantize() - weight).square() * weights).view(-1, 32).sum(1).double()

    best = errors(qlib.quantize(weight, f"mx{element}-mse", weights))
    for rule in RULES:
        assert (best <= errors(qlib.quantize(weight, f"mx{element}-{rule}")) * (1 + 1e-6)).all()
    base = qlib.quantize(weight, f"mx{element}")
    for shift in (-1, 1, 2):
        moved = base.parts["scale"].int() + shift
        scheme = Scheme(base.format.grid, 32, fit.pow2_floor, scale=grid.E8M0)
        codes = scheme.round(weight, torch.exp2(moved.float() - 127), None)
        values = scheme.values(codes, torch.exp2(moved.float() - 127), None)
        other = ((values - weight).square() * weights).view(-1, 32).sum(1).double()
        assert (best <= other * (1 + 1e-6)).all()
    assert not (errors(base) <= best * (1 + 1e-6)).all()


# -- NVFP4 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "1e-30", "1e30", "ties", "real"])
def test_nvfp4_equals_torchao(name):
    weight = for_nvfp4(name)
    whole = weight.abs().max() / 2688
    scale, codes = nvfp4_quantize(weight, 16, whole)
    q = qlib.quantize(weight, "nvfp4")
    torch.testing.assert_close(q.parts["scale.scale"].squeeze(), whole, rtol=2**-22, atol=0)
    assert torch.equal(q.parts["scale.codes"], scale.view(torch.uint8))
    assert torch.equal(q.parts["codes"], codes)
    q.parts["codes"][3, 5] ^= 1
    assert not torch.equal(q.parts["codes"], codes)


@pytest.mark.parametrize("name", ["zero blocks", "outliers"])
def test_nvfp4_scales_below_e4m3s_normal_range(name):
    """torchao keeps block scales at 2^-6 or above; E4M3 goes down to 2^-9, and so does qlib."""
    weight = WEIGHTS[name]()
    scale, codes = nvfp4_quantize(weight, 16, weight.abs().max() / 2688)
    q = qlib.quantize(weight, "nvfp4")
    ours, theirs = q.parts["scale.codes"], scale.view(torch.uint8)
    assert torch.equal(ours.clamp(min=8), theirs)
    low = (ours < 8).repeat_interleave(16, 1)
    assert bool(low.any())
    assert torch.equal(codes_of(q)[~low], unpack(codes, 4, 256)[~low])


def test_a_block_scale_never_rounds_to_zero():
    """compressed-tensors stores 0.125 instead, 2^6 times as much; torchao 2^-6."""
    weight = gaussian(1, 64)
    weight[0, 16:32] *= 1e-5
    for name in ("nvfp4", "nvfp4-reciprocal", "nvfp4-4over6", "nvfp4-mse"):
        q = qlib.quantize(weight, name)
        assert q.parts["scale.codes"][0, 1] == 1
        assert q.parts["scale.codes"][0, [0, 2, 3]].min() > 8
    weight[0, 16:32] = 0
    assert qlib.quantize(weight, "nvfp4").parts["scale.codes"][0, 1] == 0


def test_a_kept_scale_saves_its_block():
    """A block at 2^-19 of the largest: its scale would round to zero, its weights need not."""
    weight = torch.ones(1, 32)
    weight[0, 16:] = 2.0**-19
    q = qlib.quantize(weight, "nvfp4")
    assert q.parts["scale.codes"].tolist() == [[0x7E, 1]]
    assert q.dequantize()[0, 16:].count_nonzero() == 16
    erased = QTensor(q.format, q.shape, q.parts | {"scale.codes": torch.tensor([[0x7E, 0]])})
    assert erased.dequantize()[0, 16:].count_nonzero() == 0


CT = QuantizationScheme(targets=["Linear"], **NVFP4A16)


def compressed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What compressed-tensors stores for a weight."""
    blocks = weight.view(len(weight), -1, 16)
    whole = generate_gparam(weight.amin(), weight.amax())
    ends = blocks.amin(-1), blocks.amax(-1)
    scale, _ = calculate_qparams(*ends, CT.weights, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
    return BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").compress(state, CT)


@pytest.mark.parametrize("name", [n for n in NORMAL if n != "zero blocks"])
def test_reciprocal_equals_compressed_tensors(name):
    weight = for_nvfp4(name)
    theirs, q = compressed(weight), qlib.quantize(weight, "nvfp4-reciprocal")
    one_unit = {"rtol": 2**-22, "atol": 0.0}
    stored = q.parts["scale.scale"].view(-1)
    torch.testing.assert_close(stored, theirs["weight_global_scale"], **one_unit)
    assert torch.equal(q.parts["scale.codes"], theirs["weight_scale"].view(torch.uint8))
    assert torch.equal(q.parts["codes"], theirs["weight_packed"])
    q.parts["codes"][0, 0] ^= 1
    assert not torch.equal(q.parts["codes"], theirs["weight_packed"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_reciprocal_decodes_as_compressed_tensors_to_the_last_bit(name):
    theirs = compressed(WEIGHTS[name]())
    scale, whole = theirs["weight_scale"], theirs["weight_global_scale"]
    elements = grid.E2M1.decode(unpack(theirs["weight_packed"], 4, 256))
    arguments = {"args": CT.weights, "global_scale": whole, "dtype": torch.float32}
    expected = dequantize(elements, scale.float(), **arguments)
    parts = {"codes": theirs["weight_packed"], "scale.codes": scale.view(torch.uint8)}
    parts["scale.scale"] = whole.view(1, 1)
    assert torch.equal(presets.NVFP4_RECIPROCAL.decode(parts, expected.shape), expected)
    if name == "gaussian":
        parts["scale.scale"] = 1 / parts["scale.scale"]
        assert not torch.equal(presets.NVFP4.decode(parts, expected.shape), expected)


def test_zero_blocks_and_tiny_tensors_of_compressed_tensors():
    """It stores 0.125 for a scale of zero, and divides by one where 2688 / amax overflows."""
    theirs = compressed(WEIGHTS["zero blocks"]())["weight_scale"].view(torch.uint8)
    ours = qlib.quantize(WEIGHTS["zero blocks"](), "nvfp4-reciprocal").parts["scale.codes"]
    assert sorted(set(zip(theirs[ours != theirs].tolist(), ours[ours != theirs].tolist()))) == [
        (32, 0)
    ]
    tiny = WEIGHTS["subnormal"]()
    assert compressed(tiny)["weight_global_scale"].tolist() == [1.0]
    q = qlib.quantize(tiny, "nvfp4-reciprocal")
    assert q.parts["scale.scale"].item() == torch.finfo(torch.float32).max
    assert (q.dequantize() - tiny).abs().max() < tiny.abs().max() / 4
    zero = qlib.quantize(torch.zeros(2, 32), "nvfp4-reciprocal")
    assert zero.parts["scale.scale"].item() == 1.0


def test_a_divisor_that_overflows_is_refused():
    scheme = Scheme(grid.E4M3, "tensor", fit.absmax, scale=Divisor(torch.float16))
    message = "a scale of 2.23e+27 overflows a divisor float16; store it as Divisor(torch.float32)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheme.quantize(torch.full((1, 4), 1e30))
    with pytest.raises(
        ValueError, match=r"^a Divisor stores the scale of a format without offsets$"
    ):
        Scheme(grid.GRIDS["uint4"], 32, fit.minmax, Divisor(torch.float16), grid.GRIDS["uint4"])


@pytest.mark.parametrize("name", ["gaussian", "outliers", "real", "ties"])
@pytest.mark.parametrize("ending", ["", "-reciprocal"])
def test_four_over_six_is_the_better_of_both_as_stored(name, ending):
    """Every choice is compared with the other, after E4M3 has rounded both."""
    weight = WEIGHTS[name]()
    q = qlib.quantize(weight, f"nvfp4-4over6{ending}")
    whole = q.parts["scale.scale"].item()
    assert np.frexp(whole)[0] == 0.5
    unit = 1 / whole if ending else whole
    amax = weight.view(-1, 16).abs().amax(1, keepdim=True)
    errors = []
    for top in (6, 4):
        scale = (amax / top / unit).to(torch.float8_e4m3fn).float() * unit
        values = grid.E2M1.decode(grid.E2M1.round(weight.view(-1, 16) / scale)) * scale
        errors.append((values - weight.view(-1, 16)).square().sum(1))
    found = (q.dequantize() - weight).view(-1, 16).square().sum(1)
    normal = amax[:, 0] >= amax.max() * 2**-13
    expected = torch.minimum(*errors)
    torch.testing.assert_close(found[normal], expected[normal], rtol=1e-5, atol=0)
    if name == "gaussian":
        assert not torch.allclose(found, errors[0], rtol=1e-5, atol=0)
        assert not torch.allclose(found, errors[1], rtol=1e-5, atol=0)
        plain = (qlib.quantize(weight, "nvfp4").dequantize() - weight).square().sum()
        assert found.sum() < 0.95 * plain


# -- MLX --------------------------------------------------------------------------------------


def mlx(weight: torch.Tensor, mode: str):
    size, extra = (32, {}) if mode == "mxfp4" else (16, {})
    if mode == "nvfp4":
        extra = {"global_scale": mx.array(weight.abs().max().item())}
    array = mx.array(weight.numpy())
    codes, scale = mx.quantize(array, mode=mode, group_size=size, bits=4, **extra)
    codes = torch.from_numpy(np.array(codes).view(np.uint8)).view(len(weight), -1)
    return torch.from_numpy(np.array(scale)), unpack(codes, 4, weight.shape[1])


@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize(("mode", "format"), [("mxfp4", "mxfp4-rceil"), ("nvfp4", "nvfp4")])
def test_fp4_equals_mlx_but_for_exact_ties(mode, format, name):
    """MLX's CPU code rounds ties toward zero; qlib, torchao and the OCP specification to even."""
    weight = for_nvfp4(name) if mode == "nvfp4" else WEIGHTS[name]()
    scale, codes = mlx(weight, mode)
    q = qlib.quantize(weight, format)
    # An MX block of zeros has byte 127 in MLX, 0 in torchao, compressed-tensors and here.
    key, zero = ("scale.codes", 0) if mode == "nvfp4" else ("scale", 127)
    blocks = weight.view(len(weight), -1, 256 // scale.shape[1])
    assert torch.equal(q.parts[key].masked_fill((blocks == 0).all(-1), zero), scale)
    ours, theirs = unsigned_zeros(codes_of(q)), unsigned_zeros(codes)
    kept = q.format.read(q.parts, q.shape)[0].repeat_interleave(blocks.shape[2], 1)
    lower, upper = (grid.E2M1.decode(x).abs() for x in (theirs, ours))
    differ = ours != theirs
    middle = ((lower + upper) / 2)[differ]
    torch.testing.assert_close(middle, (weight / kept).abs()[differ], rtol=2**-22, atol=0)
    assert (lower < upper)[differ].all()
    assert bool(differ.any()) == (name in ("ties", "real"))
    assert not torch.equal(ours ^ (torch.arange(256) == 3), theirs)


def test_mlx_misses_the_scale_of_subnormal_weights():
    """Its exponents come out at the other end of E8M0; here they are the lowest."""
    weight = WEIGHTS["subnormal"]() * 0.01
    assert mlx(weight, "mxfp4")[0].min() > 200
    q = qlib.quantize(weight, "mxfp4-rceil")
    assert q.parts["scale"].count_nonzero() == 0
    assert (q.dequantize() - weight).abs().max() <= weight.abs().max()


# -- methods ----------------------------------------------------------------------------------

SEARCHED = ["mxfp4", "mxfp4-mse", "mxint8", "nvfp4", "nvfp4-4over6", "nvfp4-mse-reciprocal"]
SEARCHED += ["nf4", "nf3", "nf4-dq", "fp4_bnb", "lloyd3", "mlx3"]


@pytest.mark.parametrize("kind", ["mixed", "giant", "dead"])
@pytest.mark.parametrize("name", SEARCHED)
def test_gptq_is_never_above_round_to_nearest(name, kind):
    weight, stats = problem(3, 12, 128, kind=kind)
    scheme = qlib.format(name)
    ours, nearest = gptq(weight, scheme, stats), scheme.quantize(weight)
    assert losses(weight, ours, stats).sum() <= losses(weight, nearest, stats).sum() * (1 + 1e-6)
    if kind == "mixed":
        assert losses(weight, ours, stats).sum() < 0.9 * losses(weight, nearest, stats).sum()
        assert {k: t.shape for k, t in ours.parts.items()} == {
            k: t.shape for k, t in nearest.parts.items()
        }
