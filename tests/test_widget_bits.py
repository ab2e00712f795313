"""The widget "Click the bits": its data and the arithmetic of its script, against ml_dtypes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qlib.grid import FLOATS
from qlib.widgets import bits
from qlib.widgets.bits import Bits, describe

SCRIPT = Path(bits.__file__).with_suffix(".js").read_text(encoding="utf-8")
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
formats = pytest.mark.parametrize("format", FLOATS, ids=lambda format: format.name)


def bits_of(f: dict) -> int:
    return f["signed"] + f["exponent"] + f["mantissa"]


def page_read(f: dict, code: int) -> float:
    """`read` of bits.js: the value of a code."""
    sign = f["signed"] and code >> (f["exponent"] + f["mantissa"]) & 1
    field, mantissa = code >> f["mantissa"] & 2 ** f["exponent"] - 1, code & 2 ** f["mantissa"] - 1
    top, full = field == 2 ** f["exponent"] - 1, mantissa == 2 ** f["mantissa"] - 1
    whole = mantissa + (0 if f["signed"] and field == 0 else 2 ** f["mantissa"])
    value = math.ldexp(whole, max(field, f["signed"]) - f["bias"] - f["mantissa"])
    if top and f["specials"] == "ieee":
        value = math.nan if mantissa else math.inf
    if top and full and f["specials"] == "nan":
        value = math.nan
    return -value if sign else value


def page_nearest(f: dict, x: float) -> int:
    """`nearest` of bits.js: the code of the value nearest to x, ties to the even code."""
    least = f["signed"] - f["bias"]
    size = min(abs(x) if f["signed"] else max(x, 2.0**least), f["largest"])
    power = max(math.frexp(size)[1] - 1, least) if size else least
    steps = math.ldexp(size, f["mantissa"] - power)
    low = math.floor(steps) + (power - least) * 2 ** f["mantissa"] - (1 - f["signed"])
    rest = steps - math.floor(steps)
    up = rest > 0.5 or (rest == 0.5 and low % 2 == 1)
    negative = f["signed"] and math.copysign(1, x) < 0
    return low + up + (2 ** (bits_of(f) - 1) if negative else 0)


def some_codes(format) -> np.ndarray:
    if format.bits <= 8:
        return np.arange(2**format.bits)
    codes = np.random.default_rng(0).integers(0, 2**format.bits, 2000)
    marks = [mark["code"] for mark in describe(format)["marks"]]
    return np.concatenate([codes, [0, 2 ** (format.bits - 1), *marks]])


def oracle(format, codes: np.ndarray) -> np.ndarray:
    unsigned = codes.astype({8: np.uint8, 16: np.uint16, 32: np.uint32}[max(8, format.bits)])
    with np.errstate(invalid="ignore"):
        return unsigned.view(DTYPES[format.name]).astype(np.float64)


def same(ours: list[float], theirs: np.ndarray) -> bool:
    signs = np.signbit(ours) == np.signbit(theirs)
    return np.array_equal(ours, theirs, equal_nan=True) and bool((signs | np.isnan(ours)).all())


@formats
def test_the_page_reads_every_code_as_ml_dtypes_does(format):
    f, codes = describe(format), some_codes(format)
    theirs = oracle(format, codes)
    assert same([page_read(f, int(code)) for code in codes], theirs)
    assert not same([page_read(f | {"bias": f["bias"] + 1}, int(code)) for code in codes], theirs)
    assert not same([page_read(f, int(code) ^ 1) for code in codes], theirs)


@pytest.mark.parametrize("format", FLOATS[1:], ids=lambda format: format.name)
def test_the_page_rounds_as_the_grid_does(format):
    f, points = describe(format), format.grid.points
    points = points[points.isfinite()].unique()
    points = points[:: max(1, len(points) // 1000)]
    x = torch.cat(
        [points, (points[1:] + points[:-1]) / 2, torch.tensor([3e38, -3e38, 1e-45, -0.0])]
    )
    theirs = format.grid.round(x).tolist()
    assert [page_nearest(f, value) for value in x.tolist()] == theirs
    other = f | {"largest": f["largest"] / 2}
    assert [page_nearest(other, value) for value in x.tolist()] != theirs


def test_the_page_rounds_to_float32_as_numpy_does():
    x = np.random.default_rng(0).standard_normal(2000) * 1e-3
    theirs = x.astype(np.float32).view(np.uint32).tolist()
    assert [page_nearest(describe(FLOATS[0]), value) for value in x] == theirs


@formats
def test_landmarks_are_what_they_say(format):
    marks = {mark["text"]: mark["code"] for mark in describe(format)["marks"]}
    info = ml_dtypes.finfo(DTYPES[format.name])
    values = dict(zip(marks, oracle(format, np.array(list(marks.values())))))
    assert values["smallest"] == float(info.smallest_subnormal)
    assert values["one"] == 1
    assert values["largest"] == float(info.max) == describe(format)["largest"]
    assert math.isinf(values.get("infinity", math.inf))
    assert math.isnan(values.get("NaN", math.nan))
    assert ("infinity" in marks) == (format.specials == "ieee")
    assert ("NaN" in marks) == (format.specials != "none")


def test_the_first_view_shows_the_nearest_value():
    widget = Bits("e4m3", asked=0.3)
    assert (widget.format, widget.code, widget.asked) == ("e4m3", 0x2A, 0.3)
    assert page_read(describe(FLOATS[3]), widget.code) == 0.3125
    assert repr(widget) == "<Bits: interactive figure>"


def test_unknown_formats_are_refused():
    known = "float32, float16, bfloat16, e4m3, e5m2, e2m3, e3m2, e2m1, e8m0"
    message = f"unknown float format 'fp4': known are {known}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Bits("fp4")


def test_the_data_is_small_plain_json():
    widget = Bits()
    text = json.dumps(widget.formats, allow_nan=False)
    assert json.loads(text) == widget.formats
    assert len(text) < 50_000


def test_the_script_is_small_and_asks_no_other_host():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.|import\s|fetch\(", SCRIPT)
    assert SCRIPT.rstrip().endswith("export default { render };")
