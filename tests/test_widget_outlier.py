"""The outlier widget: its script's few lines of arithmetic must give what `qlib.quantize` gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import qlib
from qlib.metrics import snr_db
from qlib.widgets import outlier
from qlib.widgets.outlier import MOST, Outlier

SCRIPT = Path(outlier.__file__).with_suffix(".js").read_text(encoding="utf-8")


def tile(rows: int = 32, columns: int = 64) -> torch.Tensor:
    return 0.08 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def page(w: Outlier) -> tuple[np.ndarray, np.ndarray]:
    """The arithmetic of outlier.js, step by step: (weights, values), in reading order."""
    weights = np.array(w.tile, dtype=np.float64) * w.unit
    if w.size:
        weights[w.at] = np.float32(w.size * w.spread)
    size = next(entry["size"] for entry in w.blocks if entry["format"] == w.block)
    values = np.empty_like(weights)
    for start in range(0, len(weights), size):
        block = weights[start : start + size].astype(np.float32)
        largest = np.abs(block).max()
        scale = np.float32(np.float16(largest / np.float32(w.top))) if largest else np.float32(1)
        codes = np.rint(np.clip(block / scale, w.bottom, w.top))
        values[start : start + size] = codes * scale
    return weights, values


STATES = [{}, {"size": 0}, {"size": 48, "at": 0}, {"size": 7, "at": 2047}, {"size": 30, "at": 65}]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("block", ["tensor", "row", "g16", "g8"])
def test_the_page_computes_what_the_library_computes(block, state):
    widget = Outlier(tile(), block=f"int4-{block}", **state)
    weights, values = page(widget)
    weight = torch.tensor(weights, dtype=torch.float32).view(32, 64)
    expected = qlib.quantize(weight, widget.block).dequantize()
    assert torch.equal(torch.tensor(values, dtype=torch.float32).view(32, 64), expected)
    wrong = Outlier(tile(), block=f"int4-{block}", **state)
    wrong.top -= 1
    assert not np.array_equal(page(wrong)[1], values)


def test_a_block_of_zeros_and_a_tiny_block():
    weight = tile()
    weight[3] = 0
    weight[4] = 2.0**-14
    widget = Outlier(weight, block="int4-g8", size=0)
    weights, values = page(widget)
    expected = qlib.quantize(torch.tensor(weights).float().view(32, 64), "int4-g8").dequantize()
    assert torch.equal(torch.tensor(values).float().view(32, 64), expected)


def test_the_tile_is_close_to_the_weights():
    widget = Outlier(tile())
    assert snr_db(tile(), torch.tensor(widget.tile).view(32, 64) * widget.unit) > 60
    assert widget.spread == pytest.approx(tile().std().item(), rel=1e-3)


def test_bits_are_counted_from_the_stored_bytes():
    bits = {entry["format"]: entry["bits"] for entry in Outlier(tile()).blocks}
    stored = {name: qlib.quantize(tile(), name).bits_per_weight for name in bits}
    assert bits == stored
    assert stored["int4-g8"] == 6 != stored["int4-g16"]


def test_state_is_plain_and_small():
    state = Outlier(tile()).get_state()
    names = ("tile", "unit", "spread", "blocks", "top", "bottom", "columns", "at", "size", "block")
    assert len(json.dumps({name: state[name] for name in names})) < 50_000
    assert (state["top"], state["bottom"]) == (7, -8)


@pytest.mark.parametrize("shape", [(64,), (65, 64), (8, 24)])
def test_a_tile_of_another_shape(shape):
    message = f"a tile is [rows, a multiple of 16] with at most {MOST:,} weights, got {list(shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Outlier(torch.zeros(shape))


def test_the_script_is_small_and_knows_no_address():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.", SCRIPT)
    assert "export default { render }" in SCRIPT
