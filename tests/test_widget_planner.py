"""The planner's constants: the page's few multiplications must give what `qlib.plan` gives."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from qlib import shapes
from qlib.plan import DEVICES, kv_bytes, read_bytes, weights_bytes
from qlib.shapes import SHAPES
from qlib.widgets import planner
from qlib.widgets.planner import BATCHES, Planner, constants

SCRIPT = Path(planner.__file__).with_suffix(".js").read_text(encoding="utf-8")


def page(m: dict, bits: float, context: int, step: int, kv_bits: float, cached: str = "cached"):
    """The arithmetic of planner.js: weights, cache and bytes read, in bytes."""
    weights = ((m["dense"] + m["experts"]) * bits + m["tables"] * 16) / 8 + m["vectors"] * 2
    cache = m[cached] * context * 2**step * kv_bits / 8
    linear = (m["dense"] + m["experts"] * m["share"][step]) * bits / 8
    read = linear + (m["head"] + 2**step * m["hidden"]) * 2 + m["vectors"] * 2 + cache
    return weights, cache, read


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("bits", "context", "step", "kv_bits"), [(16, 512, 0, 16), (4.125, 8192, 5, 8)]
)
def test_the_page_computes_what_the_library_computes(name, bits, context, step, kv_bits):
    shape, m = SHAPES[name], constants(name, SHAPES[name])
    batch = BATCHES[step]
    expected = (
        weights_bytes(shape, bits),
        kv_bytes(shape, context, batch, kv_bits),
        read_bytes(shape, bits, context, batch, kv_bits=kv_bits),
    )
    assert page(m, bits, context, step, kv_bits) == pytest.approx(expected, abs=1)
    for field in ("dense", "tables", "vectors", "cached", "hidden"):
        wrong = m | {field: m[field] + 8}
        assert page(wrong, bits, context, step, kv_bits) != pytest.approx(expected, abs=1)


def test_unshared_heads_are_multi_head_attention():
    shape = SHAPES["Llama-3.1-70B"]
    every = dataclasses.replace(shape.attention, groups=shape.attention.heads)
    cache = page(constants("", shape), 16, 1000, 0, 16, "unshared")[1]
    assert cache == kv_bytes(dataclasses.replace(shape, attention=every), 1000)
    assert cache != kv_bytes(shape, 1000)
    # DeepSeek-V3: 128 + 64 values of a key and 128 of a value, for each of 128 heads.
    latent = constants("", SHAPES["DeepSeek-V3"])
    assert latent["unshared"] == 61 * 128 * (192 + 128) != latent["cached"]


def test_state_is_plain_small_json_and_names_exist():
    state = Planner().get_state()
    data = {name: state[name] for name in ("models", "formats", "devices")}
    assert len(json.dumps(data)) < 50_000
    assert state["model"] in {m["name"] for m in data["models"]}
    assert state["format"] in {f["name"] for f in data["formats"]}
    assert [d["name"] for d in data["devices"]] == [d.name for d in DEVICES]
    bits = [f["bits"] for f in data["formats"]]
    assert bits == sorted(bits, reverse=True)


def test_bits_are_counted_from_the_formats():
    bits = {f["name"]: f["bits"] for f in planner.formats()}
    assert bits["int4-g128"] == 4.125
    assert bits["nvfp4"] == pytest.approx(4.5, abs=1e-5)
    assert bits["int4-g32"] == 4.5 != bits["int4-g128"]


def test_the_words_about_sharing():
    assert planner.sharing(SHAPES["Llama-3.1-8B"]) == "GQA, 32 query heads on 8 cached heads"
    latent = "MLA, one latent of 512 + 64 values for 128 heads"
    assert planner.sharing(SHAPES["DeepSeek-V3"]) == latent
    assert isinstance(SHAPES["DeepSeek-V3"].attention, shapes.MLA)


def test_the_script_is_small_and_knows_no_address_and_no_model():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.", SCRIPT)
    assert not any(name in SCRIPT for name in [*SHAPES, *(d.name for d in DEVICES)])
    assert "export default { render }" in SCRIPT
