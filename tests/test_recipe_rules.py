"""Recipes: which layer gets which format, what cannot be planned, and what the report says."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from torch import nn

import qlib
from qlib.linear import QLinear
from qlib.methods import gptq, smoothquant
from qlib.model import Config, Decoder
from qlib.recipe import Recipe, Report, decoder_linears, plan, quantize_model, quantized

DOWN = "model.layers.1.mlp.down_proj"


def tiny_decoder() -> Decoder:
    config = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)
    generator = torch.Generator().manual_seed(0)
    return Decoder(config).normal_init(0.3, generator).requires_grad_(False)


def formats_of(model: nn.Module) -> dict[str, str]:
    named = model.named_modules()
    return {name: str(module.format) for name, module in named if isinstance(module, QLinear)}


def raises(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# -- which layer gets which format ----------------------------------------------------------------


def test_the_first_matching_rule_decides():
    rules = (("*.0.*.down_proj", None), ("*.down_proj", "int8-row"), ("*.0.*", "int6-g16"))
    model = tiny_decoder()
    quantize_model(model, Recipe("int4-g16", rules), progress=False)
    found = formats_of(model)
    assert "model.layers.0.mlp.down_proj" not in found
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    for name, format in found.items():
        expected = "int6-g16" if ".0." in name else "int4-g16"
        expected = "int8-row" if name == DOWN else expected
        assert format == str(qlib.format(expected)), name


def test_rules_in_another_order_give_another_model():
    one, two = tiny_decoder(), tiny_decoder()
    rules = (("*.down_proj", "int8-row"), ("*.1.*", "int6-g16"))
    quantize_model(one, Recipe("int4-g16", rules), progress=False)
    quantize_model(two, Recipe("int4-g16", rules[::-1]), progress=False)
    assert formats_of(one)[DOWN] != formats_of(two)[DOWN]


def test_kept_layers_are_counted_as_unquantized():
    model = tiny_decoder()
    planned = plan(model, Recipe("int4-g16", (("*.self_attn.*", None),)))
    kept = [step for step in planned.steps if step.format is None]
    assert len(kept) == 8
    assert sum(step.nbytes for step in kept) == 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32)
    report = quantize_model(model, Recipe("int4-g16", (("*.self_attn.*", None),)), progress=False)
    assert report.nbytes["unquantized"] == planned.other_bytes + sum(s.nbytes for s in kept)
    assert len(report.layers) == 6


def test_formats_and_methods_may_be_objects():
    def upside_down(weight, format):
        return qlib.quantize(-weight, format)

    model, plain = tiny_decoder(), tiny_decoder()
    quantize_model(model, Recipe(qlib.format("int8-row"), method=upside_down), progress=False)
    quantize_model(plain, "int8-row", progress=False)
    found, wanted = (m.get_submodule(DOWN).weight.dequantize() for m in (model, plain))
    assert torch.equal(found, -wanted)


def test_a_partial_method_is_named_with_its_settings():
    def name(method) -> str:
        return Recipe("int4", method=method).chosen_method().name

    assert name(gptq) == "gptq"
    assert name(partial(gptq, damping=0.1)) == "gptq(damping=0.1)"
    assert name(partial(gptq, damping=0.2)) != name(partial(gptq, damping=0.1))
    # A resumed run computes this again: no address of this process may be in it.
    nested = partial(smoothquant, 1, rounding=partial(gptq, act_order=True), dtype=torch.float16)
    assert name(nested) == "smoothquant(1, rounding=gptq(act_order=True), dtype=torch.float16)"

    class Called:
        def __call__(self, weight, format):
            return qlib.quantize(weight, format)

    assert name(Called()) == "function"
    assert name(partial(Called(), again=Called())) == "function(again=function)"


def test_the_argument_overrides_the_recipes_method():
    model = tiny_decoder()
    quantize_model(model, Recipe("int8-row", method="no-such"), method="rtn", progress=False)
    assert len(formats_of(model)) == 14


# -- the original layers come back ----------------------------------------------------------------


def test_quantized_restores_the_very_same_layers():
    model = tiny_decoder()
    before = dict(model.named_modules())
    with quantized(model, "int4-g16", progress=False) as report:
        assert len(formats_of(model)) == len(report.layers) == 14
    assert dict(model.named_modules()) == before


def test_quantized_restores_after_an_error_inside():
    model = tiny_decoder()
    before = dict(model.named_modules())
    with pytest.raises(KeyError), quantized(model, "int4-g16", progress=False):
        raise KeyError
    assert dict(model.named_modules()) == before


def test_quantized_restores_after_half_a_model():
    model = tiny_decoder()
    before = dict(model.named_modules())
    model.get_submodule(DOWN).weight.data[3, 5] = 1e6
    message = f"{DOWN} [32, 48]: a scale of 1.43e+05 overflows float16; store it as torch.float32"
    with raises(message), quantized(model, "int4-row", progress=False):
        pass
    assert dict(model.named_modules()) == before


# -- which layers are a model's own ---------------------------------------------------------------


class Experts(nn.Module):
    """Two decoder blocks whose lists of experts are longer than the list of blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(5))})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 9)


