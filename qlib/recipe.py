"""A whole model: plan, calibrate, quantize block by block, report."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from .activations import Inputs
from .block import Block, Stats
from .calibrate import Calibration, calibrated_blocks
from .files.resume import Resume, fingerprint
from .linear import DenseLinear, QLinear, replace_layer
from .methods import Method, rtn
from .metrics import proxy_loss, snr_db
from .progress import bar
from .qtensor import Format, QTensor
from .report import BlockResult, LayerResult, Plan, Report, Step, bytes_by_kind
from .rules import Recipe, called
from .structure import decoder_blocks, decoder_linears

UNREACHED = ("refuse", "keep", "rtn")
# Set on a model while its weights are being replaced.
UNFINISHED = "_qlib_unfinished"


def plan(model: nn.Module, recipe: str | Format | Recipe) -> Plan:
    """What `quantize_model` would do, without doing it.

    Raises ValueError naming the layer if a weight is empty or not finite, or if a rule of the
    recipe matches nothing.
    """
    recipe = Recipe.of(recipe)
    layers = decoder_linears(model)
    for pattern, _ in (*recipe.rules, *recipe.activation_rules):
        if not fnmatch.filter(layers, pattern):
            example = next(iter(layers))
            raise ValueError(
                f"rule {pattern!r} matches no layer; names look like {example} (embeddings and "
                "the output head stay as they are)"
            )
    steps = tuple(
        _step(name, layer, recipe.choose(name), recipe.choose_inputs(name))
        for name, layer in layers.items()
    )
    planned = {id(layer.weight) for layer in layers.values()}
    packed = [module.weight for module in model.modules() if isinstance(module, QLinear)]
    planned |= {id(part) for q in packed for part in q.parts.values()}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in planned]
    size = sum(t.numel() * t.element_size() for t in others) + sum(q.nbytes for q in packed)
    weights = sum(t.numel() for t in others) + sum(math.prod(q.shape) for q in packed)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in others})
    return Plan(steps, size, weights, " and ".join(dtypes))


def _step(name: str, layer: nn.Linear, format: Format | None, inputs: Inputs | None) -> Step:
    weight = layer.weight
    shape = tuple(weight.shape)
    if weight.numel() == 0:
        raise ValueError(f"{name} {list(shape)}: the weight is empty; leave it out with a rule")
    if format is not None and not weight.is_meta and not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{name} {list(shape)}: {bad} NaN or infinite weights; repair them first")
    dense = weight.numel() * weight.element_size()
    with _naming(name):
        size = dense if format is None else format.nbytes(shape)
        return Step(name, shape, format, size, inputs)


@torch.no_grad()
def quantize_model(
    model: nn.Module, recipe: str | Format | Recipe, method: str | Method | Callable | None = None,
    calibration=None, progress: bool = True, *, original_inputs: bool = False,
    unreached: str = "refuse", resume: str | os.PathLike | None = None,
) -> Report:  # fmt: skip
    """Replace the linear layers of a model's decoder blocks by QLinear, in place, block by block.

    Args:
        model: our Decoder or any Hugging Face causal LM; peak memory is the model as loaded plus
            the activations and statistics of one block.
        recipe: a format name, a format, a name in RECIPES such as "w8a8", or a Recipe with rules.
        method: overrides the recipe's method.
        calibration: a Calibration, or tokens as `Calibration.of` takes them, for the methods that
            look at data.
        progress: show a bar when it takes more than two seconds.
        original_inputs: calibrate every block on what the original blocks before it put out,
            instead of on what the quantized ones do.
        unreached: what becomes of a layer that no calibration token reaches (a rare expert):
            "refuse" raises, "keep" leaves it as it is, "rtn" rounds it to nearest; either leaves
            its inputs as they are if they were to be static.
        resume: a folder that keeps every finished block; the same call made again after an
            interruption continues there and ends with the same bytes.

    Raises ValueError naming the layer, its shape and the remedy, before any weight is touched
    where the plan can know it. A model whose quantization failed later must be loaded again.
    """
    if unreached not in UNREACHED:
        raise ValueError(f"unreached is one of {', '.join(UNREACHED)}, got {unreached!r}")
    if getattr(model, UNFINISHED, False):
        raise ValueError("the quantization of this model failed half-way: load it again")
    recipe = Recipe.of(recipe).with_method(method)
    chosen = recipe.chosen_method()
    planned = plan(model, recipe)
    data = _calibration(calibration, chosen, planned)
    report = Report(planned, chosen.name, "none" if data is None else str(data))
    start = time.perf_counter()
    settings = [chosen.name, _arguments(chosen), original_inputs, unreached]
    finished = resume and Resume(resume, fingerprint(model, planned, data, settings))
    blocks = calibrated_blocks(model, data, original_inputs=original_inputs, targets=chosen.targets)
    for block in bar(blocks, "quantizing", "block", progress, len(decoder_blocks(model)[1])):
        result = finished.load(block) if finished else None
        if result is None:
            steps = _steps(planned, block)
            block.activations = {n: step.inputs for n, step in steps.items() if step.inputs}
            formats = {name: step.format for name, step in steps.items() if step.format is not None}
            result = _quantize_block(block, formats, chosen, unreached)
            result.inputs = _observed(block, result, unreached)
            if finished:
                finished.save(block, result)
        setattr(model, UNFINISHED, True)
        for name in result.tensors | result.inputs:
            layer = _replacement(block.linears[name], result, name)
            replace_layer(model, _full(block, name), layer)
        report.layers += result.layers
        report.unreached += result.unreached
    vars(model).pop(UNFINISHED, None)
    report.seconds = time.perf_counter() - start
    return report


def _replacement(layer: nn.Linear, result: BlockResult, name: str) -> nn.Module:
    transform, inputs = getattr(layer, "transform", None), result.inputs.get(name)
    if name in result.tensors:
        return QLinear(result.tensors[name], layer.bias, transform, inputs)
    return DenseLinear(layer.weight, layer.bias, transform, inputs)


def _observed(block: Block, result: BlockResult, unreached: str) -> dict[str, Inputs]:
    """The block's inputs; where they have one range for all text, the one that it has there."""
    chosen = dict(block.activations)
    if unreached == "keep":
        chosen = {n: one for n, one in chosen.items() if _full(block, n) not in result.unreached}
    if all(inputs.is_ready for inputs in chosen.values()):
        return chosen
    stats = result.stats or block.stats()
    for name, inputs in block.activations.items():
        if not inputs.is_ready and not stats[name].tokens:
            if unreached == "refuse":
                raise _no_token(block, name)
            # A range that nothing was seen of would be empty: these inputs stay as they are.
            chosen.pop(name, None)
            result.unreached += {_full(block, name)} - set(result.unreached)
    for name, inputs in chosen.items():
        if not inputs.is_ready and stats[name].ends == (0.0, 0.0):
            what = "reads only zeros in calibration, so static inputs round all others to 0"
            warnings.warn(f"{_full(block, name)} {what}: give it dynamic ones", stacklevel=3)
    return {name: inputs.observed(*stats[name].ends) for name, inputs in chosen.items()}


