"""Calibration: every token is used, batches change nothing, statistics equal an independent sum."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CALIBRATED, VOCAB, raises, tiny_decoder, tokens
from torch import nn

from qlib.block import Stats
from qlib.calibrate import Calibration, calibrated_blocks
from qlib.linear import QLinear, replace_layer
from qlib.presets import quantize

# -- windows ---------------------------------------------------------------------------------------


def test_every_token_lands_in_one_window():
    ids = tokens(75)
    calibration = Calibration.of(ids, context=16)
    assert torch.equal(torch.cat(calibration.windows), ids)
    assert [len(window) for window in calibration.windows] == [16, 16, 16, 16, 11]
    assert str(calibration) == "75 tokens in 5 windows of up to 16, all used"
    batched = torch.cat([batch.flatten() for batch in calibration.batches(3)])
    assert torch.equal(batched, ids)


def test_bos_stands_before_every_window_and_is_not_counted():
    calibration = Calibration.of(tokens(31), context=16, bos=7)
    assert [len(window) for window in calibration.windows] == [16, 16, 2]
    assert all(window[0] == 7 for window in calibration.windows)
    assert torch.equal(torch.cat([window[1:] for window in calibration.windows]), tokens(31))
    assert str(calibration) == "31 tokens in 3 windows of up to 16 with a BOS each, all used"


def test_padding_is_removed():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    calibration = Calibration.of({"input_ids": ids, "attention_mask": mask}, context=4)
    assert [window.tolist() for window in calibration.windows] == [[5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    "given",
    [[1, 2, 3, 4], torch.tensor([1, 2, 3, 4]), [[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])],
)
def test_tokens_come_in_many_shapes(given):
    assert torch.cat(Calibration.of(given, context=2).windows).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            tokens(100),
            "calibration has 100 tokens, fewer than one context of 256: give more text, or "
            "Calibration.of(tokens, context=100)",
        ),
        (
            [],
            "calibration has 0 tokens, fewer than one context of 256: give more text, or "
            "Calibration.of(tokens, context=1)",
        ),
        (
            torch.zeros(300),
            "calibration tokens are integer ids [n], got torch.float32 [300]",
        ),
    ],
)
def test_what_is_no_calibration_is_refused(given, message):
    with raises(message):
        Calibration.of(given)


@pytest.mark.parametrize(
    ("ids", "context", "message"),
    [
        (
            torch.tensor([1, VOCAB, 2]), 2,
            f"calibration holds token {VOCAB}; the model has a vocabulary of {VOCAB}: "
            "tokenize the text with the model's own tokenizer",
        ),
        (
            tokens(200), 100,
            "calibration windows have 100 tokens, the model reads 64: "
            "use Calibration.of(tokens, context=64)",
        ),
    ],
)  # fmt: skip
def test_tokens_that_do_not_fit_the_model_are_refused(ids, context, message):
    with raises(message):
        list(calibrated_blocks(tiny_decoder(), Calibration.of(ids, context)))


# -- blocks and statistics -------------------------------------------------------------------------


def inputs_seen(model: nn.Module, windows) -> dict[str, torch.Tensor]:
    """What every linear layer reads when the whole model runs window by window: the oracle."""
    seen: dict[str, list] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


@pytest.mark.parametrize("name", CALIBRATED)
def test_statistics_are_those_of_a_whole_forward_pass(name):
    model = CALIBRATED[name]()
    calibration = Calibration.of(tokens(75), context=16)
    seen = inputs_seen(model, calibration.windows)
    count = 0
    for block in calibrated_blocks(model, calibration):
        stats = block.stats()
        assert set(stats) == set(block.linears)
        for layer, one in stats.items():
            x = seen[f"{block.name}.{layer}"].double()
            hessian = x.T @ x / len(x)
            torch.testing.assert_close(one.hessian.double(), hessian, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.amax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
            assert one.tokens == len(x) == 75
            # The twin: one token less, and the comparison fails.
            short = x[1:].T @ x[1:] / len(x[1:])
            assert not torch.allclose(one.hessian.double(), short, rtol=1e-4, atol=1e-5)
            count += 1
    assert count == sum(isinstance(m, nn.Linear) for m in list(model.modules())) - _heads(model)


def _heads(model: nn.Module) -> int:
    return sum(n in ("lm_head", "embed_out") for n, _ in model.named_modules())


@pytest.mark.parametrize("name", ["own-tied", "qwen2", "gemma3"])
def test_batch_size_changes_nothing_but_rounding(name):
    model = CALIBRATED[name]()
    calibration = Calibration.of([tokens(16, i) for i in range(40)] + [tokens(7)], context=16)
    one, many = (
        [block.stats() for block in calibrated_blocks(model, calibration, batch)]
        for batch in (1, 32)
    )
    for a, b in zip(one, many):
        for layer in a:
            torch.testing.assert_close(a[layer].hessian, b[layer].hessian, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a[layer].amax, b[layer].amax, rtol=1e-5, atol=1e-6)
            assert a[layer].tokens == b[layer].tokens == 647


def test_layers_that_read_the_same_share_their_statistics():
    block = next(calibrated_blocks(tiny_decoder(), Calibration.of(tokens(32), context=16)))
    stats = block.stats()
    assert stats["self_attn.q_proj"] is stats["self_attn.v_proj"]
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert len({id(one) for one in stats.values()}) == 4


def test_a_model_is_the_same_after_calibration():
    model = tiny_decoder()
    before = list(model.model.layers)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    with raises("model.layers.0: its output on the calibration text is not finite"):
        list(calibrated_blocks(model, Calibration.of(tokens(32), context=16)))
    assert all(a is b for a, b in zip(before, model.model.layers))


@pytest.mark.parametrize("original", [False, True])
def test_inputs_come_from_quantized_blocks_unless_told_otherwise(original):
    model, reference = tiny_decoder(), tiny_decoder()
    calibration = Calibration.of(tokens(64), context=16)
    hidden = []
    for block in calibrated_blocks(model, calibration, original_inputs=original):
        hidden.append(block.calls[0].hidden)
        for name, layer in block.linears.items():
            replace_layer(block.module, name, QLinear(quantize(layer.weight, "int2-row")))
    kept = [b.calls[0].hidden for b in calibrated_blocks(reference, calibration)]
    assert torch.equal(hidden[0], kept[0])
    assert torch.allclose(hidden[1], kept[1], atol=1e-5) == original


def test_nan_activation_names_its_layer():
    model = tiny_decoder()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    blocks = calibrated_blocks(model, Calibration.of(tokens(32), context=16))
    next(blocks).stats()
    broken = next(blocks)
    with raises(
        "model.layers.1.mlp.gate_proj: 32 NaN or infinite inputs on the calibration text; "
        "a weight before it is broken, or the model overflows: load it in float32"
    ):
        broken.stats()


def test_stats_merge_like_one_sample():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    merged = Stats.of(x[:1])
    for part in (x[1:1], x[1:20], x[20:]):
        merged.merge(Stats.of(part))
    whole = Stats.of(x)
    torch.testing.assert_close(merged.hessian, whole.hessian)
    torch.testing.assert_close(merged.mean_abs, whole.mean_abs)
    assert torch.equal(merged.amax, whole.amax)
    assert merged.tokens == whole.tokens == 50
    assert torch.equal(whole.mean_square, whole.hessian.diagonal())


def test_blocks_tell_which_layers_are_reached():
    block = next(calibrated_blocks(tiny_decoder(), Calibration.of(tokens(32), context=16)))
    assert block.reached() == set(block.linears)
    block.module.mlp.forward = lambda x: x * 0
    assert block.reached() == {name for name in block.linears if name.startswith("self_attn")}
    assert block.stats()["mlp.up_proj"].tokens == 0


def test_inputs_of_a_submodule():
    block = next(calibrated_blocks(tiny_decoder(), Calibration.of(tokens(40), context=16), batch=1))
    found = [args[0] for args, _ in block.inputs("mlp")]
    assert [list(x.shape) for x in found] == [[1, 16, 32], [1, 16, 32], [1, 8, 32]]
    hessian = Stats.of(torch.cat([x.flatten(0, 1) for x in found])).hessian
    torch.testing.assert_close(hessian, block.stats()["mlp.up_proj"].hessian)


def test_targets_are_what_the_original_model_has_after_each_block():
    model, calibration = tiny_decoder(), Calibration.of(tokens(64), context=16)
    outputs = [block.outputs() for block in calibrated_blocks(tiny_decoder(), calibration)]
    found = []
    for block in calibrated_blocks(model, calibration, targets=True):
        found.append(block.targets)
        for name, layer in block.linears.items():
            replace_layer(block.module, name, QLinear(quantize(layer.weight, "int2-row")))
        # The twin: what the quantized block makes of its own inputs is something else.
        assert not torch.allclose(block.run(block.calls[0]), block.targets[0], atol=1e-2)
    assert len(found) == len(outputs) == 2
    for a, b in zip(found, outputs):
        torch.testing.assert_close(a[0], b[0])
    assert next(calibrated_blocks(tiny_decoder(), calibration)).targets is None
