"""Blocks that are zero, constant, tiny or huge, and every refusal of a weight, name or scheme."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import qlib
from qlib import fit, grid
from qlib.presets import WHERE
from qlib.scheme import Scheme

EVERY_NAME = [n for n in qlib.formats() if isinstance(qlib.format(n), Scheme)]
EVERY_NAME += ["int4-g128-asym", "int4-tensor-asym", "int5-g7", "int7-row-asym"]
EVERY_NAME += ["int8-g32-asym-mse", "int1-row-asym", "int4-g128-mse"]


def random_weight(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY_NAME)
def test_zero_weights_stay_zero(name):
    assert qlib.quantize(torch.zeros(2, 70), name).dequantize().count_nonzero() == 0


@pytest.mark.parametrize("name", [n for n in EVERY_NAME if "tensor" not in n and n != "ternary"])
def test_zero_block_between_others(name):
    weight = random_weight((1, 384))
    weight[:, 128:256] = 0
    if qlib.format(name).block != "row" and not name.startswith("int1"):
        assert qlib.quantize(weight, name).dequantize()[:, 128:256].count_nonzero() == 0


@pytest.mark.parametrize("value", [0.3, -0.3, 2.0, 1e-3, -7e3])
@pytest.mark.parametrize("name", ["int4-g16", "int4-g16-asym", "int2-g16-asym", "nf4", "int8-row"])
def test_constant_blocks_keep_their_value(name, value):
    weight = torch.full((2, 40), value)
    relative = qlib.quantize(weight, name).dequantize() / value - 1
    assert relative.abs().max() < (2**-7 if name == "nf4" else 2**-10)


def test_outlier_costs_its_own_block_only():
    weight = random_weight((1, 96))
    clean = qlib.quantize(weight, "int4-g32").dequantize()
    weight[0, 40] = 1000
    hurt = qlib.quantize(weight, "int4-g32").dequantize()
    assert torch.equal(hurt[:, :32], clean[:, :32])
    assert torch.equal(hurt[:, 64:], clean[:, 64:])
    assert hurt[0, 32:64].count_nonzero() == 1


@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e-42])
def test_tiny_weights_do_not_explode(name, size):
    """Scales that underflow are stored as the smallest positive one; the error stays tiny."""
    weight = random_weight((2, 64)).clamp(-3, 3) * size
    q = qlib.quantize(weight, name)
    smallest = 2**-24 if q.parts.get("scale", weight).dtype == torch.float16 else 0
    assert (q.dequantize() - weight).abs().max() <= 8 * size + smallest
    assert q.dequantize().isfinite().all()


def test_underflowing_scale_is_kept_positive():
    q = qlib.quantize(torch.full((1, 32), 6e-8), "int4-g32")
    assert q.parts["scale"].item() == 2**-24
    assert torch.equal(q.dequantize(), torch.full((1, 32), 2.0**-24))


def test_float32_scales_take_any_size():
    weight = random_weight((2, 64)) * 1e30
    wide = dataclasses.replace(qlib.format("int8-row"), scale=torch.float32)
    assert (wide.quantize(weight).dequantize() / weight - 1).median().abs() < 0.01


# -- refusals, word for word --------------------------------------------------------------------

REFUSALS = {
    "weight [0, 4] is empty: there is nothing to quantize": torch.empty(0, 4),
    "weight [2, 2] has dtype torch.int32; quantize takes floating point": torch.zeros(2, 2).int(),
    "weight [2] has dtype torch.bool; quantize takes floating point": torch.zeros(2).bool(),
    "weight [1, 2] holds 1 NaN or infinite values; repair them first": torch.tensor(
        [[1.0, math.nan]]
    ),
    "weight [3] holds 2 NaN or infinite values; repair them first": torch.tensor(
        [math.inf, -math.inf, 0]
    ),
    "a scale of 1.43e+29 overflows float16; store it as torch.float32": torch.full((1, 4), 1e30),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_weights(message):
    with pytest.raises(ValueError, match=r"^.") as caught:
        qlib.quantize(REFUSALS[message], "int4-g32")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nf9", "did you mean nf4, nf3, nvfp4? "),
        ("int9-g32", "did you mean int1-g32, int4-g128, int4-g32-asym? "),
        ("MXFP4", "did you mean mxfp4, mxfp4-mse, mxfp8_e4m3? "),
        ("", ""),
    ],
)
def test_unknown_names(name, near):
    with pytest.raises(ValueError, match=r"^unknown format") as caught:
        qlib.quantize(torch.ones(1, 4), name)
    assert str(caught.value) == f"unknown format {name!r}: {near}{WHERE}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, 'block must be a positive int, "row" or "tensor", got 0'),
        ({"block": True}, 'block must be a positive int, "row" or "tensor", got True'),
        ({"block": "col"}, 'block must be a positive int, "row" or "tensor", got \'col\''),
        (
            {"grid": grid.NF4, "offset": grid.GRIDS["uint4"]},
            "an integer zero point needs an integer grid, got nf4",
        ),
        ({"scale": grid.TERNARY}, "scales and offsets cannot be stored on the grid ternary"),
        (
            {"grid": grid.Grid("mine", torch.arange(300.0))},
            "codes have 1 to 8 or 16 bits, got a grid of 9",
        ),
    ],
)
def test_impossible_schemes(change, message):
    with pytest.raises(ValueError, match=r"^.") as caught:
        dataclasses.replace(qlib.format("int4-g32"), **change)
    assert str(caught.value) == message


def test_fit_with_an_offset_needs_a_place_for_it():
    with pytest.raises(ValueError, match=r"^fit minmax finds an offset: say how to store it$"):
        Scheme(grid.GRIDS["uint4"], 32, fit.minmax).quantize(torch.ones(1, 32))