def test_blocks_with_many_experts_are_found():
    found = decoder_linears(Experts())
    assert list(found) == [f"blocks.{i}.experts.{j}" for i in range(2) for j in range(5)]


def test_the_longest_list_of_blocks_is_taken():
    model = nn.ModuleDict(
        {
            "short": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
            "long": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            "no_linear": nn.ModuleList(nn.LayerNorm(4) for _ in range(9)),
        }
    )
    assert list(decoder_linears(model)) == ["long.0", "long.1", "long.2"]


def test_a_model_without_blocks():
    with raises("Linear has no decoder blocks with unquantized nn.Linear"):
        plan(nn.Linear(4, 4), "int4-row")


def test_a_model_that_is_quantized_already():
    model = tiny_decoder()
    quantize_model(model, "int4-row", progress=False)
    with raises("Decoder is quantized already; load it again to start over"):
        quantize_model(model, "int4-row", progress=False)


# -- errors, word for word, before a weight is touched --------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_layer_is_named(bad):
    model = tiny_decoder()
    model.get_submodule(DOWN).weight.data[3, 5:7] = bad
    with raises(f"{DOWN} [32, 48]: 2 NaN or infinite weights; repair them first"):
        quantize_model(model, "int4-row", progress=False)
    assert formats_of(model) == {}


def test_an_empty_layer_is_named():
    model = tiny_decoder()
    model.get_submodule(DOWN).weight = nn.Parameter(torch.empty(32, 0))
    with raises(f"{DOWN} [32, 0]: the weight is empty; leave it out with a rule"):
        quantize_model(model, "int4-row", progress=False)
    assert formats_of(model) == {}


def test_a_rule_can_leave_a_broken_layer_out():
    model = tiny_decoder()
    model.get_submodule(DOWN).weight.data[0, 0] = math.nan
    quantize_model(model, Recipe("int4-row", ((DOWN, None),)), progress=False)
    assert len(formats_of(model)) == 13


def test_an_overflowing_scale_is_named():
    model = tiny_decoder()
    model.get_submodule(DOWN).weight.data[3, 5] = 1e6
    with raises(
        f"{DOWN} [32, 48]: a scale of 1.43e+05 overflows float16; store it as torch.float32"
    ):
        quantize_model(model, "int4-row", progress=False)


def test_unknown_format():
    with raises(
        "unknown format 'int4-g12o': did you mean int4-g128, int4-row, int1-g32? "
        "qlib.formats() lists the names, qlib.recipes() those for models"
    ):
        quantize_model(tiny_decoder(), "int4-g12o", progress=False)


def test_unknown_method():
    model = tiny_decoder()
    with raises("unknown method 'rnt': did you mean 'rtn'?"):
        quantize_model(model, "int4-row", method="rnt", progress=False)
    assert formats_of(model) == {}


@pytest.mark.parametrize(
    ("name", "function"), [("quarot", "rotate"), ("rotate", "rotate"), ("spinquant", "spinquant")]
)
def test_a_rotation_is_no_method(name, function):
    model = tiny_decoder()
    with raises(
        f"{name!r} rotates a model: call qlib.methods.{function}(model, ...) first, then quantize "
        "it with method=..."
    ):
        quantize_model(model, "int4-row", method=name, progress=False)
    assert formats_of(model) == {}
    # What the message tells to call.
    assert getattr(qlib.methods, function).__module__ == f"qlib.methods.{function}"


