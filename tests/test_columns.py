"""Columns: the scheme of the transposed weight, in memory, in a product and in a file."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import qlib
from qlib import FormatError, QLinear
from qlib.columns import Columns
from qlib.qtensor import QTensor

NAMES = ["int4-g64-offset", "int3-g32-asym", "int4-row", "nf4", "mxfp4", "nvfp4", "ternary"]


def weight(rows: int = 96, cols: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_is_the_scheme_of_the_transpose(name):
    w, format = weight(), Columns(qlib.format(name))
    q, turned = qlib.quantize(w, format), qlib.quantize(w.T.contiguous(), name)
    assert q.shape == (96, 40)
    assert torch.equal(q.dequantize(), turned.dequantize().T)
    assert q.dequantize().is_contiguous()
    # Along which axis the one block of a tensor runs makes no difference.
    along_rows = qlib.quantize(w, name).dequantize()
    assert torch.equal(q.dequantize(), along_rows) == (qlib.format(name).block == "tensor")


@pytest.mark.parametrize("shape", [(96, 40), (100, 3), (1, 1), (65, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_bytes(name, shape):
    format = Columns(qlib.format(name))
    q = format.quantize(weight(*shape))
    stored = {part: (t.dtype, tuple(t.shape)) for part, t in q.parts.items()}
    assert stored == format.layout(shape)
    assert q.nbytes == format.nbytes(shape) == len(q.tobytes())


def test_neighboring_rows_share_a_scale():
    w = torch.tensor([1.0, 1.0, 100.0, 100.0]).view(4, 1).expand(4, 8).contiguous()
    q = qlib.quantize(w, Columns(qlib.format("int8-g2")))
    scale = q.format.scheme.read(q.parts, (8, 4))[0]
    assert scale[0].tolist() == pytest.approx([1 / 127, 100 / 127], rel=1e-3)
    assert torch.equal(scale, scale[:1].expand(8, 2))


def test_importance_is_turned_too():
    w, format = weight(64, 8), Columns(qlib.format("int3-g32-mse"))
    importance = torch.ones(64, 8)
    importance[::2] = 0.01
    expected = qlib.quantize(w.T.contiguous(), "int3-g32-mse", importance.T.contiguous())
    assert torch.equal(format.quantize(w, importance).dequantize(), expected.dequantize().T)
    assert not torch.equal(format.quantize(w).dequantize(), expected.dequantize().T)
    per_column = format.quantize(w, torch.arange(1.0, 9.0))
    assert torch.equal(per_column.dequantize(), format.quantize(w).dequantize())


def test_products():
    q = Columns(qlib.format("int4-g32-offset")).quantize(weight())
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    expected = x @ q.dequantize().T
    assert torch.equal(qlib.kernels.matmul(x, q), expected)
    assert torch.equal(QLinear(q, torch.ones(96))(x), expected + 1)
    assert qlib.kernels.explain(x, q).splitlines() == [
        "dequantize.gemm, 10 rows of activations",
        "not gpu: x is on the CPU",
        "not cpu.nibbles: Columns is not a Scheme",
        "not cpu.bitstream: Columns is not a Scheme",
        "not cpu.ggml: the format is not ggml's Q4_K, Q6_K or Q8_0",
        "not cpu.ternary: the weights are not ternary",
    ]
    x.requires_grad_()
    qlib.kernels.matmul(x, q).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], q.dequantize().sum(0))


def test_says_what_it_is():
    q = Columns(qlib.format("int4-g32-offset")).quantize(weight())
    expected = "uint4, block 32, minmax, scale float16, offset float16, down the columns"
    assert str(q.format) == expected
    assert expected in repr(q)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4), ()])
def test_only_matrices_have_columns(shape):
    format, message = Columns(qlib.format("int4-g32")), f"a weight {list(shape)} has no columns"
    for call in (lambda: format.quantize(torch.ones(shape)), lambda: format.nbytes(shape)):
        with pytest.raises(ValueError, match="Columns needs") as caught:
            call()
        assert str(caught.value) == f"{message}; Columns needs [out, in]"


def test_bad_weights_are_named_by_their_own_shape():
    w = weight(64, 8)
    w[3, 4] = torch.nan
    message = r"^weight \[64, 8\] holds 1 NaN or infinite values; repair them first$"
    with pytest.raises(ValueError, match=message):
        Columns(qlib.format("int4-g32")).quantize(w)


# -- in a file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_file(name, tmp_path):
    q = Columns(qlib.format(name)).quantize(weight())
    q.save(tmp_path / "w.safetensors")
    loaded = QTensor.load(tmp_path / "w.safetensors")
    assert loaded.format == q.format
    assert loaded.shape == q.shape
    assert torch.equal(loaded.dequantize(), q.dequantize())
    loaded.parts["codes"][0, 0] ^= 1
    assert not torch.equal(loaded.dequantize(), q.dequantize())


FIELDS = "a scheme has exactly the fields block, fit, grid, offset, scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["format"].update(more=1), FIELDS),
        (lambda d: d.update(format={"columns": d["format"]}), FIELDS),
        (lambda d: d.update(format={"columns": None}), FIELDS),
        (lambda d: d.update(shape=[96]), "shape [96] has no columns"),
        (lambda d: d.update(shape=[2, 48, 40]), "shape [2, 48, 40] has no columns"),
    ],
)
def test_files_that_lie(change, message, tmp_path):
    q, path = Columns(qlib.format("int4-g32-offset")).quantize(weight()), tmp_path / "w.safetensors"
    q.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["qlib"])
    change(described["tensors"][""])
    safetensors.torch.save_file(q.parts, path, metadata={"qlib": json.dumps(described)})
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    assert str(caught.value) == f"{path}: field \"qlib.tensors['']\": {message}"


def test_file_with_the_shape_turned_is_refused(tmp_path):
    q, path = Columns(qlib.format("int4-g32")).quantize(weight()), tmp_path / "w.safetensors"
    QTensor(q.format, (40, 96), q.parts).save(path)
    with pytest.raises(FormatError, match=r"codes.*its format needs U8 \[96, 20\]"):
        QTensor.load(path)
