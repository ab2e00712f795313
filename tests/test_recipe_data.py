"""Methods that look at data, on whole models: what they see, what is refused, what is resumed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import CALIBRATED, raises, tiny_decoder, tokens
from torch import nn

import qlib
from qlib.block import Block
from qlib.calibrate import Calibration
from qlib.errors import FormatError
from qlib.linear import QLinear, dequantized
from qlib.methods import METHODS, Method
from qlib.presets import quantize
from qlib.recipe import Recipe, quantize_model, quantized

DATA = Calibration.of(tokens(160), context=16)
LOOKING = [method.name for method in METHODS.values() if method.sees != "weight"]


def stored(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the model, to the byte."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def output(model: nn.Module, seed: int = 5) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens(20, seed).unsqueeze(0))
    return getattr(found, "logits", found)


def dense(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers in place of every QLinear."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QLinear):
            qlib.linear.replace_layer(model, name, dequantized(layer))
    return model


# -- every method on every family ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALIBRATED)
def test_every_method_quantizes_every_family(name, method):
    model, reference = CALIBRATED[name](), CALIBRATED[name]()
    report = quantize_model(model, "int4-g16-asym", method, DATA, progress=False)
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    assert len(report.layers) == len(layers) == len(qlib.recipe.decoder_linears(reference))
    # QLinears compute what the dequantized model does.
    torch.testing.assert_close(output(model), output(dense(model)), rtol=1e-4, atol=1e-4)
    error = (output(model) - output(reference)).square().mean()
    assert 0 < error < 0.5 * output(reference).var()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_generates_what_its_dense_twin_does(method):
    model = tiny_decoder()
    quantize_model(model, "int8-g16-asym", method, DATA, progress=False)
    prompt = tokens(5).unsqueeze(0)
    assert torch.equal(model.generate(prompt, 8), dense(model).generate(prompt, 8))


@pytest.mark.parametrize("method", LOOKING)
def test_quantized_gives_every_tensor_back(method):
    model = tiny_decoder()
    before = stored(model)
    with quantized(model, "int3-g16-asym", method, DATA, progress=False):
        assert stored(model) != before
    assert stored(model) == before


@pytest.mark.parametrize("method", LOOKING)
def test_a_saved_model_is_the_same_model(method, tmp_path):
    model = tiny_decoder()
    quantize_model(model, "int3-g16-asym", method, DATA, progress=False)
    qlib.save(model, tmp_path)
    loaded, _ = qlib.load(tmp_path)
    assert stored(loaded) == stored(model)
    assert torch.equal(output(loaded), output(model))


# -- what a method sees ----------------------------------------------------------------------------


def spy(seen: dict) -> Method:
    def look(weight, format, stats):
        seen[len(seen)] = (weight, stats)
        return quantize(weight, format)

    return Method("spy", look, "inputs")


@pytest.mark.parametrize("original", [False, True])
def test_later_layers_see_the_quantized_ones_unless_told_otherwise(original):
    seen = {}
    quantize_model(
        tiny_decoder(), "int2-row", spy(seen), DATA, progress=False, original_inputs=original
    )
    assert len(seen) == 14
    reference = [b.stats() for b in qlib.calibrate.calibrated_blocks(tiny_decoder(), DATA)]
    last = reference[1]["mlp.down_proj"].hessian
    assert torch.allclose(seen[13][1].hessian, last, rtol=1e-3, atol=1e-5) == original


def test_report_says_what_it_was_calibrated_on():
    report = quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, progress=False)
    rows = dict(report.rows())
    assert rows["method"] == "spy"
    assert rows["calibration"] == "160 tokens in 10 windows of up to 16, all used"
    assert rows["worst layer"].endswith("dB in its outputs")


def test_output_ratio_is_measured_on_the_inputs():
    seen = {}
    report = quantize_model(tiny_decoder(), "int3-row", spy(seen), DATA, progress=False)
    weight, stats = seen[0]
    error = (weight - report.layers[0].format.quantize(weight).dequantize()).double()
    hessian = stats.hessian.double()
    noise = torch.einsum("oi,ij,oj->", error, hessian, error)
    signal = torch.einsum("oi,ij,oj->", weight.double(), hessian, weight.double())
    assert report.layers[0].output_db == pytest.approx((10 * torch.log10(signal / noise)).item())


@pytest.mark.parametrize("format", ["int3-g20-asym", "int4-tensor", "nvfp4", "nf4"])
def test_stacked_layers_are_quantized_like_single_ones(format):
    """Layers that read the same are given to GPTQ as one weight, where their rows are separate."""
    alone = replace(METHODS["gptq"], stacks=False)
    models = tiny_decoder(), tiny_decoder()
    for model, method in zip(models, (METHODS["gptq"], alone)):
        quantize_model(model, format, method, DATA, progress=False)
    stacked, single = map(stored, models)
    assert stacked.keys() == single.keys()
    # Matrices of another height may be multiplied in another order of the sums.
    same = sum(stacked[name] == single[name] for name in single)
    assert same >= len(single) - 2


def test_layers_of_different_formats_are_not_stacked():
    rules = (("*.k_proj", "int8-g16"), ("*.v_proj", None))
    model = tiny_decoder()
    report = quantize_model(model, Recipe("int3-g16", rules, "gptq"), calibration=DATA)
    found = {layer.layer.rpartition(".")[2]: layer.format for layer in report.layers}
    assert found["k_proj"] == qlib.format("int8-g16")
    assert found["q_proj"] == qlib.format("int3-g16")
    assert "v_proj" not in found


def test_rows_that_share_a_scale_cannot_be_split():
    q = quantize(torch.randn(6, 32), "int4-tensor")
    with raises(f"{q.format}: all rows share 'scale', so they stay together"):
        q.split([2, 4])
    pieces = quantize(torch.arange(192.0).view(6, 32), "int4-g20").split([2, 4])
    assert [piece.shape for piece in pieces] == [(2, 32), (4, 32)]
    whole = quantize(torch.arange(192.0).view(6, 32), "int4-g20").dequantize()
    assert torch.equal(torch.cat([piece.dequantize() for piece in pieces]), whole)


# -- refusals: the layer is named, and nothing is written ------------------------------------------


def test_data_must_be_given():
    with raises(
        "method 'spy' looks at data: pass calibration=token ids, for example "
        "qlib.Calibration.text(tokenizer)"
    ):
        quantize_model(tiny_decoder(), "int4-g16", spy({}))


def test_too_little_data_is_refused_before_anything_happens(tmp_path):
    model = tiny_decoder()
    with raises(
        "calibration has 50 tokens, fewer than one context of 256: give more text, or "
        "Calibration.of(tokens, context=50)"
    ):
        quantize_model(model, "int4-g16", spy({}), tokens(50), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not any(isinstance(m, QLinear) for m in model.modules())


def test_nan_weight_names_its_layer_and_writes_nothing(tmp_path):
    model = tiny_decoder()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with raises(
        "model.layers.1.mlp.up_proj [48, 32]: 1 NaN or infinite weights; repair them first"
    ):
        quantize_model(model, "int4-g16", spy({}), DATA, resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not any(isinstance(m, QLinear) for m in model.modules())


def test_nan_activation_names_its_layer_and_leaves_no_file_of_its_block(tmp_path):
    model = tiny_decoder()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with raises(
        "model.layers.1.mlp.gate_proj: 160 NaN or infinite inputs on the calibration text; "
        "a weight before it is broken, or the model overflows: load it in float32"
    ):
        quantize_model(model, "int4-g16", spy({}), DATA, progress=False, resume=tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["model.layers.0.json", "model.layers.0.safetensors"]


class Bypassed(nn.Module):
    """An MLP with an expert that no token is sent to."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.used, self.expert = mlp, nn.Linear(32, 48, bias=False)

    def forward(self, x):
        return self.used(x)


