"""Kernels against `x @ q.dequantize().T`, and the sentences that say which kernel runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

import qlib
from qlib import fit, kernels
from qlib.grid import Grid
from qlib.kernels import dequantize, dispatch
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

COMPILED = ["int4-row", "int4-g32", "int4-g32-asym", "int4-g6-asym", "int4-row-asym"]
COMPILED += ["int4-tensor", "int4-tensor-asym", "int8-row", "int8-g5", "int8-g32-asym"]
OTHERS = ["nf4", "mxfp4", "nvfp4", "mxfp6_e2m3", "fp8_e4m3", "ternary", "int3-g64", "int4-g5"]
SHAPES = [(1, 1), (3, 5), (64, 64), (33, 77), (17, 260)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ON_CPU = "not w4a16_triton: x is on the CPU"


def randn(*shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(shape, format) -> QTensor:
    weight = randn(*shape, seed=100)
    weight.view(-1)[0] = 1.5  # so that a flipped first code is far off in every format
    return qlib.quantize(weight, format)


def error(x, q: QTensor, y) -> float:
    """Largest error of `y` as `x @ q.dequantize().T`."""
    return (y.double() - x.double() @ q.dequantize().double().T).abs().max().item()


def budget(x, q: QTensor) -> float:
    """Twice the largest error of torch's own product in that dtype, `x` and 64 more rows."""
    x = torch.cat([x.reshape(-1, x.shape[-1]), randn(64, x.shape[-1], dtype=x.dtype, seed=9)])
    return 2 * error(x, q, x @ q.dequantize().to(x.dtype).T)


def flip(q: QTensor) -> QTensor:
    """`q` with the highest bit of its first code flipped."""
    codes = q.parts["codes"].clone()
    codes[0, 0] ^= 1 << (q.format.grid.bits - 1)
    return QTensor(q.format, q.shape, {**q.parts, "codes": codes})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_equal_the_dequantized_product(name, shape, dtype, monkeypatch):
    from qlib.kernels import w4_numba

    monkeypatch.setattr(w4_numba, "CHUNK_WEIGHTS", 16 * shape[1])
    q = quantized(shape, name)
    for rows in (1, 3, 17):
        x = randn(rows, shape[1], dtype=dtype, seed=rows)
        x[0, 0] = 1
        y = kernels.matmul(x, q)
        assert kernels.explain(x, q).startswith("w4_numba.")
        assert y.dtype == dtype
        assert y.shape == (rows, shape[0])
        assert error(x, q, y) <= budget(x, q)
        assert error(x, q, kernels.matmul(x, flip(q))) > budget(x, q)


@pytest.mark.parametrize("name", [*OTHERS, "nf4-dq", "nvfp4-reciprocal"])
def test_other_formats_are_dequantized_in_chunks(name, monkeypatch):
    monkeypatch.setattr(dequantize, "CHUNK_WEIGHTS", 7 * 77)
    q = quantized((33, 77), name)
    for dtype in DTYPES:
        x = randn(17, 77, dtype=dtype)
        x[0, 0] = 1
        y = kernels.matmul(x, q)
        assert y.dtype == dtype
        assert error(x, q, y) <= budget(x, q)
        assert error(x, q, kernels.matmul(x, flip(q))) > budget(x, q)


def test_float64_activations_give_a_float64_product():
    x, q = randn(17, 77).double(), quantized((33, 77), "int4-g32")
    torch.testing.assert_close(kernels.matmul(x, q), x @ q.dequantize().double().T)


LEARNED = Scheme(Grid("learned", torch.tensor([-1.0, -0.3, 0.2, 1.0])), 8, fit.absmax)
UNLIKE = Scheme(Grid("int4", torch.linspace(-2, 2, 16)), 32, fit.absmax)


@pytest.mark.parametrize("name", [*COMPILED, *OTHERS, "int4-g100", LEARNED, UNLIKE])
def test_row_chunks_are_the_rows(name):
    # A learned grid of 4 points beside 4 rows: what is shared must not be cut.
    for rows in (4, 9):
        q = quantized((rows, 77), name)
        pieces = list(dequantize.row_chunks(q, 2))
        assert [p.shape[0] for p in pieces] == [2] * (rows // 2) + [1] * (rows % 2)
        assert torch.equal(torch.cat([p.dequantize() for p in pieces]), q.dequantize())


@pytest.mark.parametrize("rows", [1, 17])
def test_special_activations_and_zero_blocks(rows):
    weight = randn(20, 77)
    weight[:, 32:64] = 0
    weight[3] = 0
    q = qlib.quantize(weight, "int4-g32-asym")
    x = randn(rows, 77)
    assert error(x, q, kernels.matmul(x, q)) <= budget(x, q)
    assert not kernels.matmul(x, q)[:, 3].any()
    x[0, 5], x[-1, 70] = float("nan"), float("inf")
    for y, want in zip(kernels.matmul(x, q), x @ q.dequantize().T):
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())


def test_leading_dimensions():
    q = quantized((6, 40), "int4-g8")
    x = randn(2, 3, 40)
    assert torch.equal(kernels.matmul(x, q).view(6, 6), kernels.matmul(x.view(6, 40), q))
    assert torch.equal(kernels.matmul(x[1, 2], q), kernels.matmul(x[1, 2:], q)[0])
    assert kernels.matmul(x[:0], q).shape == (0, 3, 6)
    strided = randn(40, 5).T
    assert error(strided, q, kernels.matmul(strided, q)) <= budget(strided, q)


