"""The rotation widget: its script, run by Node, must give what the Hadamard matrix by
its definition and `qlib.quantize` give."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from node import run

import qlib
from qlib.metrics import snr_db
from qlib.widgets import rotate
from qlib.widgets.rotate import BITS, DRAWS, PRESETS, SCALES, Rotate, token

SCRIPT = Path(rotate.__file__).with_suffix(".js").read_text(encoding="utf-8")
BASE = Path(rotate.__file__).with_name("base.js").read_text(encoding="utf-8")
FIELDS = "channels unit spread places count basis stages".split()


def given(widget: Rotate) -> dict:
    """What render() hands to both()."""
    state = {name: getattr(widget, name) for name in FIELDS}
    grid = next(entry for entry in widget.grids if entry["bits"] == widget.bits)
    sign = widget.draws[widget.signs - 1] if widget.signs else None
    return state | {"scale": widget.scales[widget.size], "sign": sign, "grid": grid}


def page(widgets: list[Rotate], script: str = SCRIPT) -> list:
    """[original, rotated] of each widget, as rotate.js computes them."""
    return run(BASE + script, "all => all.map(both)", [given(w) for w in widgets])


def hadamard(n: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of ones that i and j have in common, in binary."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


def oracle(w: Rotate) -> list[np.ndarray]:
    """The original and the rotated token, float64."""
    n = len(w.channels)
    x = np.array(w.channels) * w.unit
    x[w.places[: w.count]] = w.scales[w.size] * w.spread
    if w.basis == "rows":
        x = hadamard(n) @ x / np.sqrt(n)
    turned = x * w.draws[w.signs - 1] if w.signs else x
    mix = 2**w.stages
    return [x, np.kron(np.eye(n // mix), hadamard(mix) / np.sqrt(mix)) @ turned]


def agrees(found: dict, x: np.ndarray, bits: int) -> bool:
    """The page's numbers about one token against numpy and the library."""
    exact = torch.tensor(found["exact"])
    stored = qlib.quantize(exact[None], f"int{bits}-row")
    values = stored.dequantize()[0]
    noise = float((exact.double() - values.double()).square().sum())
    numbers = [found[name] for name in ("energy", "largest", "zeros", "noise", "snr")]
    signal = float((x**2).sum())
    right = [signal, abs(x).max(), int((values == 0).sum()), noise, 10 * np.log10(signal / noise)]
    return (
        np.allclose(found["exact"], x, rtol=1e-6, atol=1e-6)
        and torch.equal(torch.tensor(found["values"]), values)
        and np.allclose(numbers, right, rtol=1e-6)
    )


def many() -> list[Rotate]:
    """Every preset on every grid, and settings between them, two widths."""
    shared = [
        Rotate(stages=stages, signs=signs, bits=bits, **{k: p[k] for k in ("basis", "count")})
        for p, bits, (stages, signs) in product(PRESETS, BITS, [(6, 0), (3, 2), (0, 1)])
    ]
    sizes = [Rotate(token(128, seed=s), size=s, count=s % 5) for s in range(len(SCALES))]
    return [*shared, *sizes, Rotate(token(8), count=4, size=9, stages=3)]


def test_the_page_computes_what_the_library_computes():
    widgets = many()
    for w, pair in zip(widgets, page(widgets), strict=True):
        for found, x in zip(pair, oracle(w), strict=True):
            assert agrees(found, x, w.bits)
            assert not agrees(found, x * 1.01, w.bits)
            moved = [found["values"][0] + found["scale"], *found["values"][1:]]
            assert not agrees(found | {"values": moved}, x, w.bits)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("y[i + far] = (a - b)", "y[i + far] = (b - a)"),
        ("(a + b) * Math.SQRT1_2", "(a + b) / 2"),
        ("far < 2 ** stages", "far <= 2 ** stages / 4"),
        ("v * signs[i]", "v"),
        ("largest / top", "largest / (top + 0.5)"),
        ('basis === "rows"', "false"),
        ("? half(", "? ("),
        ("x[place] = scale", "x[place] = -scale"),
    ],
)
def test_a_script_with_one_mistake_is_found(right, wrong):
    assert SCRIPT.count(right) == 1
    widgets = [Rotate(basis="rows", signs=1, bits=3), Rotate(bits=4, count=3, signs=2)]
    pairs = page(widgets, SCRIPT.replace(right, wrong))
    checks = [
        agrees(found, x, w.bits)
        for w, pair in zip(widgets, pairs, strict=True)
        for found, x in zip(pair, oracle(w), strict=True)
    ]
    assert not all(checks)


