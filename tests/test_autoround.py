"""AutoRound: hand-written gradients, never above round-to-nearest, the stored values exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import CALIBRATED, VOCAB, huggingface, raises, tiny_decoder, tokens
from torch import Tensor, nn

from qlib import fit, grid
from qlib.block import Block, Call
from qlib.calibrate import Calibration, calibrated_blocks
from qlib.columns import Columns
from qlib.double import DoubleQuant
from qlib.linear import QLinear
from qlib.methods import Method
from qlib.methods.autoround import CLIP, Rounding, autoround
from qlib.presets import NAMED
from qlib.presets import format as named
from qlib.qtensor import QTensor
from qlib.recipe import quantize_model
from qlib.scheme import Scheme

SUPERBLOCK = Scheme(grid.GRIDS["uint6"], 8, fit.absmax)
INTEGERS = (
    *("int4-g16", "int4-g16-asym", "int3-g16-asym-mse", "int2-g7-asym", "int4-g16-offset"),
    *("int8-row", "int3-row-asym", "int4-tensor", "int2-tensor-asym", "int1-g8", "int1-g8-asym"),
)
SCHEMES = {name: format for name, format in NAMED.items() if isinstance(format, Scheme)}
FORMATS = {name: named(name) for name in INTEGERS} | SCHEMES | {
    "superblock": Scheme(grid.int_grid(4), 8, fit.absmax, scale=SUPERBLOCK),
    "superblock-offset": Scheme(
        grid.GRIDS["uint4"], 8, fit.minmax, scale=SUPERBLOCK,
        offset=Scheme(grid.int_grid(6), 8, fit.absmax),
    ),
    "signed-extreme": Scheme(grid.int_grid(4), 8, fit.absmax_signed),
    "learned": Scheme(grid.Grid("own", torch.tensor([-1.0, -0.3, 0.0, 0.25, 0.9])), 8, fit.absmax),
}  # fmt: skip


def odd_weight(seed: int = 0) -> Tensor:
    """[24, 50] with a row of zeros, an outlier, and a tail in blocks of any even size."""
    weight = torch.randn(24, 50, generator=torch.Generator().manual_seed(seed))
    weight[3], weight[5, 7] = 0, 30
    return weight


def wander(layer: Rounding, steps: int = 8) -> None:
    """Move all that is learned by random gradients, away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        value = layer.quantize()
        layer.move(torch.randn(value.shape, generator=generator), 0.06, 0.05)


# -- the stored values ----------------------------------------------------------------------------


# bitsandbytes rounds the weights under scales that it then rounds too.
PLAIN = [name for name, one in FORMATS.items() if not isinstance(one.scale, DoubleQuant)]