def with_unreached() -> nn.Module:
    model = tiny_decoder()
    model.model.layers[1].mlp = Bypassed(model.model.layers[1].mlp)
    return model.requires_grad_(False)


@pytest.mark.parametrize("method", LOOKING)
def test_a_layer_that_nothing_reaches_is_named(method):
    with raises(
        "model.layers.1.mlp.expert: no calibration token reaches this layer; give more text, or "
        "say unreached='keep' or unreached='rtn'"
    ):
        quantize_model(with_unreached(), "int4-g16-asym", method, DATA, progress=False)


@pytest.mark.parametrize(("choice", "kind"), [("keep", nn.Linear), ("rtn", QLinear)])
def test_a_layer_that_nothing_reaches_is_left_alone_or_rounded(choice, kind):
    model = with_unreached()
    expert = model.model.layers[1].mlp.expert.weight.clone()
    report = quantize_model(model, "int4-g16", spy({}), DATA, progress=False, unreached=choice)
    assert report.unreached == ["model.layers.1.mlp.expert"]
    assert "model.layers.1.mlp.expert" in str(report)
    layer = model.model.layers[1].mlp.expert
    assert type(layer) is kind
    wanted = expert if choice == "keep" else quantize(expert, "int4-g16").dequantize()
    found = layer.weight if choice == "keep" else layer.weight.dequantize()
    assert torch.equal(found, wanted)


def test_unknown_choice_for_unreached_layers():
    with raises("unreached is one of refuse, keep, rtn, got 'skip'"):
        quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, unreached="skip")


def test_method_errors_name_the_layer():
    def broken(weight, format, stats):
        raise ValueError("no")

    with raises("model.layers.0.self_attn.q_proj [32, 32]: no"):
        quantize_model(tiny_decoder(), "int4-g16", Method("broken", broken, "inputs"), DATA, False)


