"""A whole model: plan, quantize layer by layer, report."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .linear import QLinear, replace_layer
from .methods import METHODS
from .metrics import snr_db
from .presets import format as named_format
from .progress import bar
from .qtensor import Format, QTensor

KINDS = {"codes": "codes", "scale": "scales", "zero_point": "zeros", "offset": "zeros"}


@dataclass(frozen=True)
class Recipe:
    """What every linear layer of a model becomes.

    Args:
        format: name or object for layers that no rule matches.
        rules: (pattern, format or None) pairs; the first shell-style pattern that matches a layer's
            name decides, and None leaves the layer as it is.
        method: a name in `qlib.methods.METHODS`, or a function (weight, format) -> QTensor.

    >>> recipe = Recipe("int4-g128", rules=(("*.down_proj", "int6-g64"), ("*.0.*", None)))
    >>> recipe.choose("model.layers.5.mlp.down_proj").block
    64
    """

    format: str | Format
    rules: tuple[tuple[str, str | Format | None], ...] = ()
    method: str | Callable = "rtn"

    def choose(self, layer: str) -> Format | None:
        """The format of the layer called `layer`, or None if it stays as it is."""
        matches = (chosen for pattern, chosen in self.rules if fnmatch.fnmatch(layer, pattern))
        chosen = next(matches, self.format)
        return named_format(chosen) if isinstance(chosen, str) else chosen

    def function(self) -> Callable[[Tensor, Format], QTensor]:
        """The method as a function. Raises ValueError, with the nearest name, if unknown."""
        if callable(self.method):
            return self.method
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method, METHODS, n=1, cutoff=0.0)
            raise ValueError(f"unknown method {self.method!r}: did you mean {near[0]!r}?")
        return METHODS[self.method]


@dataclass(frozen=True)
class Step:
    """One line of a plan: a layer, what becomes of it, and the bytes that it will take."""

    layer: str
    shape: tuple[int, int]
    format: Format | None
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What `quantize_model` will do, known before a weight is touched."""

    steps: tuple[Step, ...]
    other_bytes: int
    other_weights: int
    other_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model afterwards."""
        return self.other_bytes + sum(step.nbytes for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the whole model, unquantized tensors included."""
        weights = self.other_weights + sum(math.prod(step.shape) for step in self.steps)
        return 8 * self.nbytes / weights

    def __str__(self) -> str:
        kept = sum(step.format is None for step in self.steps)
        return (
            f"{len(self.steps) - kept} layers to quantize, {kept} kept; "
            f"{self.nbytes / 1e6:,.1f} MB, {self.bits_per_weight:.3f} bits per weight in all"
        )


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer: its bytes by kind and its signal-to-noise ratio in decibels."""

    layer: str
    shape: tuple[int, int]
    format: Format
    nbytes: dict[str, int]
    snr_db: float


@dataclass
class Report:
    """What happened to a model: bits, bytes by kind, error and seconds."""

    plan: Plan
    layers: list[LayerResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the whole model by kind: codes, scales, zeros, codebooks, unquantized."""
        kept = sum(step.nbytes for step in self.plan.steps if step.format is None)
        total = {"codes": 0, "scales": 0, "zeros": 0, "codebooks": 0}
        for layer in self.layers:
            for kind, size in layer.nbytes.items():
                total[kind] += size
        total["unquantized"] = self.plan.other_bytes + kept
        return {kind: size for kind, size in total.items() if size}

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers alone."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * sum(sum(layer.nbytes.values()) for layer in self.layers) / max(1, weights)

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per weight of the whole model, unquantized tensors included."""
        return self.plan.bits_per_weight

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (label, value) pairs."""
        total = sum(self.nbytes.values())
        rows = [(f"{kind}", f"{n:,} bytes ({n / total:.1%})") for kind, n in self.nbytes.items()]
        rows.append(("total", f"{total:,} bytes"))
        if self.layers:
            worst = min(self.layers, key=lambda layer: layer.snr_db)
            rows.append(("bits per weight", f"{self.bits_per_weight:.3f} in quantized layers"))
            rows.append(("", f"{self.model_bits_per_weight:.3f} in the whole model"))
            rows.append(("", f"(unquantized tensors are {self.plan.other_dtype})"))
            rows.append(("worst layer", f"{worst.layer}, {worst.snr_db:.1f} dB"))
        rows.append(("time", f"{self.seconds:.1f} s"))
        return rows

    def __str__(self) -> str:
        head = f"{len(self.layers)} layers quantized\n"
        return head + "\n".join(f"  {label:<16} {value}" for label, value in self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = (f"<tr><th>{label}</th><td>{value}</td></tr>" for label, value in self.rows())
        title = f"<caption>{len(self.layers)} layers quantized</caption>"
        return f"<table>{title}<tbody>{''.join(lines)}</tbody></table>"


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the model's decoder blocks, by name.

    The blocks are found by structure, so any Hugging Face causal LM works: they are the longest
    outermost ModuleList that contains linear layers (a list of experts lies inside a block).
    Embeddings and the output head are not among them.
    Raises ValueError if there is no such list, or all of its layers are quantized already.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(map(_is_linear, module.modules()))
    }
    if not lists and any(isinstance(module, QLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is quantized already; load it again to start over"
        )
    if not lists:
        raise ValueError(f"{type(model).__name__} has no decoder blocks with unquantized nn.Linear")
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    prefix = max(outermost, key=lambda name: len(lists[name]))
    found = lists[prefix].named_modules(prefix=prefix)
    return {name: module for name, module in found if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def plan(model: nn.Module, recipe: str | Format | Recipe) -> Plan:
    """What `quantize_model` would do, without doing it.

    Raises ValueError naming the layer if a weight is empty or not finite, or if a rule of the
    recipe matches nothing.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    layers = decoder_linears(model)
    for pattern, _ in recipe.rules:
        if not fnmatch.filter(layers, pattern):
            example = next(iter(layers))
            raise ValueError(f"rule {pattern!r} matches no layer; names look like {example}")
    steps = tuple(_step(name, layer, recipe.choose(name)) for name, layer in layers.items())
    planned = {id(layer.weight) for layer in layers.values()}
    packed = [module.weight for module in model.modules() if isinstance(module, QLinear)]
    planned |= {id(part) for q in packed for part in q.parts.values()}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in planned]
    size = sum(t.numel() * t.element_size() for t in others) + sum(q.nbytes for q in packed)
    weights = sum(t.numel() for t in others) + sum(math.prod(q.shape) for q in packed)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in others})
    return Plan(steps, size, weights, " and ".join(dtypes))


def _step(name: str, layer: nn.Linear, format: Format | None) -> Step:
    weight = layer.weight
    shape = tuple(weight.shape)
    if weight.numel() == 0:
        raise ValueError(f"{name} {list(shape)}: the weight is empty; leave it out with a rule")
    if format is not None and not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{name} {list(shape)}: {bad} NaN or infinite weights; repair them first")
    dense = weight.numel() * weight.element_size()
    return Step(name, shape, format, dense if format is None else format.nbytes(shape))


@torch.no_grad()
def quantize_model(
    model: nn.Module, recipe: str | Format | Recipe, method: str | Callable | None = None,
    progress: bool = True,
) -> Report:  # fmt: skip
    """Replace the linear layers of a model's decoder blocks by QLinear, in place.

    Args:
        model: our Decoder or any Hugging Face causal LM; layers are replaced one at a time, so peak
            memory is the model as loaded plus one layer.
        recipe: a format name, a format, or a Recipe with rules.
        method: overrides the recipe's method.
        progress: show a bar when it takes more than two seconds.

    Raises ValueError naming the layer, its shape and the remedy, before any weight is touched
    where the plan can know it.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    choose_codes = Recipe(recipe.format, recipe.rules, method or recipe.method).function()
    planned = plan(model, recipe)
    report = Report(planned)
    start = time.perf_counter()
    todo = [step for step in planned.steps if step.format is not None]
    for step in bar(todo, "quantizing", "layer", progress):
        layer = model.get_submodule(step.layer)
        try:
            q = choose_codes(layer.weight, step.format)
        except ValueError as error:
            raise ValueError(f"{step.layer} {list(step.shape)}: {error}") from error
        report.layers.append(_result(step, layer.weight, q))
        replace_layer(model, step.layer, QLinear(q, layer.bias))
    report.seconds = time.perf_counter() - start
    return report


def _result(step: Step, weight: Tensor, q: QTensor) -> LayerResult:
    nbytes: dict[str, int] = {}
    for part, tensor in q.parts.items():
        kind = KINDS.get(part.split(".")[0], "codebooks")
        nbytes[kind] = nbytes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return LayerResult(step.layer, step.shape, q.format, nbytes, snr_db(weight, q.dequantize()))


@contextlib.contextmanager
def quantized(
    model: nn.Module, recipe: str | Format | Recipe, method: str | Callable | None = None,
    progress: bool = True,
) -> Iterator[Report]:  # fmt: skip
    """`quantize_model` for the length of a `with` block; the original layers come back after it.

    >>> import qlib
    >>> model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64)]))
    >>> with quantized(model, "int8-row") as report:
    ...     print(type(model[0][0]).__name__, report.bits_per_weight)
    QLinear 8.25
    >>> type(model[0][0]).__name__
    'Linear'
    """
    originals = decoder_linears(model)
    try:
        yield quantize_model(model, recipe, method, progress)
    finally:
        for name, layer in originals.items():
            replace_layer(model, name, layer)
