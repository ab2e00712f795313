"""LLM.int8(): codes, statistics and outliers bit for bit those of bitsandbytes, and its result."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import huggingface, raises, tiny_decoder, tokens

import qlib
from qlib.calibrate import Calibration
from qlib.files import bnb, quantized
from qlib.kernels import activations
from qlib.kernels.cpu.w8a8 import code_product
from qlib.kernels.dispatch import Product
from qlib.linear import QLinear, dequantized
from qlib.methods import llm_int8
from qlib.methods.llm_int8 import INT8, LLMInt8, columns, outlier_shares, quantize
from qlib.recipe import Recipe, quantize_model
from qlib.scheme import Scheme

RECIPE = Recipe(INT8, method=quantize, activations=LLMInt8())
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One factor of its CPU code is 1 / 127^2 with a digit missing: 6.200124e-05, not 6.2000124e-05.
SLIP = 6.200124e-05 * 127**2


def inputs(rows: int, width: int, seed: int = 0, outliers: int = 3) -> torch.Tensor:
    """Activations with a few channels in which some tokens exceed the threshold."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    large = torch.randperm(width, generator=generator)[:outliers]
    x[:, large] *= 8
    return x


def peer(x: torch.Tensor, threshold: float = 6.0):
    """(codes, row statistics, outlier columns) by bitsandbytes."""
    found = bitsandbytes.functional.int8_vectorwise_quant(x.to(torch.float16), threshold=threshold)
    return found[0], found[1], found[2] if found[2] is not None else torch.empty(0)


def signed(q: qlib.QTensor) -> torch.Tensor:
    return (q.parts["codes"] ^ 128).view(torch.int8)


def same(x: torch.Tensor, q: qlib.QTensor, outliers: torch.Tensor, threshold: float = 6.0) -> bool:
    codes, stats, theirs = peer(x.clone(), threshold)
    scale = stats.unsqueeze(1) * torch.tensor(1 / 127)
    parts = torch.equal(signed(q), codes) and torch.equal(q.parts["scale"], scale)
    return parts and outliers.tolist() == theirs.tolist()


# -- the codes of bitsandbytes ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 7), (33, 129), (64, 576)])
def test_codes_scales_and_outliers_are_those_of_bitsandbytes(shape, dtype):
    x = inputs(*shape).to(dtype)
    kept = x.clone()
    q, outliers = LLMInt8().split(x)
    assert torch.equal(x, kept)
    assert same(x, q, outliers)
    assert outliers.tolist() == LLMInt8().outliers(x).nonzero().flatten().tolist()
    # The twins: one bit of a code, and one scale by one unit in the last place.
    q.parts["codes"][-1, -1] ^= 1
    assert not same(x, q, outliers)
    q.parts["codes"][-1, -1] ^= 1
    q.parts["scale"] = q.parts["scale"].nextafter(torch.tensor(math.inf))
    assert not same(x, q, outliers)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.5, 20))
def test_codes_of_any_shape_and_threshold(rows, width, seed, threshold):
    x = inputs(rows, width, seed)
    assert same(x, *LLMInt8(threshold).split(x), threshold)


@pytest.mark.parametrize("value", [5.996, 6.0, -6.0, 5.9985])
def test_the_threshold_belongs_to_the_outliers_and_float16_decides(value):
    x = torch.full((3, 5), 0.5)
    x[1, 2] = value
    q, outliers = LLMInt8().split(x)
    assert same(x, q, outliers)
    # 5.9985 is 6 in float16.
    assert outliers.tolist() == ([] if value == 5.996 else [2])


def test_a_threshold_between_two_values_of_float16():
    x = inputs(4, 4, 595)
    assert same(x, *LLMInt8(6.119140625).split(x), 6.119140625)


def test_odd_rows():
    x = torch.zeros(6, 16)
    x[1] = 1e-9  # zero in float16
    x[2, 3] = 60000.0
    x[3] = torch.arange(16) - 7.5
    x[4, 5], x[5, 5] = 6e-8, 1e6  # the smallest float16; infinity in float16
    assert same(x, *LLMInt8().split(x))


