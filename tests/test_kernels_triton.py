"""The Triton kernels without a GPU: run by the interpreter, and compiled ahead of time.

Both run in a process of their own, because triton reads TRITON_INTERPRET when it is imported; run
as a script, this file is that process and prints what it found as JSON. The interpreter multiplies
the bits of bfloat16 as if they were integers, so bfloat16 is only compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import qlib
from qlib.grid import GRIDS
from qlib.kernels import dispatch
from qlib.qtensor import QTensor

CASES = [
    ("int4-g32", 33, 192, 3),
    ("int4-g32-asym", 70, 100, 17),
    ("int4-g48-asym", 5, 160, 1),
    ("int4-row", 40, 77, 2),
    ("int4-row-asym", 1, 130, 1),
    ("int4-tensor-asym", 9, 64, 3),
    ("int4-g128", 3, 100, 1),
]
RUNGS = ["gemv", "gemm"]


def interpreted() -> dict:
    """For each case and rung: its error, twice torch's, and its error when one code is flipped."""
    from qlib.kernels import w4a16_triton

    return {
        f"{rung} {case}": measure(getattr(w4a16_triton, rung), w4a16_triton.reference, *case)
        for rung in RUNGS
        for case in CASES
    }


def measure(kernel, reference, name: str, out: int, columns: int, rows: int) -> list[float]:
    torch.manual_seed(0)
    weight, x = torch.randn(out, columns), torch.randn(64, columns).half()
    weight[0, 0], x[0, 0] = 1.5, 1
    q = qlib.quantize(weight, name)
    codes = q.parts["codes"].clone()
    codes[0, 0] ^= 8
    flipped = QTensor(q.format, q.shape, {**q.parts, "codes": codes})
    exact = x.double() @ q.dequantize().double().T
    budget = 2 * (reference(x, q) - exact).abs().max().item()
    x, exact = x[:rows], exact[:rows]
    return [(kernel(x, w) - exact).abs().max().item() for w in (q, flipped)] + [budget]


# What must be in the PTX: 16 bytes of codes in one load (nothing else that the gemv loads is so
# wide), and the tensor cores' instruction.
WIDE = r"ld\.global\.v4\.b32"
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{0}\.{0}\.f32"
TARGETS = [("gemv", cc, "fp16", 1, WIDE) for cc in (75, 80, 89, 90, 100, 120)]
TARGETS += [("gemm", cc, "fp16", 16, MMA.format("f16")) for cc in (80, 89, 120)]
TARGETS += [("gemm", 80, "bf16", 16, MMA.format("bf16"))]
TARGETS += [("gemm", 90, "bf16", 64, r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16")]
TARGETS += [("gemm", 100, "fp16", 64, r"tcgen05\.mma\.cta_group::1\.kind::f16")]


def compiled() -> dict:
    from qlib.kernels import w4a16_triton

    wanted = {target[:4] for target in TARGETS} | {("gemm", 75, "fp16", 16)}
    return {str(target): w4a16_triton.assembly(*target) for target in sorted(wanted)}


def child(what: str, **environment: str) -> dict:
    command = [sys.executable, __file__, what]
    environment = {**os.environ, **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def measured():
    return child("interpreted", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    # An empty cache, so that this compiles today's source with today's compiler.
    cache = str(tmp_path_factory.mktemp("triton"))
    return child("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_dequantized_product(measured, rung, case):
    error, flipped, budget = measured[f"{rung} {case}"]
    assert error <= budget
    assert flipped > budget


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: " ".join(map(str, target[:4])))
def test_ptx(ptx, target):
    assert re.search(target[4], ptx[str(target[:4])])


def test_what_ptx_has_no_tensor_core_product(ptx):
    """On Turing: the reason why the dispatcher leaves several rows to torch there."""
    for target in [("gemm", 75, "fp16", 16), ("gemv", 90, "fp16", 1), ("gemv", 100, "fp16", 1)]:
        assert f".target sm_{target[1]}" in ptx[str(target)]
        assert not re.search(r"mma\.|mma_async", ptx[str(target)])


def integer(**change) -> qlib.Scheme:
    return dataclasses.replace(qlib.format("int4-g32-asym"), **change)


@pytest.mark.parametrize(
    ("format", "x", "reason"),
    [
        ("int4-g32-asym", {}, None),
        ("int4-row", {"rows": 1, "capability": (7, 5)}, None),
        ("int4-row", {"is_cuda": False}, "x is on mps"),
        ("int4", {"dtype": torch.float32}, "x is float32, it takes float16 or bfloat16"),
        ("int4", {"capability": (7, 5)}, "the product needs tensor cores of cc 8.0, this is 7.5"),
        ("int4", {"rows": 0}, "x has no rows"),
        ("int8", {}, "the grid int8 is not an integer grid of 4 bits"),
        ("int4-g20", {}, "blocks of 20 are not a multiple of 16"),
        (integer(scale=GRIDS["e8m0"]), {}, "the scale is not float16, bfloat16 or float32"),
        (integer(offset=GRIDS["uint8"]), {}, "the zero point is stored as uint8, not in 4 bits"),
    ],
)
def test_why_not_triton(format, x, reason, monkeypatch):
    """Without a GPU: a tensor that says it is on one."""
    x = {"rows": 2, "is_cuda": True, "dtype": torch.float16, "capability": (9, 0)} | x
    capability = x.pop("capability")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)

    class Fake(SimpleNamespace):
        device, requires_grad = torch.device("mps"), False
        __len__ = lambda self: self.rows  # noqa: E731

    q = qlib.quantize(torch.randn(8, 64), format)
    assert dispatch._why_not_triton(Fake(**x), q) == reason
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    if x["is_cuda"]:
        assert dispatch._why_not_triton(Fake(**x), q) == "triton is not installed"


if __name__ == "__main__":
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
