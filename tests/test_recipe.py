"""Whole models: the plan, the report and the buffers count the same bytes; layers by structure."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import MODELS, VOCAB, huggingface, tiny_decoder
from torch import nn

import qlib
from qlib.linear import QLinear, dequantized, replace_layer
from qlib.recipe import Recipe, decoder_linears, plan, quantize_model

DOWN = "model.layers.1.mlp.down_proj"
# Whole rows, ragged tails of 32 and 48 columns, trits, two-level scales, a zero point.
FORMATS = ["int8-row", "int4-g20", "int3-g16-asym", "int4-tensor", "nf4", "nvfp4", "ternary"]


LAYERS = {"own-tied": 14, "own-untied": 14, "llama": 14, "qwen2": 14, "gpt-neox": 8}


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(tokens)
    return getattr(output, "logits", output)


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of the stored weights, counted from the buffers that the layers hold."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    return sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())


def all_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_plan_report_and_buffers_count_the_same_bytes(name, format):
    model = MODELS[name]()
    planned = plan(model, format)
    report = quantize_model(model, format, progress=False)
    quantized_bytes = sum(sum(layer.nbytes.values()) for layer in report.layers)
    assert quantized_bytes == sum(step.nbytes for step in planned.steps) == buffer_bytes(model)
    assert planned.nbytes == sum(report.nbytes.values()) == all_bytes(model)
    weights = sum(math.prod(step.shape) for step in planned.steps)
    assert report.bits_per_weight == 8 * buffer_bytes(model) / weights
    assert report.model_bits_per_weight == planned.bits_per_weight


def test_one_more_buffer_breaks_the_count():
    model = tiny_decoder()
    planned = plan(model, "int4-g20")
    quantize_model(model, "int4-g20", progress=False)
    model.get_submodule(DOWN).register_buffer("extra", torch.zeros(1, dtype=torch.uint8))
    assert sum(step.nbytes for step in planned.steps) == buffer_bytes(model) - 1


def test_bytes_by_kind_by_hand():
    model = tiny_decoder()
    report = quantize_model(model, "int4-g16-asym", progress=False)
    # Per layer: q and o 32x32, k and v 16x32, gate and up 48x32, down 32x48.
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    # Two blocks a row give one byte of 4-bit zero points; the three blocks of `down` give two.
    zeros = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32 * 2)
    kept = 4 * (VOCAB * 32 + 5 * 32)
    assert report.nbytes == {
        "codes": weights // 2,
        "scales": weights // 16 * 2,
        "zeros": zeros,
        "unquantized": kept,
    }
    total = weights // 2 + weights // 16 * 2 + zeros
    assert report.bits_per_weight == 8 * total / weights
    everything = weights + VOCAB * 32 + 5 * 32
    assert report.model_bits_per_weight == 8 * (total + kept) / everything


def test_a_plan_touches_nothing():
    model = tiny_decoder()
    before = copy.deepcopy(model.state_dict())
    plan(model, "int2-g16")
    assert not any(isinstance(module, QLinear) for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_quantizing_what_was_kept_counts_the_packed_layers_once():
    model = tiny_decoder()
    first = quantize_model(model, Recipe("int4-row", (("*.1.*", None),)), progress=False)
    second = quantize_model(model, "int4-row", progress=False)
    together = quantize_model(tiny_decoder(), "int4-row", progress=False)
    assert len(first.layers) + len(second.layers) == len(together.layers)
    assert second.model_bits_per_weight == together.model_bits_per_weight


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_dequantized_weights(name, format):
    model = MODELS[name]()
    dense = copy.deepcopy(model)
    originals = decoder_linears(dense)
    quantize_model(model, format, progress=False)
    for layer, original in originals.items():
        replace_layer(dense, layer, dequantized(model.get_submodule(layer)))
        wanted = qlib.quantize(original.weight, format).dequantize()
        assert torch.equal(dense.get_submodule(layer).weight, wanted)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_flipped_code_bit_is_noticed(name):
    model = MODELS[name]()
    quantize_model(model, "int4-g16", progress=False)
    wanted = logits(model)
    layer = next(module for module in model.modules() if isinstance(module, QLinear))
    layer.codes[0, 0] ^= 8
    assert (logits(model) - wanted).abs().max() > 1e-3


def test_biases_stay():
    model, original = huggingface("Qwen2"), huggingface("Qwen2")
    quantize_model(model, "int8-row", progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, original.model.layers[0].self_attn.q_proj.bias)
    assert model.model.layers[0].self_attn.o_proj.bias is None


@pytest.mark.parametrize("name", ["own-tied", "own-untied", "llama"])
def test_embeddings_norms_and_head_are_untouched(name):
    model, original = MODELS[name](), MODELS[name]()
    quantize_model(model, "int2-g16", progress=False)
    kept = {k: v for k, v in original.state_dict().items() if "proj" not in k}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < set(kept)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_tied_embeddings_stay_tied_and_count_once():
    model = huggingface("Llama", tie_word_embeddings=True)
    planned = plan(model, "int4-row")
    quantize_model(model, "int4-row", progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert planned.nbytes == all_bytes(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_keep_their_dtype_when_a_model_changes_its_own(dtype):
    model = huggingface("Qwen2")
    quantize_model(model, "int4-g16", progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.tobytes()
    model.to(dtype)
    assert (layer.scale.dtype, layer.codes.dtype) == (torch.float16, torch.uint8)
    assert layer.weight.tobytes() == before
    assert layer.bias.dtype == model.model.norm.weight.dtype == dtype
    assert logits(model).dtype == dtype