def test_gradient_takes_the_differentiable_path():
    q = quantized((6, 40), "int4-g8")
    x = randn(3, 40).requires_grad_()
    kernels.matmul(x, q).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, 40))
    reason = "not w4_numba: x needs a gradient"
    assert kernels.explain(x, q) == f"dequantize.gemm, 3 rows of activations\n{ON_CPU}\n{reason}"
    with torch.no_grad():
        assert kernels.explain(x, q) == f"w4_numba.gemv, 3 rows of activations\n{ON_CPU}"
        for rows in (x, x.repeat(2, 1), x.half()):
            assert error(rows, q, kernels.matmul(rows, q)) <= budget(rows, q)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A format that is not a Scheme: float64 values."""

    def decode(self, parts, shape):
        return parts["values"].float().view(shape)

    def layout(self, shape):
        return {"values": (torch.float64, tuple(shape))}


def integer(**change) -> Scheme:
    return dataclasses.replace(qlib.format("int4-g32-asym"), **change)


@pytest.mark.parametrize(
    ("format", "x", "reason"),
    [
        ("nf4", randn(2, 64), "the grid nf4 is not an integer grid of 4 or 8 bits"),
        ("int3-g32", randn(2, 64), "the grid int3 is not an integer grid of 4 or 8 bits"),
        (UNLIKE, randn(2, 64), "the grid int4 is not an integer grid of 4 or 8 bits"),
        ("int4-g5", randn(2, 64), "blocks of 5 codes of 4 bits do not end at a byte"),
        (integer(offset=torch.float16), randn(2, 64), "the offset is not an integer zero point"),
        ("int4", randn(0, 64), "x has no rows"),
        ("int4", randn(2, 64).double(), "x is float64, it takes float16, bfloat16 or float32"),
    ],
)
def test_explain_fallback(format, x, reason):
    q = quantized((8, 64), format)
    first = f"dequantize.gemm, {len(x)} rows of activations"
    assert kernels.explain(x, q) == f"{first}\n{ON_CPU}\nnot w4_numba: {reason}"
    assert kernels.matmul(x, q).shape == (len(x), 8)


def test_explain_what_is_missing_and_what_is_not_a_scheme(monkeypatch):
    x, q = randn(5, 64), quantized((8, 64), "int4")
    assert kernels.explain(x[:1], q) == f"w4_numba.gemv, 1 row of activations\n{ON_CPU}"
    assert kernels.explain(x, q) == f"w4_numba.gemm, 5 rows of activations\n{ON_CPU}"
    plain = QTensor(Plain(), (8, 64), {"values": randn(8, 64).double()})
    assert kernels.explain(x, plain).endswith("\nnot w4_numba: Plain is not a Scheme")
    assert torch.equal(kernels.matmul(x, plain), x @ plain.dequantize().T)
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    assert kernels.explain(x, q).endswith("\nnot w4_numba: numba is not installed")
    assert error(x, q, kernels.matmul(x, q)) <= budget(x, q)


def test_errors_name_what_does_not_fit():
    q = quantized((64, 128), "int4-g32")
    parts = {**q.parts, "codes": q.parts["codes"][:, :-1]}
    short = "codes is uint8 [64, 63], a weight of [64, 128] has uint8 [64, 64]"
    wide = {**q.parts, "scale": q.parts["scale"].float()}
    cases = [
        (randn(2, 100), q, "x has 100 input features, weight is [64, 128]"),
        (torch.tensor(1.0), q, "x has no dimensions, weight is [64, 128]"),
        (torch.ones(2, 128).long(), q, "x is int64, need floating point"),
        (randn(2, 128).to("meta"), q, "x is on meta, codes is on cpu"),
        (randn(2, 5), quantized((2, 3, 5), "int4"), "weight is [2, 3, 5], need [out, in]"),
        (randn(2, 128), QTensor(q.format, q.shape, parts), short),
        (
            randn(2, 128),
            QTensor(q.format, q.shape, wide),
            "scale is float32 [64, 4], a weight of [64, 128] has float16 [64, 4]",
        ),
    ]
    for x, weight, message in cases:
        for function in (kernels.matmul, kernels.explain):
            with pytest.raises(ValueError, match=f"^{re.escape(f'matmul: {message}')}$"):
                function(x, weight)


def test_nothing_is_imported_before_it_is_used():
    code = """if True:
        import sys, torch, qlib
        def loaded(): return sorted({"numba", "triton"} & set(sys.modules))
        q = qlib.quantize(torch.ones(2, 32), "int4-g32")
        print(loaded(), qlib.kernels.explain(torch.ones(1, 32), q)[:13], loaded())
        qlib.kernels.matmul(torch.ones(1, 32), q)
        print(loaded(), hasattr(qlib.kernels, "__version__"))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] w4_numba.gemv []\n['numba'] False\n"
    with pytest.raises(AttributeError, match=r"^module 'qlib.kernels' has no attribute 'gemv'$"):
        kernels.gemv  # noqa: B018