def _arguments(method: Method) -> str:
    # A function is known by the method's name; what was given to it beforehand is not.
    return called(method.function) if isinstance(method.function, partial) else ""


def _full(block: Block, name: str) -> str:
    # A block that is itself a linear layer has the name "" in itself.
    return f"{block.name}.{name}".rstrip(".")


def _no_token(block: Block, name: str) -> ValueError:
    return ValueError(
        f"{_full(block, name)}: no calibration token reaches this layer; give more text, "
        "or say unreached='keep' or unreached='rtn'"
    )


def _calibration(calibration, method: Method, planned: Plan) -> Calibration | None:
    if method.sees == "weight" and not planned.is_static:
        return None
    if calibration is None:
        what = f"method {method.name!r} looks at"
        what = "ranges of static activations come from" if method.sees == "weight" else what
        raise ValueError(
            f"{what} data: pass calibration=token ids, for example qlib.Calibration.text(tokenizer)"
        )
    data = Calibration.of(calibration)
    widest = max((step.shape[1] for step in planned.steps if step.format is not None), default=0)
    if data.tokens < widest and method.sees != "weight":
        warnings.warn(
            f"{data.tokens} calibration tokens for layers of up to {widest} inputs: with fewer "
            f"than several tokens for each input {method.name} can be worse than rounding",
            stacklevel=3,
        )
    return data


