"""The board of KV caches: bits and bytes against arithmetic, order, and a row measured again."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import math
import re
from pathlib import Path

import cacheboard as tool
import pytest
import torch

import qlib
from qlib.cache import kv_format
from qlib.config import Config
from qlib.metrics import Reference

ROOT = Path(__file__).parents[1]
BOARD = json.loads((ROOT / "book/results/kvcache.json").read_text())
ROWS = {(row["model"], row["context"], row["cache"]): row for row in BOARD["rows"]}
IDS = [" ".join(map(str, key)) for key in ROWS]
PLACES = [(model, context) for model, contexts in tool.CONTEXTS.items() for context in contexts]
# (Layers, key and value heads, head_dim), of which SmolLM2's are those of its config.json.
OWN = Config.from_hf(json.loads((ROOT / "qlib/data/own/config.json").read_text()))
SHAPES = {
    "bpw-small": (OWN.num_hidden_layers, OWN.num_key_value_heads, OWN.head_dim),
    "smollm2-135m": (30, 3, 64),
}
# Names from many bits to few.
FAMILIES = {
    "int": ["f16", "int8", "int4", "int3", "int2"],
    "int-hadamard": ["f16", "int4-hadamard", "int3-hadamard", "int2-hadamard"],
    "kivi": ["f16", "kivi4", "kivi3", "kivi2"],
    "kivi-w0": ["f16", "kivi4-w0", "kivi3-w0", "kivi2-w0"],
    "turbo": ["turbo8", "turbo4", "turbo3", "turbo2"],
    "turbo-qjl": ["f16", "turbo4-qjl", "turbo3-qjl", "turbo2-qjl"],
    "polar": ["f16", "polar", "polar3", "polar2"],
}
FIELDS = {"model", "cache", "context", "protocol", "chunk", "key_bits", "value_bits"}
FIELDS |= {"bytes_per_token", "attention_error", "kl", "kl_error", "perplexity"}
FIELDS |= {"perplexity_error", "reference_perplexity", "seconds"}


def expected_bits(name: str) -> tuple[float, float]:
    """Bits of a stored key and value by the layouts of the formats, for heads of 64."""
    if name == "f16":
        return 16, 16
    if name.startswith("fp8"):
        return (8 + 32 / 64 * name.endswith("-token"),) * 2
    if name.startswith("polar"):
        # Bits of each level of angles, from pairs upwards, packed level by level; float16 radii.
        levels = {"polar": (4, 2, 2, 2), "polar3": (3, 2, 2, 3, 2), "polar2": (2, 1, 1, 1, 2)}[name]
        angles = [math.ceil(64 / 2**n * bits / 8) for n, bits in enumerate(levels, start=1)]
        return ((8 * sum(angles) + 16 * 64 / 2 ** len(levels)) / 64,) * 2
    bits = int(re.match(r"(?:int|kivi|turbo)(\d)", name)[1])
    if name.startswith("turbo"):
        # A float16 length for each head, and one more for the residual that QJL sketches.
        return bits + 16 / 64 * (1 + name.endswith("-qjl")), bits + 16 / 64
    return (bits + (16 + 16) / 32,) * 2


def expected_bytes(row: dict) -> float:
    """Bytes per token, where the newest tokens of KIVI are as yet in float16."""
    layers, heads, dim = SHAPES[row["model"]]
    window = 128 if re.fullmatch(r"kivi\d", row["cache"]) else 0
    # By channel the window has just been emptied, for it divides the context; by token it slides.
    assert window == 0 or row["context"] % window == 0
    recent = window / row["context"]
    values = 16 * recent + row["value_bits"] * (1 - recent)
    return layers * heads * dim * (row["key_bits"] + values) / 8


def grows(kl: list[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(kl))


def test_the_board_says_how_it_was_made():
    assert BOARD["command"] == "tools/cacheboard.py"
    assert (ROOT / BOARD["command"]).is_file()
    assert datetime.date.fromisoformat(BOARD["date"]) <= datetime.date.today()
    assert "torch" in BOARD["device"]


@pytest.mark.parametrize(("model", "context"), PLACES)
def test_every_cache_is_measured_at_every_context(model, context):
    found = [key[2] for key in ROWS if key[:2] == (model, context)]
    assert sorted(found) == sorted(tool.FORMATS)
    assert len(ROWS) == len(BOARD["rows"])
    assert set(itertools.chain(*FAMILIES.values())) <= set(tool.FORMATS)


@pytest.mark.parametrize("row", ROWS.values(), ids=IDS)
def test_schema(row):
    assert set(row) == FIELDS
    named = {"model", "cache", "protocol"}
    assert all(type(row[name]) is str for name in named)
    assert all(math.isfinite(row[name]) and row[name] > 0 for name in FIELDS - named)
    found = re.fullmatch(r"(.*), context ([\d,]+), stride ([\d,]+), BOS", row["protocol"]).groups()
    assert found == ("evaluation, 4,096 tokens", *[f"{row['context']}"] * 2)


@pytest.mark.parametrize("row", ROWS.values(), ids=IDS)
def test_bits_are_those_of_the_layout(row):
    stored = row["key_bits"], row["value_bits"]
    assert stored == expected_bits(row["cache"])
    assert stored == kv_format(row["cache"]).bits(SHAPES[row["model"]][2])
    assert stored != expected_bits("int8" if stored[0] != 9 else "int4")


@pytest.mark.parametrize("row", ROWS.values(), ids=IDS)
def test_bytes_follow_from_bits_and_window(row):
    assert row["bytes_per_token"] == pytest.approx(expected_bytes(row), abs=1e-6)
    for name in ("key_bits", "value_bits"):
        wrong = row | {name: row[name] + 1 / 64}
        assert row["bytes_per_token"] != pytest.approx(expected_bytes(wrong), abs=1e-6)


@pytest.mark.parametrize(("model", "context"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("figure", ["kl", "attention_error"])
def test_damage_grows_as_bits_go(family, model, context, figure):
    found = [ROWS[model, context, name][figure] for name in FAMILIES[family]]
    assert grows(found)
    assert not grows(found[::-1])
    assert not grows([*found, found[0]])


# Better and worse ways to spend the same bits on old tokens; "{}" is 4, 3 or 2.
ORDERS = {
    "rotated keys": ("int{}-hadamard", "int{}"),
    "keys by channel": ("kivi{}-w0", "int{}"),
    "newest tokens kept": ("kivi{}", "kivi{}-w0"),
    # Unbiased inner products, which softmax does not ask for, at the price of their variance.
    "no sketch": ("turbo{}", "turbo{}-qjl"),
}


def beats(better: dict, worse: dict) -> bool:
    """By more than two standard errors, in KL."""
    return better["kl"] < worse["kl"] - 2 * math.hypot(better["kl_error"], worse["kl_error"])


@pytest.mark.parametrize(("model", "context"), PLACES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_schemes_of_the_same_bits_differ_as_published(order, bits, model, context):
    better, worse = (ROWS[model, context, name.format(bits)] for name in ORDERS[order])
    assert better["value_bits"] == worse["value_bits"]
    assert better["attention_error"] < worse["attention_error"]
    assert beats(better, worse)
    assert not beats(worse, better)
    assert not beats(better, better | {"kl": better["kl"] + better["kl_error"]})


@pytest.mark.parametrize(("model", "context"), PLACES)
def test_sixteen_bits_are_nearly_exact(model, context):
    found = ROWS[model, context, "f16"]
    assert found["kl"] < 1e-5
    assert found["attention_error"] < 1e-3
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-4)
    # Eight bits are good, and not that good.
    eight = ROWS[model, context, "int8"]
    assert eight["kl"] > 10 * found["kl"]
    assert eight["attention_error"] > 1e-3


# -- the tool -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return qlib.load("bpw-small")


@pytest.fixture(scope="module")
def reference(small) -> Reference:
    """Two windows of so few tokens that a row takes a moment."""
    model, tokenizer = small
    protocol = qlib.Protocol.of(tokenizer, "evaluation", context=96, stride=96, tokens=192)
    return Reference(model, protocol)


@pytest.mark.parametrize("name", ["f16", "int4", "kivi2-w32", "turbo3-qjl"])
def test_a_measured_row_has_the_boards_form(small, reference, name):
    row = tool.measure("bpw-small", small[0], name, reference, 96)
    assert set(row) == FIELDS
    assert (row["model"], row["cache"], row["context"]) == ("bpw-small", name, 96)
    assert (row["key_bits"], row["value_bits"]) == kv_format(name).bits(SHAPES["bpw-small"][2])
    if name != "kivi2-w32":
        assert row["bytes_per_token"] == expected_bytes(row)
    assert row["attention_error"] > 0
    assert (row["kl"] < 1e-5) == (name == "f16")


def test_a_row_is_what_a_model_without_this_tool_says(small, reference):
    """Keys and values rounded by KIVI's formula in a copy of the model, which keeps no cache."""
    row = tool.measure("bpw-small", small[0], "int2", reference, 96)
    model = copy.deepcopy(small[0])
    cache = Rounding()
    model.hidden, hidden = (lambda tokens: hidden(tokens, cache)), model.hidden
    found = qlib.divergence(reference, model, reference.protocol)
    assert found.kl == pytest.approx(row["kl"], rel=1e-2)
    assert found.perplexity.value == pytest.approx(row["perplexity"], rel=1e-3)
    cache.bits = 3
    assert qlib.divergence(reference, model, reference.protocol).kl < 0.5 * row["kl"]


class Rounding:
    """Attention of a whole text to keys and values of few bits."""

    length, bits = 0, 2

    def attend(self, q, k, v, layer):
        k, v = (self.rounded(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.half().float().unflatten(-1, (-1, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, low = ((high - low) / (2**self.bits - 1)).half().float(), low.half().float()
        codes = ((groups - low) / scale).round().clamp(0, 2**self.bits - 1)
        return (codes * scale + low).flatten(-2)


def test_rows_are_written_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "BOARD", tmp_path / "kvcache.json")
    assert tool.read() == {"rows": []}
    rows = [
        {"model": model, "cache": "f16", "context": context, "kl": kl}
        for model, context, kl in [
            ("bpw-small", 256, 1.0),
            ("smollm2-135m", 256, 2.0),
            ("smollm2-135m", 2048, 3.0),
        ]
    ]
    for row in reversed(rows):
        tool.write(row)
    assert tool.read()["rows"] == rows
    # A row measured again replaces the old one, and only that.
    tool.write(rows[1] | {"kl": 4})
    assert tool.read()["rows"] == [rows[0], rows[1] | {"kl": 4}, rows[2]]
