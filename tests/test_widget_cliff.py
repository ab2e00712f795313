"""The cliff explorer: what travels to the page is the scoreboard, sorted into families."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from qlib.presets import format as named_format
from qlib.widgets import BookWidget, cliff
from qlib.widgets.cliff import FAMILIES, Cliff, family, point

SCRIPT = Path(cliff.__file__).with_suffix(".js").read_text(encoding="utf-8")
TOOL = Path(__file__).parents[1] / "tools" / "scoreboard.py"


def board_formats() -> list[str]:
    spec = importlib.util.spec_from_file_location("scoreboard_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FORMATS


FORMATS = board_formats()


def row(format: str = "int4-g32-asym", model: str = "bpw-small", **other) -> dict:
    bits = 8 * named_format(format).nbytes((512, 256)) / (512 * 256)
    numbers = {"bits_per_weight": bits, "kl": 0.123456789 * 4**-bits, "kl_error": 0.001}
    quality = {"top1": 0.9, "perplexity": 82.8123456, "perplexity_error": 7.89}
    return {"model": model, "format": format, **numbers, **quality, **other}


def board() -> list[dict]:
    """As many rows as the finished scoreboard has, the small model first."""
    return [row(name, model) for model in ("bpw-small", "smollm2-135m") for name in FORMATS]


def family_of_scheme(format: str) -> str:
    """The family by the parsed format instead of its name."""
    scheme = named_format(format)
    if scheme.fit.__name__.endswith("mse"):
        return "search"
    if not scheme.grid.name.startswith(("int", "uint", "ternary")):
        return "float"
    if scheme.block in ("row", "tensor"):
        return "wide"
    return "small" if scheme.block <= 32 else "large"


@pytest.mark.parametrize("format", FORMATS)
def test_the_name_tells_the_family(format):
    assert family(format) == family_of_scheme(format)


@pytest.mark.parametrize(
    ("format", "expected", "twin"),
    [
        ("int4-g32", "small", "int4-g64"),
        ("int4-g128", "large", "int4-g128-mse"),
        ("int8-row", "wide", "fp8_e4m3"),
        ("int3", "wide", "int3-g16"),
        ("mxfp4", "float", "int4-tensor"),
        ("int2-g32-asym-mse", "search", "int2-g32-asym"),
    ],
)
def test_a_small_change_of_the_name_changes_the_family(format, expected, twin):
    assert family(format) == expected != family(twin)
    assert family(format) == family_of_scheme(format)
    assert family(twin) == family_of_scheme(twin)


@pytest.mark.parametrize("format", ["q4_k_m", "int4-g32-", "int44", "xint4-g32", "ternary2", ""])
def test_a_name_of_no_family(format):
    message = f"format {format!r} belongs to no family of the cliff explorer"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        family(format)


def test_families_differ_in_name_color_and_shape():
    assert len({name for name, *_ in FAMILIES}) == len(FAMILIES) == 5
    assert len({color for *_, color, _ in FAMILIES}) == len(FAMILIES)
    assert len({shape for *_, shape in FAMILIES}) == len(FAMILIES)


def test_a_point_is_its_row_to_six_digits():
    given = row()
    made = point(given)
    assert made["bits"] == given["bits_per_weight"] == 4.625
    assert made["changed"] == pytest.approx(1 - given["top1"])
    for name in ("kl", "kl_error", "perplexity", "perplexity_error"):
        assert made[name] == pytest.approx(given[name], rel=1e-5)
        assert point(given | {name: given[name] * 1.0001})[name] != made[name]
    assert made["line"]
    assert not point(row("int4-g32"))["line"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_such_number(value):
    with pytest.raises(ValueError, match=f"^bpw-small int4-g32-asym: kl is {value}$"):
        Cliff(rows=[row(kl=value)])


def test_no_rows():
    message = "the cliff explorer needs at least one row of the scoreboard"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Cliff(rows=[])


def test_the_whole_board_travels():
    widget = Cliff(rows=board())
    assert [m["name"] for m in widget.models] == ["smollm2-135m", "bpw-small"]
    assert [m["label"] for m in widget.models] == ["SmolLM2-135M", "bpw-small"]
    assert len(widget.points) == 2 * len(FORMATS)
    assert Counter(p["format"] for p in widget.points) == dict.fromkeys(FORMATS, 2)
    assert widget.shown == [name for name, *_ in FAMILIES]
    assert widget.points[widget.at]["format"] == "int4-g32-asym"
    assert (widget.model, widget.points[widget.at]["model"]) == ("both", "smollm2-135m")


LINE = [8.75, 6.6875, 5.65625, 4.625, 3.59375, 2.5625]


def test_points_go_from_many_bits_to_few_model_by_model():
    points = Cliff(rows=board()).points
    half = len(FORMATS)
    assert {p["model"] for p in points[:half]} == {"smollm2-135m"}
    for part in (points[:half], points[half:]):
        bits = [p["bits"] for p in part]
        assert bits == sorted(bits, reverse=True)
        assert [p["bits"] for p in part if p["line"]] == LINE


def test_a_board_that_has_only_begun():
    widget = Cliff(rows=[row("nf4", "other")])
    assert (widget.model, widget.at, widget.shown) == ("other", 0, ["float"])
    assert widget.models == [{"name": "other", "label": "other"}]


def test_state_is_plain_and_small():
    state = Cliff(rows=board(), metric="changed", log_x=True).get_state()
    names = set(Cliff.class_trait_names(sync=True)) - set(BookWidget.class_trait_names(sync=True))
    assert {"points", "families", "metrics", "models", "sizes", "factor", "at"} < names
    data = {name: state[name] for name in names}
    assert len(json.dumps(data, allow_nan=False)) < 50_000
    assert (data["metric"], data["log_x"]) == ("changed", True)
    assert data["billions"] in data["sizes"]


def test_every_metric_is_in_every_point():
    widget = Cliff(rows=board())
    wanted = {m["name"] for m in widget.metrics} | {m["error"] or "kl" for m in widget.metrics}
    assert all(wanted <= set(p) for p in widget.points)


def test_the_script_is_small_and_knows_no_address_and_no_result():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.", SCRIPT)
    assert not any(name in SCRIPT for name in [*FORMATS, *cliff.MODELS])
    assert "export default { render }" in SCRIPT
