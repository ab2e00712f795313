"""Products of two microscaling tensors: what Triton compiles them to, and what the kernel means.

Triton's interpreter has no `dot_scaled`, so the child process gives it one, made of ml_dtypes.
"""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from triton_child import CAPABILITIES, compiled, facts, interpreted
from weight_kernels import twins, weight, zeros

from qlib.kernels.gpu import scaled
from qlib.qtensor import QTensor

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
# Activations, weights, rows, outputs, inputs.
CASES = [
    ("mxfp8_e4m3", "mxfp4", 3, 70, 130),
    ("mxfp4", "mxfp4", 17, 5, 77),
    ("mxfp8_e4m3", "mxfp8_e5m2", 1, 1, 33),
    ("mxfp4", "mxfp8_e4m3", 2, 130, 256),
    ("nvfp4", "nvfp4-reciprocal", 3, 33, 130),
    ("nvfp4", "nvfp4", 40, 9, 16),
]


def operands(x: str, w: str, rows: int, outputs: int, inputs: int) -> tuple[QTensor, QTensor]:
    return weight(x, rows, inputs), weight(w, outputs, inputs)


class Documented:
    """What `tl.dot_scaled` is documented to compute, by ml_dtypes."""

    @staticmethod
    def dot_scaled(semantic, left, left_scale, left_name, right, right_scale, right_name, acc, *_):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        a, b = left.handle.data, right.handle.data.T
        a = Documented.values(a, left_name) * Documented.scales(left_scale, a, left_name)
        b = Documented.values(b, right_name) * Documented.scales(right_scale, b, right_name)
        total = (a @ b.T + acc.handle.data).astype(np.float32)
        return tl.tensor(TensorHandle(total, tl.float32), acc.type)

    @staticmethod
    def values(data, kind):
        raw = np.ascontiguousarray(data).view(np.uint8)
        if kind != "e2m1":
            return raw.view(TYPES[kind]).astype(np.float64)
        # The lower half of a byte comes first.
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
        return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)

    @staticmethod
    def scales(scale, data, kind):
        raw = np.ascontiguousarray(scale.handle.data).view(np.uint8)
        count = data.shape[1] * (2 if kind == "e2m1" else 1)
        nested = count // raw.shape[1] == 16
        dtype = ml_dtypes.float8_e4m3fn if nested else ml_dtypes.float8_e8m0fnu
        return np.repeat(raw.view(dtype).astype(np.float64), count // raw.shape[1], axis=1)


def products() -> dict[str, list]:
    from triton.language.semantic import TritonSemantic

    TritonSemantic.dot_scaled = Documented.dot_scaled
    torch.cuda.get_device_capability = lambda device: (12, 0)
    found = {}
    for case in CASES:
        x, w = operands(*case)
        exact = x.dequantize().double() @ w.dequantize().double().T
        plain = x.dequantize() @ w.dequantize().T
        pairs = [(x, w), *((twin, w) for twin in twins(x)), *((x, twin) for twin in twins(w))]
        results = [scaled.scaled_product(*pair, torch.float32) for pair in pairs]
        errors = [(y - exact).abs().max().item() for y in results]
        # A product of few terms can be exact in torch.
        floor = torch.finfo(torch.float32).eps * exact.abs().max().item()
        half = torch.equal(scaled.scaled_product(x, w, torch.float16), results[0].half())
        found[str(case)] = [errors, max(2 * (plain - exact).abs().max().item(), floor), half]
    return found


@pytest.fixture(scope="module")
def measured():
    return interpreted(products)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(measured, case):
    (error, *wrong), budget, half = measured[str(case)]
    assert error <= budget
    assert min(wrong) > budget
    assert half


# What there is an instruction for, by capability; everything else becomes bfloat16.
BLACKWELL = r"tcgen05\.mma\.cta_group::1\.kind::{}\.block_scale\.scale_vec::{}"
MMA = r"mma\.sync\.aligned\.m16n8k{}\.row\.col\.kind::{}\.block_scale\.scale_vec::{}\.f32\.{}\.{}"
NATIVE = {
    (100, "mxfp4", "mxfp4"): BLACKWELL.format("mxf4", "2X"),
    (100, "mxfp8_e4m3", "mxfp4"): BLACKWELL.format("mxf8f6f4", "1X"),
    (100, "mxfp8_e4m3", "mxfp8_e4m3"): BLACKWELL.format("mxf8f6f4", "1X"),
    (100, "nvfp4", "nvfp4-reciprocal"): BLACKWELL.format("mxf4nvf4", "4X"),
    (120, "mxfp4", "mxfp4"): MMA.format(64, "mxf4nvf4", "2X", "e2m1", "e2m1"),
    (120, "mxfp8_e4m3", "mxfp8_e4m3"): MMA.format(32, "mxf8f6f4", "1X", "e4m3", "e4m3"),
    (120, "mxfp8_e4m3", "mxfp8_e5m2"): MMA.format(32, "mxf8f6f4", "1X", "e5m2", "e4m3"),
    (120, "nvfp4", "nvfp4-reciprocal"): MMA.format(64, "mxf4nvf4", "4X", "e2m1", "e2m1"),
}
BFLOAT16 = r"(mma\.sync|wgmma).*\.f32\.bf16\.bf16"
TARGETS = [(*names, 16, cc) for cc, *names in NATIVE]
TARGETS += [("mxfp8_e4m3", "mxfp4", 512, 100), ("nvfp4", "nvfp4-reciprocal", 512, 120)]
EMULATED = [("mxfp8_e4m3", "mxfp4", 512, cc) for cc in (89, 90, 120)]
EMULATED += [("mxfp4", "mxfp4", 16, 80), ("mxfp8_e5m2", "mxfp4", 512, 80)]


def assembled() -> dict[str, dict]:
    found = {}
    for target in TARGETS + EMULATED:
        x, w, rows, capability = target
        pair = zeros(x, rows, 4096), zeros(w, 256, 4096)
        code = scaled.launch(*pair, capability)[0].compiled(capability)
        found[str(target)] = facts(code) | {"native": scaled.native(*pair, capability)}
    try:
        scaled.launch(*operands("mxfp8_e4m3", "mxfp4", 16, 64, 128), 80)[0].compiled(80)
    except Exception as error:
        return found | {"e4m3 on 80": str(error.__cause__ or error)}
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS + EMULATED, ids=str)
def test_machine_code(code, target):
    """Native on 10.0 and 12.0, emulated on 8.0 to 9.0; 12.0 has no product of 8 by 4 bits."""
    found = code[str(target)]
    expected = NATIVE.get((target[3], *target[:2]))
    assert found["native"] == (expected is not None) == (target in TARGETS)
    assert found["tensor cores"]
    for instruction in found["tensor cores"]:
        assert re.match(expected or BFLOAT16, instruction)
    assert found["stack"] == 0


