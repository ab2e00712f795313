"""Allocation of bits: the greedy choice against all choices, and what a measured damage is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import raises, tiny_decoder

import qlib
from qlib.allocate import allocate, damage
from qlib.knapsack import spend
from qlib.structure import decoder_linears

FORMATS = ["mxfp4", "mxfp6_e2m3"]


def protocol(model):
    ids = torch.randint(61, (128,), generator=torch.Generator().manual_seed(1))
    return qlib.Protocol("random", ids, context=64, stride=64, bos=None)


@pytest.fixture(scope="module")
def measured():
    model = tiny_decoder()
    return model, damage(model, FORMATS, protocol(model), progress=False)


def test_damage_is_the_divergence_with_one_layer_quantized(measured):
    model, found = measured
    assert found.keys() == decoder_linears(model).keys()
    name, other = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
    for format in FORMATS:
        changed = tiny_decoder()
        layer = changed.get_submodule(name)
        layer.weight.data = qlib.quantize(layer.weight, format).dequantize()
        kl = qlib.divergence(model, changed, protocol(model)).kl
        assert found[name][format] == pytest.approx(kl, rel=1e-4)
        assert found[other][format] != pytest.approx(kl, rel=1e-4)
    fresh = tiny_decoder()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("bpw", [4.267, 4.3, 5.0, 6.0, 6.25, 9.0])
def test_recipe_keeps_to_its_bits(measured, bpw):
    recipe = allocate(measured[0], bpw, measured[1])
    model = tiny_decoder()
    report = qlib.quantize_model(model, recipe, progress=False)
    layers = [layer for layer in report.layers if layer.layer in measured[1]]
    used = 8 * sum(sum(layer.nbytes.values()) for layer in layers)
    used /= sum(math.prod(layer.shape) for layer in layers)
    assert used <= bpw
    # No layer that could still have got more bits was left out.
    assert used >= min(bpw, 6.267) - 2 * 48 * 32 / 15_360


def test_too_few_bits(measured):
    with raises("4 bits per weight: the smallest formats take 4.267"):
        allocate(measured[0], 4, measured[1])


def test_greedy_is_near_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.cumsum(rng.uniform(1, 3, (7, 3)), axis=1)
        harm = np.sort(rng.exponential(size=(7, 3)), axis=1)[:, ::-1]
        budget = rng.uniform(sizes[:, 0].sum(), sizes[:, 2].sum())
        rows = np.arange(7)
        every = [list(c) for c in itertools.product(range(3), repeat=7)]
        fit = [c for c in every if sizes[rows, c].sum() <= budget]
        best = min(harm[rows, c].sum() for c in fit)
        chosen = spend(sizes, harm, budget)
        assert sizes[rows, chosen].sum() <= budget
        assert best <= harm[rows, chosen].sum() < best + 0.35 * harm[:, 0].sum()
        assert harm[rows, chosen].sum() <= np.median([harm[rows, c].sum() for c in fit])


def test_too_small_a_budget():
    with raises("7 bytes: the smallest candidates take 8"):
        spend(np.array([[4.0, 9.0], [4.0, 9.0]]), np.ones((2, 2)), 7)
