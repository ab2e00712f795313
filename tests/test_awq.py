"""AWQ: never above round-to-nearest, the same in batches of any size, nothing kept aside."""

from __future__ import annotations

import copy
import itertools
import re
import sys

import pytest
import torch
from gptq_problems import losses, problem
from tiny_models import CALIBRATED, huggingface, raises, tokens, uneven

from qlib.block import Stats
from qlib.calibrate import Calibration, calibrated_blocks
from qlib.columns import Columns
from qlib.fold import folds
from qlib.linear import QLinear, dequantized, replace_layer
from qlib.methods.awq import awq, clip_ranges, output_error, search_scales
from qlib.presets import format as named

FORMATS = ["int4-g16-asym", "int3-g8", "int2-row-asym", "mxfp4", "nvfp4", "int4-tensor"]
SHRINKS = torch.linspace(1.0, 0.5, 20).tolist()
FOLDED = [name for name in CALIBRATED if name != "gpt-neox"]


def first_block(name: str = "own-tied", batch: int | None = None):
    calibration = Calibration.of(tokens(200), context=32)
    return next(calibrated_blocks(uneven(name), calibration, batch))


def formats_of(block, name: str = "int3-g16-asym") -> dict:
    return dict.fromkeys(block.linears, named(name))


def seen_by(block) -> dict[str, torch.Tensor]:
    """What every linear layer of the block reads, [tokens, in] in float64."""
    seen: dict[str, list] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in block.linears.items()
    ]
    for call in block.calls:
        block.run(call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() for name, found in seen.items()}


@pytest.fixture
def search(monkeypatch):
    """The scales that awq has chosen, by producer."""
    chosen = {}

    def spy(fold, *args):
        chosen[fold.producer] = (fold, search_scales(fold, *args))
        return chosen[fold.producer][1]

    monkeypatch.setattr(sys.modules["qlib.methods.awq"], "search_scales", spy)
    return chosen


def error_of(x, weight, approximation) -> float:
    """Summed squared output error over all tokens, token by token in float64."""
    return (x @ (weight.double() - approximation.double()).T).square().sum().item()


# -- the scale search ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDED)
def test_no_fold_is_worse_than_round_to_nearest(name):
    block = first_block(name)
    x, stats, found = seen_by(block), block.stats(), folds(block)
    assert {layer for fold in found for layer in fold.consumers} == block.linears.keys()
    for fold, format_name in itertools.product(found, FORMATS):
        formats = formats_of(block, format_name)
        scales = search_scales(fold, formats, stats[fold.consumers[0]], grid=5)
        columns = scales[fold.columns]
        rtn = scaled = 0.0
        for layer in fold.consumers:
            weight, format = block.linears[layer].weight, formats[layer]
            rtn += error_of(x[layer], weight, format.quantize(weight).dequantize())
            rounded = format.quantize(weight * columns).dequantize() / columns
            scaled += error_of(x[layer], weight, rounded)
        assert scaled <= rtn * (1 + 1e-5)


@pytest.mark.parametrize("name", ["own-tied", "gemma2"])
@pytest.mark.parametrize("format_name", ["int4-g16-asym", "int2-row"])
def test_no_layer_group_is_worse_in_the_end(name, format_name, search):
    block = first_block(name)
    x, formats = seen_by(block), formats_of(block, format_name)
    weights = {layer: linear.weight.clone() for layer, linear in block.linears.items()}
    tensors = awq(block, formats)
    for fold, _ in search.values():
        rtn = found = 0.0
        for layer in fold.consumers:
            rounded = formats[layer].quantize(weights[layer]).dequantize()
            # Undo both foldings: that of the columns, and that of the rows of v and up.
            unscaled = tensors[layer].dequantize() * weights[layer] / block.linears[layer].weight
            rtn += error_of(x[layer], weights[layer], rounded)
            found += error_of(x[layer], weights[layer], unscaled)
        assert found <= rtn * 1.001