# -- interrupted and resumed -----------------------------------------------------------------------


class Killed(BaseException):
    """What a signal raises."""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_after_a_block_ends_with_the_same_bytes(method, tmp_path, monkeypatch):
    whole, again = tiny_decoder(), tiny_decoder()
    expected = quantize_model(whole, "int3-g16-asym", method, DATA, progress=False)
    broken = tiny_decoder()
    loaded = qlib.files.resume.Resume.load

    def die(self, block: Block):
        if block.name.endswith(".1"):
            raise Killed
        return loaded(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(qlib.files.resume.Resume, "load", die)
        with pytest.raises(Killed):
            quantize_model(broken, "int3-g16-asym", method, DATA, False, resume=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.layers.0.json", "model.layers.0.safetensors",
    ]  # fmt: skip
    report = quantize_model(again, "int3-g16-asym", method, DATA, False, resume=tmp_path)
    assert stored(again) == stored(whole)
    assert report.layers == expected.layers


def test_a_finished_run_is_not_done_again(tmp_path):
    quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)
    seen, model = {}, tiny_decoder()
    quantize_model(model, "int4-g16", spy(seen), DATA, False, resume=tmp_path)
    assert seen == {}
    # The twin: one other token, and the folder is refused.
    other = Calibration.of(torch.cat([tokens(159), tokens(1, 9)]), context=16)
    with raises(
        f"{tmp_path} holds another run (other weights, formats, calibration or method); choose "
        "another folder for resume, or delete this one"
    ):
        quantize_model(tiny_decoder(), "int4-g16", spy({}), other, False, resume=tmp_path)


@pytest.mark.parametrize("change", ["format", "weight", "switch"])
def test_a_folder_of_another_run_is_refused(change, tmp_path):
    quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)
    model = tiny_decoder()
    if change == "weight":
        model.model.norm.weight.data[0] += 1e-6
    format = "int4-g8" if change == "format" else "int4-g16"
    with pytest.raises(ValueError, match="holds another run"):
        quantize_model(
            model, format, spy({}), DATA, False, resume=tmp_path, original_inputs=change == "switch"
        )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 1', "\x00", "[" * 99999])
def test_a_broken_note_is_refused(content, tmp_path):
    quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)
    (tmp_path / "model.layers.0.json").write_text(content)
    with pytest.raises(FormatError, match="delete the folder"):
        quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)


@pytest.mark.parametrize("field", ["layers", "unreached"])
def test_a_note_without_a_field_is_refused(field, tmp_path):
    quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)
    path = tmp_path / "model.layers.0.json"
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="do not fit the block; delete the folder"):
        quantize_model(tiny_decoder(), "int4-g16", spy({}), DATA, False, resume=tmp_path)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from tiny_models import tiny_decoder, tokens
    from qlib.calibrate import Calibration
    from qlib.recipe import quantize_model
    from qlib.methods import METHODS, Method

    def method(weight, format, stats):
        method.calls += 1
        if method.calls == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return METHODS["rtn"].function(weight, format)

    method.calls = 0
    data = Calibration.of(tokens(160), context=16)
    quantize_model(tiny_decoder(), "int4-g16", Method("spy", method, "inputs"), data, False,
                   resume={folder!r})
"""


def test_a_killed_process_leaves_a_folder_that_can_be_resumed(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert run.returncode == -9, run.stderr
    assert (tmp_path / "model.layers.0.json").exists()
    assert not (tmp_path / "model.layers.1.json").exists()
    seen, model, whole = {}, tiny_decoder(), tiny_decoder()
    quantize_model(model, "int4-g16", spy(seen), DATA, False, resume=tmp_path)
    assert len(seen) == 7
    quantize_model(whole, "int4-g16", spy({}), DATA, False)
    assert stored(model) == stored(whole)


def test_a_layer_that_reads_only_zeros_is_named_where_inputs_are_static():
    model = tiny_decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    name = "model.layers.1.mlp.down_proj reads only zeros in calibration"
    with pytest.warns(UserWarning, match=f"^{name}") as caught:
        qlib.quantize_model(model, "w8a8-static", calibration=DATA, progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qlib.quantize_model(tiny_decoder(), "w8a8-static", calibration=DATA)


def test_arguments_of_a_method_are_part_of_a_run(tmp_path):
    chosen = [Method("gptq", partial(qlib.methods.gptq, damping=d), "inputs") for d in (0.01, 0.1)]
    quantize_model(tiny_decoder(), "int4-g16", chosen[0], DATA, False, resume=tmp_path)
    quantize_model(tiny_decoder(), "int4-g16", chosen[0], DATA, False, resume=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        quantize_model(tiny_decoder(), "int4-g16", chosen[1], DATA, False, resume=tmp_path)
