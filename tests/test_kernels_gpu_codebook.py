"""Products with weights of 4 bits that look up a table: NF4, FP4, Lloyd-Max, learned grids."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_child import CAPABILITIES, compiled, interpreted
from weight_kernels import both_rungs, drawn, layer_facts, products_of, tiles, weight

import qlib
from qlib import fit
from qlib.double import DoubleQuant
from qlib.grid import Grid
from qlib.kernels.gpu import codebook
from qlib.scheme import Scheme

LEARNED = Grid("mine", torch.linspace(-1, 1, 13) ** 3 + 0.01)
SCHEMES = {
    "learned": Scheme(LEARNED, 32, fit.absmax, scale=torch.bfloat16),
    "learned row": Scheme(LEARNED, "row", fit.absmax),
    "nf4 tensor": dataclasses.replace(qlib.format("nf4"), block="tensor"),
    "nf4-dq row": dataclasses.replace(qlib.format("nf4-dq"), block="row"),
    "nf4-dq small": dataclasses.replace(qlib.format("nf4-g16"), scale=DoubleQuant(4)),
}
# Outputs, inputs, rows of activations.
CASES = [
    ("nf4", 33, 192, 3),
    ("nf4-g128", 5, 130, 1),
    ("nf4-g48", 70, 100, 17),
    ("nf4-dq", 7, 700, 2),
    ("nf4-dq row", 9, 77, 1),
    ("nf4-dq small", 9, 96, 3),
    ("fp4_bnb", 1, 77, 1),
    ("lloyd4-g16", 9, 33, 3),
    ("learned", 3, 65, 2),
    ("learned row", 1, 1, 1),
    ("nf4 tensor", 40, 64, 3),
]


def bnb_tiles(kind: str, double: bool) -> list[list[float]]:
    return tiles(codebook.packed(weight(NAMES[kind] + "-dq" * double, 24, 192))).tolist()


NAMES = {"nf4": "nf4", "fp4": "fp4_bnb"}
KINDS = [(kind, double) for kind in NAMES for double in (False, True)]


def everything() -> dict[str, list]:
    found = {f"{kind} {double}": bnb_tiles(kind, double) for kind, double in KINDS}
    found |= both_rungs(codebook, CASES, SCHEMES)
    names = ["nf4", "nf4-g32-dq", "lloyd4-g48"]
    return found | {"any shape": drawn(products_of(codebook, "gemm"), names)}


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("rung", ["gemv", "gemm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(measured, rung, case):
    error, wrong, budget = measured[f"{rung} {case}"]
    assert error <= budget
    assert min(wrong) > budget


def test_products_of_any_shape(measured):
    assert measured["any shape"] >= 10


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_tiles_equal_bitsandbytes(measured, kind, double):
    """Its codes, with the halves of each byte swapped, are ours; so are the values, to the last
    bit. (A GPU multiplies and adds a doubly quantized scale in one rounding.)"""
    import bitsandbytes.functional as bnb

    q = weight(NAMES[kind] + "-dq" * double, 24, 192)
    original = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))
    original[0, 0] = 2
    arguments = {"blocksize": 64, "quant_type": kind, "compress_statistics": double}
    state = bnb.quantize_4bit(original, **arguments)[1]
    codes = q.parts["codes"].view(-1, 1)
    theirs = bnb.dequantize_4bit((codes << 4) | (codes >> 4), state)
    tile = torch.tensor(measured[f"{kind} {double}"])
    torch.testing.assert_close(tile, theirs, rtol=0, atol=0)
    wrong = bnb.dequantize_4bit(codes, state)
    assert not torch.equal(tile, wrong)


# (format, rung, rows of activations, dtype, capability).
TARGETS = [("nf4", "gemv", 1, "float16", cc) for cc in CAPABILITIES]
TARGETS += [("nf4", "gemm", 16, "float16", cc) for cc in CAPABILITIES[1:]]
TARGETS += [("nf4", "gemm", 512, "bfloat16", 90), ("nf4-dq", "gemv", 1, "bfloat16", 90)]
TARGETS += [("learned row", "gemv", 1, "float16", 80)]
PAIRS = r"ld\.global\.b64|cp\.async\.ca\.shared\.global[^;]*0x8, "


def assembled() -> dict[str, dict]:
    return layer_facts(codebook, TARGETS, SCHEMES, pairs=PAIRS)


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    """One load of a pair serves two weights: a thread has 64 of them, or 32 to 96 in a gemv."""
    found = code[str(target)]
    assert found["wide"] > 0
    assert found["pairs"] > 0
    assert bool(found["tensor cores"]) == (target[1] == "gemm")
    assert found["stack"] == 0


def test_why_not():
    for name in [case[0] for case in CASES]:
        assert codebook.why_not(weight(SCHEMES.get(name, name), 2, 64)) is None
    holes = Grid("holes", torch.tensor([0.0, 1, float("nan"), 3, 4, 5, 6, 7, 8]))
    table = "is not a table of 9 to 16 numbers"
    reasons = {
        "the grid nf3 " + table: "nf3",
        "the grid int8 " + table: "int8",
        "the grid holes " + table: Scheme(holes, 32, fit.absmax),
        "blocks of 20 are not a multiple of 16": "nf4-g20",
        "the weights have an offset": "int4-g32-offset",
        "the scale is not float16, bfloat16, float32 or double quantization": "mxfp4",
        "Ggml is not a Scheme": "q4_0",
    }
    for reason, format in reasons.items():
        q = qlib.quantize(torch.randn(2, 160).abs(), format)
        assert codebook.why_not(q) == reason.replace("Ggml", type(q.format).__name__)
