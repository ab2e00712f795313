"""The scoreboards: bits against arithmetic on shapes, order, and the check that repeats a row."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import scoreboard as tool
import torch

import qlib
from qlib.config import Config
from qlib.metrics import Reference
from qlib.scoreboard import Entry, Row, check, entry_of, measure, prepared, protocols

ROOT = Path(__file__).parents[1]
BOARDS = {
    name: json.loads((ROOT / f"book/results/{name}.json").read_text())
    for name in ("scoreboard", "methods", "activations")
}
BOARD = BOARDS["scoreboard"]
ROWS = {(row["model"], row["format"]): row for row in BOARD["rows"]}
ALL = {
    (name, row["model"], entry_of(row)): row
    for name, board in BOARDS.items()
    for row in board["rows"]
}
IDS = [" ".join(map(str, key)) for key in ALL]
FIELDS = [field.name for field in dataclasses.fields(Row)]
# What a row has only where it is not empty.
OPTIONAL = {"activations", "rotation", "cache"}
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


def counted_bits(entry: Entry, config: Config) -> tuple[float, float]:
    """Bits per weight of the linear layers, and of the model with its table and norms."""
    shapes, format = linear_shapes(config), entry.recipe.choose("any")
    stored = sum(format.nbytes(shape) for shape in shapes)
    weights = sum(math.prod(shape) for shape in shapes)
    # A rotated head is no longer the table of embeddings that it was tied to.
    tables = 2 if entry.rotation else 1
    others = (tables * config.vocab_size + 2 * config.num_hidden_layers + 1) * config.hidden_size
    # What is not quantized is held in float32.
    return 8 * stored / weights, 8 * (stored + 4 * others) / (weights + others)


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
    found = {key[2] for key in ALL if key[:2] == (board, model)}
    assert found == set(tool.BOARDS[board])


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(
    ("board", "tokens"), [("scoreboard", 12_000), ("methods", 6_000), ("activations", 4_000)]
)
def test_every_model_has_its_protocol(board, tokens, model):
    form = r"evaluation, ([\d,]+) tokens, context 256, stride 256, BOS"
    found = re.fullmatch(form, BOARDS[board]["protocol"][model])
    assert int(found[1].replace(",", "")) >= tokens


def test_calibration_is_another_text():
    for board, model in itertools.product(("methods", "activations"), CONFIGS):
        assert BOARDS[board]["calibration"][model].startswith("8,192 tokens in ")
    known = [set(qlib.texts(name).split("\n\n")) for name in ("calibration", "evaluation")]
    assert not known[0] & known[1]


def test_no_row_stands_twice():
    assert len(ALL) == sum(len(board["rows"]) for board in BOARDS.values())


@pytest.mark.parametrize("row", ALL.values(), ids=IDS)
def test_schema(row):
    named = {name for name, value in row.items() if type(value) is str}
    assert {"model", "format", "method"} <= named <= {"model", "format", "method"} | OPTIONAL
    assert all(row[name] for name in named)
    assert set(row) | OPTIONAL == set(FIELDS)
    numbers = [value for name, value in row.items() if name not in named]
    assert all(type(x) is float and math.isfinite(x) and x > 0 for x in numbers)
    assert row["top1"] <= 1


@pytest.mark.parametrize("board", ["scoreboard", "methods"])
def test_boards_of_weights_alone_name_nothing_else(board):
    assert not any(OPTIONAL & set(row) for row in BOARDS[board]["rows"])
    assert any(OPTIONAL & set(row) for row in BOARDS["activations"]["rows"])


@pytest.mark.parametrize("row", ALL.values(), ids=IDS)
def test_bits_are_counted_from_bytes(row):
    config, entry = CONFIGS[row["model"]], entry_of(row)
    stored = row["bits_per_weight"], row["model_bits_per_weight"]
    assert stored == counted_bits(entry, config)
    # A width that leaves a ragged block changes the count of every format.
    wider = dataclasses.replace(config, intermediate_size=config.intermediate_size + 8)
    assert not set(stored) & set(counted_bits(entry, wider))
    other = dataclasses.replace(entry, rotation="" if entry.rotation else "quarot")
    assert stored[0] == counted_bits(other, config)[0]
    assert stored[1] != counted_bits(other, config)[1]


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
    return ALL["methods", model, Entry(f"int{bits}-g{group}-{zero}", method)]


def beats(better: dict, worse: dict) -> bool:
    """By more than two standard errors, in KL."""
    margin = 2 * math.hypot(better["kl_error"], worse["kl_error"])
    return better["kl"] < worse["kl"] - margin


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", ["gptq", "gptq-act-order", "awq", "awq-clip", "autoround-light"])
def test_methods_that_look_at_data_beat_rounding_to_nearest(model, bits, group, method):
    """By more than two standard errors, in KL; each is the paper's central claim."""
    ours, rtn = (method_row(model, bits, group, name) for name in (method, "rtn"))
    assert ours["bits_per_weight"] == rtn["bits_per_weight"]
    assert not beats(rtn, ours)
    # The small model has no large channels, so there is nothing to scale.
    if (model, method) == ("bpw-small", "awq"):
        assert abs(ours["kl"] - rtn["kl"]) < 4 * math.hypot(ours["kl_error"], rtn["kl_error"])
    else:
        assert beats(ours, rtn)


