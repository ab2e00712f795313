"""Products with weights of small floats: every code under every scale, and what they compile to."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from triton_child import CAPABILITIES, compiled, interpreted
from weight_kernels import both_rungs, drawn, layer_facts, products_of, tiles, twins, weight

import qlib
from qlib.kernels.gpu import minifloat
from qlib.pack import pack
from qlib.qtensor import QTensor

ELEMENTS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
EXHAUSTIVE = ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "nvfp4-reciprocal"]
EXHAUSTIVE += ["fp8_e4m3", "fp8_e5m2"]
SCHEMES = {
    "e4m3 tensor": dataclasses.replace(qlib.format("fp8_e4m3"), block="tensor"),
    "e4m3 g48": dataclasses.replace(qlib.format("fp8_e4m3"), block=48, scale=torch.bfloat16),
}
# Outputs, inputs, rows of activations.
CASES = [
    ("mxfp4", 33, 192, 3),
    ("mxfp4", 5, 77, 1),
    ("nvfp4", 5, 130, 1),
    ("nvfp4-reciprocal", 7, 300, 2),
    ("mxfp8_e4m3", 70, 100, 17),
    ("mxfp8_e5m2", 1, 33, 1),
    ("fp8_e4m3", 9, 33, 3),
    ("fp8_e5m2", 1, 1, 1),
    ("e4m3 tensor", 40, 64, 3),
    ("e4m3 g48", 3, 100, 2),
]


def exhaustive(name: str) -> QTensor:
    """Every code in every block of a row, and every scale code (of floats: 256 of all sizes)."""
    scheme = qlib.format(name)
    codes = torch.arange(2**scheme.grid.bits, dtype=torch.uint8)
    if type(scheme.block) is int:
        codes = codes.repeat(max(1, scheme.block // len(codes)))
    shape = (256, len(codes))
    q = qlib.quantize(torch.ones(shape), scheme)
    parts = q.parts | {"codes": pack(codes.expand(shape), scheme.grid.bits)}
    part = "scale.codes" if "scale.codes" in parts else "scale"
    bytes = torch.arange(256, dtype=torch.uint8)[:, None].expand(parts[part].shape)
    floats = (1 + bytes / 256) * 2.0 ** (bytes.float() - 140)
    parts[part] = floats if parts[part].dtype.is_floating_point else bytes
    if part == "scale.codes":
        parts["scale.scale"] = torch.tensor([[0.0123]])
    return QTensor(scheme, shape, parts)


def oracle(q: QTensor) -> np.ndarray:
    """What ml_dtypes says the codes and scales are, multiplied in float32."""
    element = ELEMENTS[q.format.grid.name]
    codes = q.format.unpack(q.parts["codes"], q.shape).numpy().astype(np.uint8)
    values = codes.view(element).astype(np.float32)
    if "scale.codes" in q.parts:
        inner = q.parts["scale.codes"].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        whole = q.parts["scale.scale"].numpy()
        scale = inner / whole if "divisor" in str(q.format) else inner * whole
    elif q.parts["scale"].dtype == torch.uint8:
        scale = q.parts["scale"].numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    else:
        scale = q.parts["scale"].numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return values * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)


def unequal(values: torch.Tensor, expected: np.ndarray) -> int:
    """How many values differ, where NaN equals NaN and zeros have signs."""
    values = values.numpy()
    same = (values.view(np.int32) == expected.view(np.int32)) | (
        np.isnan(values) & np.isnan(expected)
    )
    return int((~same).sum())


def everything() -> dict[str, list]:
    found = both_rungs(minifloat, CASES, SCHEMES)
    names = ["mxfp4", "nvfp4", "fp8_e4m3"]
    found["any shape"] = drawn(products_of(minifloat, "gemm"), names)
    with np.errstate(all="ignore"):
        for name in EXHAUSTIVE:
            q = exhaustive(name)
            found[name] = [unequal(decoded(q, block), oracle(q)) for block in (64, 256)]
            found[f"{name} flipped"] = [unequal(decoded(twin), oracle(q)) for twin in twins(q)]
            found[f"{name} qlib"] = unequal(q.dequantize(), oracle(q))
    return found


def decoded(q: QTensor, block: int = 256) -> torch.Tensor:
    return tiles(minifloat.packed(q), block=block)


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_code_under_every_scale_equals_ml_dtypes(measured, name):
    assert measured[name] == [0, 0]
    assert measured[f"{name} qlib"] == 0
    assert min(measured[f"{name} flipped"]) > 0


@pytest.mark.parametrize("rung", ["gemv", "gemm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(measured, rung, case):
    error, wrong, budget = measured[f"{rung} {case}"]
    assert error <= budget
    assert min(wrong) > budget


def test_products_of_any_shape(measured):
    assert measured["any shape"] >= 10


# (format, rung, rows of activations, dtype, capability).
TARGETS = [("mxfp4", "gemv", 1, "float16", cc) for cc in CAPABILITIES]
TARGETS += [("nvfp4-reciprocal", "gemm", 16, "float16", cc) for cc in CAPABILITIES[1:]]
TARGETS += [("fp8_e4m3", "gemm", 512, "bfloat16", 100), ("fp8_e4m3", "gemv", 1, "float16", 75)]
TARGETS += [("mxfp8_e5m2", "gemv", 1, "bfloat16", 90), ("nvfp4", "gemv", 1, "float16", 75)]
TARGETS += [("nvfp4", "gemv", 1, "bfloat16", cc) for cc in (80, 89)]


def assembled() -> dict[str, dict]:
    return layer_facts(minifloat, TARGETS, SCHEMES, ftz=r"\.ftz", fp8="e4m3x2|e5m2x2")


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    """No instruction of 8-bit floats, and none that takes a subnormal for zero."""
    found = code[str(target)]
    assert found["wide"] > 0
    assert (found["ftz"], found["fp8"]) == (0, 0)
    assert bool(found["tensor cores"]) == (target[1] == "gemm")
    assert found["stack"] == 0


def test_why_not():
    for name in [case[0] for case in CASES]:
        assert minifloat.why_not(weight(SCHEMES.get(name, name), 2, 64)) is None
    nested = qlib.format("nvfp4")
    inner = dataclasses.replace(nested.scale, block="row")
    scale = "the scale is not float16, bfloat16, float32, e8m0, or e4m3 in units of one float"
    reasons = {
        "mxfp6_e2m3": "the grid e2m3 is not e2m1, e4m3 or e5m2",
        "nf4": "the grid nf4 is not e2m1, e4m3 or e5m2",
        dataclasses.replace(
            qlib.format("mxfp4"), block=24
        ): "blocks of 24 are not a multiple of 16",
        dataclasses.replace(
            qlib.format("mxfp4"), offset=torch.float16
        ): "the weights have an offset",
        dataclasses.replace(nested, scale=inner): scale,
        dataclasses.replace(nested, scale=qlib.format("fp8_e5m2")): scale,
    }
    for format, reason in reasons.items():
        assert minifloat.why_not(qlib.quantize(torch.randn(2, 96), format)) == reason
    q4_0 = qlib.quantize(torch.randn(2, 96), "q4_0")
    assert minifloat.why_not(q4_0) == f"{type(q4_0.format).__name__} is not a Scheme"