@pytest.mark.parametrize("name", ["own-tied", "gemma2", "qwen2"])
def test_the_search_finds_the_best_exponent(name):
    block = first_block(name)
    x, stats, formats = seen_by(block), block.stats(), formats_of(block)
    for fold in folds(block):
        first = fold.consumers[0]
        found = search_scales(fold, formats, stats[first], grid=10)
        # By hand: the mean over tokens and over the columns that read a channel.
        mean = torch.zeros(fold.channels).double()
        for channel in range(fold.channels):
            mean[channel] = x[first][:, fold.columns == channel].abs().mean()
        candidates = [mean.clamp(min=1e-4) ** (step / 10) for step in range(10)]
        candidates = [s / (s.max() * s.min()).sqrt() for s in candidates]
        errors = []
        for s in candidates:
            columns = s[fold.columns]
            total = 0.0
            for n in fold.consumers:
                w = block.linears[n].weight.double()
                q = formats[n].quantize(w * columns).dequantize().double() / columns
                total += error_of(x[n], w, q)
            errors.append(total)
        best = min(range(10), key=errors.__getitem__)
        torch.testing.assert_close(found.double(), candidates[best], rtol=1e-4, atol=0)
        assert errors[best] < errors[0] or best == 0


def test_the_search_finds_something(search):
    """The twin of the test above: had it always answered "no scaling", this would fail."""
    awq(first_block(), formats_of(first_block()))
    assert any(scales.max() / scales.min() > 1.5 for _, scales in search.values())


@pytest.mark.parametrize(
    ("name", "clip"),
    [*((name, False) for name in CALIBRATED), ("own-tied", True), ("gemma2", True)],
)
@pytest.mark.filterwarnings("ignore:awq cannot rescale")
def test_scales_do_not_depend_on_the_batch_size(name, clip, search):
    # 6 windows of 32 and one of 8 tokens: a batch of 32 windows holds all that are equally long.
    chosen, tensors = [], []
    for batch in (1, 32):
        block = first_block(name, batch)
        assert len(block.calls) == {1: 7, 32: 2}[batch]
        tensors.append(awq(block, formats_of(block), clip))
        chosen.append({producer: scales for producer, (_, scales) in search.items()})
    for producer, scales in chosen[0].items():
        torch.testing.assert_close(scales, chosen[1][producer], rtol=1e-4, atol=0)
    for layer, q in tensors[0].items():
        other = tensors[1][layer].dequantize()
        torch.testing.assert_close(q.dequantize(), other, rtol=2e-3, atol=1e-5)


def test_a_lost_window_changes_the_scales(search):
    chosen = []
    for windows in (6, 7):
        block = first_block(batch=1)
        block.calls = block.calls[:windows]
        awq(block, formats_of(block))
        chosen.append({producer: scales for producer, (_, scales) in search.items()})
    changes = [(chosen[0][p] / chosen[1][p]).log().abs().max().item() for p in chosen[0]]
    assert max(changes) > 1e-3


def planted(size: float) -> tuple:
    """A block whose MLP reads one channel that is `size` times as large as it was."""
    block = first_block()
    norm = block.module.post_attention_layernorm.weight
    norm.data = torch.ones_like(norm)
    norm.data[5] *= size
    return block, 5


def test_a_salient_channel_is_scaled_up_and_its_error_falls(search):
    block, channel = planted(30.0)
    x, layer = seen_by(block)["mlp.gate_proj"], block.linears["mlp.gate_proj"]
    weight, formats = layer.weight.clone(), formats_of(block)
    before = (weight - formats["mlp.gate_proj"].quantize(weight).dequantize())[:, channel]
    q = awq(block, formats)["mlp.gate_proj"]
    scales = search["post_attention_layernorm"][1]
    assert scales[channel] > 1.5
    assert scales.argmax() == channel
    after = (weight - q.dequantize() / scales)[:, channel]
    assert after.norm() < 0.7 * before.norm()
    # The norm carries the rest of it.
    read = seen_by(block)["mlp.gate_proj"]
    torch.testing.assert_close(read * scales.double(), x, rtol=1e-3, atol=1e-5)


def test_without_the_planted_channel_it_is_one_of_many(search):
    block, channel = planted(1.0)
    awq(block, formats_of(block))
    assert search["post_attention_layernorm"][1].argmax() != channel


# -- the whole method ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDED)
def test_the_block_computes_what_it_did_before_it_is_rounded(name, search):
    block = first_block(name)
    before = torch.cat([block.run(call).flatten(0, 1) for call in block.calls])
    awq(block, formats_of(block))
    after = torch.cat([block.run(call).flatten(0, 1) for call in block.calls])
    assert any((scales != 1).any() for _, scales in search.values())
    assert ((after - before).norm() / before.norm()).item() < 1e-5


