"""Which kernel runs, the sentences that say so, and the fallback that dequantizes."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from product_errors import budget, error, flip, quantized, randn

import qlib
from qlib import fit, kernels
from qlib.activations import inputs
from qlib.grid import GRIDS, Grid
from qlib.kernels import dequantize, dispatch, operator
from qlib.linear import QLinear
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

COMPILED = (
    "int4-row int4-g32-asym nf4 nvfp4 int8-row int8-g32-asym ternary int3-g64 fp8_e4m3".split()
)
OTHERS = "nf5 int3-g24 int4-g5 lloyd6 int2-g8-asym mxint8".split()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ON_CPU = "not gpu: x is on the CPU"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPILED)
def test_dispatched_kernels_equal_the_dequantized_product(name, dtype):
    q = quantized((33, 77), name)
    for rows in (1, 3, 17):
        x = randn(rows, 77, dtype=dtype, seed=rows)
        x[0, 0] = 1
        y = kernels.matmul(x, q)
        assert re.match(r"cpu\.\w+\.gem[vm], ", kernels.explain(x, q))
        assert y.dtype == dtype
        assert error(x, q, y) <= budget(x, q)
        assert error(x, q, kernels.matmul(x, flip(q))) > budget(x, q)


@pytest.mark.filterwarnings("ignore::qlib.kernels.dispatch.SlowKernelWarning")
@pytest.mark.parametrize("name", OTHERS)
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
UNLIKE = Scheme(Grid("int5", torch.linspace(-2, 2, 32)), 32, fit.absmax)


@pytest.mark.parametrize("name", [*COMPILED, *OTHERS, "int4-g100", LEARNED, UNLIKE])
def test_row_chunks_are_the_rows(name):
    # A learned grid of 4 points beside 4 rows: what is shared must not be cut.
    for rows in (4, 9):
        q = quantized((rows, 77), name)
        pieces = list(dequantize.row_chunks(q, 2))
        assert [p.shape[0] for p in pieces] == [2] * (rows // 2) + [1] * (rows % 2)
        assert torch.equal(torch.cat([p.dequantize() for p in pieces]), q.dequantize())


def test_leading_dimensions():
    q = quantized((6, 40), "int4-g8")
    x = randn(2, 3, 40)
    assert torch.equal(kernels.matmul(x, q).view(6, 6), kernels.matmul(x.view(6, 40), q))
    assert torch.equal(kernels.matmul(x[1, 2], q), kernels.matmul(x[1, 2:], q)[0])
    assert kernels.matmul(x[:0], q).shape == (0, 3, 6)
    strided = randn(40, 5).T
    assert error(strided, q, kernels.matmul(strided, q)) <= budget(strided, q)


def test_gradient_takes_the_differentiable_path():
    q = quantized((6, 40), "int4-g32")
    x = randn(3, 40).requires_grad_()
    kernels.matmul(x, q).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, 40))
    reason = "not cpu: x needs a gradient"
    assert kernels.explain(x, q) == f"dequantize.gemm, 3 rows of activations\n{ON_CPU}\n{reason}"
    with torch.no_grad():
        first = "cpu.nibbles.gemv, 3 rows of activations"
        assert kernels.explain(x, q) == f"{first}\n{ON_CPU}"
        for rows in (x, x.repeat(4, 1), x.half()):
            assert error(rows, q, kernels.matmul(rows, q)) <= budget(rows, q)


def test_a_product_that_is_ready_decides_again_when_the_activations_change():
    product = dispatch.Product(quantized((6, 64), "int4-g32"))
    x = randn(9, 64)
    want = x @ product.q.dequantize().T
    torch.testing.assert_close(product(x), want)
    torch.testing.assert_close(product(x[:1]), want[:1])
    twice = x.double() @ product.q.dequantize().double().T
    torch.testing.assert_close(product(x.double()), twice)
    assert product(x.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not product(x).requires_grad
    with pytest.raises(ValueError, match=r"^matmul: x has 63 input features, weight is \[6, 64\]$"):
        product(x[:, 1:])


@dataclasses.dataclass(frozen=True)
class Plain:
    """A format that is not a Scheme: float64 values."""

    def decode(self, parts, shape):
        return parts["values"].float().view(shape)

    def layout(self, shape):
        return {"values": (torch.float64, tuple(shape))}


DOUBLE = randn(2, 64).double()


@pytest.mark.parametrize(
    ("format", "x", "reason"),
    [
        ("int3-g24", randn(20, 64), "cpu.nibbles: the grid int3 does not have codes of 4 bits"),
        ("int3-g24", randn(20, 64), "cpu.bitstream: blocks of 24 are not a multiple of 16"),
        (
            UNLIKE,
            randn(20, 64),
            "cpu.bitstream: the grid int5 has over 16 values, neither integers nor small floats",
        ),
        ("int4", randn(0, 64), "cpu: x has no rows"),
        (
            "int4",
            randn(2, 64).double(),
            "cpu: x is float64, they take float32, float16 or bfloat16",
        ),
    ],
)
def test_explain_fallback(format, x, reason):
    q = quantized((8, 64), format)
    explained = kernels.explain(x, q).splitlines()
    assert explained[:2] == [f"dequantize.gemm, {len(x)} rows of activations", ON_CPU]
    assert f"not {reason}" in explained
    assert kernels.matmul(x, q).shape == (len(x), 8)


def test_explain_what_is_missing_and_what_is_not_a_scheme(monkeypatch):
    x, q = randn(9, 64), quantized((8, 64), "int4")
    assert kernels.explain(x[:1], q) == f"cpu.nibbles.gemv, 1 row of activations\n{ON_CPU}"
    assert kernels.explain(x, q) == f"cpu.nibbles.gemm, 9 rows of activations\n{ON_CPU}"
    plain = QTensor(Plain(), (8, 64), {"values": randn(8, 64).double()})
    assert "\nnot cpu.nibbles: Plain is not a Scheme\n" in kernels.explain(x, plain)
    many = x.repeat(4, 1)
    assert torch.equal(kernels.matmul(many, plain), many @ plain.dequantize().T)
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    assert kernels.explain(x, q).endswith("\nnot cpu: numba is not installed")
    assert error(x, q, kernels.matmul(x, q)) <= budget(x, q)
    lacks = {str(kernel) for kernel in kernels.available()}
    assert "cpu.ternary: ternary (not here: numba is not installed)" in lacks


def test_available_names_every_file_of_kernels():
    listed = {kernel.name: kernel for kernel in kernels.available()}
    for name in listed:
        module = dispatch._module(name)
        assert module.why_not(quantized((8, 77), "int1-g7"))
        assert hasattr(module, "packed") or hasattr(module, "gemv")
    assert str(listed["cpu.ggml"]) == "cpu.ggml: ggml's Q4_K, Q6_K and Q8_0 (available)"
    if not torch.cuda.is_available():
        assert {k.missing for name, k in listed.items() if name[:3] == "gpu"} == {"no CUDA device"}


def test_a_slow_product_of_one_row_warns_once():
    q = quantized((8, 96), dataclasses.replace(qlib.format("int3-g32"), block=24))
    dispatch._warn.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kernels.matmul(randn(2, 96), q)
        assert not seen
        for _ in range(3):
            kernels.matmul(randn(1, 96), q)
    assert [w.category for w in seen] == [kernels.SlowKernelWarning]
    assert seen[0].filename == __file__
    assert str(seen[0].message) == (
        "no kernel on cpu for int3, block 24, absmax, scale float16: every product dequantizes the "
        "weight first; qlib.kernels.explain(x, q) says why, qlib.kernels.available() what there is"
    )


class OnGpu(SimpleNamespace):
    """What a decision reads of a tensor on a GPU that is not there."""

    device, requires_grad = torch.device("cuda"), False

    def __len__(self) -> int:
        return self.rows


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ({}, None),
        ({"rows": 1, "capability": (7, 5)}, None),
        ({"dtype": torch.float32}, "x is float32, they take float16 or bfloat16"),
        ({"capability": (7, 5)}, "the product needs tensor cores of cc 8.0, this is 7.5"),
        ({"rows": 0}, "x has no rows"),
    ],
)
def test_why_not_on_a_gpu(x, reason, monkeypatch):
    x = {"rows": 2, "dtype": torch.float16, "capability": (9, 0)} | x
    capability = x.pop("capability")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    assert dispatch._why_not_any(OnGpu(**x)) == reason
    assert dispatch._rung(OnGpu(**x)) == ("gemv" if x["rows"] < 2 else "gemm")
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    assert dispatch._why_not_any(OnGpu(**x)) == "triton is not installed"


@pytest.mark.parametrize("name", ["int4-g32-asym", "q4_k", "int3-g64", "nvfp4"])
def test_compiled_models_keep_the_kernel(name):
    layer = QLinear(quantized((24, 256), name), randn(24))
    x = randn(2, 20, 256).requires_grad_()
    want = x @ layer.weight.dequantize().T + layer.bias
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], layer.weight.dequantize().sum(0), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_operator_of_torch():
    q = quantized((24, 256), "int4-g32-asym")
    for rows in (3, 20):  # by either rung: the compiler was promised the strides of a new tensor
        x, parts = randn(rows, 256), list(q.parts.values())
        arguments = (x, parts, operator.name_of(q.format), [24, 256])
        torch.library.opcheck(torch.ops.qlib.matmul.default, arguments)
        assert kernels.matmul(x, q).is_contiguous()
    assert operator.name_of(qlib.format("int4-g32-asym")) == operator.name_of(q.format)
    assert operator.name_of(qlib.format("int4-g32")) != operator.name_of(q.format)


def test_a_layer_sees_that_its_weight_changed():
    layer, other = (QLinear(quantized((24, 256), "nvfp4")) for _ in range(2))
    x = randn(1, 256)
    first = layer(x)
    copied = copy.deepcopy(layer)
    other.weight.parts["scale.scale"].mul_(2)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), 2 * first)
    assert torch.equal(copied(x), first)


@pytest.mark.parametrize("name", ["ternary", "nvfp4", "int4-g32-asym"])
def test_a_layer_of_inference_mode_sees_that_its_weight_changed(name):
    """What is made in inference mode does not count its versions."""
    x = randn(1, 256)
    with torch.inference_mode():
        other = QLinear(qlib.quantize(randn(24, 256, seed=7), name))
        for made in (lambda layer: layer, copy.deepcopy, QLinear.half):
            layer = made(QLinear(quantized((24, 256), name)))
            first = layer(x)
            layer.load_state_dict(other.state_dict())
            assert torch.equal(layer(x), other(x))
            assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("change", [lambda layer: layer, copy.deepcopy, QLinear.half, "assigned"])
def test_a_layer_of_inference_mode_can_be_trained_through(change):
    want = QLinear(quantized((24, 256), "nvfp4"))
    with torch.inference_mode():
        layer = QLinear(quantized((24, 256), "nvfp4"))
        if change == "assigned":
            layer.load_state_dict({k: v.clone() for k, v in want.state_dict().items()}, assign=True)
        else:
            layer = change(layer)
    x, y = (randn(2, 256).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    want(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert x.grad.abs().sum() > 0
    assert not any(buffer.is_inference() for buffer in layer.buffers())


def test_a_grid_with_the_points_of_another_is_another():
    """The formats differ in what they store, so nothing may take the one for the other."""
    x, w = randn(1, 64), randn(4, 64)
    points = GRIDS["int4"].points.clone()
    standard, mine = (Scheme(g, 64, fit.absmax) for g in (GRIDS["int4"], Grid("mine", points)))
    assert standard != mine
    assert [list(s.layout((4, 64))) for s in (standard, mine)] == [
        ["codes", "scale"],
        ["codes", "scale", "grid"],
    ]
    layers = [QLinear(s.quantize(w)) for s in (standard, mine)]
    for layer in layers:
        want = x @ layer.weight.dequantize().T
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    assert torch.equal(*(layer.weight.dequantize() for layer in layers))


@pytest.mark.parametrize("shape", [(8, 64), (3, 8, 64), (0, 64), (1, 64)])
def test_operators_promise_the_strides_that_they_return(shape):
    rows = randn(*shape)
    q, rounding = quantized((24, 64), "int4-g32-asym"), operator.name_of(inputs("int8-row"))
    # The same numbers with the first and last axis exchanged in memory, and with gaps.
    for x in (rows, rows.mT.contiguous().mT, torch.cat([rows, rows], -1)[..., ::2]):
        weight = (list(q.parts.values()), operator.name_of(q.format), [24, 64])
        calls = {
            torch.ops.qlib.rounded.default: (x, rounding),
            torch.ops.qlib.matmul.default: (x, *weight),
            torch.ops.qlib.hadamard.default: (x, torch.ones(64), False),
        }
        for call, arguments in calls.items():
            torch.library.opcheck(call, arguments)
            assert call(*arguments).is_contiguous()


EXTRA = "a weight of [64, 128] has the parts ['codes', 'scale'], got ['codes', 'grid', 'scale']"


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
        (randn(2, 128), QTensor(q.format, q.shape, parts | {"grid": torch.ones(1)}), EXTRA),
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
        print(loaded())
        qlib.kernels.matmul(torch.ones(1, 32), q)
        print(loaded(), hasattr(qlib.kernels, "__version__"))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n['numba'] False\n"
    with pytest.raises(AttributeError, match=r"^module 'qlib.kernels' has no attribute 'gemv'$"):
        kernels.gemv  # noqa: B018


@pytest.mark.parametrize("name", ["activations", "dispatch"])
def test_examples(name):
    """pytest finds doctests below qlib/ only, and would import these modules a second time."""
    found = doctest.testmod(importlib.import_module(f"qlib.kernels.{name}"))
    assert found.attempted > 0 == found.failed
