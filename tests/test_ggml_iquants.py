"""IQ1_S to IQ3_S: the bytes of ggml, read and written, but for one error of ggml's own."""

from __future__ import annotations

import dataclasses
import sys

import libgguf
import numpy as np
import pytest
from ggml_cases import bits, decoded, differing, importances, oracle, ours, refused, weights
from gguf import GGMLQuantizationType, quants

import qlib
from qlib.ggml import FORMATS, block, codebooks, iq1, iquants

NAMES = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]
# With an importance that is zero for many weights, ggml's IQ2_XXS aborts the process.
CASES = [
    (name, importance)
    for name in NAMES
    for importance in ("none", "usual", "holes")
    if (name, importance) != ("iq2_xxs", "holes")
]


@pytest.mark.parametrize(("name", "importance"), CASES)
def test_bytes_equal_libgguf(name, importance):
    given, tensors = importances()[importance], weights()
    if name == "iq3_s":
        # See `test_iq3_s_keeps_what_follows_zeros_in_its_place`.
        del tensors["zeros"]
    found = {case: differing(name, x, given) for case, x in tensors.items()}
    assert found == dict.fromkeys(tensors, 0)


@pytest.mark.parametrize("name", NAMES)
def test_real_weights_equal_libgguf(name):
    w = qlib.load("bpw-small")[0].model.layers[1].mlp.down_proj.weight.detach().numpy()[:64]
    assert differing(name, w) == 0
    assert differing(name, w, importances()["usual"]) == 0


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
@pytest.mark.parametrize("change", ["tries", "fudge", "size of step", "shells"])
def test_one_wrong_constant_of_the_search_is_noticed(monkeypatch, name, change):
    x = np.random.default_rng(2).standard_normal((32, 512)).astype(np.float32)
    assert differing(name.lower(), x) == 0
    search = getattr(iquants, name)
    if change == "shells":
        fewer = codebooks.SHELLS | {name: 2 if codebooks.SHELLS[name] == 1 else 1}
        monkeypatch.setattr(codebooks, "SHELLS", fewer)
        monkeypatch.setattr(iquants, "cells", codebooks.cells.__wrapped__)
    else:
        wrong = {
            "tries": {"tries": search.tries - 3},
            "fudge": {"fudge": search.fudge * 1.01},
            "size of step": {"step": search.step * 1.1},
        }[change]
        monkeypatch.setattr(iquants, name, dataclasses.replace(search, **wrong))
    assert differing(name.lower(), x) > 0


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m"])
def test_one_wrong_weight_of_an_error_is_noticed(monkeypatch, name):
    x, importance = weights()["gauss"], importances()["usual"]
    right = iq1.error_weights

    def wrong(x, importance, size):
        return right(x, importance, size, spread=1.9)

    monkeypatch.setattr(iq1, "error_weights", wrong)
    assert differing(name, x, importance) > 0


