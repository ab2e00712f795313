"""How scales are kept: every name round trips, files that lie about it are refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from format_weights import gaussian

import qlib
from qlib import FormatError, fit, grid, presets
from qlib.double import DoubleQuant
from qlib.files.native import format_to_dict
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

GRAMMAR = [
    f"mx{e}-{r}" for e in presets.ELEMENTS for r in ("floor", "ceil", "even", "rceil", "mse")
]
GRAMMAR += [f"nvfp4{r}{s}" for r in ("", "-mse", "-4over6") for s in ("", "-reciprocal")]
GRAMMAR += [f"nf{b}{g}{d}" for b in range(2, 9) for g in ("", "-g32") for d in ("", "-dq")]
GRAMMAR += ["fp4_bnb", "fp4_bnb-g128", "fp4_bnb-dq", "fp4_bnb-g96-dq"]
GRAMMAR += [f"mlx{b}{g}" for b in (2, 3, 4, 5, 6, 8) for g in ("", "-g32", "-g64", "-g128")]
GRAMMAR += [f"lloyd{b}{g}" for b in range(2, 9) for g in ("", "-g48")]


@pytest.mark.parametrize("name", GRAMMAR)
def test_every_name_makes_a_format_that_can_be_saved(name, tmp_path):
    weight = gaussian(3, 140)
    q = qlib.quantize(weight, name)
    q.save(tmp_path / "w.safetensors")
    loaded = QTensor.load(tmp_path / "w.safetensors")
    assert loaded.format == q.format
    assert loaded.tobytes() == q.tobytes()
    assert len(q.tobytes()) == q.nbytes == q.format.nbytes(q.shape)
    assert torch.equal(loaded.dequantize(), q.dequantize())
    assert (q.dequantize() - weight).square().mean() < 0.5
    loaded.parts["codes"][0, 0] ^= 1
    assert loaded.tobytes() != q.tobytes()


UNKNOWN = ["mxfp4-nearest", "mxfp5", "mxint4", "nvfp4-4over5", "nvfp4-reciprocal-mse", "nf1"]
UNKNOWN += ["nf9", "nf4-g0", "nf4-dq-g64", "fp4_bnb-", "mlx7", "mlx4-g16", "mlx4-dq", "lloyd1"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_beside_the_grammar_are_unknown(name):
    with pytest.raises(ValueError, match=f"^unknown format '{name}': "):
        qlib.format(name)


def test_names_without_a_part_mean_its_default():
    assert qlib.format("mxfp4") == qlib.format("mxfp4-floor") == presets.MXFP4
    assert qlib.format("nf4") == qlib.format("nf4-g64") == presets.NF4
    assert qlib.format("nf4-dq") == presets.NF4_DQ
    assert qlib.format("nvfp4-reciprocal") == presets.NVFP4_RECIPROCAL
    assert qlib.format("mlx4") == qlib.format("mlx4-g64")
    assert qlib.format("mxfp4-ceil") != presets.MXFP4
    assert set(qlib.formats()) >= {"nf4-dq", "fp4_bnb", "mxint8", "nvfp4-4over6", "mlx4", "lloyd4"}


def test_a_format_says_how_its_scales_are_kept():
    assert str(presets.NF4_DQ) == ("nf4, block 64, absmax, scale (double quantization, block 256)")
    inner = "(e4m3, block tensor, absmax, scale divisor float32)"
    assert str(presets.NVFP4_RECIPROCAL) == f"e2m1, block 16, absmax, scale {inner}"


def test_a_divisor_divides():
    weight = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    q = Scheme(grid.GRIDS["int4"], 4, fit.absmax, Divisor(torch.float16)).quantize(weight * 3)
    assert q.parts["scale"].dtype == torch.float16
    # 1 / 3 in float16; a block of zeros has the divisor one.
    assert q.parts["scale"].view(-1).tolist() == [0.333251953125, 1.0]
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0] * 4]) / torch.tensor(
        [[0.333251953125], [1.0]]
    )
    assert torch.equal(q.dequantize(), expected)
    assert not torch.equal(q.dequantize(), expected * 0.333251953125**2)


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65])
@pytest.mark.parametrize(
    "name", ["nf4", "int4-g16-asym", "int4-tensor", "fp4_bnb", "nvfp4", "mlx4"]
)
def test_pairs_of_codes_mean_what_single_codes_mean(name, columns):
    """Whole bytes of 4-bit codes are looked up as pairs; this is the long way."""
    weight = gaussian(5, columns)
    q = qlib.quantize(weight, name)
    scheme = q.format
    codes = scheme.rows(scheme.unpack(q.parts["codes"], q.shape))
    values = scheme.values(codes, *scheme.read(q.parts, q.shape)).view(5, columns)
    assert torch.equal(q.dequantize(), values)
    q.parts["codes"][2, 0] ^= 7
    assert not torch.equal(q.dequantize(), values)


def test_a_learned_grid_of_nine_points_is_looked_up_too():
    own = grid.Grid("mine", torch.linspace(-1, 1, 9))
    q = Scheme(own, 8, fit.absmax).quantize(gaussian(2, 16))
    assert q.format.grid.bits == 4
    allowed = (own.points * q.parts["scale"].view(-1, 1)).view(-1).unique()
    assert set(q.dequantize().unique().tolist()) <= set(allowed.tolist())


# -- hostile files ------------------------------------------------------------------------------


def damaged(path, name: str, scale=None, parts=None) -> str:
    """The refusal of a file whose format's scale, or whose stored tensors, were replaced."""
    q = qlib.quantize(gaussian(4, 128), name)
    described = format_to_dict(q.format)
    if scale is not None:
        described["scale"] = scale
    text = json.dumps({"version": 1, "tensors": {"": {"shape": [4, 128], "format": described}}})
    safetensors.torch.save_file(q.parts | (parts or {}), path, metadata={"qlib": text})
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    return str(caught.value).removeprefix(f"{path}: ")