TENSOR, ROTATED = {"activations": "int8-tensor"}, {"rotation": "quarot"}
# What the papers on activations claim: the better of two rows, the worse, and the models where it
# is to hold by more than two standard errors. The small model has no large channels to move.
CLAIMS = {
    "a scale for each token": (Entry("w8a8"), Entry("int8-row", **TENSOR), [*CONFIGS]),
    "scales of each call": (Entry("w8a8"), Entry("w8a8-static"), [*CONFIGS]),
    "SmoothQuant": (
        Entry("int8-row", "smoothquant", **TENSOR), Entry("int8-row", **TENSOR), ["smollm2-135m"],
    ),
    "alpha by search": (
        Entry("int8-row", "smoothquant-search", **TENSOR),
        Entry("int8-row", "smoothquant", **TENSOR), ["smollm2-135m"],
    ),
    "LLM.int8()": (Entry("llm.int8"), Entry("w8a8"), [*CONFIGS]),
    "eight bits of activations": (Entry("w4a8"), Entry("w4a4"), [*CONFIGS]),
    "QuaRot": (Entry("w4a4", **ROTATED), Entry("w4a4"), [*CONFIGS]),
    "QuaRot with GPTQ": (Entry("w4a4", "gptq", **ROTATED), Entry("w4a4", "gptq"), [*CONFIGS]),
    "GPTQ after QuaRot": (Entry("w4a4", "gptq", **ROTATED), Entry("w4a4", **ROTATED), [*CONFIGS]),
    "GPTQ": (Entry("w4a8", "gptq"), Entry("w4a8"), [*CONFIGS]),
    # A rotation spreads outliers of activations; weights alone, in rows, are worse off with it.
    "no rotation": (Entry("int4-row"), Entry("int4-row", **ROTATED), ["smollm2-135m"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "model"),
    [(claim, model) for claim, (*_, models) in CLAIMS.items() for model in models],
)
def test_published_orderings_of_activations_hold(claim, model):
    better, worse = (ALL["activations", model, entry] for entry in CLAIMS[claim][:2])
    assert beats(better, worse)
    assert not beats(worse, better)
    # Two rows that are nearer than their errors decide nothing.
    assert not beats(better, better | {"kl": better["kl"] + better["kl_error"]})


@pytest.fixture(scope="module")
def small():
    return qlib.load("bpw-small")


@pytest.fixture(scope="module")
def measured(small) -> dict:
    """A row over so few tokens that it takes a moment."""
    model, tokenizer = small
    references = tuple(Reference(model, protocol) for protocol in protocols(tokenizer, 256))
    return dataclasses.asdict(measure("bpw-small", model, Entry("int3-g32-asym"), references))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same_weights(before: dict[str, torch.Tensor], model) -> bool:
    after = model.state_dict()
    assert list(after) == list(before)
    return all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_measured_row_has_the_boards_form(measured):
    assert list(measured) == FIELDS
    assert (measured["model"], measured["format"]) == ("bpw-small", "int3-g32-asym")
    assert {measured[name] for name in OPTIONAL} == {""}
    assert measured["bits_per_weight"] == 3.59375
    # Here both protocols are the same 256 tokens.
    assert measured["kl"] == measured["check_kl"] > 0


def test_check_repeats_a_row_and_leaves_the_model_whole(measured, small):
    model, tokenizer = small
    before = weights_of(model)
    assert check(measured, model, tokenizer) == pytest.approx(measured["kl"], rel=1e-3)
    assert same_weights(before, model)


def test_check_finds_wrong_bits(measured, small):
    # One bit for each weight, and one byte in the whole model.
    weights = sum(math.prod(shape) for shape in linear_shapes(small[0].config))
    for off in (1, 8 / weights):
        expect_wrong_bits(measured, small, off)


def expect_wrong_bits(measured, small, off):
    wrong = measured | {"bits_per_weight": measured["bits_per_weight"] + off}
    has = wrong["bits_per_weight"]
    message = f"int3-g32-asym rtn: 3.59375 bits per weight, the board has {has}"
    with pytest.raises(AssertionError) as raised:
        check(wrong, *small)
    assert str(raised.value).splitlines()[0] == message


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_check_finds_a_wrong_divergence(measured, small, factor):
    kl = measured["check_kl"]
    message = f"int3-g32-asym rtn: KL {kl:.4g}, the board has {factor * kl:.4g}"
    with pytest.raises(AssertionError) as raised:
        check(measured | {"check_kl": factor * kl}, *small)
    assert str(raised.value).splitlines()[0] == message


# -- entries ------------------------------------------------------------------------------------


def test_an_entry_is_a_recipe():
    entry = Entry("w4a8", "gptq", "int8-tensor", "quarot", "int4-hadamard")
    assert str(entry) == "w4a8 gptq int8-tensor quarot int4-hadamard"
    assert str(Entry("int4-row")) == "int4-row rtn"
    assert (entry.recipe.format, entry.recipe.method) == ("int4-g128", "gptq")
    assert entry.recipe.activations == "int8-tensor"
    # What the entry leaves open is the recipe's.
    assert Entry("w4a8").recipe.activations == "int8-row"
    assert Entry("int4-row").recipe.activations is None


@pytest.mark.parametrize("entry", [*tool.BOARDS["activations"], Entry("nf4", "awq")], ids=str)
def test_an_entry_is_found_in_its_row(entry):
    row = dataclasses.asdict(Row(**dataclasses.asdict(entry), model="any", kl=1.0))
    assert entry_of(row) == entry
    assert entry_of({name: value for name, value in row.items() if value != ""}) == entry
    for name in OPTIONAL | {"format", "method"}:
        assert entry_of(row | {name: "other"}) != entry


def test_every_entry_of_a_board_is_another():
    for entries in tool.BOARDS.values():
        assert len(set(entries)) == len({str(entry) for entry in entries}) == len(entries)


@pytest.fixture(scope="module")
def rotated_row(small) -> dict:
    model, tokenizer = small
    references = tuple(Reference(model, protocol) for protocol in protocols(tokenizer, 256))
    entry = Entry("w4a4", rotation="quarot", cache="int2")
    return dataclasses.asdict(measure("bpw-small", model, entry, references))


def test_a_rotated_row_is_repeated_and_leaves_the_model_whole(rotated_row, small):
    model, tokenizer = small
    before = weights_of(model)
    assert check(rotated_row, model, tokenizer) == pytest.approx(rotated_row["kl"], rel=1e-3)
    assert same_weights(before, model)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("change", [{"rotation": ""}, {"cache": ""}, {"activations": "int8-row"}])
def test_every_part_of_an_entry_is_done(rotated_row, small, change):
    with pytest.raises(AssertionError, match=r": KL 0\.\d+, the board has 0\.\d+"):
        check(rotated_row | change, *small)


def test_a_learned_rotation_sees_the_recipe_and_the_text(small, monkeypatch):
    model, _ = small
    calls = []
    monkeypatch.setattr("qlib.scoreboard.spinquant", lambda *given, **other: calls.append(given))
    with prepared(model, Entry("int8-row", rotation="spinquant"), "text", progress=False):
        pass
    (((changed, recipe, data)),) = calls
    assert changed is not model
    assert (recipe.format, data) == ("int8-row", "text")


# -- the tool -----------------------------------------------------------------------------------


def test_rows_are_written_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert tool.read("methods") == {"protocol": {}, "rows": []}
    for format, model, kl in [("nf4", "a", 1.0), ("nf4", "b", 2.0), ("int4", "a", 3.0)]:
        tool.write("methods", Row(format, model=model, kl=kl), "text", "data")
    tool.write("methods", Row("nf4", model="a", kl=4.0), "text", "data")
    content = tool.read("methods")
    assert [(row["format"], row["model"], row["kl"]) for row in content["rows"]] == [
        ("nf4", "a", 4.0), ("nf4", "b", 2.0), ("int4", "a", 3.0)
    ]  # fmt: skip
    assert not any(OPTIONAL & set(row) for row in content["rows"])
    assert content["protocol"] == {"a": "text", "b": "text"}
    # Another protocol makes the other rows of its model stale, and no more.
    tool.write("methods", Row("w8a8", model="a", cache="int4"), "longer", "data")
    content = tool.read("methods")
    assert [(row["format"], row["model"]) for row in content["rows"]] == [
        ("nf4", "b"),
        ("w8a8", "a"),
    ]
    assert content["rows"][1]["cache"] == "int4"
    assert content["protocol"] == {"a": "longer", "b": "text"}