def test_iq3_s_keeps_what_follows_zeros_in_its_place():
    x = weights()["gauss"][:1, :256].copy()
    x[:, 32:64] = 0
    mine, theirs = ours("iq3_s", x), oracle("iq3_s", x)
    # ggml leaves out the 8 indices and 4 sign bytes of the zeros and closes up.
    assert np.array_equal(theirs[0, 2:10], mine[0, 2:10])
    assert np.array_equal(theirs[0, 10:58], mine[0, 18:66])
    assert np.array_equal(theirs[0, 78:102], mine[0, 82:106])
    errors = [np.square(decoded("iq3_s", raw) - x).sum() for raw in (mine, theirs)]
    assert errors[0] < 0.03 * np.square(x).sum()
    assert errors[1] > 50 * errors[0]
    # At the end of a block there is nothing to misplace.
    assert differing("iq3_s", np.roll(x, 192, axis=1)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_arbitrary_bytes_decode_as_in_ggml(name):
    kind = FORMATS[name].kind
    raw = np.random.default_rng(3).integers(0, 256, (2000, kind.size), np.uint8)
    values = decoded(name, raw)
    assert np.array_equal(bits(values), bits(libgguf.dequantize_rows(raw, kind.id)))
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(raw, GGMLQuantizationType(kind.id)).astype(np.float32)
    assert np.array_equal(bits(values), bits(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_noticed(name):
    kind = FORMATS[name].kind
    right = ours(name, weights()["gauss"])[:1]
    flipped = np.repeat(right, 8 * kind.size, axis=0)
    at = np.arange(8 * kind.size)
    flipped[at, at // 8] ^= np.left_shift(1, at % 8).astype(np.uint8)
    assert (decoded(name, flipped) != libgguf.dequantize_rows(right, kind.id)).any(1).all()


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs"])
def test_squares_of_the_whole_matrix_stand_in_for_an_importance(monkeypatch, name):
    x = weights()["heavy"]
    monkeypatch.setattr(block, "CHUNK_WEIGHTS", 512)
    assert np.array_equal(ours(name, x), ours(name, x, np.square(x).sum(0)))
    assert differing(name, x) == 0
    # Of one row alone they would be others.
    assert differing(name, x[:1]) == 0
    assert not np.array_equal(ours(name, x)[:2], ours(name, x[:1]))


def test_which_types_need_an_importance():
    need = {name for name, format in FORMATS.items() if format.needs_importance}
    assert need == set(NAMES) - {"iq3_s"}
    strict = {name for name in NAMES if libgguf.quantize_requires_imatrix(FORMATS[name].kind.id)}
    assert strict == {n for n in NAMES if isinstance(FORMATS[n], codebooks.CoarseFormat)}


# Not IQ2_XXS: its 256 points are so far apart that ggml's search, which weighs the choice of a
# point by the root of the importance, can lose by it.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "iq2_xxs"])
def test_importance_pays(name):
    x, importance = weights()["gauss"], importances()["usual"]
    errors = []
    for given in (np.ones_like(importance), importance):
        y = decoded(name, ours(name, x, given)).reshape(x.shape)
        errors.append((importance * np.square(y - x)).sum())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("importance", ["holes", "nothing"])
def test_weights_that_count_for_nothing(name, importance):
    given = importances().get(importance, np.zeros(512, np.float32))
    for x in weights().values():
        y = decoded(name, ours(name, x, given))
        assert np.isfinite(y).all()
        assert np.abs(y).max() <= 2 * np.abs(x).max()


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_cells_against_all_distances(name):
    index, bounds, near, levels = codebooks.cells(name)
    n = levels.shape[1]
    width, digits = (3, 8) if n == 4 else (2, 3)
    first, step = (-1, 1) if name == "IQ1_S" else (1, 2)
    for digit in np.random.default_rng(4).integers(0, digits, (50, n)):
        cell = int((digit << width * np.arange(n)).sum())
        distance = np.square(levels - (first + step * digit)).sum(1)
        shells = np.unique(distance)[: codebooks.SHELLS[name]]
        wanted = [i for d in shells for i in np.flatnonzero(distance == d)]
        assert near[slice(*bounds[cell])].tolist() == wanted
        assert index[cell] == (wanted[0] if shells[0] == 0 else -1)


def test_codebooks_need_gguf(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"the codebook of IQ2_S .* pip install gguf"):
        codebooks.points.__wrapped__("IQ2_S")


@pytest.mark.parametrize("name", NAMES)
def test_weights_beyond_float16_are_refused(name):
    message = refused(name, weights()["gauss"] * np.float32(1e9))
    assert f"{name.upper()}: weights up to" in message
    assert "need a scale that float16 cannot hold" in message


@pytest.mark.parametrize("name", NAMES)
def test_rows_must_be_whole_blocks(name):
    assert f"{name.upper()} stores blocks of 256" in refused(name, np.ones((2, 128), np.float32))