def test_what_the_presets_show():
    """The claims of the page: who gains, who loses, what stays, and how far the maximum falls."""
    settings = {p["label"]: {k: p[k] for k in ("basis", "count", "size")} for p in PRESETS}
    pairs = page([Rotate(**state) for state in settings.values()])
    gain = {
        name: after["snr"] - before["snr"]
        for name, (before, after) in zip(settings, pairs, strict=True)
    }
    assert gain["one outlier"] > 10
    assert gain["massive activation"] < -3
    assert abs(gain["Gaussian"]) < 1
    assert gain["worst case"] < -10
    for before, after in pairs:
        assert after["energy"] == pytest.approx(before["energy"], rel=1e-6)
        assert before["largest"] / 8 <= after["largest"] * (1 + 1e-6)
    before, after = pairs[1]
    assert before["largest"] / after["largest"] == pytest.approx(8, rel=0.05)


def gains(widgets: list[Rotate]) -> np.ndarray:
    """Decibels that the rotation gains."""
    return np.array([after["snr"] - before["snr"] for before, after in page(widgets)])


def test_what_more_bits_and_random_signs_change():
    """At 8 bits even a massive activation gains; random signs spread the pattern of the worst."""
    massive, worst = ({k: PRESETS[i][k] for k in ("basis", "count", "size")} for i in (1, 3))
    assert gains([Rotate(**massive, bits=8)]) > 8
    signed = gains([Rotate(**worst, signs=d) for d in range(DRAWS + 1)])
    assert (signed[1:] > signed[0] + 4).all()
    drawn = gains([Rotate(token(seed=seed), count=0) for seed in range(200)])
    assert abs(drawn.mean()) < 0.3 < drawn.std()


def test_the_error_of_a_dot_product():
    """Its root mean square over weights of variance 1 is the length of the error."""
    (found, _), *_ = page([Rotate()])
    error = torch.tensor(found["exact"]) - torch.tensor(found["values"])
    weights = torch.randn(20_000, len(error), generator=torch.Generator().manual_seed(0))
    sampled = (weights @ error).square().mean().sqrt().item()
    assert sampled == pytest.approx(found["noise"] ** 0.5, rel=0.03)
    assert sampled != pytest.approx(found["noise"], rel=0.03)


def test_exact_rounding_has_no_finite_snr():
    """JSON writes infinity as null; the page says "exact"."""
    x = torch.tensor([1.5, -1.5, 1.5, 0.5, 0.5, -0.5, 0.5, 0.5])
    before, _ = page([Rotate(x, count=0, bits=3)])[0]
    assert (before["noise"], before["snr"], before["zeros"]) == (0, None, 0)


def test_the_channels_are_close_to_what_was_given():
    x = token(128, seed=3)
    widget = Rotate(5 * x)
    assert snr_db(x, torch.tensor(widget.channels) * widget.unit) > 60
    assert widget.spread == pytest.approx(1, rel=1e-3)
    assert Rotate(x.tolist()).channels == widget.channels


def test_state_is_plain_and_small():
    state = Rotate(token(128)).get_state()
    names = [*FIELDS, "scales", "grids", "draws", "presets", "size", "signs", "bits"]
    assert len(json.dumps({name: state[name] for name in names})) < 50_000
    assert (state["stages"], Rotate().stages, Rotate(stages=2).stages) == (7, 6, 2)
    assert state["grids"][1] == {"bits": 4, "bottom": -8, "top": 7}
    assert {sign for draw in state["draws"] for sign in draw} == {1, -1}
    assert len(set(state["places"])) == 4
    assert repr(Rotate()) == "<Rotate: interactive figure>"


@pytest.mark.parametrize("shape", [(), (4,), (48,), (256,), (2, 32)])
def test_a_token_of_another_shape(shape):
    need = "a vector of a power of two from 8 to 128 channels"
    message = f"the rotation widget needs {need}, got {list(shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Rotate(torch.ones(shape))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_token_without_a_scale(bad):
    message = "the rotation widget needs finite channels that are not all zero"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Rotate(torch.full((64,), bad))


def test_the_script_is_small_and_knows_no_address():
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.", SCRIPT)
    assert "export default { render }" in SCRIPT