def test_triton_has_no_e4m3_on_ampere(code):
    assert "fp8e4nv not supported in this architecture" in code["e4m3 on 80"]


def test_why_not():
    reasons = {
        ("mxfp4", "mxfp4", 75): "Triton's product of scaled tiles needs cc 8.0",
        ("mxfp8_e4m3", "mxfp4", 80): "Triton has no e4m3 before cc 8.9",
        ("mxfp4", "mxfp8_e4m3", 80): "Triton has no e4m3 before cc 8.9",
        ("nvfp4", "nvfp4", 90): "Triton has no product of two nvfp4 tensors before cc 10.0",
        ("nvfp4", "mxfp4", 100): "only one of x and w is nvfp4",
        ("fp8_e4m3", "mxfp4", 120): "x is not mxfp4, mxfp8 or nvfp4",
        ("mxfp4", "mxfp6_e2m3", 120): "w is not mxfp4, mxfp8 or nvfp4",
        ("mxfp4", "q4_0", 120): "w is not mxfp4, mxfp8 or nvfp4",
    }
    for (x, w, capability), reason in reasons.items():
        assert scaled.why_not(*operands(x, w, 2, 2, 64), capability) == reason
    for x, w, _, capability in TARGETS + EMULATED:
        assert scaled.why_not(*operands(x, w, 2, 2, 64), capability) is None
    assert set(CAPABILITIES) >= {target[3] for target in TARGETS + EMULATED}


def test_inputs_must_match():
    x, w = operands("mxfp4", "mxfp4", 2, 3, 64)[0], operands("mxfp4", "mxfp4", 2, 3, 32)[1]
    with pytest.raises(ValueError, match=r"^scaled_product: x has 64 inputs, the weight 32$"):
        scaled.launch(x, w, 100)
