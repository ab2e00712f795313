"""The bytes that ggml's own C (libgguf) writes for the same weights and importance, all of them."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

import qlib
from qlib.ggml import BY_ID, FORMATS, block, kquants, legacy_loops, search

LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
K_TYPES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
WIDTH = 512


def tensors() -> dict[str, np.ndarray]:
    """Weights of every kind, float32 [6, 512] each."""
    rng = np.random.default_rng(0)
    shape = (6, WIDTH)
    gauss = rng.standard_normal(shape).astype(np.float32)
    mixed = np.exp(rng.normal(0, 3, (6, 16, 1))).repeat(32, axis=2).reshape(shape)
    chosen = {
        "gaussian": gauss,
        "student t": rng.standard_t(2, shape),
        "positive": np.abs(gauss),
        "negative": -np.abs(gauss),
        "constant": np.full(shape, 0.37),
        "negative constant": np.full(shape, -0.37),
        "zero": np.zeros(shape),
        "both zeros": np.where(gauss > 0, 0.0, -0.0),
        "sparse, both zeros": gauss * (rng.random(shape) < 0.05),
        "ties": np.round(gauss * 4),
        "signs": np.sign(gauss),
        "one large": np.where(np.arange(WIDTH) % 50, gauss * 1e-4, 1),
        "blocks of all sizes": gauss * mixed,
        "1e-9": gauss * 1e-9,
        "1e-13": gauss * 1e-13,
        "near 1e-15": gauss * 2e-15,
        "1e-30": gauss * 1e-30,
        "1e4": gauss * 1e4,
    }
    return {name: np.asarray(x, np.float32) for name, x in chosen.items()}


def importances() -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(1)
    chosen = {
        "none": None,
        "chi squared": rng.standard_normal(WIDTH) ** 2,
        "heavy": np.exp(rng.normal(0, 3, WIDTH)),
        "half zero": rng.random(WIDTH) < 0.5,
    }
    return {k: v if v is None else np.asarray(v, np.float32) for k, v in chosen.items()}


TENSORS, IMPORTANCES = tensors(), importances()
# Enough blocks to meet one that needs each trial.
MANY = np.random.default_rng(2).standard_t(2, (512, WIDTH)).astype(np.float32)


def refused(name: str, x: torch.Tensor, importance: torch.Tensor | None = None) -> str:
    with pytest.raises(ValueError, match=name.upper()) as info:
        FORMATS[name].quantize(x, importance)
    return str(info.value)


def oracle(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """libgguf's bytes, uint8 [rows, bytes]."""
    kind = getattr(GGMLQuantizationType, name.upper())
    return libgguf.quantize_rows(x, kind, imatrix=importance).view(np.uint8).reshape(len(x), -1)