def _steps(planned: Plan, block: Block) -> dict[str, Step]:
    """The plan of the block's layers, by their names in the block."""
    start = f"{block.name}."
    steps = [step for step in planned.steps if f"{step.layer}.".startswith(start)]
    return {f"{step.layer}.".removeprefix(start).rstrip("."): step for step in steps}


def _quantize_block(
    block: Block, formats: dict[str, Format], method: Method, unreached: str
) -> BlockResult:
    stats = block.stats() if method.sees == "inputs" and formats else {}
    reached = {name for name, one in stats.items() if one.tokens}
    if method.sees == "block":
        reached = block.reached()
    missing = [] if method.sees == "weight" else [name for name in formats if name not in reached]
    if missing and unreached == "refuse":
        raise _no_token(block, missing[0])
    chosen = {name: format for name, format in formats.items() if name not in missing}
    if method.sees == "block":
        with _naming(block.name):
            tensors = method.function(block, chosen) if chosen else {}
    else:
        tensors = {}
        for names in _together(chosen, stats) if method.stacks else [[name] for name in chosen]:
            weights = [block.linears[name].weight for name in names]
            data = [stats[names[0]]] if stats else []
            with _naming(f"{block.name}.{' + '.join(names)} {list(weights[0].shape)}"):
                q = method.function(torch.cat(weights), chosen[names[0]], *data)
            pieces = q.split([len(weight) for weight in weights]) if len(names) > 1 else [q]
            tensors |= dict(zip(names, pieces))
    if unreached == "rtn":
        tensors |= {name: rtn(block.linears[name].weight, formats[name]) for name in missing}
    layers = [_result(block, name, q, stats.get(name)) for name, q in tensors.items()]
    return BlockResult(tensors, layers, [_full(block, name) for name in missing], stats=stats)


def _together(formats: dict[str, Format], stats: dict[str, Stats]) -> list[list[str]]:
    """Layers whose rows one call can quantize: they read the same and share no stored tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, format in formats.items():
        columns = len(stats[name].amax)
        alone = any(size[0] != 2 for _, size in format.layout((2, columns)).values())
        key = (id(stats[name]), id(format) if alone else format, name if alone else "")
        groups.setdefault(key, []).append(name)
    return list(groups.values())


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _result(block: Block, name: str, q: QTensor, stats: Stats | None) -> LayerResult:
    weight, rounded = block.linears[name].weight.float(), q.dequantize()
    output = None
    if stats is not None and stats.tokens:
        loss = proxy_loss(weight, rounded, stats.hessian)
        output = -10 * math.log10(loss) if loss > 0 else math.inf
    ratio = snr_db(weight, rounded)
    return LayerResult(_full(block, name), q.shape, q.format, bytes_by_kind(q), ratio, output)


@contextlib.contextmanager
def quantized(
    model: nn.Module, recipe: str | Format | Recipe, method: str | Method | Callable | None = None,
    calibration=None, progress: bool = True, **options,
) -> Iterator[Report]:  # fmt: skip
    """`quantize_model` for the length of a `with` block; the original weights come back after it.

    >>> import qlib
    >>> model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64)]))
    >>> with quantized(model, "int8-row") as report:
    ...     print(type(model[0][0]).__name__, report.bits_per_weight)
    QLinear 8.25
    >>> type(model[0][0]).__name__
    'Linear'
    """
    layers = decoder_linears(model)
    # Methods that rescale norms bind new tensors, so the old ones are still these.
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        yield quantize_model(model, recipe, method, calibration, progress, **options)
    finally:
        for name, layer in layers.items():
            replace_layer(model, name, layer)
        for name, parameter in model.named_parameters():
            parameter.data = values[name]
        vars(model).pop(UNFINISHED, None)