@pytest.mark.parametrize("clip", [False, True])
def test_every_layer_has_its_format_and_nothing_is_kept_aside(clip):
    block = first_block()
    names = itertools.cycle(["int4-g16-asym", "int3-g8", "int8-row", "nf4"])
    formats = {layer: named(name) for layer, name in zip(block.linears, names)}
    keys = {key: value.shape for key, value in block.module.state_dict().items()}
    tensors = awq(block, formats, clip)
    assert tensors.keys() == block.linears.keys()
    for layer, q in tensors.items():
        assert q.format == formats[layer]
        assert q.nbytes == formats[layer].nbytes(block.linears[layer].weight.shape)
    assert {key: value.shape for key, value in block.module.state_dict().items()} == keys


def test_codes_are_those_of_the_scaled_weights():
    block = first_block()
    formats = formats_of(block)
    for layer, q in awq(block, formats).items():
        again = formats[layer].quantize(block.linears[layer].weight)
        assert all(torch.equal(part, again.parts[name]) for name, part in q.parts.items())


@pytest.mark.parametrize("clip", [False, True])
def test_quantized_model_equals_its_dequantized_twin(clip):
    model, ids = uneven(), tokens(200)
    prompt = ids[:32].unsqueeze(0)
    original, gains = model(prompt), model.model.layers[0].input_layernorm.weight.data
    for block in calibrated_blocks(model, Calibration.of(ids, context=32)):
        for layer, q in awq(block, formats_of(block, "int8-g16-asym"), clip).items():
            replace_layer(block.module, layer, QLinear(q))
    logits = model(prompt)
    assert (logits - original).norm() / original.norm() < 0.05
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, QLinear):
            replace_layer(twin, name, dequantized(layer))
    torch.testing.assert_close(twin(prompt), logits, rtol=1e-4, atol=1e-4)
    # The norms carry 1/s: without it the quantized layers do not fit.
    twin.model.layers[0].input_layernorm.weight.data = gains
    assert (twin(prompt) - logits).norm() / logits.norm() > 0.05


def test_layers_without_a_format_are_left_alone():
    block = first_block()
    weights = {key: value.clone() for key, value in block.module.state_dict().items()}
    tensors = awq(block, {"mlp.down_proj": named("int3-g16")})
    assert list(tensors) == ["mlp.down_proj"]
    changed = {k for k, v in block.module.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}


def test_a_reader_that_is_not_quantized_is_rescaled_with_the_others(search):
    block = first_block()
    before = torch.cat([block.run(call).flatten(0, 1) for call in block.calls])
    formats = formats_of(block)
    del formats["self_attn.v_proj"]
    assert awq(block, formats).keys() == formats.keys()
    after = torch.cat([block.run(call).flatten(0, 1) for call in block.calls])
    assert (search["input_layernorm"][1] != 1).any()
    assert ((after - before).norm() / before.norm()).item() < 1e-5


def test_half_precision_models_are_measured_as_they_are_stored():
    model = huggingface("Gemma2", head_dim=8).bfloat16()
    block = next(calibrated_blocks(model, Calibration.of(tokens(100), context=32)))
    formats = formats_of(block)
    for layer, q in awq(block, formats).items():
        again = formats[layer].quantize(block.linears[layer].weight)
        assert torch.equal(q.dequantize(), again.dequantize())
    assert block.module.input_layernorm.weight.dtype == torch.bfloat16


def warned(message: str):
    return pytest.warns(UserWarning, match=f"^{re.escape(message)}$")


def test_unknown_architectures_are_rounded_with_a_warning():
    block = first_block("gpt-neox")
    formats = formats_of(block)
    with warned(
        "awq cannot rescale what these layers of GPTNeoXLayer read: attention.dense, "
        "attention.query_key_value, mlp.dense_4h_to_h, mlp.dense_h_to_4h; they are rounded as "
        "they are"
    ):
        tensors = awq(block, formats)
    for layer, q in tensors.items():
        rtn = formats[layer].quantize(block.linears[layer].weight)
        assert torch.equal(q.dequantize(), rtn.dequantize())


def test_layers_that_share_their_norm_with_others_are_named():
    model = huggingface("Cohere")
    block = next(calibrated_blocks(model, Calibration.of(tokens(100), context=32)))
    with warned(
        "awq cannot rescale what these layers of CohereDecoderLayer read: mlp.gate_proj, "
        "mlp.up_proj, self_attn.k_proj, self_attn.q_proj and 1 more; they are rounded as they are"
    ):
        awq(block, formats_of(block))


def test_known_architectures_warn_of_nothing(recwarn):
    awq(first_block(), formats_of(first_block()))
    assert not recwarn.list


