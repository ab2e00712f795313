"""Quantized inputs: their values, the products of codes, ranges, and layers that have them."""

from __future__ import annotations

import copy
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CALIBRATED, raises, tiny_decoder, tokens

import qlib
from qlib.activations import Dynamic, inputs
from qlib.block import Block, Call, Stats
from qlib.kernels import activations
from qlib.kernels.dispatch import Product
from qlib.linear import DenseLinear, QLinear, dequantized, read_by
from qlib.qtensor import QTensor
from qlib.transform import Hadamard

INTEGERS = ["int8-row", "int8-tensor", "int8-g32", "int4-row", "int4-row-asym", "int4-g32-asym"]
FLOATS = ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3-tensor", "fp8_e5m2-g32"]
BLOCKS = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4"]
STATIC = ["int8-tensor-static", "int8-tensor-asym-static", "fp8_e4m3-tensor-static",
          "int4-tensor-static", "nvfp4-static"]  # fmt: skip
ALL = [*INTEGERS, *FLOATS, *BLOCKS, *STATIC]
FLOAT8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ready(name: str, low: float = -3.0, high: float = 4.0):
    return inputs(name).observed(low, high)


def numpy_rounded(x: np.ndarray, name: str) -> np.ndarray:
    """Integers and FP8 in blocks, computed again: the scale, the rounding, the way back."""
    kind, *rest = name.split("-")
    size = {"row": x.shape[1], "tensor": x.size}.get(rest[0] if rest else "row")
    blocks = x.reshape(-1, size or int(rest[0][1:]))
    amax = np.abs(blocks).max(1, keepdims=True)
    if kind.startswith("fp8"):
        dtype, top = FLOAT8[kind[4:]]
        scale = (amax / np.float32(top)).astype(np.float32)
        codes = torch.from_numpy(blocks / np.where(scale == 0, 1, scale)).to(dtype).float().numpy()
        return (codes * scale).reshape(x.shape)
    top = 2 ** (int(kind[3:]) - 1) - 1
    if "asym" in rest:
        low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
        scale = ((high - low) / (2 * top + 1)).astype(np.float16).astype(np.float32)[:, None]
        zero = np.round(-low[:, None] / np.where(scale == 0, 1, scale))
        codes = np.clip(np.round(blocks / np.where(scale == 0, 1, scale)) + zero, 0, 2 * top + 1)
        return ((codes - zero) * scale).reshape(x.shape)
    scale = (amax / np.float32(top)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(blocks / np.where(scale == 0, 1, scale)), -top - 1, top)
    return (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_those_of_numpy(name, dtype):
    x = randn(7, 96).to(dtype)
    x[2, 5], x[3] = 60, 0
    found = inputs(name).rounded(x)
    expected = torch.from_numpy(numpy_rounded(x.float().numpy(), name))
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    assert not torch.equal(inputs(name).rounded(x.roll(1, 0))[:4], expected.to(dtype)[:4])


def test_fp4_blocks_are_those_of_numpy():
    x = randn(5, 64)
    amax = x.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(amax)) - 2)
    units = (x.unflatten(1, (-1, 32)) / scale).numpy()
    # Ties go to the even mantissa; a Gaussian has none.
    nearest = E2M1[np.abs(np.abs(units)[..., None] - E2M1).argmin(-1)] * np.sign(units)
    expected = (torch.from_numpy(nearest).float() * scale).flatten(1)
    assert torch.equal(inputs("mxfp4").rounded(x), expected)
    assert not torch.equal(inputs("mxfp4-ceil").rounded(x), expected)


@pytest.mark.parametrize(("name", "low", "high"), [("int8-tensor", -2.0, 2.0),
                                                   ("int8-tensor-asym", -1.0, 3.0)])  # fmt: skip
def test_static_values_are_those_of_torch(name, low, high):
    x = 3 * randn(9, 40)
    top, bottom = (127, -128) if "asym" not in name else (255, 0)
    scale = (
        torch.tensor((high - low) / (top - bottom) if bottom == 0 else high / top).half().float()
    )
    zero = 0 if bottom else round(-low / scale.item())
    expected = torch.fake_quantize_per_tensor_affine(x, scale.item(), zero, bottom, top)
    static = ready(f"{name}-static", low, high)
    torch.testing.assert_close(static.rounded(x), expected, rtol=1e-6, atol=0)
    # What is beyond the range saturates, and other text has no say in the scale.
    assert static.rounded(x).max() <= high + scale
    assert torch.equal(static.rounded(x)[3], static.rounded(x[3:4])[0])
    other = ready(f"{name}-static", 2 * low, 2 * high).rounded(x)
    assert (other - expected).abs().max() > 0.5


