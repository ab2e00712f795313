"""The scoreboard: bits against arithmetic on shapes, order, and the check that repeats a row."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import qlib
from qlib.config import Config
from qlib.metrics import Reference
from qlib.scoreboard import Row, check, measure, protocols

ROOT = Path(__file__).parents[1]
BOARDS = {
    name: json.loads((ROOT / f"book/results/{name}.json").read_text())
    for name in ("scoreboard", "methods")
}
BOARD = BOARDS["scoreboard"]
ROWS = {(row["model"], row["format"]): row for row in BOARD["rows"]}
ALL = {
    (name, row["model"], row["format"], row["method"]): row
    for name, board in BOARDS.items()
    for row in board["rows"]
}
IDS = [" ".join(key) for key in ALL]
FIELDS = [field.name for field in dataclasses.fields(Row)]
LADDER = [f"int{bits}-g32-asym" for bits in (2, 3, 4, 5, 6, 8)]
CONFIGS = {
    "bpw-small": Config.from_hf(json.loads((ROOT / "qlib/data/own/config.json").read_text())),
    # As its publisher's config.json has it; typed here, so that no model file is needed.
    "smollm2-135m": Config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    ),
}  # fmt: skip


def linear_shapes(c: Config) -> list[tuple[int, int]]:
    """[out, in] of every linear layer in the decoder's blocks, from the sizes alone."""
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = [(query, c.hidden_size), (key, c.hidden_size), (key, c.hidden_size)]
    attention.append((c.hidden_size, query))
    mlp = [(c.intermediate_size, c.hidden_size)] * 2 + [(c.hidden_size, c.intermediate_size)]
    return (attention + mlp) * c.num_hidden_layers


def counted_bits(format: str, config: Config) -> tuple[float, float]:
    """Bits per weight of the linear layers, and of the model with its tied table and norms."""
    shapes = linear_shapes(config)
    stored = sum(qlib.format(format).nbytes(shape) for shape in shapes)
    weights = sum(math.prod(shape) for shape in shapes)
    others = (config.vocab_size + 2 * config.num_hidden_layers + 1) * config.hidden_size
    # What is not quantized is held in float32.
    return 8 * stored / weights, 8 * (stored + 4 * others) / (weights + others)


