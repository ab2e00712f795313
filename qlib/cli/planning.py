"""`qlib plan`: what a model will be, in bytes, before anything is quantized."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections import Counter
from pathlib import Path

import torch

from .. import zoo
from ..files import gguf_export, gguf_write
from ..files.gguf_report import GgufReport, Stored
from ..files.inspect import by_kind
from ..ggml import TYPES, mixes
from ..model import Decoder
from ..plan import kv_bytes, weights_bytes
from ..qtensor import QTensor
from ..recipe import plan
from ..report import Plan, bytes_by_kind
from ..rules import Recipe
from ..shapes import SHAPES
from .text import bits, kinds_table, size, table

HEAD = ("layer", "shape", "format", "layers", "bytes", "bits per weight")
CONTEXT = 8192


def run(options: argparse.Namespace, dtype: torch.dtype, recipe: Recipe | None) -> tuple[str, dict]:
    """The plan of `options.model` as text and as data: layers, bytes by kind, memory, fallbacks.

    Args:
        dtype: in which the model is loaded; recipe: None where `options.mix` is planned.
    """
    if options.model in SHAPES:
        return _on_paper(options, recipe)
    near = difflib.get_close_matches(options.model.lower(), map(str.lower, SHAPES), 1, 0.7)
    if near and not Path(options.model).exists() and options.model not in zoo.NAMES:
        name = next(name for name in SHAPES if name.lower() == near[0])
        raise ValueError(f"unknown model or shape {options.model!r}: did you mean {name!r}?")
    model = zoo.load(options.model, dtype)[0].to(dtype)
    return _mixed(options, model) if recipe is None else _planned(options, model, recipe)


def _planned(options: argparse.Namespace, model: Decoder, recipe: Recipe) -> tuple[str, dict]:
    planned = plan(model, recipe)
    kinds = planned_by_kind(planned)
    loaded = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    peak, why = loaded, "the model as loaded"
    sees = "inputs" if planned.is_static else recipe.chosen_method().sees
    if sees != "weight":
        # What a block reads and what it computes from that, for all tokens.
        peak += 2 * 4 * options.tokens * model.config.hidden_size
        why = "the model and the inputs of one block"
    if sees == "inputs":
        peak, why = peak + statistics_bytes(planned), why + " with their statistics"
    text = [f"{options.model}: {planned}", *table(HEAD, _rows(planned, recipe))]
    text += [f"inputs: {kind} ({n} layers)" for kind, n in planned.activations.items()]
    text.append("bytes:  " + ", ".join(f"{kind} {n:,}" for kind, n in kinds.items()))
    text.append(
        f"memory: {size(loaded)} as loaded, {size(planned.nbytes)} afterwards\n"
        f"peak:   about {size(peak)} besides Python, for {why}"
    )
    layers = [
        {
            "layer": s.layer,
            "shape": s.shape,
            "format": recipe.named(s.layer),
            "bytes": s.nbytes,
            "inputs": s.inputs and str(s.inputs),
        }
        for s in planned.steps
    ]
    data = {"model": options.model, "bytes": planned.nbytes, "bytes_by_kind": kinds}
    data |= {"bits_per_weight": planned.bits_per_weight, "loaded_bytes": loaded}
    return "\n".join(text), data | {"peak_bytes": peak, "layers": layers}


def planned_by_kind(planned: Plan) -> dict[str, int]:
    """Bytes of codes, scales, ... and of unquantized tensors that a plan will take."""
    kinds = {"unquantized": planned.other_bytes}
    for step in planned.steps:
        found = {"unquantized": step.nbytes}
        if step.format is not None:
            layout = step.format.layout(step.shape).items()
            parts = {n: torch.empty(s, dtype=dtype, device="meta") for n, (dtype, s) in layout}
            found = bytes_by_kind(QTensor(step.format, step.shape, parts))
        for kind, n in found.items():
            kinds[kind] = kinds.get(kind, 0) + n
    return kinds


def statistics_bytes(planned: Plan) -> int:
    """Bytes of the statistics of the largest block: a float32 [in, in] for each of its layers."""
    blocks: dict[str, int] = {}
    for step in planned.steps:
        block = re.match(r"(?:.*?\.\d+(?=\.))?", step.layer)[0]
        blocks[block] = blocks.get(block, 0) + 4 * step.shape[1] ** 2
    return max(blocks.values())


def _rows(planned: Plan, recipe: Recipe) -> list[tuple]:
    """One row for all layers of one role, shape and format; then what is no layer."""
    found: dict[tuple, list[int]] = {}
    for step in planned.steps:
        role = re.sub(r"^.*?\.\d+\.", "", step.layer)
        name = recipe.named(step.layer) or "kept as it is"
        found.setdefault((role, step.shape, name), []).append(step.nbytes)
    rows = [
        (*_row(role, shape, name), len(sizes), sum(sizes),
         bits(sum(sizes), len(sizes) * math.prod(shape)))
        for (role, shape, name), sizes in found.items()
    ]  # fmt: skip
    others = bits(planned.other_bytes, planned.other_weights)
    last = ("all other tensors", "", planned.other_dtype, None, planned.other_bytes, others)
    return [*rows, last]


def _row(role: str, shape: tuple[int, ...], name: str) -> tuple[str, str, str]:
    return role, str(list(shape)), name


def _mixed(options: argparse.Namespace, model: Decoder) -> tuple[str, dict]:
    """A GGUF file of a mix: the type that every tensor gets."""
    shapes = {name: tuple(weight.shape) for name, weight in gguf_export.named_weights(model)}
    gqa = model.config.num_attention_heads // model.config.num_key_value_heads
    mix = mixes.assign(options.mix, shapes, gqa, options.importance is not None)
    tensors = [
        Stored(name, kind, shapes[name], gguf_write.tensor_bytes(name, TYPES[kind], shapes[name]))
        for name, kind in mix.types.items()
    ]
    report = GgufReport("", options.mix, 0, tuple(tensors), mix.fallbacks, "none", 0.0)
    total, bpw = report.nbytes, report.bits_per_weight
    head = f"{options.model}: {len(tensors)} tensors, {options.mix}; {size(total)}, {bpw:.3f} bits"
    text = [f"{head} per weight in all", *kinds_table(by_kind(tensors))]
    same = Counter(f"{f.reason} -> {mixes.ggml_name(f.got)}" for f in mix.fallbacks)
    text += [f"fallback: {count:,} tensor(s), {reason}" for reason, count in same.items()]
    fallbacks = [str(fallback) for fallback in mix.fallbacks]
    data = {"model": options.model, "mix": options.mix, "bytes": total, "bits_per_weight": bpw}
    rows = [{"tensor": t.name, "type": t.kind, "bytes": t.nbytes} for t in tensors]
    return "\n".join(text), data | {"fallbacks": fallbacks, "tensors": rows}


def _on_paper(options: argparse.Namespace, recipe: Recipe | None) -> tuple[str, dict]:
    """A model that nobody has to have: its published shape is enough."""
    name, shape = options.model, SHAPES[options.model]
    if options.rule or recipe is None:
        raise ValueError(f"{name} is only a published shape: give --format, without rules")
    form = recipe.choose("")
    rows = [
        (*_row(role, m.shape, recipe.format), m.count, m.count * form.nbytes(m.shape),
         bits(form.nbytes(m.shape), math.prod(m.shape)))
        for role, m in shape.matrices.items()
    ]  # fmt: skip
    for role, n in (("embedding and head", shape.embedding), ("norms and others", shape.vectors)):
        rows.append((role, "", "16 bits", None, 2 * n, 16.0))
    total, cache = weights_bytes(shape, form), kv_bytes(shape, CONTEXT)
    bpw = bits(total, shape.parameters)
    weights = f"{name}, as published: {shape.parameters:,} weights"
    text = [f"{weights}; {size(total)}, {bpw:.3f} bits per weight in all", *table(HEAD, rows)]
    text.append(f"memory: {size(total)}, and {size(cache)} for {CONTEXT:,} tokens of 16-bit cache")
    data = {"model": name, "bytes": total, "weights": shape.parameters, "bits_per_weight": bpw}
    return "\n".join(text), data | {"cache_tokens": CONTEXT, "cache_bytes": cache}