def test_static_blocks_of_nvfp4_are_in_units_of_one_scale():
    x, static = randn(6, 64), ready("nvfp4-static", -2.0, 4.0)
    largest = 4.0 / 6 / 448
    scales = (x.unflatten(1, (-1, 16)).abs().amax(2) / 6 / largest).clamp(max=448)
    scales = scales.to(torch.float8_e4m3fn).float() * largest
    found = static.quantize(x)
    torch.testing.assert_close(found.format.read(found.parts, x.shape)[0], scales)
    row = static.quantize(x[:1]).parts
    assert torch.equal(row["codes"], found.parts["codes"][:1])
    # Dynamic ones take theirs from all the rows that there are.
    whole, one = (inputs("nvfp4").quantize(rows).parts for rows in (x, 9 * x[:1]))
    assert not torch.equal(whole["scale.scale"], one["scale.scale"])


@pytest.mark.parametrize("of_w", ["int8-row", "int4-g32", "fp8_e4m3", "mxfp4"])
@pytest.mark.parametrize("name", ALL)
def test_codes_and_rounded_values_give_the_same_product(name, of_w):
    x, w, chosen = randn(5, 128), qlib.quantize(randn(33, 128, seed=1), of_w), ready(name)
    left, right = chosen.rounded(x), w.dequantize()
    exact = left.double() @ right.double().T
    most = 2 * (left @ right.T - exact).abs().max() + 1e-6
    y = chosen.product(x, Product(w))
    assert (y - exact).abs().max() <= most
    codes = w.parts["codes"].clone()
    codes[0, 0] ^= 0x40
    wrong = QTensor(w.format, w.shape, {**w.parts, "codes": codes})
    assert (chosen.product(x, Product(wrong)) - exact).abs().max() > most
    assert (x.double() @ right.double().T - exact).abs().max() > most


def test_eight_bits_take_the_product_of_codes():
    w = qlib.quantize(randn(8, 64), "int8-row")
    for name in ("int8-row", "int8-tensor", "int8-tensor-static"):
        assert activations.multiplies_codes(ready(name).quantize(randn(3, 64)), w)
    assert not activations.multiplies_codes(ready("int8-g32").quantize(randn(3, 64)), w)
    assert not activations.multiplies_codes(ready("fp8_e4m3").quantize(randn(3, 64)), w)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(0, 99))
def test_small_integers_are_multiplied_exactly(rows, width, out, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-126, 127, (rows, width), generator=draw).float()
    w = torch.randint(-126, 127, (out, width), generator=draw).float()
    x[:, 0], w[:, 0] = 127, 127
    q = qlib.quantize(w, "int8-row")
    assert torch.equal(inputs("int8-row").product(x, Product(q)), x @ w.T)
    assert torch.equal(ready("int8-tensor-static", -127.0, 127.0).product(x, Product(q)), x @ w.T)


def layer(name: str | None, of_w: str = "int8-row") -> QLinear:
    chosen = None if name is None else ready(name)
    return QLinear(qlib.quantize(randn(24, 64, seed=2), of_w), randn(24, seed=3), None, chosen)