def ours(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    given = None if importance is None else torch.from_numpy(importance)
    return FORMATS[name].quantize(torch.from_numpy(x), given).parts["blocks"].numpy()


def differing(name: str, where: str = "none") -> set[str]:
    """The tensors on which our bytes differ from libgguf's."""
    importance = IMPORTANCES[where]
    return {
        kind
        for kind, x in TENSORS.items()
        if not np.array_equal(ours(name, x, importance), oracle(name, x, importance))
    }


@pytest.mark.parametrize("where", IMPORTANCES)
@pytest.mark.parametrize("name", LEGACY + K_TYPES)
def test_bytes_equal_libggufs(name, where):
    assert differing(name, where) == set()


@pytest.fixture(scope="module")
def real_layers():
    """Rows of trained layers of 256, 512 and 1536 columns."""
    small, smol = qlib.load("bpw-small")[0], qlib.load("smollm2-135m")[0]
    parts = [smol.model.layers[i].mlp.down_proj for i in (0, 29)]
    for layer in small.model.layers[:2]:
        parts += [layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj]
    return [part.weight.detach().numpy()[:24].copy() for part in parts]


@pytest.mark.parametrize("name", LEGACY + K_TYPES)
def test_real_weights(name, real_layers):
    assert {x.shape[1] for x in real_layers} == {256, 512, 1536}
    for x in real_layers:
        for given in (None, np.square(x).mean(0)):
            assert np.array_equal(ours(name, x, given), oracle(name, x, given))


@pytest.mark.parametrize("name", ["q6_k", "q8_0"])
def test_values_of_a_million_fit(name):
    x = TENSORS["gaussian"] * np.float32(1e6)
    assert np.array_equal(ours(name, x), oracle(name, x))


@pytest.mark.parametrize("name", LEGACY + K_TYPES)
def test_flipped_bit_is_noticed(name):
    x = TENSORS["gaussian"][:1, :256]
    right = oracle(name, x)
    values = libgguf.dequantize_rows(right, getattr(GGMLQuantizationType, name.upper()))
    assert np.array_equal(ours(name, x), right)
    for bit in range(0, 8 * right.size, 7):
        wrong = right.copy()
        wrong[0, bit // 8] ^= 1 << bit % 8
        decoded = FORMATS[name].decode({"blocks": torch.from_numpy(wrong)}, x.shape).numpy()
        assert not np.array_equal(decoded.ravel(), values.ravel()), f"bit {bit}"


def one_trial_less(monkeypatch):
    def shorter(x, w, n, trials, absolute=False):
        first, step, last = trials
        return fit(x, w, n, (first, step, last - 1), absolute)

    fit = search.fit_affine
    monkeypatch.setattr(search, "fit_affine", shorter)
    monkeypatch.setattr(search, "SIGNED_TRIALS", [i for i in search.SIGNED_TRIALS if i != -9])


@pytest.mark.parametrize("where", ["none", "chi squared"])
@pytest.mark.parametrize("name", [*LEGACY, *K_TYPES])
def test_one_trial_less_changes_bytes(name, where, monkeypatch):
    one_trial_less(monkeypatch)
    equal = np.array_equal(
        ours(name, MANY, IMPORTANCES[where]), oracle(name, MANY, IMPORTANCES[where])
    )
    # Q3_K without an importance has one first guess, and no trials.
    plain = name == "q8_0" or (where == "none" and name in [*LEGACY, "q3_k"])
    assert equal == plain


@pytest.mark.parametrize(
    ("name", "where"), [("q3_k", "none"), ("q2_k", "chi squared"), ("q4_k", "chi squared")]
)
def test_fewer_passes_change_bytes(name, where, monkeypatch):
    right = oracle(name, MANY, IMPORTANCES[where])
    assert np.array_equal(ours(name, MANY, IMPORTANCES[where]), right)
    monkeypatch.setattr(search, "PASSES", 2)
    assert not np.array_equal(ours(name, MANY, IMPORTANCES[where]), right)


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_k"])
def test_one_trial_less_of_the_scales_changes_bytes(name, monkeypatch):
    monkeypatch.setattr(search, "POSITIVE_TRIALS", search.POSITIVE_TRIALS[:-1])
    importance = IMPORTANCES["heavy"]
    assert not np.array_equal(ours(name, MANY, importance), oracle(name, MANY, importance))


@pytest.mark.parametrize("name", LEGACY[:4])
def test_rounding_of_the_plain_types_is_noticed(name, monkeypatch):
    signed, affine, pack = legacy_loops.write_signed, legacy_loops.write_affine, legacy_loops.pack

    def other_signed(x, n, top, d, raw):
        signed(x, n, top, d, raw)
        pack(x, d, np.zeros_like(d), n + np.float32(0.49), top, raw)

    def other_affine(x, top, d, low, raw):
        affine(x, top, d, low, raw)
        pack(x, d, low, np.float32(0.49), top, raw)

    monkeypatch.setattr(legacy_loops, "write_signed", other_signed)
    monkeypatch.setattr(legacy_loops, "write_affine", other_affine)
    assert "gaussian" in differing(name)


def test_halves_of_q8_0_go_away_from_zero():
    # d = 1 and codes at half and just below, of both signs.
    below = np.nextafter(np.float32(0.5), np.float32(0))
    x = np.zeros((1, 32), np.float32)
    x[0, :7] = 127, 0.5, -0.5, 2.5, -2.5, below, -below
    assert ours("q8_0", x)[0, 2:9].view(np.int8).tolist() == [127, 1, -1, 3, -3, 0, 0]
    assert np.array_equal(ours("q8_0", x), oracle("q8_0", x))


@pytest.mark.parametrize("name", LEGACY + K_TYPES)
def test_importance_of_every_weight(name):
    x = TENSORS["student t"]
    importance = np.random.default_rng(3).standard_normal(x.shape).astype(np.float32) ** 2
    right = [oracle(name, row[None], w)[0] for row, w in zip(x, importance)]
    assert np.array_equal(ours(name, x, importance), right)
    if name != "q8_0":
        assert not np.array_equal(ours(name, x, importance[::-1].copy()), right)


@pytest.mark.parametrize("name", [*LEGACY, *K_TYPES, "q8_k"])
def test_chunks_and_threads_change_nothing(name, monkeypatch):
    x, importance = TENSORS["student t"], IMPORTANCES["chi squared"]
    whole = ours(name, x, importance)
    rows = [ours(name, x[i : i + 1], importance)[0] for i in range(len(x))]
    assert np.array_equal(rows, whole)
    # A single block: sums over its values must not be taken in another order.
    kind = FORMATS[name].kind
    first = ours(name, x[:1, : kind.block])
    assert np.array_equal(first[0], ours(name, x)[0, : kind.size])
    monkeypatch.setattr(block, "CHUNK_WEIGHTS", 2 * WIDTH)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert np.array_equal(ours(name, x, importance), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LEGACY + K_TYPES)
def test_any_leading_shape(name):
    x = torch.from_numpy(TENSORS["gaussian"])
    q = FORMATS[name].quantize(x.view(2, 3, WIDTH))
    assert torch.equal(q.parts["blocks"], FORMATS[name].quantize(x).parts["blocks"])
    assert q.dequantize().shape == (2, 3, WIDTH)
    assert q.nbytes == FORMATS[name].nbytes((6, WIDTH))


def test_ragged_rows_are_refused():
    message = "Q4_K stores blocks of 256, and rows of shape [2, 320] are no multiple of it; "
    assert refused("q4_k", torch.ones(2, 320)) == message + "q8_0 and q5_0 have blocks of 32"
    assert refused("q5_1", torch.ones(2, 48)) == (
        "Q5_1 stores blocks of 32, and rows of shape [2, 48] are no multiple of it; "
        "int formats take any row"
    )


@pytest.mark.parametrize("importance", [None, torch.ones(256)])
@pytest.mark.parametrize(
    ("name", "largest", "allowed"),
    [
        ("q4_0", 6e5, 5e5),
        ("q4_1", 7e4, 6e4),
        ("q5_0", 1.1e6, 1e6),
        ("q5_1", 7e4, 6e4),
        ("q8_0", 9e6, 8e6),
        ("q2_k", 4e6, 6e5),
        ("q3_k", 1e7, 6e6),
        ("q4_k", 7e7, 3e6),
        ("q5_k", 2e8, 3e6),
        ("q6_k", 3e8, 2e8),
    ],
)
def test_weights_too_large_for_the_scale(name, largest, allowed, importance):
    x = torch.zeros(3, 256)
    x[:, ::2] = 1
    # A minimum overflows before a scale does.
    x[1, 5] = -allowed
    FORMATS[name].quantize(x, importance)
    x[1, 5] = -largest
    assert refused(name, x, importance) == (
        f"{name.upper()}: weights up to {largest:.3g} need a scale that float16 cannot hold; "
        "divide the tensor by a constant or leave it unquantized"
    )


ZERO = {"q4_0": "0080" + "88" * 16, "q5_0": "0080" + "ffffffff" + "00" * 16}


@pytest.mark.parametrize("name", [*LEGACY, *K_TYPES, "q8_k"])
def test_zeros(name):
    kind = FORMATS[name].kind
    raw = ours(name, np.zeros((1, kind.block), np.float32))
    assert raw.tobytes().hex() == ZERO.get(name, "00" * kind.size)


def same(a, b) -> bool:
    """Equal bit for bit, with every NaN alike."""
    return all(
        np.array_equal(*pair)
        for pair in ((np.nan_to_num(a), np.nan_to_num(b)), (np.isnan(a), np.isnan(b)))
    ) and np.array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))


