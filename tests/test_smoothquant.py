"""SmoothQuant: the published formula, a function that stays what it was, and better W8A8."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import CALIBRATED, raises, tokens, uneven
from torch import nn

import qlib
from qlib.activations import inputs
from qlib.block import Block
from qlib.calibrate import Calibration, calibrated_blocks
from qlib.fold import folds, rescale
from qlib.linear import QLinear
from qlib.methods import METHODS
from qlib.methods.gptq import gptq
from qlib.methods.smoothquant import ALPHAS, search_alpha, smoothing_scales, smoothquant
from qlib.recipe import Recipe, quantize_model, quantized

INT8 = qlib.format("int8-row")
CONTEXT = 32
DATA = Calibration.of(tokens(200), context=CONTEXT)
FOLDED = [name for name in CALIBRATED if name != "gpt-neox"]
NORMS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def first_block(name: str = "own-tied", batch: int | None = None, model=None) -> Block:
    return next(calibrated_blocks(model or uneven(name), DATA, batch))


def formats_of(block: Block) -> dict:
    return dict.fromkeys(block.linears, INT8)


def seen_by(block: Block) -> dict[str, torch.Tensor]:
    """What every linear layer of the block reads, [tokens, in]."""
    return {
        name: torch.cat([args[0].flatten(0, -2) for args, _ in block.inputs(name)])
        for name in block.linears
    }


def weights_of(block: Block) -> dict[str, torch.Tensor]:
    return {name: layer.weight.clone() for name, layer in block.linears.items()}


# -- equation 4 ------------------------------------------------------------------------------------


def formula(fold, block: Block, alpha: float) -> np.ndarray:
    """s by numpy, channel by channel."""
    x = np.abs(seen_by(block)[fold.consumers[0]].double().numpy())
    weights = [np.abs(block.linears[name].weight.double().numpy()) for name in fold.consumers]
    scales = np.ones(fold.channels)
    for channel in range(fold.channels):
        columns = np.flatnonzero(fold.columns.numpy() == channel)
        largest_w = max(weight[:, columns].max() for weight in weights)
        scale = x[:, columns].max() ** alpha / largest_w ** (1 - alpha)
        scales[channel] = max(scale, 1e-5)
    return scales


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("name", ["own-tied", "llama", "qwen2", "gemma2"])
def test_scales_are_those_of_the_paper(name, alpha):
    block = first_block(name)
    stats = block.stats()
    for fold in folds(block):
        scales = smoothing_scales(fold, stats[fold.consumers[0]], alpha)
        np.testing.assert_allclose(scales.numpy(), formula(fold, block, alpha), rtol=1e-5)
        # The twin: another alpha.
        other = formula(fold, block, alpha + 0.01)
        assert not np.allclose(scales.numpy(), other, rtol=1e-5)


def test_every_consumer_counts():
    block = first_block()
    fold = next(fold for fold in folds(block) if "mlp.gate_proj" in fold.consumers)
    stats = block.stats()["mlp.gate_proj"]
    before = smoothing_scales(fold, stats, 0.5)
    for name in fold.consumers:
        weight = block.linears[name].weight
        kept = weight[2, 3].item()
        weight[2, 3] = 100.0
        after = smoothing_scales(fold, stats, 0.5)
        assert (after != before).nonzero().flatten().tolist() == [3]
        weight[2, 3] = kept


@pytest.mark.parametrize("name", ["own-tied", "qwen2"])
def test_limits_of_alpha(name):
    for alpha in (0.0, 1.0):
        block = first_block(name)
        smoothquant(block, formats_of(block), alpha)
        for fold in folds(block):
            weights = torch.stack([block.linears[n].weight.abs().amax(0) for n in fold.consumers])
            amax = seen_by(block)[fold.consumers[0]].abs().amax(0)
            # At 0 all weights of a channel reach up to 1, at 1 all activations do.
            flat = (amax if alpha else weights.amax(0)).new_zeros(fold.channels)
            flat.scatter_reduce_(0, fold.columns, amax if alpha else weights.amax(0), "amax")
            if isinstance(block.module.get_submodule(fold.producer), nn.Linear) or alpha:
                torch.testing.assert_close(flat, torch.ones_like(flat), rtol=1e-3, atol=0)


def test_channels_of_zeros_are_left_alone():
    model = uneven()
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data[5] = 0
    layer.mlp.gate_proj.weight.data[:, 7] = 0
    layer.mlp.up_proj.weight.data[:, 7] = 0
    block = first_block(model=model)
    stats = block.stats()
    found = {fold.producer: fold for fold in folds(block)}
    scales = smoothing_scales(found["input_layernorm"], stats["self_attn.q_proj"], 0.5)
    assert scales[5] == 1
    assert bool(((scales > 0) & scales.isfinite()).all())
    assert smoothing_scales(found["post_attention_layernorm"], stats["mlp.up_proj"], 0.5)[7] == 1
    tensors = smoothquant(block, formats_of(block), None)
    assert all(bool(q.dequantize().isfinite().all()) for q in tensors.values())


# -- the model stays what it was -------------------------------------------------------------------


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens(30, 5).unsqueeze(0))
    return getattr(found, "logits", found)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("name", FOLDED)
def test_the_function_is_preserved_in_float64(name, alpha):
    model = uneven(name).double()
    before = logits(model)
    for block in calibrated_blocks(model, DATA):
        weights = weights_of(block)
        block.activations = dict.fromkeys(block.linears, inputs("int8-row"))
        smoothquant(block, formats_of(block), alpha)
        assert not any(torch.equal(weights[n], w) for n, w in weights_of(block).items())
    after = logits(model)
    # Gemma multiplies by its gains in float32.
    limit = (1e-5 if "gemma" in name else 1e-10) * before.abs().max()
    assert (after - before).abs().max() < limit
    # The twin: one value of every gain.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data[1] *= 1.001
    assert (logits(model) - before).abs().max() > limit


def test_norms_only():
    block = first_block()
    before = weights_of(block)
    smoothquant(block, formats_of(block), norms_only=True)
    changed = {n for n, w in weights_of(block).items() if not torch.equal(w, before[n])}
    assert changed == {*NORMS}


def test_only_what_is_quantized_is_smoothed():
    block = first_block()
    before = weights_of(block)
    smoothquant(block, {"mlp.down_proj": INT8})
    changed = {n for n, w in weights_of(block).items() if not torch.equal(w, before[n])}
    assert changed == {"mlp.up_proj", "mlp.down_proj"}
    # Layers that quantize their inputs alone count, too.
    block.activations = {"self_attn.o_proj": inputs("int8-row")}
    assert smoothquant(block, {}) == {}
    assert not torch.equal(block.linears["self_attn.o_proj"].weight, before["self_attn.o_proj"])


# -- what the codes are chosen with ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["own-tied", "gemma2"])
def test_other_methods_get_the_statistics_of_smoothed_inputs(name):
    block, seen = first_block(name), {}
    before = block.stats()

    def spy(weight, format, stats):
        seen[len(seen)] = stats
        return format.quantize(weight)

    tensors = smoothquant(block, formats_of(block), rounding=spy)
    for stats, (layer, again) in zip(seen.values(), block.stats().items(), strict=True):
        size = again.hessian.abs().max().item()
        torch.testing.assert_close(stats.hessian, again.hessian, rtol=1e-3, atol=1e-5 * size)
        for part in ("mean_abs", "low", "high"):
            found, expected = getattr(stats, part), getattr(again, part)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert stats.tokens == 200
        # The twin: those of the inputs before.
        assert not torch.allclose(before[layer].hessian, again.hessian, rtol=1e-2)
    expected = {n: INT8.quantize(layer.weight) for n, layer in block.linears.items()}
    assert all(
        torch.equal(tensors[n].parts["codes"], q.parts["codes"]) for n, q in expected.items()
    )


def test_gptq_after_smoothing():
    block, plain = first_block(), first_block()
    format = qlib.format("int4-g16")
    formats = dict.fromkeys(block.linears, format)
    tensors = METHODS["smoothquant-gptq"].function(block, formats)
    smoothquant(plain, formats)
    stats = plain.stats()
    for name, q in tensors.items():
        weight = plain.linears[name].weight
        error, rounded = (
            qlib.metrics.proxy_loss(weight, t.dequantize(), stats[name].hessian)
            for t in (q, format.quantize(weight))
        )
        assert error <= rounded * 1.001
        direct = gptq(weight, format, stats[name])
        direct = qlib.metrics.proxy_loss(weight, direct.dequantize(), stats[name].hessian)
        assert error == pytest.approx(direct, rel=0.05)


# -- the search ------------------------------------------------------------------------------------


def losses(fold, block: Block, name: str) -> list[float]:
    """The objective for every alpha, token by token in float64."""
    found = []
    for alpha in ALPHAS:
        s = torch.from_numpy(formula(fold, block, alpha)).float()[fold.columns]
        x, total = seen_by(block)[fold.consumers[0]], 0.0
        read = inputs(name)
        if not read.is_ready:
            ends = torch.tensor([[w.min(), w.max()] for w in (x / s).split(CONTEXT)]).mean(0)
            read = read.observed(*ends.tolist())
        rounded = read.rounded(x / s).double()
        for consumer in fold.consumers:
            weight = block.linears[consumer].weight
            y = x.double() @ weight.double().T
            error = rounded @ INT8.quantize(weight * s).dequantize().double().T - y
            total += (error.norm(dim=1) / y.norm(dim=1)).square().mean().item()
        found.append(total)
    return found


@pytest.mark.parametrize("kind", ["int8-row", "int8-tensor", "int8-tensor-static", "int4-row"])
def test_the_search_finds_the_best_alpha(kind):
    block = first_block()
    block.activations = dict.fromkeys(block.linears, inputs(kind))
    chosen = set()
    for fold in folds(block):
        alpha = search_alpha(fold, block, formats_of(block), block.stats()[fold.consumers[0]])
        found = losses(fold, block, kind)
        assert found[ALPHAS.index(alpha)] <= min(found) * 1.001
        assert found[ALPHAS.index(alpha)] <= found[ALPHAS.index(0.5)]
        chosen.add(alpha)
    # The twin: had it always answered the same, this would fail.
    assert len(chosen) > 1 or kind != "int8-row"


@pytest.mark.parametrize("alpha", [0.5, None])
def test_batches_make_no_difference(alpha):
    found = []
    for batch in (1, 7):
        block = first_block(batch=batch)
        block.activations = dict.fromkeys(block.linears, inputs("int8-row"))
        found.append(smoothquant(block, formats_of(block), alpha))
    for name, q in found[0].items():
        torch.testing.assert_close(q.dequantize(), found[1][name].dequantize(), rtol=0, atol=1e-2)


# -- whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["int8-row", "int8-tensor", "int8-tensor-static"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox"])
def test_models_of_transformers(name, activations):
    model, reference = CALIBRATED[name](), CALIBRATED[name]()
    recipe = Recipe("int8-row", method="smoothquant", activations=activations)
    report = quantize_model(model, recipe, calibration=DATA, progress=False)
    assert report.method == "smoothquant"
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    assert all(layer.inputs.is_ready for layer in layers)
    error = (logits(model) - logits(reference)).square().mean()
    assert 0 < error < 0.02 * logits(reference).var()


def test_static_ranges_are_those_of_smoothed_inputs():
    model = uneven()
    recipe = Recipe("int8-row", method="smoothquant", activations="int8-tensor-static")
    block = first_block(model=copy.deepcopy(model))
    smoothquant(block, formats_of(block))
    smooth = block.stats()["mlp.down_proj"]
    quantize_model(model, recipe, calibration=DATA, progress=False)
    found = model.model.layers[0].mlp.down_proj.inputs
    assert found.high == pytest.approx(smooth.ends[1], rel=1e-4)
    plain = first_block().stats()["mlp.down_proj"]
    assert found.high != pytest.approx(plain.ends[1], rel=1e-2)


def test_a_real_model_gets_better():
    model, tokenizer = qlib.load("bpw-small")
    protocol = qlib.Protocol.of(tokenizer, "evaluation", tokens=768)
    reference = qlib.Reference(model, protocol)
    data = Calibration.text(tokenizer, tokens=1024)
    recipe, kl = Recipe("int8-row", activations="int8-tensor-static"), {}
    for method in ("rtn", "smoothquant"):
        with quantized(model, recipe, method, data, progress=False) as report:
            kl[report.method] = qlib.divergence(reference, model, protocol).kl
    assert kl["smoothquant"] < 0.85 * kl["rtn"]


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alphas_that_are_refused(alpha):
    block = first_block()
    with raises(f"alpha must be between 0 and 1, or None to search, got {alpha}"):
        smoothquant(block, formats_of(block), alpha)


def test_layers_that_cannot_be_smoothed_are_named():
    block = first_block("gpt-neox")
    before = weights_of(block)
    message = (
        "smoothquant cannot smooth what these layers of GPTNeoXLayer read: attention.dense, "
        "attention.query_key_value, mlp.dense_4h_to_h, mlp.dense_h_to_4h; they are quantized as "
        "they are"
    )
    with pytest.warns(UserWarning, match=f"^{message}$"):
        smoothquant(block, formats_of(block))
    assert all(torch.equal(w, before[n]) for n, w in weights_of(block).items())


def test_no_warning_where_all_is_smoothed(recwarn):
    block = first_block()
    smoothquant(block, formats_of(block), norms_only=True)
    assert not recwarn.list


def test_rescaled_twice_is_rescaled_once():
    """At alpha 1 there is nothing left to smooth."""
    block = first_block()
    smoothquant(block, formats_of(block), 1.0)
    for fold in folds(block):
        again = smoothing_scales(fold, block.stats()[fold.consumers[0]], 1.0)
        torch.testing.assert_close(again, torch.ones_like(again), rtol=1e-3, atol=0)
    rescale(fold, torch.full((fold.channels,), 2.0))
    again = smoothing_scales(fold, block.stats()[fold.consumers[0]], 1.0)
    assert not torch.allclose(again, torch.ones_like(again), rtol=1e-3)