def board_rows() -> dict[str, list[tuple[str, str]]]:
    """The (format, method) pairs that every board is to have."""
    spec = importlib.util.spec_from_file_location("scoreboard_tool", ROOT / "tools/scoreboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BOARDS


def falls(kl: list[float]) -> bool:
    return all(a > b for a, b in itertools.pairwise(kl))


def ladder(model: str) -> list[float]:
    """KL from two bits to eight, as far as it is measured."""
    return [ROWS[model, name]["kl"] for name in LADDER if (model, name) in ROWS]


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_the_board_says_how_it_was_made(board):
    assert board["command"] == "tools/scoreboard.py"
    assert (ROOT / board["command"]).is_file()
    assert datetime.date.fromisoformat(board["date"]) <= datetime.date.today()
    assert "torch" in board["device"]


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("board", BOARDS)
def test_every_row_is_measured_on_every_model(board, model):
    found = {key[2:] for key in ALL if key[:2] == (board, model)}
    assert found == set(board_rows()[board])


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(("board", "tokens"), [("scoreboard", 12_000), ("methods", 6_000)])
def test_every_model_has_its_protocol(board, tokens, model):
    form = r"evaluation, ([\d,]+) tokens, context 256, stride 256, BOS"
    found = re.fullmatch(form, BOARDS[board]["protocol"][model])
    assert int(found[1].replace(",", "")) >= tokens


def test_calibration_is_another_text():
    for model in CONFIGS:
        assert BOARDS["methods"]["calibration"][model].startswith("8,192 tokens in ")
    known = [set(qlib.texts(name).split("\n\n")) for name in ("calibration", "evaluation")]
    assert not known[0] & known[1]


def test_no_row_stands_twice():
    assert len(ALL) == sum(len(board["rows"]) for board in BOARDS.values())


@pytest.mark.parametrize("row", ALL.values(), ids=IDS)
def test_schema(row):
    assert list(row) == FIELDS
    named = {"model", "format", "method"}
    assert {name for name, value in row.items() if type(value) is str} == named
    numbers = [row[name] for name in FIELDS if name not in named]
    assert all(type(x) is float and math.isfinite(x) and x > 0 for x in numbers)
    assert row["top1"] <= 1


@pytest.mark.parametrize("row", ALL.values(), ids=IDS)
def test_bits_are_counted_from_bytes(row):
    config = CONFIGS[row["model"]]
    stored = row["bits_per_weight"], row["model_bits_per_weight"]
    assert stored == counted_bits(row["format"], config)
    # A width that leaves a ragged block changes the count of every format.
    wider = dataclasses.replace(config, intermediate_size=config.intermediate_size + 8)
    assert not set(stored) & set(counted_bits(row["format"], wider))


@pytest.mark.parametrize("row", ALL.values(), ids=IDS)
def test_errors_are_small_parts_of_what_they_belong_to(row):
    assert 0 < row["kl_error"] < 0.2 * row["kl"]
    assert 0 < row["perplexity_error"] < 0.5 * row["perplexity"]
    assert row["kl_99"] > row["kl"]


@pytest.mark.parametrize("model", CONFIGS)
def test_damage_falls_with_every_bit(model):
    kl = ladder(model)
    assert falls(kl)
    assert not falls(kl[::-1])
    assert not falls([kl[0], *kl])


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("coarse", ["ternary", "int2-g128", "int2-g32-asym"])
def test_the_coarsest_formats_are_far_worse_than_eight_bits(model, coarse):
    fine = [row for (name, format), row in ROWS.items() if name == model and "int8" in format]
    found = [row for key, row in ROWS.items() if key == (model, coarse)]
    for bad in found:
        assert all(bad["kl"] > 100 * good["kl"] and bad["top1"] < good["top1"] for good in fine)


def method_row(model: str, bits: int, group: int, method: str) -> dict:
    zero = "offset" if method == "hqq" else "asym"
    return ALL["methods", model, f"int{bits}-g{group}-{zero}", method]


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", ["gptq", "gptq-act-order", "awq", "awq-clip", "autoround-light"])
def test_methods_that_look_at_data_beat_rounding_to_nearest(model, bits, group, method):
    """By more than two standard errors, in KL; each is the paper's central claim."""
    ours, rtn = (method_row(model, bits, group, name) for name in (method, "rtn"))
    assert ours["bits_per_weight"] == rtn["bits_per_weight"]
    margin = 2 * math.hypot(ours["kl_error"], rtn["kl_error"])
    if (model, method) == ("bpw-small", "awq"):
        # The small model has no large channels, so there is nothing to scale.
        assert abs(ours["kl"] - rtn["kl"]) < 2 * margin
    else:
        assert ours["kl"] < rtn["kl"] - margin


@pytest.fixture(scope="module")
def small():
    return qlib.load("bpw-small")


@pytest.fixture(scope="module")
def measured(small) -> dict:
    """A row over so few tokens that it takes a moment."""
    model, tokenizer = small
    references = tuple(Reference(model, protocol) for protocol in protocols(tokenizer, 256))
    return dataclasses.asdict(measure("bpw-small", model, "int3-g32-asym", references))


def test_a_measured_row_has_the_boards_form(measured):
    assert list(measured) == FIELDS
    assert (measured["model"], measured["format"]) == ("bpw-small", "int3-g32-asym")
    assert measured["bits_per_weight"] == 3.59375
    # Here both protocols are the same 256 tokens.
    assert measured["kl"] == measured["check_kl"] > 0


def test_check_repeats_a_row_and_leaves_the_model_whole(measured, small):
    model, tokenizer = small
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert check(measured, model, tokenizer) == pytest.approx(measured["kl"], rel=1e-3)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_check_finds_wrong_bits(measured, small):
    # One bit for each weight, and one byte in the whole model.
    weights = sum(math.prod(shape) for shape in linear_shapes(small[0].config))
    for off in (1, 8 / weights):
        expect_wrong_bits(measured, small, off)


def expect_wrong_bits(measured, small, off):
    wrong = measured | {"bits_per_weight": measured["bits_per_weight"] + off}
    message = f"int3-g32-asym: 3.59375 bits per weight, the board has {wrong['bits_per_weight']}"
    with pytest.raises(AssertionError) as raised:
        check(wrong, *small)
    assert str(raised.value).splitlines()[0] == message


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_check_finds_a_wrong_divergence(measured, small, factor):
    kl = measured["check_kl"]
    message = f"int3-g32-asym: KL {kl:.4g}, the board has {factor * kl:.4g}"
    with pytest.raises(AssertionError) as raised:
        check(measured | {"check_kl": factor * kl}, *small)
    assert str(raised.value).splitlines()[0] == message