@pytest.mark.parametrize("name", ["int8-row", "int4-g32-asym", "nvfp4", "int8-tensor-static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer_computes_from_rounded_inputs(name, dtype):
    own, x = layer(name), randn(2, 3, 64).to(dtype)
    flat = own.inputs.rounded(x.view(6, 64)).double()
    exact = (flat @ own.weight.dequantize().double().T + own.bias.double()).view(2, 3, 24)
    most = 0.02 if dtype != torch.float32 else 1e-4
    assert own(x).dtype == dtype
    assert (own(x).double() - exact).abs().max() <= most * exact.abs().max()
    assert (layer(None)(x).double() - exact).abs().max() > (1e-3 if dtype == torch.float32 else 0)
    # The layer of dense weights does the same.
    dense = dequantized(own)
    assert isinstance(dense, DenseLinear)
    if dtype == torch.float32:
        torch.testing.assert_close(dense(x), own(x), rtol=1e-4, atol=1e-4)


def test_no_rows_and_one_row():
    for own in (layer("int8-row"), dequantized(layer("int8-row"))):
        assert own(torch.empty(0, 64)).shape == (0, 24)
        assert own(torch.empty(2, 0, 64)).shape == (2, 0, 24)
        x = randn(4, 64)
        torch.testing.assert_close(own(x[1]), own(x)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 64), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8-row", "int8-tensor-static", "mxfp4", "nvfp4-static"])
def test_no_rows_have_no_codes(name, dtype, shape):
    x, one = torch.empty(shape, dtype=dtype), ready(name)
    found = one.rounded(x)
    assert found.shape == shape
    assert found.dtype == dtype
    if shape[1]:
        y = one.product(x, Product(qlib.quantize(randn(24, 64), "int8-row")))
        assert y.shape == (0, 24)
        assert y.dtype == dtype


@pytest.mark.parametrize("given", [3, 8.0, ["int8-row"], object])
def test_what_is_no_kind_of_activations_is_refused(given):
    message = f"activations must be a name, a format or Inputs, got {given!r}"
    for call in (inputs, lambda given: qlib.Recipe(None, activations=given)):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call(given)
    assert inputs(None) is None
    one = inputs("int8-row")
    assert inputs(one) is one


def test_values_that_are_not_finite_are_refused():
    x = randn(3, 64)
    x[1, 2], x[2, 2] = torch.nan, torch.inf
    message = ("inputs [3, 64] hold 2 NaN or infinite values: a layer before this one overflows, "
               "so load the model in float32")  # fmt: skip
    for name in ("int8-row", "int8-tensor-static", "mxfp4"):
        with raises(message):
            layer(name)(x)
        with raises(message):
            dequantized(layer(name))(x)


@pytest.mark.parametrize("name", ["int8-row", "nvfp4"])
def test_the_gradient_passes_the_rounding(name):
    """Straight through: it is that of the layer with dequantized weights."""
    own, plain, x = layer(name), layer(None), randn(3, 64)
    gradients = []
    for one in (own, dequantized(own), dequantized(plain)):
        leaf = x.clone().requires_grad_()
        (one(leaf) * randn(3, 24, seed=5)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("name", ["int8-row", "mxfp4"])
def test_a_compiled_layer_computes_the_same(name):
    for own in (layer(name), dequantized(layer(name))):
        x = randn(3, 64).requires_grad_()
        compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.testing.assert_close(y, own(x), rtol=1e-5, atol=1e-5)
        assert (y - layer(None)(x)).abs().max() > 1e-3
        y.sum().backward()
        sums = dequantized(layer(None)).weight.sum(0)
        torch.testing.assert_close(x.grad, sums.expand(3, 64))


def test_copies_compute_the_same():
    own, x = layer("int8-tensor-static"), randn(3, 64)
    stream = io.BytesIO()
    torch.save(own, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(own), own.to("cpu"), torch.load(stream, weights_only=False)):
        assert copied.inputs == own.inputs
        assert torch.equal(copied(x), own(x))
    half = copy.deepcopy(own).to(torch.bfloat16)
    assert half.codes.dtype == torch.uint8
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert "static, -3 to 4" in repr(own)


def test_inputs_are_rounded_in_the_new_basis():
    turn, w, x = Hadamard(64), randn(24, 64, seed=2), randn(5, 64)
    x[:, 7] = 30
    q = qlib.quantize(turn.weight(w), "int8-row")
    turned = QLinear(q, None, turn, inputs("int4-row"))
    plain = QLinear(qlib.quantize(w, "int8-row"), None, None, inputs("int4-row"))
    assert torch.equal(read_by(turned, x), turn.input(x))
    errors = [(one(x) - x @ w.T).norm().item() for one in (turned, plain)]
    assert errors[0] < 0.5 * errors[1]
    dense = DenseLinear(torch.nn.Parameter(turn.weight(w)), None, turn)
    torch.testing.assert_close(dense(x), x @ w.T, rtol=1e-4, atol=1e-4)
    block = Block("b", torch.nn.Sequential(dense), [Call(x)])
    torch.testing.assert_close(block.stats()["0"].amax, turn.input(x).abs().amax(0))


def test_what_cannot_be_static_is_refused():
    message = "has scales for parts of the tensor; static inputs have one, as int8-tensor does"
    with raises(f"int8, block row, absmax, scale float16 {message}"):
        inputs("int8-row-static")
    with raises(f"e2m1, block 32, pow2_floor, scale e8m0 {message}"):
        inputs("mxfp4-static")
    with raises("static inputs have no range yet: calibrate, or use dynamic ones"):
        inputs("int8-tensor-static").rounded(randn(2, 8))
    with pytest.raises(ValueError, match=r"^unknown format 'int9-row'"):
        inputs("int9-row-static")
    assert inputs(None) is None
    assert inputs(qlib.format("nf4")) == Dynamic(qlib.format("nf4"))
    assert inputs(found := ready("int8-tensor-static")) is found


def test_statistics_average_the_ends_of_windows():
    parts = [randn(2, n, 6, seed=n) for n in (3, 1, 4)]
    merged = Stats.of(torch.empty(0, 6))
    for part in parts:
        merged.merge(Stats.of(part))
    merged.merge(Stats.of(torch.empty(0, 6)))
    windows = [window for part in parts for window in part]
    low, high = (sum(f(w).item() for w in windows) / 6 for f in (torch.min, torch.max))
    assert merged.ends == (pytest.approx(low), pytest.approx(high))
    every = torch.cat(windows)
    assert torch.equal(merged.amax, every.abs().amax(0))
    assert merged.ends[1] != pytest.approx(every.max().item())
    assert merged.tokens == 16


def calibration(n: int = 96):
    return qlib.Calibration.of(tokens(n), context=16)


def seen(model, data) -> dict[str, tuple[float, float]]:
    """The range of what every linear layer reads: ends of a window, averaged over the windows."""
    ends: dict[str, list[torch.Tensor]] = {}

    def see(name, x):
        ends.setdefault(name, []).append(torch.stack([x.min(), x.max()]))

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | QLinear)]
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: see(n, a[0])) for n, m in named]
    for window in data.windows:
        model(window.view(1, -1))
    for hook in hooks:
        hook.remove()
    means = {name: torch.stack(parts).mean(0) for name, parts in ends.items()}
    return {name: (low.item(), high.item()) for name, (low, high) in means.items()}


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
@pytest.mark.filterwarnings("ignore:.*calibration tokens for layers")
def test_static_ranges_are_those_of_all_calibration_windows(method):
    """The first layers read the same in every block: only the method's own scales change it."""
    model, data = tiny_decoder(), calibration()
    recipe = qlib.Recipe("int2-g16-asym", activations="int8-tensor-static")
    qlib.quantize_model(model, recipe, method, data, progress=False)
    static = {n: m.inputs for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert len(static) == 14
    for module in model.modules():
        if isinstance(module, QLinear):
            module.inputs = None
    ranges = seen(model, data)
    for name in ("q_proj", "k_proj", "v_proj"):
        found = static[f"model.layers.0.self_attn.{name}"]
        low, high = ranges[f"model.layers.0.self_attn.{name}"]
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    if method == "awq":
        fresh = tiny_decoder()
        low, high = seen(fresh, data)["model.layers.0.self_attn.q_proj"]
        assert abs(static["model.layers.0.self_attn.q_proj"].high / high - 1) > 1e-3


def test_static_activations_need_calibration():
    remedy = "data: pass calibration=token ids, for example qlib.Calibration.text(tokenizer)"
    with raises(f"ranges of static activations come from {remedy}"):
        qlib.quantize_model(tiny_decoder(), "w8a8-static", progress=False)
    with raises(f"method 'gptq' looks at {remedy}"):
        qlib.quantize_model(tiny_decoder(), "w8a8-static", "gptq", progress=False)


@pytest.mark.parametrize("family", ["own-tied", "llama", "qwen2", "gpt-neox", "gemma3"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "fp8", "llm.int8"])
def test_eight_bits_stay_near_the_model(family, recipe):
    model, ids = CALIBRATED[family](), tokens(16)[None]

    def logits():
        found = model(ids)
        return getattr(found, "logits", found)

    before = logits()
    report = qlib.quantize_model(model, recipe, calibration=calibration(), progress=False)
    error = ((logits() - before).norm() / before.norm()).item()
    assert 1e-4 < error < 0.35
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    assert layers
    assert all(m.inputs.is_ready for m in layers)
    assert f"({len(layers)} layers)" in str(report)
    for m in layers:
        m.inputs = ready("int2-tensor-static", -0.01, 0.01)
    assert ((logits() - before).norm() / before.norm()).item() > 2 * error


def test_a_layer_that_no_token_reaches_has_no_range():
    from torch import nn

    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, **_):
            return self.often(x) + self.never(x[:0]).sum()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.layers = nn.Embedding(61, 8), nn.ModuleList([Rare(), Rare()])

        def forward(self, ids, **_):
            x = self.embed(ids)
            for block in self.layers:
                x = block(x)
            return x

    run = {"calibration": calibration(), "progress": False}
    with raises("layers.0.never: no calibration token reaches this layer; give more text, or say "
                "unreached='keep' or unreached='rtn'"):  # fmt: skip
        qlib.quantize_model(Model(), "w8a8-static", **run)
    for unreached in ("keep", "rtn"):
        model = Model()
        report = qlib.quantize_model(model, "w8a8-static", unreached=unreached, **run)
        assert model.layers[1].often.inputs.is_ready
        assert getattr(model.layers[1].never, "inputs", None) is None
        assert report.unreached == ["layers.0.never", "layers.1.never"]
        assert model(tokens(5)[None]).isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5))
def test_static_ranges_saturate_and_keep_zero(a, b):
    low, high = min(a, b), max(a, b)
    for name in ("int8-tensor-static", "int8-tensor-asym-static", "fp8_e4m3-tensor-static"):
        static = ready(name, low, high)
        found = static.rounded(torch.tensor([[0.0, -100.0, 100.0]]))[0]
        most = max(abs(low), abs(high))
        assert found[0] == 0
        assert found.abs().max() <= 1.02 * most + 1e-4
