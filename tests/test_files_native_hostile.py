"""Files that lie about one thing each, and what the native container says about them."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import qlib
from qlib import FormatError, fit, grid
from qlib.polarquant import PolarQuant
from qlib.qtensor import QTensor
from qlib.scheme import Scheme
from qlib.turboquant import TurboQuant

INT4 = {"grid": "uint4", "block": 32, "fit": "minmax", "scale": "float16"}
INT4["offset"] = {"grid": "uint4"}


def weight(rows: int = 4, cols: int = 64) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def good_parts() -> dict[str, torch.Tensor]:
    return dict(qlib.quantize(weight(), "int4-g32-asym").parts)


def write(path, parts, shape=(4, 64), format=None, entry=None, metadata=None):
    """A file with one nameless tensor, described by hand so that any lie can be told."""
    described = {"shape": list(shape), "format": INT4 if format is None else format}
    described = described if entry is None else entry
    text = json.dumps({"version": 1, "tensors": {"": described}})
    found = {"qlib": text} if metadata is None else metadata
    safetensors.torch.save_file(parts, path, metadata=found)


def refusal(path) -> str:
    """The message of the FormatError that loading `path` raises, without the path."""
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weight.safetensors"


def test_hand_written_description_is_valid(path):
    """The hostile files below differ from this one in one thing each."""
    write(path, good_parts())
    assert torch.equal(
        QTensor.load(path).dequantize(), qlib.quantize(weight(), "int4-g32-asym").dequantize()
    )


# -- hostile parts ------------------------------------------------------------------------------


def changed(part: str, value) -> dict[str, torch.Tensor]:
    parts = good_parts()
    parts[part] = value(parts[part]) if callable(value) else value
    return parts


HOSTILE_PARTS = {
    "field 'scale': is F32 [4, 2], its format needs F16 [4, 2]": changed(
        "scale", lambda s: s.float()
    ),
    "field 'codes': is I8 [4, 32], its format needs U8 [4, 32]": changed(
        "codes", lambda c: c.view(torch.int8)
    ),
    "field 'codes': is U8 [4, 31], its format needs U8 [4, 32]": changed(
        "codes", lambda c: c[:, :31].contiguous()
    ),
    "field 'codes': is U8 [128], its format needs U8 [4, 32]": changed(
        "codes", lambda c: c.view(-1)
    ),
    "field 'zero_point': is U8 [4, 2], its format needs U8 [4, 1]": changed(
        "zero_point", torch.zeros(4, 2, dtype=torch.uint8)
    ),
    "field 'scale': holds NaN or infinite values": changed("scale", lambda s: s * torch.nan),
    "field 'zero_point': missing": {k: v for k, v in good_parts().items() if k != "zero_point"},
    "field 'codes': missing": {k: v for k, v in good_parts().items() if k != "codes"},
}


@pytest.mark.parametrize("message", HOSTILE_PARTS)
def test_hostile_parts(path, message):
    write(path, HOSTILE_PARTS[message])
    assert refusal(path) == message


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("mxfp4", "scale", 0xFF, "field 'scale': holds NaN or infinite values"),
        ("nvfp4", "scale.codes", 0x7F, "field 'scale': holds NaN or infinite values"),
        ("fp8_e4m3", "codes", 0x7F, "field 'codes': holds a code that stands for no number"),
        ("fp8_e5m2", "codes", 0x7C, "field 'codes': holds a code that stands for no number"),
        ("int4-g32", "scale", torch.inf, "field 'scale': holds NaN or infinite values"),
    ],
)
def test_codes_that_mean_no_number(path, name, part, value, message):
    q = qlib.quantize(weight(), name)
    q.parts[part][0, 0] = value
    q.save(path)
    assert refusal(path) == message


def test_code_beyond_the_grid(path):
    own = grid.Grid("mine", torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0]))
    q = Scheme(own, 32, fit.absmax).quantize(weight())
    q.parts["codes"][0, 0] |= 7
    q.save(path)
    assert refusal(path) == "field 'codes': holds a code beyond the end of its grid"


# -- hostile descriptions -----------------------------------------------------------------------

HERE = "field \"qlib.tensors['']\": "
FIELDS = "a scheme has exactly the fields block, fit, grid, offset, scale"


def deep(levels: int) -> dict:
    scheme = INT4
    for _ in range(levels):
        scheme = INT4 | {"scale": scheme}
    return scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": "int99"}, "unknown grid 'int99'"),
        ({"grid": ["uint4"]}, "unknown grid ['uint4']"),
        (
            {"grid": {"learned": "x"}},
            "a learned grid needs its points, a float32 tensor called 'grid'",
        ),
        ({"fit": "magic"}, "unknown fit 'magic'"),
        ({"fit": {}}, "unknown fit {}"),
        ({"block": 0}, 'block must be a positive int, "row" or "tensor", got 0'),
        ({"block": 1.5}, 'block must be a positive int, "row" or "tensor", got 1.5'),
        ({"block": None}, 'block must be a positive int, "row" or "tensor", got None'),
        ({"scale": "float64"}, FIELDS),
        ({"scale": 16}, FIELDS),
        ({"scale": {"grid": "int99"}}, "unknown grid 'int99'"),
        ({"scale": {"grid": "ternary"}}, "scales and offsets cannot be stored on the grid ternary"),
        ({"grid": "nf4"}, "an integer zero point needs an integer grid, got nf4"),
        ({"surprise": 1}, FIELDS),
    ],
)
def test_hostile_schemes(path, change, message):
    write(path, good_parts(), format=INT4 | change)
    assert refusal(path) == HERE + message


TURBO = {"bits": 3, "qjl": True, "rotation": "qr", "seed": 0, "norm": "float16"}
POLAR = {"bits": [4, 2], "rotation": "qr", "seed": 0, "radius": "float16"}
SEED = "seed is an int from 0 to 2**32 - 1, got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "TurboQuant has 1 to 8 bits, got 9"),
        ({"bits": "3"}, "TurboQuant has 1 to 8 bits, got '3'"),
        ({"bits": True}, "TurboQuant has 1 to 8 bits, got True"),
        ({"qjl": 1}, "qjl is True or False, got 1"),
        ({"seed": 1.5}, SEED + "1.5"),
        ({"seed": -1}, SEED + "-1"),
        ({"seed": 2**32}, SEED + "4294967296"),
        ({"rotation": "magic"}, "rotation is one of qr, hadamard, got 'magic'"),
        ({"rotation": ["qr"]}, "rotation is one of qr, hadamard, got ['qr']"),
        ({"norm": "int8"}, "norms are stored as float16 or float32, got None"),
        ({"norm": ["float16"]}, "norms are stored as float16 or float32, got None"),
        ({"norm": "bfloat16"}, "norms are stored as float16 or float32, got torch.bfloat16"),
        ({"more": 1}, "turboquant has exactly the fields bits, qjl, rotation, seed, norm"),
    ],
)
def test_hostile_turboquant(path, change, message):
    parts = dict(TurboQuant(3, qjl=True).quantize(weight()).parts)
    write(path, parts, format={"turboquant": TURBO})
    assert QTensor.load(path).shape == (4, 64)
    write(path, parts, format={"turboquant": TURBO | change})
    assert refusal(path) == HERE + message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": [9]}, "PolarQuant has 1 to 10 levels of 1 to 8 bits, got (9,)"),
        ({"bits": []}, "PolarQuant has 1 to 10 levels of 1 to 8 bits, got ()"),
        ({"bits": [1] * 11}, f"PolarQuant has 1 to 10 levels of 1 to 8 bits, got {(1,) * 11}"),
        ({"bits": "42"}, "PolarQuant has 1 to 10 levels of 1 to 8 bits, got ('4', '2')"),
        ({"bits": [[4], 2]}, "PolarQuant has 1 to 10 levels of 1 to 8 bits, got ([4], 2)"),
        ({"bits": 4}, "bits are those of each level, such as (4, 2, 2, 2); got 4"),
        ({"seed": None}, SEED + "None"),
        ({"radius": "float64"}, "radii are stored as float16 or float32, got None"),
        ({"norm": "float16"}, "polarquant has exactly the fields bits, rotation, seed, radius"),
    ],
)
def test_hostile_polarquant(path, change, message):
    parts = dict(PolarQuant((4, 2)).quantize(weight()).parts)
    write(path, parts, format={"polarquant": POLAR})
    assert QTensor.load(path).shape == (4, 64)
    write(path, parts, format={"polarquant": POLAR | change})
    assert refusal(path) == HERE + message


def test_rotated_rows_whose_parts_do_not_fit(path):
    q = TurboQuant(3, qjl=True).quantize(weight())
    write(path, dict(q.parts), format={"turboquant": TURBO | {"bits": 4}})
    assert refusal(path) == "field 'codes': is U8 [4, 16], its format needs U8 [4, 24]"
    without = {name: part for name, part in q.parts.items() if name != "signs"}
    write(path, without, format={"turboquant": TURBO})
    assert refusal(path) == "field 'signs': missing"
    for part in ("norm", "residual"):
        broken = q.parts | {part: q.parts[part] * torch.inf}
        write(path, broken, format={"turboquant": TURBO})
        assert refusal(path) == f"field '{part}': holds NaN or infinite values"
    write(path, dict(q.parts), shape=(4, 1 << 20), format={"turboquant": TURBO})
    wide = "rows of 1048576 are wider than a rotation of 8192: reshape it to shorter ones"
    assert refusal(path) == HERE + wide


def test_rows_that_no_hadamard_matrix_turns(path):
    parts = dict(TurboQuant(3, qjl=True).quantize(weight(4, 70)).parts)
    write(path, parts, shape=(4, 70), format={"turboquant": TURBO})
    assert QTensor.load(path).dequantize().isfinite().all()
    write(path, parts, shape=(4, 70), format={"turboquant": TURBO | {"rotation": "hadamard"}})
    unknown = "no construction of a Hadamard matrix of size 70 is known here: pad the rows to 72"
    assert refusal(path) == HERE + unknown
    parts = dict(PolarQuant((4,)).quantize(weight(4, 69)).parts)
    hadamard = POLAR | {"bits": [4], "rotation": "hadamard"}
    write(path, parts, shape=(4, 69), format={"polarquant": hadamard})
    assert refusal(path) == HERE + unknown


@pytest.mark.parametrize("data", [3, None, [], "3", {}])
@pytest.mark.parametrize("name", ["turboquant", "polarquant"])
def test_rotated_formats_need_a_table_of_fields(path, name, data):
    write(path, good_parts(), format={name: data})
    assert refusal(path).startswith(f"{HERE}{name} has exactly the fields bits, ")


def test_schemes_within_schemes_end(path):
    write(path, good_parts(), format=deep(6))
    assert refusal(path) == HERE + FIELDS
    write(path, good_parts(), format=deep(100))
    assert refusal(path) == HERE + FIELDS


@pytest.mark.parametrize("place", ["scale", "offset"])
def test_learned_grid_for_scales_is_refused(path, place):
    """Its codes could point beyond its end, and nothing would check them."""
    points = {"grid": torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0])}
    own = {"grid": {"learned": "int mine"}}
    nested = {"block": 2, "fit": "absmax", "scale": "float32", "offset": None} | own
    for storage in (own, nested):
        write(path, good_parts() | points, format=INT4 | {place: storage})
        with pytest.raises(FormatError):
            QTensor.load(path)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 2), "grid mine: need 2 to 65536 points, got [2, 2]"),
        (torch.full((4,), torch.nan), "grid mine: needs at least two finite points"),
        (
            torch.arange(4),
            "a learned grid needs its points, a float32 tensor called 'grid'",
        ),
        (torch.arange(300.0), "codes have 1 to 8 or 16 bits, got a grid of 9"),
    ],
)
def test_hostile_learned_grids(path, points, message):
    scheme = INT4 | {"grid": {"learned": "mine"}, "offset": None, "fit": "absmax"}
    write(path, good_parts() | {"grid": points}, format=scheme)
    assert refusal(path) == HERE + message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [4, 0]}, "shape must be a list of positive integers"),
        ({"shape": [4, -64]}, "shape must be a list of positive integers"),
        ({"shape": [4, True]}, "shape must be a list of positive integers"),
        ({"shape": "4, 64"}, "shape must be a list of positive integers"),
        ({}, "shape must be a list of positive integers"),
        ([], "shape must be a list of positive integers"),
        (
            {"shape": [1 << 30, 1 << 30]},
            "shape [1073741824, 1073741824] is larger than any tensor qlib reads",
        ),
        ({"shape": [4, 64]}, FIELDS),
        ({"shape": [4, 64], "format": None}, FIELDS),
    ],
)
def test_hostile_entries(path, entry, message):
    write(path, good_parts(), entry=entry)
    assert refusal(path) == HERE + message


def test_shape_that_the_bytes_do_not_have(path):
    """A terabyte that is promised but not there must not be allocated."""
    write(path, good_parts(), shape=[1 << 10, 1 << 30])
    message = "field 'codes': is U8 [4, 32], its format needs U8 [1024, 536870912]"
    assert refusal(path) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing: this file was not written by qlib"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "has no table of tensors"),
        ('{"version": 1, "tensors": []}', "has no table of tensors"),
        ('{"version": 3, "tensors": {}}', "has version 3, expected 1 or 2"),
        ('{"tensors": {}}', "has version None, expected 1 or 2"),
        ('{"version": 1, "tensors": {}}', "holds no quantized tensor ''"),
    ],
)
def test_hostile_metadata(path, text, message):
    write(path, good_parts(), metadata={"format": "pt"} if text is None else {"qlib": text})
    assert refusal(path) == f"field 'qlib': {message}"
