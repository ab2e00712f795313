"""IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0: byte for byte the bytes of ggml."""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
from ggml_cases import bits, decoded, differing, importances, oracle, ours, refused, weights
from gguf import GGMLQuantizationType, quants

import qlib
from qlib.ggml import FORMATS, fp4, iq4, ternary

NAMES = ["iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "q1_0", "ggml_mxfp4", "ggml_nvfp4"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("importance", ["none", "usual", "holes"])
def test_bytes_equal_libgguf(name, importance):
    given = importances()[importance]
    assert {case: differing(name, x, given) for case, x in weights().items()} == dict.fromkeys(
        weights(), 0
    )


@pytest.mark.parametrize("name", NAMES)
def test_real_weights_equal_libgguf(name):
    w = qlib.load("bpw-small")[0].model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert differing(name, w) == 0
    assert differing(name, w, importances()["usual"]) == 0


@pytest.mark.parametrize(
    ("name", "module", "what", "wrong"),
    [
        ("iq4_nl", iq4, "TARGETS", range(-127 - 6, -127 + 8)),
        ("iq4_xs", iq4, "TARGETS", range(-127 - 7, -127 + 7)),
        ("tq1_0", ternary, "PACKED", ternary.PACKED + np.uint8(1)),
        ("ggml_mxfp4", fp4, "BOUNDS", np.nextafter(fp4.BOUNDS, np.float32(0))),
        ("ggml_nvfp4", fp4, "BOUNDS", fp4.BOUNDS * np.float32(1.001)),
    ],
)
def test_one_wrong_constant_is_noticed(monkeypatch, name, module, what, wrong):
    x = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    x[0] = weights()["ties"][0]
    assert differing(name, x) == 0
    monkeypatch.setattr(module, what, wrong)
    assert differing(name, x) > 0


@pytest.mark.parametrize("name", ["tq2_0", "q1_0"])
def test_one_wrong_weight_is_noticed(name):
    x = weights()["trits"]
    x[0, 5] *= 2
    assert not np.array_equal(ours(name, x), oracle(name, weights()["trits"]))


@pytest.mark.parametrize("name", NAMES)
def test_arbitrary_bytes_decode_as_in_ggml(name):
    kind = FORMATS[name].kind
    raw = np.random.default_rng(3).integers(0, 256, (2000, kind.size), np.uint8)
    values = decoded(name, raw)
    assert np.array_equal(bits(values), bits(libgguf.dequantize_rows(raw, kind.id)))
    if name != "q1_0":
        with np.errstate(all="ignore"):
            theirs = quants.dequantize(raw, GGMLQuantizationType(kind.id)).astype(np.float32)
        assert np.array_equal(bits(values), bits(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_noticed_where_ggml_notices_it(name):
    kind = FORMATS[name].kind
    block = ours(name, weights()["gauss"])[:1]
    flipped = np.repeat(block, 8 * kind.size, axis=0)
    at = np.arange(8 * kind.size)
    flipped[at, at // 8] ^= np.left_shift(1, at % 8).astype(np.uint8)
    mine = (decoded(name, flipped) != decoded(name, block)).any(1)
    theirs = libgguf.dequantize_rows(flipped, kind.id) != libgguf.dequantize_rows(block, kind.id)
    assert np.array_equal(mine, theirs.any(1))
    # TQ1_0 has 256 bytes for 243 numbers; zeros have two signs, NVFP4's scales an idle bit.
    assert mine.mean() > (0.8 if name == "tq1_0" else 0.95)


# 64 values of a wave, and what ggml writes for them. libgguf does not have Q2_0.
WAVE = """
fd33a5bf83be98bf8b7227bff12c5abe062ad53bf6a4d33e47ad6e3f33fa843fa32e6e3fe876813fcd96723f5a28dc3e
3d909abd162495beb20424bfec6d95bff4cfa8bf82a78cbf1b3480bf7a8762bfbfe0a8bebf3b913e0b5bf33ecff0263f
f285873f66ed9a3ff32e6b3fb1632f3f0035143fcfc3083e5bc702bfb32f4fbf9bf06abf148f9cbf4615b0bf86c982bf
66a617bf9f2cbdbe63da903c089d193ff116663f9147613f76dc813f18d4923f45c8503f63599c3ec8876f3d4d5770be
4c5052bf531c9abf82a292bfc64b8ebfbcdc94bf2f314fbf138120be0ade483ee83bb73ea0a64b3f4b41943f6c80863f
bccb5b3f7ad6583f7ffc123f633d6bbd
"""
WAVE_Q2_0 = "813d50a56a1500556a150055aa560050a95a"


def test_q2_0_against_ggmls_bytes():
    x = np.frombuffer(bytearray.fromhex(WAVE), np.float32).reshape(1, 64)
    assert ours("q2_0", x).tobytes().hex() == WAVE_Q2_0
    assert ours("q2_0", -x).tobytes().hex() != WAVE_Q2_0


def test_q2_0_reads_all_four_values():
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([0.5], np.float16).view(np.uint8)
    # The first code of a byte lies lowest: 0, 1, 2, 3.
    raw[0, 2:] = 0b11100100
    assert decoded("q2_0", raw)[0, :5].tolist() == [-0.5, 0, 0.5, 1, -0.5]
    assert np.array_equal(ours("q2_0", decoded("q2_0", raw & 0xBF))[:, 2:], raw[:, 2:] & 0xBF)


def test_nearest_level_of_iq4():
    x = np.concatenate([iq4.LEVELS, (iq4.LEVELS[1:] + iq4.LEVELS[:-1]) / 2, np.linspace(-134, 134)])
    x = np.concatenate([np.nextafter(x, np.float32(-200)), x]).astype(np.float32)[:, None]
    codes = iq4._look_up(iq4.CODES, x, np.ones(1, np.float32))
    # Of two equally near levels the upper: the last of the least distances.
    distance = np.abs(x.astype(np.float64) - iq4.LEVELS)
    upper = 15 - distance[:, ::-1].argmin(1)
    assert np.array_equal(codes[:, 0], upper)
    assert not np.array_equal(codes[:, 0], distance.argmin(1))


def test_e4m3_of_ggml():
    x = np.abs(np.random.default_rng(4).standard_normal(4000)).astype(np.float32)
    x = np.concatenate([x, x * 1e-3, x * 300, fp4.HALF_E4M3 * 2, fp4.HALF_E4M3 * 2.125, [0, 1e9]])
    x = x.astype(np.float32)
    assert np.array_equal(fp4.to_e4m3(x), quants.NVFP4.fp32_to_ue4m3(x))
    # 256 has a code of its own, but from 248 on ggml writes 448.
    assert fp4.HALF_E4M3[fp4.to_e4m3(np.float32([247, 248, 256, 448]))].tolist() == [
        120, 224, 224, 224,
    ]  # fmt: skip


def test_importance_pays():
    x, importance = weights()["gauss"], importances()["usual"]
    errors = []
    for given in (None, importance):
        y = decoded("iq4_xs", ours("iq4_xs", x, given)).reshape(x.shape)
        errors.append((importance * np.square(y - x)).sum())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "q1_0", "q2_0"])
def test_weights_beyond_float16_are_refused(name):
    message = refused(name, weights()["gauss"] * np.float32(1e9))
    assert FORMATS[name].kind.name in message
    assert "need a scale that float16 cannot hold" in message


@pytest.mark.parametrize("name", NAMES)
def test_rows_must_be_whole_blocks(name):
    message = refused(name, np.ones((2, 24), np.float32))
    assert f"{FORMATS[name].kind.name} stores blocks of {FORMATS[name].kind.block}" in message
