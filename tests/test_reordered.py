"""Reordered: blocks of columns in any order, in memory, in a product and in a file."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import torch

import qlib
from qlib import FormatError, QLinear
from qlib.qtensor import QTensor
from qlib.reordered import Reordered

NAMES = ["int4-g16", "int3-g32-asym", "int4-g16-offset", "nf4", "nvfp4"]


def weight(rows: int = 24, cols: int = 72) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def order(cols: int = 72) -> torch.Tensor:
    return torch.randperm(cols, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_is_the_scheme_of_the_reordered_weight(name):
    w = weight()
    q = Reordered(qlib.format(name)).quantize(w, order=order())
    inner = qlib.quantize(w[:, order()], name)
    assert torch.equal(q.dequantize()[:, order()], inner.dequantize())
    # Negative twin: another order is another weight.
    assert not torch.equal(q.dequantize()[:, order().flip(0)], inner.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_without_an_order_it_is_the_scheme(name):
    q, plain = Reordered(qlib.format(name)).quantize(weight()), qlib.quantize(weight(), name)
    assert torch.equal(q.dequantize(), plain.dequantize())
    assert q.parts["order"].tolist() == [list(range(72))]
    assert q.nbytes == plain.nbytes + 4 * 72


@pytest.mark.parametrize("shape", [(24, 72), (5, 33), (1, 1), (40, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_bytes(name, shape):
    format = Reordered(qlib.format(name))
    q = format.quantize(weight(*shape), order=order(shape[1]))
    stored = {part: (t.dtype, tuple(t.shape)) for part, t in q.parts.items()}
    assert stored == format.layout(shape)
    assert q.nbytes == format.nbytes(shape) == len(q.tobytes())


def test_importance_is_reordered_too():
    w, format = weight(), Reordered(qlib.format("int3-g16-mse"))
    importance = torch.where(torch.arange(72) % 2 == 0, 1.0, 0.01)
    inner = qlib.quantize(w[:, order()], "int3-g16-mse", importance[order()].expand(24, 72))
    q = format.quantize(w, importance, order())
    assert torch.equal(q.dequantize()[:, order()], inner.dequantize())
    wrong = qlib.quantize(w[:, order()], "int3-g16-mse", importance.expand(24, 72))
    assert not torch.equal(q.dequantize()[:, order()], wrong.dequantize())


def test_products():
    q = Reordered(qlib.format("int4-g24-asym")).quantize(weight(), order=order())
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))
    expected = x @ q.dequantize().T
    assert torch.equal(qlib.kernels.matmul(x, q), expected)
    layer = QLinear(q, torch.ones(24))
    assert torch.equal(layer(x), expected + 1)
    # Blocks that the compiled kernels take: these gather the columns of x in the stored order.
    q = Reordered(qlib.format("int4-g32-asym")).quantize(weight(), order=order())
    assert qlib.kernels.explain(x, q).startswith("cpu.nibbles.gemm")
    for rows in (x, x[0, :1]):
        expected = rows @ q.dequantize().T
        torch.testing.assert_close(qlib.kernels.matmul(rows, q), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(qlib.kernels.matmul(rows.flip(-1), q), expected, atol=1e-2)
    assert layer.half().weight.parts["order"].dtype == torch.int32


def test_rows_do_not_come_apart():
    """A square weight has as many columns as rows; its order is still no row of anything."""
    q = Reordered(qlib.format("int4-g16")).quantize(weight(40, 40), order=order(40))
    with pytest.raises(ValueError, match=r"all rows share 'order', so they stay together$"):
        q.split([20, 20])


def test_says_what_it_is():
    q = Reordered(qlib.format("int4-g16")).quantize(weight())
    assert str(q.format) == "int4, block 16, absmax, scale float16, columns reordered"
    assert str(q.format) in repr(q)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4), ()])
def test_only_matrices_have_columns(shape):
    format, message = Reordered(qlib.format("int4-g32")), f"a weight {list(shape)} has no columns"
    for call in (lambda: format.quantize(torch.ones(shape)), lambda: format.nbytes(shape)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}; Reordered needs"):
            call()


@pytest.mark.parametrize("block", ["row", "tensor"])
def test_blocks_without_an_order(block):
    message = f"^a block '{block}' holds the same columns in any order$"
    with pytest.raises(ValueError, match=message):
        Reordered(qlib.format(f"int4-{block}"))


@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 2, 2], [1, 2, 3, 4], [-1, 0, 1, 2]])
def test_orders_that_are_none(bad):
    message = "^order must name each of the 4 columns of the weight once$"
    with pytest.raises(ValueError, match=message):
        Reordered(qlib.format("int4-g2")).quantize(torch.ones(1, 4), order=torch.tensor(bad))


# -- in a file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_file(name, tmp_path):
    q = Reordered(qlib.format(name)).quantize(weight(), order=order())
    q.save(tmp_path / "w.safetensors")
    loaded = QTensor.load(tmp_path / "w.safetensors")
    assert (loaded.format, loaded.shape) == (q.format, q.shape)
    assert loaded.tobytes() == q.tobytes()
    loaded.parts["order"][0, :2] = loaded.parts["order"][0, :2].flip(0)
    assert not torch.equal(loaded.dequantize(), q.dequantize())


@pytest.mark.parametrize("bad", [[0, 0], [-1, 0], [72, 0]])
def test_file_whose_order_is_none(bad, tmp_path):
    q, path = Reordered(qlib.format("int4-g16")).quantize(weight()), tmp_path / "w.safetensors"
    q.parts["order"][0, :2] = torch.tensor(bad)
    q.save(path)
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    assert str(caught.value) == f"{path}: field 'order': does not name every column once"


FIELDS = "a scheme has exactly the fields block, fit, grid, offset, scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["format"].update(more=1), FIELDS),
        (lambda d: d.update(format={"reordered": d["format"]}), FIELDS),
        (lambda d: d.update(format={"reordered": None}), FIELDS),
        (
            lambda d: d["format"]["reordered"].update(block="row"),
            "a block 'row' holds the same columns in any order",
        ),
        (lambda d: d.update(shape=[24]), "a weight [24] has no columns; Reordered needs [out, in]"),
    ],
)
def test_files_that_lie(change, message, tmp_path):
    q, path = Reordered(qlib.format("int4-g16")).quantize(weight()), tmp_path / "w.safetensors"
    q.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["qlib"])
    change(described["tensors"][""])
    safetensors.torch.save_file(q.parts, path, metadata={"qlib": json.dumps(described)})
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    assert str(caught.value) == f"{path}: field \"qlib.tensors['']\": {message}"