def test_a_scale_counts_what_outlier_channels_hold_below_the_threshold():
    x = torch.tensor([[1.0, 5.0], [1.0, 9.0]])
    q, outliers = LLMInt8().split(x)
    assert outliers.tolist() == [1]
    assert (q.parts["scale"] * 127).flatten().tolist() == [5.0, 1.0]
    assert signed(q).tolist() == [[25, 0], [127, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_bitsandbytes(dtype):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(4)).to(dtype)
    # 63.5 steps, by a factor that is rounded itself.
    weight[:2] = 0
    weight[0, :2] = torch.tensor([2.0, 1.0]) * (135 / 128)
    theirs = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    stored = bnb.store(quantize(weight))
    assert torch.equal(stored["weight"], theirs.CB)
    assert torch.equal(stored["SCB"] * torch.tensor(1 / 127), theirs.SCB * torch.tensor(1 / 127))
    # The twin: to divide by the scale is not to multiply by its inverse.
    divided = signed(INT8.quantize(weight.half()))
    assert [0, 1] in (divided != theirs.CB).nonzero().tolist()


# -- the result ------------------------------------------------------------------------------------


def layers(dtype=torch.float32, threshold: float = 6.0, width: int = 160):
    """One layer by bitsandbytes and by us."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(72, width, generator=generator) * 0.1
    bias = torch.randn(72, generator=generator)
    theirs = bitsandbytes.nn.Linear8bitLt(
        width, 72, has_fp16_weights=False, threshold=threshold
    ).eval()
    theirs.load_state_dict({"weight": weight, "bias": bias})
    ours = QLinear(quantize(weight), bias, inputs=LLMInt8(threshold if threshold else math.inf))
    return theirs.to("cpu").to(dtype), ours.to(dtype)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_layer_computes_what_bitsandbytes_does(rows, threshold):
    theirs, ours = layers(threshold=threshold)
    x = inputs(rows, 160)
    expected, found = theirs(x.clone()).detach(), ours(x).detach()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    # But for the constant, to the rounding of float32.
    _, outliers = ours.inputs.split(x)
    full = x[:, outliers] @ ours.weight.dequantize()[:, outliers].T + ours.bias
    expected = (expected - full) / SLIP + full
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    # The twin: one code of the weight.
    ours.codes[5, 7] ^= 4
    assert not torch.allclose(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_sixteen_bits(dtype):
    theirs, ours = layers(dtype)
    x = inputs(9, 160).to(dtype)
    # Two roundings of the result: after the integer product, and after the outliers.
    step = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x.clone()).detach(), rtol=step, atol=step)


def test_sums_of_codes_are_exact():
    theirs, ours = layers()
    x = inputs(33, 160)
    q, _ = LLMInt8().split(x)
    weight = theirs.weight.CB
    expected = bitsandbytes.functional.int8_linear_matmul(signed(q), weight)
    found = code_product(signed(q), ours.codes)
    assert torch.equal(found.int(), expected)
    ours.codes[0, 0] ^= 1
    assert not torch.equal(code_product(signed(q), ours.codes).int(), expected)


@pytest.mark.parametrize("format", ["int8-row", "int8-tensor", "int4-g32", "nf4", "fp8_e4m3"])
def test_product_is_that_of_rounded_inputs(format):
    x, weight = inputs(17, 96), torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    q = qlib.quantize(weight, format)
    found = LLMInt8().product(x, Product(q))
    expected = LLMInt8().rounded(x) @ q.dequantize().T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found, x @ q.dequantize().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", ["int8-row", "int8-tensor", "fp8_e4m3", "int4-g32", "q8_0"])
def test_columns_are_those_of_the_dequantized_weight(format):
    q = qlib.quantize(torch.randn(24, 96, generator=torch.Generator().manual_seed(3)), format)
    which = torch.tensor([0, 17, 95])
    assert torch.equal(columns(q, which), q.dequantize()[:, which])
    assert not torch.equal(columns(q, which), q.dequantize()[:, which + torch.tensor([0, 0, -1])])


def test_outlier_columns_are_decoded_alone(monkeypatch):
    shapes, decode = [], Scheme.decode
    spy = lambda self, parts, shape: shapes.append(shape) or decode(self, parts, shape)  # noqa: E731
    monkeypatch.setattr(Scheme, "decode", spy)
    _, ours = layers()
    ours(inputs(33, 160))
    assert shapes == [(72, 3)]


def test_without_outliers_nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(llm_int8, "columns", None)
    _, ours = layers()
    x = inputs(4, 160, outliers=0)
    torch.testing.assert_close(ours(x), dequantized(ours)(x), rtol=1e-4, atol=1e-4)


def test_empty_inputs():
    _, ours = layers()
    assert ours(torch.empty(2, 0, 160)).shape == (2, 0, 72)
    x = torch.empty(0, 160, dtype=torch.float16)
    assert LLMInt8().rounded(x).shape == (0, 160)
    y = LLMInt8().product(x, Product(ours.weight))
    assert y.shape == (0, 72)
    assert LLMInt8().rounded(x).dtype is y.dtype is torch.float16


# -- whole models ----------------------------------------------------------------------------------


def layer_errors(model, theirs) -> list[float]:
    """How far each of our layers is from theirs on the inputs that theirs has.

    Of whole models, one code that lands elsewhere hides what is equal.
    """
    errors = []

    def compare(_, args, y, name):
        ours = model.get_submodule(name)(args[0])
        errors.append(((ours - y).norm() / y.norm()).item())

    handles = [
        layer.register_forward_hook(partial(compare, name=name))
        for name, layer in theirs.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt)
    ]
    with torch.no_grad():
        theirs(tokens(40).unsqueeze(0))
    for handle in handles:
        handle.remove()
    assert len(errors) == len([m for m in model.modules() if isinstance(m, QLinear)])
    return errors


def compare(model, theirs) -> None:
    assert max(layer_errors(model, theirs)) < 3e-5
    # The twin: with another threshold they part.
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.inputs = LLMInt8(1.0)
    assert max(layer_errors(model, theirs)) > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPTNeoX"])
def test_a_model_is_that_of_bitsandbytes(family):
    model, theirs = huggingface(family), huggingface(family)
    for name, old in qlib.recipe.decoder_linears(theirs).items():
        new = bitsandbytes.nn.Linear8bitLt(
            old.in_features, old.out_features, old.bias is not None, False, threshold=6.0
        )
        new.load_state_dict(old.state_dict())
        qlib.linear.replace_layer(theirs, name, new.to("cpu").eval())
    assert quantize_model(model, RECIPE, progress=False).bits_per_weight > 8
    compare(model, theirs)


def test_bitsandbytes_reads_the_file(tmp_path):
    import transformers

    model = tiny_decoder()
    quantize_model(model, RECIPE, progress=False)
    quantized.save(tmp_path, model, container="bitsandbytes")
    compare(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_outlier_shares():
    model, data = tiny_decoder(), Calibration.of(tokens(64), context=32)
    limit = LLMInt8(2.0)
    found = outlier_shares(model, data, limit)
    seen: dict[str, list] = {}
    for name, layer in qlib.recipe.decoder_linears(model).items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0])
        )
    for window in data.windows:
        model(window.unsqueeze(0))
    for name, calls in seen.items():
        shares = [(x.half().abs() >= 2).any(0).double().mean().item() for x in calls]
        assert found[name] == pytest.approx(sum(shares) / 2)
    assert found.keys() == seen.keys()
    assert 0 < max(found.values()) < 1
    assert max(outlier_shares(model, data, LLMInt8(math.inf)).values()) == 0
    hooks = [m._forward_pre_hooks for m in tiny_decoder().modules()]
    assert not any(hooks)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_thresholds_that_are_refused(threshold):
    message = f"threshold must be positive, got {threshold}"
    with raises(f"{message}; infinity leaves every channel in eight bits"):
        LLMInt8(threshold)


def test_nan_is_refused_and_infinity_is_an_outlier():
    x = inputs(4, 16)
    x[2, 3] = math.nan
    with raises("[4, 16]: 1 rows hold NaN or what float16 cannot"):
        LLMInt8().split(x)
    x[2, 3] = math.inf
    q, outliers = LLMInt8().split(x)
    assert 3 in outliers
    assert bool(q.dequantize().isfinite().all())
    with raises("[4, 16]: 1 rows hold NaN or what float16 cannot"):
        quantize(x)


def test_other_formats_are_refused():
    format = qlib.format("int4-g16")
    message = f"LLM.int8() keeps weights as {INT8}, got {format}; use method='rtn'"
    with raises(message):
        quantize(torch.ones(2, 16), format)


def test_what_it_says_of_itself():
    assert str(LLMInt8()) == "int8 for each token, channels from 6 at full width"
    assert LLMInt8().is_ready
    assert LLMInt8().observed(-1.0, 1.0) == LLMInt8()
    assert dataclasses.replace(LLMInt8(), threshold=5.0) != LLMInt8()
    assert re.fullmatch("int8, block row, absmax, scale float32", str(INT8))
    assert activations.multiplies_codes(quantize(torch.ones(2, 8)), quantize(torch.ones(3, 8)))