@pytest.mark.parametrize("name", K_TYPES)
def test_arbitrary_bytes_are_read_as_gguf_reads_them(name):
    kind = FORMATS[name].kind
    raw = np.random.default_rng(4).integers(0, 256, (500, kind.size), dtype=np.uint8)
    decoded = FORMATS[name].decode({"blocks": torch.from_numpy(raw)}, (500, 256)).numpy()
    number = getattr(GGMLQuantizationType, name.upper())
    with np.errstate(all="ignore"):
        assert same(decoded, quants.dequantize(raw, number).reshape(500, 256))
    assert same(decoded, libgguf.dequantize_rows(raw, number).reshape(500, 256))


@pytest.mark.parametrize("name", K_TYPES)
def test_every_flipped_bit_is_read(name):
    x = TENSORS["gaussian"][:1, :256] + np.float32(0.5)
    raw = oracle(name, x)
    number = getattr(GGMLQuantizationType, name.upper())
    right = libgguf.dequantize_rows(raw, number).reshape(1, 256)
    flipped = raw.repeat(8 * raw.size, axis=0)
    bits = np.arange(8 * raw.size)
    flipped[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    decoded = FORMATS[name].decode({"blocks": torch.from_numpy(flipped)}, (len(bits), 256)).numpy()
    assert (decoded != right).any(axis=1).all()
    assert same(decoded, libgguf.dequantize_rows(flipped, number).reshape(decoded.shape))


def q8_k_by_hand(x: np.ndarray) -> bytes:
    """One block in plain Python: d is float32, and the extreme gets the code -127."""
    extreme = max(x, key=abs)
    inverse = np.float32(-127) / extreme
    codes = [min(127, round(float(v * inverse))) for v in x]
    sums = [sum(codes[i : i + 16]) for i in range(0, 256, 16)]
    head = (np.float32(1) / inverse).tobytes()
    return head + np.array(codes, np.int8).tobytes() + np.array(sums, "<i2").tobytes()


@pytest.mark.parametrize("kind", ["gaussian", "student t", "ties", "constant", "1e-9", "1e4"])
def test_q8_k_by_hand(kind):
    x = TENSORS[kind][:, :256]
    right = np.array([list(q8_k_by_hand(row)) for row in x], np.uint8)
    assert np.array_equal(ours("q8_k", x), right)
    assert not np.array_equal(ours("q8_k", -x), right)
    values = FORMATS["q8_k"].decode({"blocks": torch.from_numpy(right)}, x.shape).numpy()
    d = right[:, :4].copy().view("<f4")
    assert np.array_equal(values, right[:, 4:260].copy().view(np.int8) * d)
    assert np.abs(values - x).max() <= np.abs(d).max() / 2 * 1.001


def test_six_bit_scales_by_hand():
    # Scale 5 is 0b100011: its low half is in byte 9, its high half on top of byte 1.
    scales, mins = np.zeros((1, 8), np.uint8), np.zeros((1, 8), np.uint8)
    scales[0, 5] = 0b100011
    raw = kquants.to_six_bits(scales, mins)
    assert raw[0].tolist() == [0, 0b10000000, 0, 0, 0, 0, 0, 0, 0, 0b0011, 0, 0]
    assert [part.tolist() for part in kquants.from_six_bits(raw)] == [
        scales.tolist(),
        mins.tolist(),
    ]


def test_names_and_sizes():
    sizes = gguf.GGML_QUANT_SIZES
    for name in [*LEGACY, *K_TYPES]:
        kind = qlib.format(name).kind
        assert BY_ID[kind.id] is kind
        assert (kind.block, kind.size) == sizes[GGMLQuantizationType[name.upper()]]
        bits = 8 * kind.size / kind.block
        assert qlib.quantize(torch.ones(4, 256), name).bits_per_weight == bits
