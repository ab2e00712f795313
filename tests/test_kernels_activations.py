"""Products of two quantized tensors: which runs, and that it is theirs."""

from __future__ import annotations

import pytest
import torch

import qlib
from qlib import kernels
from qlib.kernels import activations
from qlib.qtensor import QTensor

PAIRS = [
    ("int8-row", "int8-row", "cpu.w8a8.scaled_product"),
    ("int8-tensor", "int8-row", "cpu.w8a8.scaled_product"),
    ("fp8_e4m3", "fp8_e4m3", "cpu.w8a8.scaled_product"),
    ("mxfp8_e4m3", "mxfp4", "dequantize.gemm"),
    ("int8-row", "int4-g32-asym", "dequantize.gemm"),
    ("int4-g32", "q4_k", "dequantize.gemm"),
]


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flip(q: QTensor) -> QTensor:
    codes = q.parts["codes"].clone()
    codes[0, 0] ^= 0x40
    return QTensor(q.format, q.shape, {**q.parts, "codes": codes})


@pytest.mark.parametrize(("of_x", "of_w", "chosen"), PAIRS)
def test_the_product_is_that_of_the_dequantized_sides(of_x, of_w, chosen):
    x = activations.quantize(randn(7, 256), qlib.format(of_x))
    w = qlib.quantize(randn(33, 256, seed=1), of_w)
    left, right = x.dequantize(), w.dequantize()
    exact = left.double() @ right.double().T
    most = 2 * (left @ right.T - exact).abs().max()
    y = kernels.matmul(x, w)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= most
    assert (kernels.matmul(flip(x), w) - exact).abs().max() > most
    assert kernels.explain(x, w).splitlines()[0] == f"{chosen}, {x.format} by {w.format}"
    half = activations.product(x, w, torch.bfloat16)
    torch.testing.assert_close(half, y.bfloat16(), rtol=2e-2, atol=2e-2)


def test_a_batch_is_quantized_row_by_row():
    x, format = randn(2, 3, 64), qlib.format("int8-row")
    found = activations.quantize(x.requires_grad_(), format)
    expected = format.quantize(x.detach().view(6, 64))
    assert found.shape == (6, 64)
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


def test_sides_that_do_not_match_are_refused():
    x, w = (activations.quantize(randn(2, n), qlib.format("int8-row")) for n in (64, 63))
    with pytest.raises(ValueError, match=r"^matmul: x is \[2, 64\], weight is \[2, 63\]: inputs "):
        kernels.matmul(x, w)
    short = QTensor(x.format, x.shape, {**x.parts, "codes": x.parts["codes"][:, :-1]})
    with pytest.raises(ValueError, match=r"^matmul: codes is uint8 \[2, 63\], a weight of "):
        kernels.matmul(short, x)
    there = QTensor(x.format, x.shape, {k: v.to("meta") for k, v in x.parts.items()})
    with pytest.raises(ValueError, match=r"^matmul: x is on meta, the weight on cpu$"):
        kernels.matmul(there, x)
    assert "fp8" not in kernels.explain(x, x)