def test_errors_come_before_anything_is_changed():
    block = first_block()
    weights = [parameter.data for parameter in block.module.parameters()]
    turned = Columns(named("int4-g16-asym"))
    formats = formats_of(block) | {"mlp.up_proj": turned}
    with raises(f"mlp.up_proj: clipping needs a Scheme, got {turned}; use method='awq'"):
        awq(block, formats, clip=True)
    with raises("grid must be at least 1, got 0"):
        awq(block, formats, grid=0)
    now = [parameter.data_ptr() for parameter in block.module.parameters()]
    assert now == [weight.data_ptr() for weight in weights]
    assert awq(block, formats)["mlp.up_proj"].format == turned


# -- clipping --------------------------------------------------------------------------------------

CLIPPED = [*FORMATS, "int4-row", "int3-g100-asym", "int8-g16", "nf4", "int1-g16", "mxfp6_e2m3"]


@pytest.mark.parametrize("format_name", CLIPPED)
@pytest.mark.parametrize("kind", ["mixed", "giant", "dead", "alike"])
def test_clipping_is_never_above_round_to_nearest(format_name, kind):
    weight, stats = problem(1, 12, 40, kind=kind)
    format = named(format_name)
    clipped = losses(weight, clip_ranges(weight, format, stats.hessian), stats)
    plain = losses(weight, format.quantize(weight), stats)
    assert clipped.sum() <= plain.sum() * (1 + 1e-6)
    if format_name not in ("nvfp4", "int4-tensor"):
        # Where rows share nothing, no row is worse.
        assert (clipped <= plain * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("format_name", ["int2-g16-asym", "int3-row", "int2-g16"])
def test_clipping_finds_something(format_name):
    weight, stats = problem(2, 12, 40)
    format = named(format_name)
    clipped = losses(weight, clip_ranges(weight, format, stats.hessian), stats).sum()
    assert clipped < 0.97 * losses(weight, format.quantize(weight), stats).sum()


@pytest.mark.parametrize("format_name", ["int2-g16-asym", "int3-g16", "int2-row-asym", "int3-g40"])
def test_every_block_has_its_best_range(format_name):
    """On inputs whose blocks are uncorrelated, the best of all combinations, found one by one."""
    weight, stats = problem(3, 5, 40)
    format = named(format_name)
    size = format.block if isinstance(format.block, int) else 40
    hessian = stats.hessian.clone()
    index = torch.arange(40) // size
    hessian[index[:, None] != index] = 0
    found = output_error(weight - clip_ranges(weight, format, hessian).dequantize(), hessian)
    for row in range(5):
        best = 0.0
        for start in range(0, 40, size):
            part = weight[row : row + 1, start : start + size]
            h = hessian[start : start + size, start : start + size].double()
            low, high = part.min(), part.max()
            if "asym" not in format_name:
                high = max(high, -low)
                low = -high
            errors = [
                (part - format.quantize(part.clamp(low * s, high * s)).dequantize()).double()
                for s in SHRINKS
            ]
            best += min(((e @ h) * e).sum().item() for e in errors)
        assert found[row].item() == pytest.approx(best, rel=1e-4)


def test_another_hessian_gives_other_ranges():
    weight, stats = problem(3, 5, 40)
    format = named("int2-g16-asym")
    other = Stats.of(torch.randn(100, 40, generator=torch.Generator().manual_seed(0)) ** 3)
    mine, theirs = (clip_ranges(weight, format, s.hessian) for s in (stats, other))
    assert not torch.equal(mine.dequantize(), theirs.dequantize())
    assert losses(weight, mine, stats).sum() < losses(weight, theirs, stats).sum()


@pytest.mark.parametrize("name", ["own-tied", "gemma3"])
def test_clipping_lowers_the_error_of_awq(name):
    totals = []
    for clip in (False, True):
        block = first_block(name)
        tensors = awq(block, formats_of(block), clip)
        x = seen_by(block)
        totals.append({n: error_of(x[n], block.linears[n].weight, q.dequantize())
                       for n, q in tensors.items()})  # fmt: skip
    assert all(totals[1][layer] <= totals[0][layer] * 1.001 for layer in totals[0])
    assert sum(totals[1].values()) < 0.97 * sum(totals[0].values())


def test_zero_blocks_and_outliers_are_clipped_without_harm():
    weight = torch.zeros(3, 40)
    weight[1] = 0.01 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    weight[1, 7] = 3.0
    stats = problem(4, 3, 40)[1]
    q = clip_ranges(weight, named("int2-g16-asym"), stats.hessian)
    assert torch.equal(q.dequantize()[[0, 2]], weight[[0, 2]])
    assert (q.dequantize()[1, 7] - 3.0).abs() < 0.5