FIELDS = "a scheme has exactly the fields block, fit, grid, offset, scale"


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"double": 0}, "block must be a positive int, got 0"),
        ({"double": True}, "block must be a positive int, got True"),
        ({"double": "256"}, "block must be a positive int, got '256'"),
        ({"double": None}, "block must be a positive int, got None"),
        ({"divisor": "int8"}, FIELDS),
        ({"divisor": ["float32"]}, FIELDS),
        ({"divisor": "float32", "double": 256}, FIELDS),
        ({}, FIELDS),
        ({"grid": "bnb_fp5"}, "unknown grid 'bnb_fp5'"),
    ],
)
def test_hostile_storages(tmp_path, scale, message):
    found = damaged(tmp_path / "w.safetensors", "nf4-dq", scale)
    assert found == f"field \"qlib.tensors['']\": {message}"


def test_hostile_double_quantization(tmp_path):
    path = tmp_path / "w.safetensors"
    found = damaged(path, "nf4-dq", parts={"scale.scale": torch.ones(1, 2)})
    assert found == "field 'scale.scale': is F32 [1, 2], its format needs F32 [1, 1]"
    found = damaged(path, "nf4-dq", parts={"scale.offset": torch.tensor([torch.nan])})
    assert found == "field 'scale.offset': holds NaN or infinite values"
    huge = {"scale.scale": torch.full((1, 1), 3.4e38), "scale.offset": torch.tensor([3.4e38])}
    found = damaged(path, "nf4-dq", parts=huge)
    assert found == "field 'scale': holds NaN or infinite values"
    found = damaged(path, "nf4-dq", {"double": 1})
    assert found == "field 'scale.scale': is F32 [1, 1], its format needs F32 [1, 8]"


def test_a_block_larger_than_any_file_takes_no_memory(tmp_path):
    scheme = Scheme(grid.NF4, 64, fit.absmax, scale=DoubleQuant(10**15))
    q = scheme.quantize(gaussian(4, 128))
    q.save(tmp_path / "w.safetensors")
    assert torch.equal(QTensor.load(tmp_path / "w.safetensors").dequantize(), q.dequantize())


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_divisor_of_zero_is_refused(tmp_path, value):
    path = tmp_path / "w.safetensors"
    found = damaged(path, "nvfp4-reciprocal", parts={"scale.scale": torch.tensor([[value]])})
    assert found == "field 'scale': holds NaN or infinite values"
    scheme = Scheme(grid.GRIDS["int4"], 64, fit.absmax, Divisor(torch.float32))
    q = scheme.quantize(gaussian(4, 128))
    q.parts["scale"][1, 1] = value
    q.save(path)
    with pytest.raises(FormatError, match=r"field 'scale': holds NaN or infinite values$"):
        QTensor.load(path)


def test_mxint8s_lowest_code_is_refused(tmp_path):
    q = qlib.quantize(gaussian(4, 128), "mxint8")
    codes = q.parts["codes"].clone()
    codes[0, 3] = 0x80
    found = damaged(tmp_path / "w.safetensors", "mxint8", parts={"codes": codes})
    assert found == "field 'codes': holds a code that stands for no number"
