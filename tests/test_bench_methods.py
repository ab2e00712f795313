"""The judge of tools/bench_methods.py: nobody is credited with weights that are not quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from bench_methods import Judge, check_grid, merged

import qlib
from qlib.config import Config
from qlib.model import Decoder
from qlib.recipe import decoder_linears

BITS, GROUP = 3, 16


@pytest.fixture
def judge() -> Judge:
    generator = torch.Generator().manual_seed(0)
    config = Config(64, 32, 48, 2, 2, 1, 16, max_position_embeddings=32)
    model = Decoder(config).normal_init(0.2, generator).requires_grad_(False)
    tokens = torch.randint(64, (8, 32), generator=generator)
    return Judge(model, qlib.Protocol("random", tokens.flatten(), 32, 32), tokens)


def rounded(judge: Judge) -> dict[str, torch.Tensor]:
    q = {name: qlib.quantize(judge.dense[name], f"int{BITS}-g{GROUP}") for name in judge.hessians}
    return judge.dense | {name: tensor.dequantize() for name, tensor in q.items()}


def test_figures_are_those_of_the_model(judge):
    found = judge.judge(rounded(judge), BITS, GROUP)
    model = copy.deepcopy(judge.model)
    assert len(judge.hessians) == len(decoder_linears(model)) == 14
    qlib.quantize_model(model, f"int{BITS}-g{GROUP}", progress=False)
    kl = qlib.divergence(judge.model, model, judge.reference.protocol).kl
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert 0 < found["layer_error"] < 1
    assert 0 < found["block_error"] < 1


def test_worse_weights_have_larger_figures(judge):
    tensors = rounded(judge)
    before = judge.judge(tensors, BITS, GROUP)
    for name in judge.hessians:
        tensors[name] = tensors[name].roll(1, dims=0)
    after = judge.judge(tensors, BITS, GROUP)
    assert all(after[x] > 1.5 * before[x] for x in ("kl", "layer_error", "block_error"))


def test_a_fold_keeps_the_block_error_and_has_no_layer_error(judge):
    tensors = rounded(judge)
    before = judge.judge(tensors, BITS, GROUP)
    tensors["model.layers.1.post_attention_layernorm.weight"] = torch.full((32,), 0.5)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] = (
            2 * tensors[f"model.layers.1.mlp.{name}.weight"]
        )
    after = judge.judge(tensors, BITS, GROUP)
    assert after["layer_error"] is None
    assert after["block_error"] == pytest.approx(before["block_error"], rel=1e-4)
    assert after["kl"] == pytest.approx(before["kl"], rel=1e-4)


def test_dense_weights_are_refused(judge):
    name = next(iter(judge.hessians))
    message = f"{name}: 16 values in a group of 16 that has 3 bits"
    with pytest.raises(ValueError, match=message):
        judge.judge(judge.dense, BITS, GROUP)
    tensors = rounded(judge)
    tensors[name][0] = judge.dense[name][0]
    with pytest.raises(ValueError, match=message):
        judge.judge(tensors, BITS, GROUP)


def test_groups_of_columns_in_another_order():
    column = torch.arange(16)
    g_idx = column % 4
    weight = (10.0 * g_idx + column // 4 % 2).repeat(2, 1)
    check_grid("w", weight, g_idx, bits=1, group=4)
    with pytest.raises(ValueError, match="w: 4 values in a group of 4 that has 1 bits"):
        check_grid("w", weight, None, bits=1, group=4)


def test_costs_are_minima_and_quality_is_of_the_first_round():
    costs = {"seconds": 2.0, "cpu_seconds": 1.0, "loaded_mib": 5.0, "peak_mib": 9.0}
    first = merged({"name": "a"}, None, costs | {"kl": 0.5})
    second = merged({"name": "a"}, first, costs | {"seconds": 1.0, "cpu_seconds": 3.0})
    assert second == first | {"seconds": 1.0, "rounds": 2}