def test_a_rule_that_matches_nothing():
    message = (
        "rule '*.dwon_proj' matches no layer; names look like model.layers.0.self_attn.q_proj "
    )
    message += "(embeddings and the output head stay as they are)"
    with raises(message):
        plan(tiny_decoder(), Recipe("int4-row", (("*.dwon_proj", None),)))


def test_a_weight_that_is_no_matrix():
    with raises("a linear weight is [out, in], got [4, 4, 4]"):
        QLinear(qlib.quantize(torch.ones(4, 4, 4), "int4-row"))


# -- what the report says -------------------------------------------------------------------------


def test_plan_prints():
    planned = plan(tiny_decoder(), Recipe("int4-g16", (("*.down_proj", None),)))
    kept = 2 * 48 * 32 + 61 * 32 + 5 * 32
    packed = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 48 * 32)
    bits = (5 * packed + 32 * kept) / (packed + kept)
    assert str(planned) == (
        f"12 layers to quantize, 2 kept; 0.0 MB, {bits:.3f} bits per weight in all"
    )


def test_report_prints():
    model = tiny_decoder()
    report = quantize_model(model, "int4-g16", progress=False)
    report.seconds = 1.26
    worst = min(report.layers, key=lambda layer: layer.snr_db)
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    codes, scales, kept = weights // 2, weights // 8, 4 * (61 * 32 + 5 * 32)
    total = codes + scales + kept
    assert str(report).splitlines() == [
        "14 layers quantized",
        f"  codes            {codes:,} bytes ({codes / total:.1%})",
        f"  scales           {scales:,} bytes ({scales / total:.1%})",
        f"  unquantized      {kept:,} bytes ({kept / total:.1%})",
        f"  total            {total:,} bytes",
        "  bits per weight  5.000 in quantized layers",
        f"                   {8 * total / (weights + kept // 4):.3f} in the whole model",
        "                   (unquantized tensors are float32)",
        f"  worst layer      {worst.layer}, {worst.snr_db:.1f} dB in its weights",
        "  method           rtn",
        "  time             1.3 s",
    ]
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert page.startswith("<table><caption>14 layers quantized</caption>")
    assert page.count("<tr>") == len(report.rows())
    assert f"<tr><th>codes</th><td>{codes:,} bytes" in page


def test_a_layer_of_zeros_is_not_the_worst():
    model = tiny_decoder()
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.data.zero_()
    rows = dict(quantize_model(model, "int4-g16", progress=False).rows())
    assert "nan" not in rows["worst layer"]


def test_an_empty_report_prints():
    model = tiny_decoder()
    report = quantize_model(model, Recipe("int4-row", (("*", None),)), progress=False)
    assert report.bits_per_weight == 0
    assert report.model_bits_per_weight == 32
    assert "0 layers quantized" in str(Report(report.plan))


def test_a_model_that_failed_half_way_is_not_quantized_again():
    model, text = tiny_decoder(), qlib.Calibration.of(torch.arange(80) % 7, context=16)
    model.model.layers[1].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1"):
        quantize_model(model, "int2-g8", "gptq", text, progress=False)
    model.model.layers[1].input_layernorm.weight.data[0] = 1
    with raises("the quantization of this model failed half-way: load it again"):
        quantize_model(model, "int4-g8", progress=False)


def test_rules_are_pairs():
    with raises("rules are (pattern, format) pairs in a tuple, got ('*.q_proj', None)"):
        Recipe("int4-row", ("*.q_proj", None))


def test_a_call_that_was_refused_may_be_made_again():
    model, wrong = tiny_decoder(), qlib.Calibration.of(torch.full((80,), 61), context=16)
    with pytest.raises(ValueError, match="calibration holds token 61"):
        quantize_model(model, "int4-g8", "gptq", wrong, progress=False)
    quantize_model(model, "int4-g8", progress=False)
    assert len(formats_of(model)) == 14


def test_a_width_that_a_format_cannot_hold_names_the_layer():
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: Q4_K stores blocks"
    ):
        plan(tiny_decoder(), "q4_k")
