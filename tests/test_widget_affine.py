"""The affine widget: its data against the weights, its formulas against torch, and no network."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import qlib
from qlib.metrics import snr_db
from qlib.widgets import affine
from qlib.widgets.affine import Affine

SOURCE = (Path(affine.__file__).with_suffix(".js")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(500, generator=torch.Generator().manual_seed(0))


def test_weights_are_the_given_ones(weights):
    sent = torch.tensor(Affine.of(weights).weights)
    torch.testing.assert_close(sent, weights, rtol=1e-4, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sent.flip(0), weights, rtol=1e-4, atol=0)


def test_eight_chosen_weights_cover_the_range(weights):
    widget = Affine.of(weights)
    picked = [widget.weights[i] for i in widget.chosen]
    assert len(picked) == 8
    assert picked == sorted(picked)
    assert (picked[0], picked[-1]) == (min(widget.weights), max(widget.weights))
    ranked = sorted(widget.weights)
    assert picked[3] == ranked[round(3 * 499 / 7)] != ranked[round(4 * 499 / 7)]


def test_first_view_clips_nothing_and_equals_the_library(weights):
    """At the start the range is the library's `int4-row`: the same scale, so the same SNR."""
    widget = Affine.of(weights)
    assert (widget.bits, widget.symmetric) == (4, True)
    assert widget.high == widget.limit == weights.abs().max().item()
    assert widget.low == weights.min().item()
    scale = widget.high / 7
    shown = torch.fake_quantize_per_tensor_affine(weights, scale, 0, -8, 7)
    q = qlib.quantize(weights.view(1, -1), "int4-row").dequantize()[0]
    assert math.isclose(snr_db(weights, shown), snr_db(weights, q), rel_tol=0.01)
    wrong = torch.fake_quantize_per_tensor_affine(weights, widget.high / 8, 0, -8, 7)
    assert not math.isclose(snr_db(weights, wrong), snr_db(weights, q), rel_tol=0.01)


def test_state_can_be_chosen(weights):
    widget = Affine.of(weights, bits=3, symmetric=False, high=1.5)
    assert (widget.bits, widget.symmetric, widget.high) == (3, False, 1.5)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.ones(20), -torch.ones(20), torch.full((20,), torch.nan)]
)
def test_weights_that_show_nothing_are_refused(bad):
    message = f"^need at least 8 finite weights of both signs, got {len(bad)}$"
    with pytest.raises(ValueError, match=message):
        Affine.of(bad)


def test_data_and_source_are_small_and_offline(weights):
    state = {name: getattr(Affine.of(weights), name) for name in ("weights", "chosen")}
    assert len(json.dumps(state)) < 50_000
    assert len(SOURCE.encode()) < 12_000
    addresses = r"https?://(?!www\.w3\.org/2000/svg)|\bimport\b|\bfetch\("
    assert not re.search(addresses, SOURCE)
    assert re.search(addresses, SOURCE + 'fetch("x")')
    assert SOURCE.endswith("export default { render };\n")
