"""Folding scales into a block leaves its function as it is, on every architecture or not at all."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from qlib import fold as folding
from qlib.block import Block, Call
from qlib.calibrate import Calibration, calibrated_blocks
from qlib.fold import folds, rescale
from qlib.linear import QLinear, replace_layer
from qlib.model import Config, Decoder
from qlib.presets import quantize

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
OWN = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)
LLAMA = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
# Which folds each architecture has. Cohere's one norm feeds attention and MLP side by side, OLMo 2
# norms what attention and MLP wrote, and Mixtral has experts instead of an MLP.
ARCHITECTURES = {
    "Decoder": LLAMA,
    "Llama": LLAMA,
    "Llama-biases": LLAMA,
    "Llama-mha": LLAMA,
    "Llama-eager": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Gemma": LLAMA,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Cohere": ["self_attn.v_proj", "mlp.up_proj"],
    "Olmo2": ["self_attn.v_proj", "mlp.up_proj"],
    "Mixtral": ["input_layernorm", "self_attn.v_proj"],
    "GPTNeoX": [],
}
OFFSETS = {"Gemma": 1, "Gemma2": 1, "Gemma3": 1}
EXTRA = {
    "Llama-biases": {"attention_bias": True, "mlp_bias": True},
    "Llama-mha": {"num_key_value_heads": 4},
    "Llama-eager": {"attn_implementation": "eager"},
    "Gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "Gemma2": {"query_pre_attn_scalar": 8},
    "Gemma3": {"query_pre_attn_scalar": 8},
    "Mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
}


def build(name: str) -> nn.Module:
    """A tiny random model whose gains and biases are far from 1 and 0."""
    if name == "Decoder":
        model = Decoder(OWN)
    else:
        kind = name.partition("-")[0]
        config_class = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
        config = getattr(transformers, config_class)(**SIZES | EXTRA.get(name, {}))
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.3, 1.7, generator=generator)
        else:
            parameter.normal_(0, 0.2, generator=generator)
    return model


def prompt(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    found = model(prompt())
    return getattr(found, "logits", found)


def blocks(model: nn.Module) -> list[Block]:
    return list(calibrated_blocks(model, Calibration.of(prompt(2), context=17)))


def random_scales(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.exp(
        torch.empty(channels, dtype=torch.float64).uniform_(-2, 2, generator=generator)
    )


def relative(after: torch.Tensor, before: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_folds(name):
    for block in blocks(build(name)):
        found = folds(block)
        assert [fold.producer for fold in found] == ARCHITECTURES[name]
        offsets = [fold.offset for fold in found if "norm" in fold.producer]
        assert set(offsets) <= {OFFSETS.get(name, 0)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_do_not_change(name):
    model = build(name)
    before = logits(model)
    for block in blocks(model):
        for fold in folds(block):
            rescale(fold, random_scales(fold.channels))
    assert relative(logits(model), before) < 1e-5


@pytest.mark.parametrize("name", [name for name, found in ARCHITECTURES.items() if found])
def test_every_single_fold_changes_weights_but_not_logits(name, monkeypatch):
    # Norms compute in float32 whatever the model's type is; here they go all the way.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = build(name).double()
    before = logits(model)
    for fold in folds(blocks(model)[0]):
        weights = {n: fold.module.get_submodule(n).weight.clone() for n in fold.consumers}
        rescale(fold, random_scales(fold.channels))
        assert relative(logits(model), before) < 1e-9
        for consumer, old in weights.items():
            assert relative(fold.module.get_submodule(consumer).weight, old) > 0.5


@pytest.mark.parametrize("name", [name for name, found in ARCHITECTURES.items() if found])
def test_scaling_one_side_only_is_noticed(name):
    for producer in ARCHITECTURES[name]:
        model = build(name)
        before = logits(model)
        fold = next(fold for fold in folds(blocks(model)[0]) if fold.producer == producer)
        scales = random_scales(fold.channels)
        fold.module.get_submodule(fold.consumers[0]).weight.mul_(scales[fold.columns])
        assert relative(logits(model), before) > 1e-2


def test_finding_folds_changes_nothing():
    for name in ("Llama-biases", "Cohere", "Gemma2"):
        model = build(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for block in blocks(model):
            folds(block)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_come_back_when_the_trial_is_interrupted():
    model = build("Llama")
    block = blocks(model)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = block.module.mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        folds(block)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["Cohere", "Olmo2"])
def test_names_alone_would_give_wrong_folds(name, monkeypatch):
    """What the trial is for: without it, these architectures get a fold that changes them."""
    monkeypatch.setattr(folding, "_preserve", lambda *_: True)
    model = build(name)
    before = logits(model)
    for fold in folds(blocks(model)[0]):
        rescale(fold, random_scales(fold.channels))
    assert relative(logits(model), before) > 1e-2


class Gated(nn.Module):
    """A Llama block whose attention output is gated by the norm itself: one reader is no layer."""

    def __init__(self, layer: nn.Module, massive: float):
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.massive = massive

    def forward(self, x, rope, _cache):
        normed = self.input_layernorm(x)
        y = x + self.self_attn(normed, rope) * normed
        # One channel of the residual stream is far larger than all the others.
        y[..., 3] += self.massive
        return y


@pytest.mark.parametrize("massive", [0.0, 1e5])
def test_a_reader_that_is_no_linear_layer_is_noticed(massive):
    block = blocks(build("Decoder"))[0]
    gated = Block("gated", Gated(block.module, massive), block.calls)
    assert [fold.producer for fold in folds(gated)] == ["self_attn.v_proj"]


def test_a_value_is_read_by_every_query_head_of_its_group():
    model = build("Decoder")
    fold = folds(blocks(model)[0])[1]
    assert (fold.producer, fold.channels) == ("self_attn.v_proj", 16)
    # 4 query heads of 8 channels; heads 0 and 1 read value head 0, heads 2 and 3 value head 1.
    first, second = list(range(8)), list(range(8, 16))
    assert fold.columns.tolist() == first + first + second + second


def test_another_order_of_the_heads_is_noticed():
    model = build("Decoder")
    before = logits(model)
    fold = folds(blocks(model)[0])[1]
    wrong = folding.Fold(fold.module, fold.producer, fold.consumers, torch.arange(16).repeat(2))
    rescale(wrong, random_scales(16))
    assert relative(logits(model), before) > 1e-2


def test_producer_is_divided_and_consumers_multiplied():
    model = build("Qwen2").double()
    layer = model.model.layers[0]
    old = {name: p.clone() for name, p in layer.named_parameters()}
    norm, value = folds(blocks(model)[0])[:2]
    s, t = random_scales(32), random_scales(16)
    rescale(norm, s)
    rescale(value, t)
    new = dict(layer.named_parameters())
    close = torch.testing.assert_close
    close(new["input_layernorm.weight"] * s, old["input_layernorm.weight"])
    close(new["self_attn.q_proj.weight"], old["self_attn.q_proj.weight"] * s)
    assert torch.equal(new["self_attn.q_proj.bias"], old["self_attn.q_proj.bias"])
    close(new["self_attn.v_proj.bias"] * t, old["self_attn.v_proj.bias"])
    close(new["self_attn.v_proj.weight"], old["self_attn.v_proj.weight"] * s / t[:, None])


@pytest.mark.parametrize("name", ["Decoder", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folds_are_found_in_half_precision(name, dtype):
    if name == "Decoder":
        model = build("Llama").to(dtype)
        assert [fold.producer for fold in folds(blocks(model)[1])] == LLAMA
    else:
        model = build(name).to(dtype)
        assert [fold.producer for fold in folds(blocks(model)[1])] == GEMMA


def test_a_quantized_producer_has_no_fold():
    model = build("Decoder")
    value = model.model.layers[0].self_attn.v_proj
    replace_layer(model, "model.layers.0.self_attn.v_proj", QLinear(quantize(value.weight, "int4")))
    producers = [fold.producer for fold in folds(blocks(model)[0])]
    assert producers == ["post_attention_layernorm", "mlp.up_proj"]


def test_quantized_model_equals_its_dequantized_twin():
    """The norms carry 1/s, the quantized layers s: together an ordinary model."""
    model, twin = build("Decoder"), build("Decoder")
    for block in blocks(model):
        for fold in folds(block):
            rescale(fold, random_scales(fold.channels))
    twin.load_state_dict(model.state_dict())
    for block in blocks(model):
        for name, layer in block.linears.items():
            q = quantize(layer.weight, "int8-g16-asym")
            twin.get_submodule(f"{block.name}.{name}").weight.copy_(q.dequantize())
            replace_layer(block.module, name, QLinear(q))
    assert relative(logits(model), logits(twin)) < 1e-5
    # The norms' gains are not the original ones, so one without the other is another function.
    twin.model.layers[0].input_layernorm.load_state_dict(
        build("Decoder").model.layers[0].input_layernorm.state_dict()
    )
    assert relative(logits(model), logits(twin)) > 1e-2


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_errors_say_what_is_needed():
    block = blocks(build("Decoder"))[0]
    fold = folds(block)[1]
    need = "self_attn.v_proj has 16 channels, got scales [32]: give one for every channel"
    with refused(need):
        rescale(fold, torch.ones(32))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with refused("self_attn.v_proj: scales must be positive and finite"):
            rescale(fold, torch.full((16,), bad))
    with refused("model.layers.0: folds are verified on calibration text; give calibration="):
        folds(Block("model.layers.0", block.module))


def test_the_shortest_call_is_the_trial():
    block = blocks(build("Decoder"))[0]
    call = block.calls[0]
    times = []
    block.run = lambda call: times.append(call.hidden.shape[1]) or Block.run(block, call)
    rope = tuple(part[:5] for part in call.args[0])
    block.calls = [call, Call(call.hidden[:, :5], (rope, *call.args[1:]), call.kwargs)]
    assert len(folds(block)) == 4
    assert times == [5, 5]


def test_a_norm_that_is_neither_kind_is_refused():
    odd = nn.Module()
    odd.weight = nn.Parameter(torch.rand(8) + 0.5)
    odd.forward = lambda x: x * odd.weight.square()
    assert folding._gain_offset(odd) is None
    matrix = SimpleNamespace(weight=torch.ones(2, 2))
    assert folding._gain_offset(matrix) is None


def test_a_norm_with_a_bias_is_rescaled_whole():
    norm = nn.LayerNorm(8)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0.5, 1.5)
    assert folding._gain_offset(norm) == 0
