"""Recipes: which layer gets which weights and which activations, and the recipes with names."""

from __future__ import annotations

import pytest
import torch
from tiny_models import raises, tiny_decoder, tokens

import qlib
from qlib.activations import Dynamic, Static
from qlib.linear import DenseLinear
from qlib.methods.llm_int8 import LLMInt8
from qlib.rules import RECIPES, Recipe


def test_rules_of_activations_are_their_own():
    recipe = Recipe(
        "int4-g32", rules=(("*.down_proj", "int8-row"),), activations="int8-row",
        activation_rules=(("*.down_proj", None), ("*.0.*", "fp8_e4m3")),
    )  # fmt: skip
    assert recipe.choose("a.0.down_proj") == qlib.format("int8-row")
    assert recipe.choose_inputs("a.0.down_proj") is None
    assert recipe.choose_inputs("a.0.up_proj") == Dynamic(qlib.format("fp8_e4m3"))
    assert recipe.choose_inputs("a.1.up_proj") == Dynamic(qlib.format("int8-row"))
    assert recipe.named("a.1.up_proj") == "int4-g32"


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_name_formats(name):
    recipe = Recipe.of(name)
    assert recipe is RECIPES[name]
    weight, inputs = recipe.choose("any"), recipe.choose_inputs("any")
    assert weight.nbytes((256, 256)) <= 1.1 * 256 * 256
    kind = LLMInt8 if name == "llm.int8" else Static if "static" in name else Dynamic
    assert type(inputs) is kind
    assert inputs.is_ready == (kind is not Static)


def test_a_recipe_is_made_of_a_name_a_format_or_itself():
    assert qlib.recipes() == list(RECIPES)
    assert Recipe.of("int4-g32") == Recipe("int4-g32")
    assert Recipe.of(qlib.format("nf4")).choose("any") == qlib.format("nf4")
    assert Recipe.of(recipe := Recipe("nf4")) is recipe
    assert recipe.with_method(None) is recipe
    assert recipe.with_method("gptq").method == "gptq"


def test_what_is_no_rule_is_refused():
    with raises("activation_rules are (pattern, format) pairs in a tuple, got ('*', 'int8')"):
        Recipe("int4", activation_rules=("*", "int8"))
    names = "names look like model.layers.0.self_attn.q_proj (embeddings and the output head stay"
    with raises(f"rule '*.downproj' matches no layer; {names} as they are)"):
        recipe = Recipe("int4", activations="int8", activation_rules=(("*.downproj", None),))
        qlib.quantize_model(tiny_decoder(), recipe)


@pytest.mark.parametrize(
    "given", [{"activations": "int4-rows"}, {"activation_rules": (("*", "int4-rows"),)}]
)
def test_unknown_activations_are_refused_at_once(given):
    with raises(
        "unknown format 'int4-rows': did you mean int4-row, int4-g64-offset, int4-g128? "
        "qlib.formats() lists the names, qlib.recipes() those for models"
    ):
        Recipe(None, **given)


def test_weights_may_stay_as_they_are():
    model, ids = tiny_decoder(), tokens(20)[None]
    before = model(ids)
    recipe = Recipe(None, activations="int8-row")
    with qlib.recipe.quantized(model, recipe, progress=False) as report:
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, DenseLinear)
        assert str(layer).endswith("bias=False, inputs int8, block row, absmax, scale float16, "
                                   "dynamic)")  # fmt: skip
        error = (model(ids) - before).norm() / before.norm()
        assert 1e-4 < error < 0.1
        assert report.layers == []
        kind = "int8, block row, absmax, scale float16, dynamic"
        assert ("activations", f"{kind} (14 layers)") in report.rows()
    assert torch.equal(model(ids), before)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
