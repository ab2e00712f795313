"""Recipe: what every linear layer of a model becomes, and the recipes that have a name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from .activations import Inputs, inputs
from .methods import METHODS, Method, llm_int8
from .presets import format as named_format
from .qtensor import Format

Rules = tuple[tuple[str, object], ...]
# What to call for methods that rotate a model before another one rounds it.
ROTATIONS = {"quarot": "rotate", "rotate": "rotate", "spinquant": "spinquant"}


@dataclass(frozen=True)
class Recipe:
    """What every linear layer of a model becomes.

    Args:
        format: name or object for layers that no rule matches; None leaves weights as they are.
        rules: (pattern, format) pairs; the first shell-style pattern that matches a name decides.
        method: a name in `qlib.methods.METHODS`, a Method, or a function of (weight, format).
        activations: what layers that no rule matches do to their inputs: a format name (every call
            finds its own scales), one that ends in "-static", an Inputs object, or None.
        activation_rules: (pattern, activations) pairs, as `rules`.

    >>> recipe = Recipe("int4-g128", rules=(("*.down_proj", "int6-g64"), ("*.0.*", None)))
    >>> recipe.choose("model.layers.5.mlp.down_proj").block
    64
    """

    format: str | Format | None
    rules: Rules = ()
    method: str | Method | Callable = "rtn"
    activations: str | Format | Inputs | None = None
    activation_rules: Rules = ()

    def __post_init__(self):
        for name in ("rules", "activation_rules"):
            rules = getattr(self, name)
            if not all(isinstance(rule, tuple) and len(rule) == 2 for rule in rules):
                raise ValueError(f"{name} are (pattern, format) pairs in a tuple, got {rules!r}")
        for chosen in (self.activations, *(chosen for _, chosen in self.activation_rules)):
            inputs(chosen)

    @classmethod
    def of(cls, recipe: str | Format | Recipe) -> Recipe:
        """A recipe by its name in RECIPES, or the one that gives every layer one format."""
        found = RECIPES.get(recipe, recipe) if isinstance(recipe, str) else recipe
        return found if isinstance(found, Recipe) else cls(found)

    def named(self, layer: str) -> str | Format | None:
        """What the recipe calls the format of the layer called `layer`."""
        return _first(self.rules, layer, self.format)

    def choose(self, layer: str) -> Format | None:
        """The format of the layer called `layer`, or None if it stays as it is."""
        chosen = self.named(layer)
        return named_format(chosen) if isinstance(chosen, str) else chosen

    def choose_inputs(self, layer: str) -> Inputs | None:
        """How the layer called `layer` quantizes its inputs, or None if it does not."""
        return inputs(_first(self.activation_rules, layer, self.activations))

    def with_method(self, method: str | Method | Callable | None) -> Recipe:
        """The recipe with another method, unless that is None."""
        return self if method is None else replace(self, method=method)

    def chosen_method(self) -> Method:
        """The method as data. Raises ValueError, with the nearest name, if unknown."""
        if isinstance(self.method, Method):
            return self.method
        if callable(self.method):
            return Method(called(self.method), self.method)
        if self.method in ROTATIONS:
            call = f"call qlib.methods.{ROTATIONS[self.method]}(model, ...) first, then quantize it"
            raise ValueError(f"{self.method!r} rotates a model: {call} with method=...")
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method, METHODS, n=1, cutoff=0.0)
            raise ValueError(f"unknown method {self.method!r}: did you mean {near[0]!r}?")
        return METHODS[self.method]


def called(value: object) -> str:
    """How a function, or an argument of a partial one, is written: "gptq(damping=0.1)"."""
    if isinstance(value, partial):
        settings = [f"{name}={called(one)}" for name, one in value.keywords.items()]
        return f"{called(value.func)}({', '.join([*map(called, value.args), *settings])})"
    return getattr(value, "__qualname__", "function" if callable(value) else repr(value))


def _first(rules: Rules, layer: str, otherwise):
    matches = (chosen for pattern, chosen in rules if fnmatch.fnmatch(layer, pattern))
    return next(matches, otherwise)


# Weights, then activations. Activations in four bits want a rotated model (`qlib.methods.rotate`).
RECIPES = {
    "w8a8": Recipe("int8-row", activations="int8-row"),
    "w8a8-static": Recipe("int8-row", activations="int8-tensor-static"),
    "fp8": Recipe("fp8_e4m3", activations="fp8_e4m3"),
    "fp8-static": Recipe("fp8_e4m3", activations="fp8_e4m3-tensor-static"),
    "llm.int8": Recipe(llm_int8.INT8, method=llm_int8.quantize, activations=llm_int8.LLMInt8()),
    "w8a8-mxfp8": Recipe("mxfp8_e4m3", activations="mxfp8_e4m3"),
    "w4a8": Recipe("int4-g128", activations="int8-row"),
    "w4a4": Recipe("int4-g128", activations="int4-row-asym"),
    "w4a4-mxfp4": Recipe("mxfp4", activations="mxfp4"),
    "w4a4-nvfp4": Recipe("nvfp4", activations="nvfp4"),
}


def recipes() -> list[str]:
    """The names of recipes, which `quantize_model` takes for a format: weights and activations."""
    return list(RECIPES)
