"""The KV planner: its script, run by Node, must count what caches store and `qlib.plan` says."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from node import run

from qlib.cache import QuantizedCache
from qlib.cache.names import kv_format
from qlib.plan import DEVICES, decode_bound, kv_bytes, read_bytes, weights_bytes
from qlib.shapes import SHAPES
from qlib.widgets import kvplanner
from qlib.widgets.kvplanner import BATCHES, NAMES, WEIGHTS, KVPlanner, constants, sharing, stored

SCRIPT = Path(kvplanner.__file__).with_suffix(".js").read_text(encoding="utf-8")
MODELS = {name: constants(name, shape) for name, shape in SHAPES.items()}
WIDTHS = sorted({model["width"] for model in MODELS.values()})
CARD = next(vars(device) for device in DEVICES if device.name == "RTX 4090")


def setting(model: str, format: str, kind: int = 4, step: int = 0, tokens: int = 8192) -> dict:
    parts = {"m": MODELS[model], "f": stored(format, WIDTHS), "device": CARD}
    return parts | {"kind": kind, "step": step, "tokens": tokens}


def page(settings: list[dict], script: str = SCRIPT) -> list[dict]:
    return run(script, "all => all.map(s => plan(s, s.tokens))", settings)


SETTINGS = [
    setting(model, format, kind, step, tokens)
    for model, format, (kind, step, tokens) in product(
        SHAPES, ("f16", "fp8", "int4", "q8_0"), [(0, 1, 512), (4, 5, 8192), (6, 8, 2**20)]
    )
]


def expected(s: dict) -> list:
    """weights, cache, total, read, fits, speed, bits, by the planner of the library."""
    shape, batch = SHAPES[s["m"]["name"]], BATCHES[s["step"]]
    kind = 16 if s["kind"] == 0 else WEIGHTS[s["kind"]]
    bits = kv_format(s["f"]["name"]).bits(s["m"]["width"])[0]
    weights, cache = weights_bytes(shape, kind), kv_bytes(shape, s["tokens"], batch, bits)
    read = read_bytes(shape, kind, s["tokens"], batch, kv_bits=bits)
    bound = decode_bound(shape, 1.008e12, kind, s["tokens"], batch, kv_bits=bits)
    return [weights, cache, weights + cache, read, weights + cache <= 24e9, bound, bits]


def agree(found: dict, right: list) -> bool:
    names = ("weights", "cache", "total", "read", "fits", "speed", "bits")
    return [found[name] for name in names] == pytest.approx(right, rel=1e-9)


def test_the_page_computes_what_the_library_computes():
    for s, found in zip(SETTINGS, page(SETTINGS), strict=True):
        assert agree(found, expected(s)), (s["m"]["name"], s["f"]["name"])
        assert not agree(found, expected(s | {"tokens": s["tokens"] + 1}))
        assert not agree(found, expected(s | {"step": s["step"] - 1}))
        assert not agree(found, expected(s | {"kind": (s["kind"] + 1) % len(WEIGHTS)}))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("key * m.keys + value", "key * m.keys + key"),
        ("batch * (first", "(first"),
        ("(tokens - first)", "tokens"),
        ("reads[step] + cache", "reads[0] + cache"),
        ("total = weights + cache", "total = weights"),
        ("speed: batch * device", "speed: device"),
        ("f.sinks + f.window", "f.window"),
    ],
)
def test_a_script_with_one_mistake_is_found(right, wrong):
    assert SCRIPT.count(right) == 1
    settings = [setting("Llama-3.1-8B", "turbo4-qjl-w64-s4", step=5)]
    assert page(settings, SCRIPT.replace(right, wrong)) != page(settings)


HEADS, DIM, BATCH = 2, 64, 3


def cached(format: str, tokens: int) -> int:
    """Bytes that a real cache of one layer stores, without what all rows share."""
    cache = QuantizedCache(format)
    x = torch.randn(BATCH, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(0))
    cache.attend(x, x, x, layer=0)
    packed = [store.packed for store in cache.stores[0] if store.packed is not None]
    shared = [part.nbytes for p in packed for part in p.shared.values()]
    return cache.nbytes - sum(shared)


def counted(format: str, tokens: list[int]) -> list[int]:
    """Bytes that the page counts for it."""
    m = {"width": DIM, "keys": HEADS * DIM, "values": HEADS * DIM}
    given = [{"m": m, "f": stored(format, [DIM]), "tokens": n} for n in tokens]
    return run(SCRIPT, f"all => all.map(s => cached(s.m, s.f, s.tokens, {BATCH}))", given)


BY_TOKEN = [name for name in NAMES if not name.startswith("kivi")]
BY_TOKEN += ["turbo3-qjl", "int4-hadamard-w32-s4", "fp8-token", "q4_0"]


@pytest.mark.parametrize("format", BY_TOKEN)
def test_the_count_is_that_of_the_stored_cache(format):
    tokens = [20, 36, 200]
    assert counted(format, tokens) == [cached(format, n) for n in tokens]
    assert counted(format, tokens) != [cached(format, n + 1) for n in tokens]


@pytest.mark.parametrize("format", ["kivi4", "kivi2", "kivi2-w32-s4"])
def test_a_window_that_fills_and_empties_counts_as_full(format):
    """Keys by channel have one token less than the window when it is fullest, and none after."""
    form = kv_format(format)
    fullest = form.sinks + 2 * form.window - 1
    most, after = counted(format, [fullest, fullest + 1])
    extra = (16 - form.bits(DIM)[0]) / 8 * HEADS * DIM * BATCH
    assert most - cached(format, fullest) == extra
    assert after - cached(format, fullest + 1) == extra * form.window
    tokens = [form.sinks + form.window // 2, form.sinks + form.window - 1]
    assert counted(format, tokens) == [cached(format, n) for n in tokens]


def test_the_longest_context_is_the_last_that_fits():
    formats = [*NAMES, "int4-w4096-s4"]
    settings = [
        setting(model, format, kind, step)
        for model, format, (kind, step) in product(
            ("Llama-3.1-8B", "Qwen3-30B-A3B", "Mixtral-8x7B"), formats, [(4, 0), (4, 8), (0, 3)]
        )
    ]
    most = [found["most"] for found in page(settings)]
    last = page([s | {"tokens": n} for s, n in zip(settings, most, strict=True)])
    over = page([s | {"tokens": n + 1} for s, n in zip(settings, most, strict=True)])
    for n, weights, a, b in zip(most, (f["weights"] for f in last), last, over, strict=True):
        assert a["fits"] == (weights <= 24e9)
        assert not b["fits"]
        assert (n > 0) == (weights < 24e9)
    assert 0 in most
    assert 0 < min(n for n in most if n) < 4096 < max(most)


def test_a_model_leaves_what_its_shape_says():
    for name, shape in SHAPES.items():
        m = MODELS[name]
        assert m["keys"] + m["values"] == shape.layers * shape.attention.cached
    assert MODELS["DeepSeek-V3"]["values"] == 0 < MODELS["DeepSeek-V3"]["keys"]
    eight = "8 keys and 8 values of 128 numbers for 32 query heads"
    assert sharing(SHAPES["Llama-3.1-8B"]) == eight
    latent = "one latent of 576 numbers, rounded as a key, for 128 query heads"
    assert sharing(SHAPES["DeepSeek-V3"]) == latent


def test_bits_of_the_formats():
    published = {"f16": 16, "fp8": 8, "int8": 9, "int4": 5, "kivi2": 3, "polar": 3.875}
    found = {f["name"]: f for f in KVPlanner().formats}
    assert {name: found[name]["bits"]["128"] for name in published} == {
        name: (bits, bits) for name, bits in published.items()
    }
    assert stored("turbo2-qjl", [128])["bits"]["128"] == kv_format("turbo2-qjl").bits(128)
    assert (found["kivi2"]["window"], found["int4"]["window"]) == (128, 0)
    assert stored("int4-s4", [64])["sinks"] == 4
    assert (stored("f32", [64])["full"], stored("bf16", [64])["full"]) == (32, 16)
    bits = [sum(found[name]["bits"]["128"]) for name in NAMES]
    assert bits == sorted(bits, reverse=True)


def test_state_is_plain_and_small_and_names_exist():
    state = KVPlanner().get_state()
    data = {name: state[name] for name in ("models", "kinds", "devices", "formats")}
    assert len(json.dumps(data)) < 50_000
    for name, trait in (("model", "models"), ("weights", "kinds"), ("device", "devices")):
        assert state[name] in {entry["name"] for entry in data[trait]}
    assert [kind["bits"] for kind in state["kinds"]][:5] == [16, *(8.0078125, 8.5, 4.5, 4.125)]
    assert state["format"] == "int4"
    assert KVPlanner(["f16", "turbo4"]).format == "turbo4"
    assert KVPlanner(["f16", "int4"], format="f16").format == "f16"
    assert repr(KVPlanner(["f16"])) == "<KVPlanner: interactive figure>"


def test_names_that_are_refused():
    with pytest.raises(ValueError, match=r"^the KV planner needs cache formats, such as f16, int8"):
        KVPlanner([])
    with pytest.raises(ValueError, match=r"^unknown KV cache format 'int4x'"):
        KVPlanner(["int4x"])


def test_the_script_is_small_and_knows_no_address_and_no_name():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.", SCRIPT)
    names = [*SHAPES, *(d.name for d in DEVICES), *(f'"{name}"' for name in [*NAMES, *WEIGHTS])]
    assert not any(name in SCRIPT for name in names)
    assert "export default { render }" in SCRIPT