@pytest.mark.parametrize("name", PLAIN)
def test_before_the_first_step_it_is_rounding_to_nearest(name):
    format, weight = FORMATS[name], odd_weight()
    layer, expected = Rounding(weight, format), format.quantize(weight).dequantize()
    assert torch.equal(layer.quantize(), expected)
    assert torch.equal(layer.qtensor().dequantize(), expected)
    wander(layer)
    assert not torch.equal(layer.quantize(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_loss_sees_exactly_what_is_stored(name):
    format = FORMATS[name]
    layer = Rounding(odd_weight(), format)
    wander(layer)
    stored = layer.qtensor()
    assert torch.equal(stored.dequantize(), layer.quantize())
    shapes = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.parts.items()}
    assert list(shapes.items()) == list(format.layout((24, 50)).items())
    codes = stored.parts["codes"].clone()
    codes[0, 0] ^= 1
    broken = QTensor(format, stored.shape, stored.parts | {"codes": codes})
    assert not torch.equal(broken.dequantize(), layer.quantize())


@pytest.mark.parametrize("name", ["int4-g16", "int4-g16-asym", "nf4", "int1-g8"])
def test_a_shift_reaches_both_neighbors(name):
    format, weight = FORMATS[name], torch.linspace(-1, 1, 64).repeat(2, 1)[:, 1:-1]
    points = format.grid.points.sort().values
    places = {}
    for shift in (-0.499, 0.0, 0.499):
        layer = Rounding(weight, format)
        layer.shift += shift
        _, scale, offset = layer.stored()
        places[shift] = torch.searchsorted(points, format.grid.decode(layer.codes(scale, offset)))
    down, nearest, up = places.values()
    # On an uneven grid half of a wide gap may lead past a narrow one.
    assert bool(((up - down >= 0) & (up - down <= (1 if name != "nf4" else 2))).all())
    assert bool(((down <= nearest) & (nearest <= up)).all())
    assert bool((up - down == 1).float().mean() >= 0.5)


def test_clip_factors_stay_between_half_and_one():
    layer = Rounding(odd_weight(), FORMATS["int4-g16-asym"])
    for _ in range(3):
        layer.move(torch.randn_like(layer.quantize()), 0.4, 0.4)
    assert (layer.clip.min(), layer.clip.max()) == CLIP
    assert (layer.shift.min(), layer.shift.max()) == (-0.5, 0.5)


# -- the gradients --------------------------------------------------------------------------------


def through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value `rounded` with the gradient of `exact`: the straight-through estimator."""
    return exact + (rounded - exact).detach()


def oracle(layer: Rounding, shift: Tensor, factors: Tensor) -> Tensor:
    """The fake quantizer of the paper in ordinary differentiable code, block by block."""
    format, weight = layer.format, format_rows(layer)
    low, high = format.grid.min, format.grid.max
    fitted, base = format.fit_blocks(weight)
    start = torch.zeros_like(fitted) if base is None else base
    ends = (start + low * fitted) * factors[0], (start + high * fitted) * factors[-1]
    scale = (ends[1] - ends[0]) / (high - low)
    base = ends[0] - low * scale
    kept, place = format.read(
        format.store(scale.detach(), None if format.offset is None else base.detach()), layer.shape
    )
    stored = torch.zeros_like(kept) if place is None else place
    if isinstance(format.offset, grid.Grid):
        stored = -stored * kept
    scale, base = through(scale, kept), through(base, stored)
    size = layer.weight.shape[2]
    columns = [
        column(weight[:, i], shift[:, i], scale[:, i // size], base[:, i // size], format.grid)
        for i in range(weight.shape[1])
    ]
    return torch.stack(columns, dim=1)


def format_rows(layer: Rounding) -> Tensor:
    columns = layer.shape[1]
    return layer.weight.flatten(1)[:, :columns].clone()


def column(w: Tensor, v: Tensor, scale: Tensor, base: Tensor, points: grid.Grid) -> Tensor:
    x = (w - base) / scale
    clipped = x.clamp(points.min, points.max)
    v = torch.where(x == clipped, v, v.detach())
    moved = clipped + v
    return scale * through(moved, points.decode(points.round(moved))) + base


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    "name", ["int4-g16", "int4-g16-asym", "int2-g7-asym", "int4-g16-offset", "int3-row-asym"]
)
def test_gradients_are_those_of_autograd(name, broken):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 50, generator=generator)
    layer = Rounding(weight, FORMATS[name])
    layer.shift.uniform_(-0.4, 0.4, generator=generator)
    layer.clip.uniform_(0.6, 0.9, generator=generator)
    shift = layer.shift.flatten(1)[:, :50].clone().requires_grad_()
    factors = layer.clip.clone().requires_grad_()
    gradient = torch.randn(6, 50, generator=generator)
    value = oracle(layer, shift, factors)
    torch.testing.assert_close(value.detach(), layer.quantize(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(value, [shift, factors], gradient)
    if broken:
        layer.last = (layer.last[0], layer.last[1], layer.last[2] + 0.3)
    by_shift, by_clip = layer.gradients(gradient)
    close = [
        torch.allclose(by_shift.flatten(1)[:, :50], expected[0], rtol=1e-3, atol=1e-4),
        torch.allclose(by_clip, expected[1], rtol=1e-3, atol=1e-3),
    ]
    assert all(close) is not broken
    # A step goes down: the hand-written gradient has the sign that it should have.
    assert bool((by_shift.flatten(1)[:, :50].sign() == expected[0].sign()).all()) is not broken


def test_the_tail_of_a_row_gets_no_gradient():
    layer = Rounding(odd_weight(), FORMATS["int2-g7-asym"])
    wander(layer)
    assert layer.shift.shape == (24, 8, 7)
    assert bool((layer.shift[:, -1, 1:] == 0).all())
    assert bool((layer.shift[:2, -1, :1] != 0).all())


# -- the optimum, by brute force ------------------------------------------------------------------


def one_layer(out: int = 12, columns: int = 8, seed: int = 0) -> Block:
    """A block that is one linear layer, with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, out, bias=False).requires_grad_(False)
    layer.weight.data = torch.randn(out, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    calls = [Call(torch.randn(2, 40, columns, generator=generator) @ mix) for _ in range(3)]
    return Block("one", nn.Sequential(layer), calls)


def squared_error(block: Block, tensors: dict[str, QTensor]) -> float:
    """The block's output error, from its definition: new weights in a real forward pass."""
    before = [x.float() for x in block.targets or block.outputs()]
    originals = {name: block.linears[name].weight for name in tensors}
    for name, q in tensors.items():
        value = q.dequantize().to(originals[name].dtype)
        block.linears[name].weight = nn.Parameter(value, requires_grad=False)
    after = [block.run(call).float() for call in block.calls]
    for name, weight in originals.items():
        block.linears[name].weight = weight
    return sum((b - a).square().sum().item() for a, b in zip(before, after))


def nearest(block: Block, formats: dict[str, Scheme]) -> dict[str, QTensor]:
    return {name: f.quantize(block.linears[name].weight) for name, f in formats.items()}


def best_rounding(block: Block, format: Scheme) -> float:
    """The least error of all ways to round each row up or down, under the scales of `nearest`."""
    weight = block.linears["0"].weight
    q = format.quantize(weight)
    scale, zero = format.read(q.parts, weight.shape)
    floor = torch.floor(weight / scale)
    x = torch.cat([call.hidden.flatten(0, 1) for call in block.calls])
    total = 0.0
    for row, lowest, s, z in zip(weight, floor, scale, zero):
        ups = torch.tensor([*itertools.product((0, 1), repeat=len(row))])
        values = ((lowest + ups + z).clamp(format.grid.min, format.grid.max) - z) * s
        total += ((row - values) @ x.T).square().sum(1).min().item()
    return total


def test_between_the_optimum_and_rounding_to_nearest():
    block, format = one_layer(), named("int2-row-asym")
    rtn = squared_error(block, nearest(block, {"0": format}))
    optimum = best_rounding(block, format)
    learned = squared_error(block, autoround(block, {"0": format}, steps=200, ranges=False))
    assert optimum <= learned < 0.95 * rtn


def test_a_step_that_is_good_on_its_own_window_only():
    """Windows that have nothing in common: what helps one of them hurts the others."""
    layer = nn.Linear(6, 8, bias=False).requires_grad_(False)
    layer.weight.data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    windows = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    block = Block("one", nn.Sequential(layer), [Call(windows.view(6, 1, 6))])
    formats = {"0": named("int2-row-asym")}
    rtn = squared_error(block, nearest(block, formats))
    for seed in range(20):
        found = autoround(block, formats, steps=6, learning_rate=0.3, batch=1, seed=seed)
        assert squared_error(block, found) <= rtn * (1 + 1e-5)


# -- whole blocks ---------------------------------------------------------------------------------


def first_block(model: nn.Module, batch: int | None = None, text: Tensor | None = None) -> Block:
    calibration = Calibration.of(tokens(70) if text is None else text, context=12)
    return next(calibrated_blocks(model, calibration, batch))


def everywhere(block: Block, name: str) -> dict[str, Scheme]:
    return {layer: FORMATS.get(name) or named(name) for layer in block.linears}


@pytest.mark.parametrize("name", CALIBRATED)
def test_below_rounding_to_nearest_on_every_architecture(name):
    block = first_block(CALIBRATED[name]())
    formats = everywhere(block, "int3-g20-asym")
    learned = squared_error(block, autoround(block, formats, steps=40))
    assert learned < 0.8 * squared_error(block, nearest(block, formats))


@pytest.mark.parametrize("name", FORMATS)
def test_never_above_rounding_to_nearest_in_any_format(name):
    block = first_block(tiny_decoder())
    formats = everywhere(block, name)
    learned, rtn = autoround(block, formats, steps=4), nearest(block, formats)
    assert squared_error(block, learned) <= squared_error(block, rtn) * (1 + 1e-5)


def test_later_blocks_make_up_for_earlier_ones():
    """Their inputs come from a quantized block, their targets from the original model."""
    text = Calibration.of(tokens(70), context=12)
    blocks = calibrated_blocks(tiny_decoder(), text, targets=True)
    for layer in next(blocks).linears.values():
        layer.weight += 0.02 * torch.randn(layer.weight.shape, generator=torch.manual_seed(0))
    block = next(blocks)
    formats = everywhere(block, "int3-g16-asym")
    found, rtn = autoround(block, formats, steps=40), nearest(block, formats)
    assert squared_error(block, found) < 0.9 * squared_error(block, rtn)
    own = Block(block.name, block.module, block.calls)
    assert squared_error(block, found) < squared_error(block, autoround(own, formats, steps=40))


def test_steps_that_lead_astray_end_in_rounding_to_nearest():
    block = first_block(tiny_decoder())
    formats = everywhere(block, "int4-g16-asym")
    lost = autoround(block, formats, steps=2, learning_rate=100.0)
    expected = nearest(block, formats)
    assert all(lost[name].tobytes() == q.tobytes() for name, q in expected.items())
    # And indeed they would lead astray.
    layers = {name: Rounding(block.linears[name].weight, f) for name, f in formats.items()}
    for layer in layers.values():
        layer.move(torch.randn_like(layer.quantize()), 100.0, 100.0)
    astray = {name: layer.qtensor() for name, layer in layers.items()}
    assert squared_error(block, astray) > squared_error(block, expected)


def test_without_ranges_the_scales_are_those_of_rounding_to_nearest():
    block = first_block(tiny_decoder())
    formats = everywhere(block, "int3-g16-asym")
    rtn = nearest(block, formats)
    fixed, free = (autoround(block, formats, 40, ranges=ranges) for ranges in (False, True))
    for name, q in rtn.items():
        assert torch.equal(fixed[name].parts["scale"], q.parts["scale"])
        assert torch.equal(fixed[name].parts["zero_point"], q.parts["zero_point"])
        assert not torch.equal(fixed[name].parts["codes"], q.parts["codes"])
        assert not torch.equal(free[name].parts["scale"], q.parts["scale"])
    errors = [squared_error(block, found) for found in (free, fixed, rtn)]
    assert errors == sorted(errors)


def test_only_the_layers_asked_for():
    block = first_block(tiny_decoder())
    found = autoround(
        block, {"mlp.up_proj": named("int2-g16"), "self_attn.q_proj": named("nf4")}, 3
    )
    assert {name: q.format for name, q in found.items()} == {
        "mlp.up_proj": named("int2-g16"),
        "self_attn.q_proj": named("nf4"),
    }


@pytest.mark.parametrize("name", ["own-tied", "gpt-neox", "gemma2"])
def test_how_windows_are_batched_does_not_matter(name):
    model = CALIBRATED[name]()
    found = [
        autoround(block, everywhere(block, "int3-g16-asym"), steps=20)
        for block in (first_block(model, batch) for batch in (1, 2, 5))
    ]
    for layer, q in found[0].items():
        assert all(q.tobytes() == other[layer].tobytes() for other in found[1:])
    other = first_block(model, None, tokens(70, seed=1))
    other = autoround(other, everywhere(other, "int3-g16-asym"), steps=20)
    assert any(q.tobytes() != other[layer].tobytes() for layer, q in found[0].items())


@pytest.mark.parametrize("name", ["own-tied", "gemma2"])
def test_a_batch_as_large_as_a_window_is_cut_rightly(name):
    """Rotation tables [time, features] look like a batch then."""
    model, text = CALIBRATED[name](), Calibration.of(tokens(64), context=8)
    blocks = [next(calibrated_blocks(model, text, batch)) for batch in (1, 8)]
    assert blocks[1].calls[0].hidden.shape[:2] == (8, 8)
    one, many = (autoround(b, everywhere(b, "int3-g16-asym"), steps=20) for b in blocks)
    assert all(one[layer].tobytes() == many[layer].tobytes() for layer in one)
    rtn = nearest(blocks[0], everywhere(blocks[0], "int3-g16-asym"))
    assert any(one[layer].tobytes() != rtn[layer].tobytes() for layer in one)


def test_a_seed_decides_everything():
    block = first_block(tiny_decoder())
    formats = everywhere(block, "int3-g16-asym")
    state = torch.get_rng_state()
    one, again, other = (autoround(block, formats, 20, seed=seed) for seed in (0, 0, 1))
    assert all(one[name].tobytes() == again[name].tobytes() for name in one)
    assert any(one[name].tobytes() != other[name].tobytes() for name in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ranges", [True, False])
def test_the_rate_falls_linearly(monkeypatch, ranges):
    block, rates = one_layer(), []
    monkeypatch.setattr(Rounding, "move", lambda _, gradient, *pair: rates.append(pair))
    autoround(block, {"0": named("int4-row")}, steps=4, ranges=ranges)
    autoround(block, {"0": named("int4-row")}, steps=2, learning_rate=0.5, ranges=ranges)
    falling = (0.25, 0.1875, 0.125, 0.0625, 0.5, 0.25)
    assert rates == [(rate, rate if ranges else 0.0) for rate in falling]


def test_the_block_is_not_changed():
    model = tiny_decoder().requires_grad_(True)
    block = first_block(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = autoround(block, everywhere(block, "int3-g16-asym"), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(part.requires_grad for q in found.values() for part in q.parts.values())


def test_bfloat16_blocks():
    block = first_block(tiny_decoder().bfloat16())
    formats = everywhere(block, "int3-g16-asym")
    learned = squared_error(block, autoround(block, formats, steps=20))
    assert learned < squared_error(block, nearest(block, formats))


class Experts(nn.Module):
    """Two experts: positive tokens go to the first, negative ones to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        first = x[..., :1] > 0
        if bool(first.all()):
            return (self.experts[0](x),)
        return (torch.where(first, self.experts[0](x), self.experts[1](x)),)


def test_an_expert_that_a_step_does_not_reach():
    torch.manual_seed(0)
    module, hidden = Experts().requires_grad_(False), torch.randn(4, 20, 4) @ torch.randn(4, 32)
    hidden[..., 0] = hidden[..., 0].abs() * torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None]
    formats = {f"experts.{i}": named("int2-row-asym") for i in range(2)}
    both = Block("b", module, [Call(hidden)])
    found = autoround(both, formats, steps=30, batch=1)
    assert squared_error(both, found) < 0.8 * squared_error(both, nearest(both, formats))
    only = Block("b", module, [Call(hidden[:3])])
    found, rtn = autoround(only, formats, steps=30, batch=1), nearest(only, formats)
    assert torch.equal(found["experts.1"].dequantize(), rtn["experts.1"].dequantize())
    assert not torch.equal(found["experts.0"].dequantize(), rtn["experts.0"].dequantize())


# -- as a method of quantize_model ----------------------------------------------------------------


def test_a_whole_model(capsys):
    method = Method("autoround", lambda block, formats: autoround(block, formats, 8), "block")
    model, text = huggingface("Qwen2"), Calibration.of(tokens(70), context=12)
    report = quantize_model(model, "int3-g16-asym", method, text, progress=False)
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    assert len(layers) == len(report.layers) == 14
    assert capsys.readouterr().err == ""
    assert model(tokens(9)[None]).logits.shape == (1, 9, VOCAB)


# -- errors ---------------------------------------------------------------------------------------


def test_errors():
    block = first_block(tiny_decoder())
    formats = everywhere(block, "int4-g16")
    with raises("need steps >= 1 and batch >= 1, got steps=0, batch=4"):
        autoround(block, formats, steps=0)
    with raises("need steps >= 1 and batch >= 1, got steps=5, batch=0"):
        autoround(block, formats, steps=5, batch=0)
    columns = Columns(named("int4-g16"))
    with raises(f"self_attn.q_proj: autoround needs a Scheme, got {columns}; use method='rtn'"):
        autoround(block, {"self_attn.q_proj": columns})
    with raises("autoround needs calibration: calibrated_blocks(model, calibration)"):
        autoround(Block(block.name, block.module), formats)
    call = block.calls[0]
    broken = Call(call.hidden.clone(), call.args, call.kwargs)
    broken.hidden[0, 0, 0] = torch.inf
    with raises("the block's output on the calibration text is not finite"):
        autoround(Block(block.name, block.module, [broken]), formats)
    model = tiny_decoder()
    block = first_block(model)
    block.linears["mlp.up_proj"].weight[3, 4] = torch.nan
    with raises("weight [48, 32] holds 1 NaN or infinite values; repair them first"):
        autoround(block, {"mlp.up_proj": named("int4-g16")})
