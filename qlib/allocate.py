"""Which layer gets which format: a budget of bits, spent where it lowers the damage most.

The damage of a layer in a format is measured, not guessed: the divergence of the model when that
layer alone is quantized. Summed over layers it is close to the divergence of the whole, as long as
it is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from .knapsack import spend
from .linear import QLinear, dequantized, replace_layer
from .metrics import Reference, divergence
from .presets import format as named_format
from .progress import bar
from .protocol import Protocol
from .recipe import Recipe
from .structure import decoder_linears

Damage = dict[str, dict[str, float]]


@torch.no_grad()
def damage(
    model: nn.Module, formats: Sequence[str], protocol: Protocol, progress: bool = True
) -> Damage:
    """KL divergence of the model with one layer at a time in each format: layer -> format -> nats.

    Args:
        model: our Decoder or any Hugging Face causal LM; it is left as it was.
        formats: names of the candidates.
        protocol: the text on which the divergence is measured.

    It takes one evaluation for every layer and format, so choose a short text.
    """
    reference = Reference(model, protocol)
    found: Damage = {}
    for name, layer in bar(decoder_linears(model).items(), "damage", "layer", progress):
        found[name] = {}
        for format in formats:
            q = named_format(format).quantize(layer.weight)
            turn, inputs = getattr(layer, "transform", None), getattr(layer, "inputs", None)
            replace_layer(model, name, dequantized(QLinear(q, layer.bias, turn, inputs)))
            try:
                found[name][format] = divergence(reference, model, protocol).kl
            finally:
                replace_layer(model, name, layer)
    return found


def allocate(model: nn.Module, bpw: float, damage: Mapping[str, Mapping[str, float]]) -> Recipe:
    """The recipe of at most `bpw` bits per weight, over the layers of `damage`, that harms least.

    Args:
        model: as given to `damage`, not quantized yet.
        bpw: bits per weight, counted from stored bytes.
        damage: layer -> format -> harm; the same formats for every layer.

    Raises ValueError if even the smallest formats take more.
    """
    if not damage:
        raise ValueError("damage names no layer: measure it with qlib.allocate.damage")
    layers = decoder_linears(model)
    formats = list(next(iter(damage.values())))
    shapes = [tuple(layers[name].weight.shape) for name in damage]
    sizes = np.array([[named_format(f).nbytes(shape) for f in formats] for shape in shapes], float)
    harm = np.array([[damage[name][format] for format in formats] for name in damage])
    weights = sum(map(math.prod, shapes))
    least = 8 * sizes.min(1).sum() / weights
    if bpw < least:
        raise ValueError(f"{bpw:g} bits per weight: the smallest formats take {least:.4g}")
    chosen = dict(zip(damage, spend(sizes, harm, bpw * weights / 8)))
    smallest = formats[int(sizes.sum(0).argmin())]
    rules = {name: formats[i] for name, i in chosen.items() if formats[i] != smallest}
    return Recipe(smallest, rules=tuple(rules.items()))
