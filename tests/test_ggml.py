"""Block decoders against libgguf (ggml's own C) and gguf's numpy, bit for bit."""

from __future__ import annotations

import gguf
import libgguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from qlib import ggml

BY_NAME = ggml.TYPES
BLOCKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def bits(values):
    """float32 as integers, with every NaN alike."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def oracle(name, raw, columns):
    kind = getattr(GGMLQuantizationType, name)
    rows = raw.reshape(-1, columns // BY_NAME[name].block * BY_NAME[name].size)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(rows, kind)
    return theirs.astype(np.float32).reshape(-1, columns)


def weights(rows=7, columns=96):
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    x[0] = 0
    x[1, 5] = 1000
    x[2] = np.linspace(-4, 4, columns)
    return x


@pytest.mark.parametrize("name", BLOCKED)
def test_quantized_rows_equal_libgguf(name):
    kind = getattr(GGMLQuantizationType, name)
    raw = np.asarray(libgguf.quantize_rows(weights(), kind)).view(np.uint8)
    ours = ggml.decode(BY_NAME[name], raw.reshape(-1), (7, 96))
    theirs = np.asarray(libgguf.dequantize_rows(raw, kind)).reshape(7, 96)
    assert np.array_equal(bits(ours), bits(theirs))
    assert np.array_equal(bits(ours), bits(oracle(name, raw, 96)))


@pytest.mark.parametrize("name", BLOCKED)
def test_arbitrary_bytes_equal_gguf(name):
    raw = np.random.default_rng(1).integers(0, 256, 3000 * BY_NAME[name].size, dtype=np.uint8)
    ours = ggml.decode(BY_NAME[name], raw, (3000, 32))
    assert np.isnan(ours).any()
    assert np.array_equal(bits(ours), bits(oracle(name, raw, 32)))


@pytest.mark.parametrize("name", BLOCKED)
def test_every_flipped_bit_is_noticed(name):
    kind = getattr(GGMLQuantizationType, name)
    raw = np.asarray(libgguf.quantize_rows(weights()[3:4, :32], kind)).view(np.uint8).reshape(-1)
    right = oracle(name, raw, 32)
    for bit in range(8 * raw.size):
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        ours = ggml.decode(BY_NAME[name], flipped, (1, 32))
        assert not np.array_equal(bits(ours), bits(right)), f"bit {bit}"


@pytest.mark.parametrize(("name", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_all_16_bit_floats(name, dtype):
    codes = np.arange(1 << 16, dtype=np.uint16)
    ours = ggml.decode(BY_NAME[name], codes.view(np.uint8), (256, 256))
    theirs = codes.view(dtype).astype(np.float32).reshape(256, 256)
    assert np.array_equal(bits(ours), bits(theirs))
    assert not np.array_equal(bits(ours), bits(np.roll(theirs, 1)))


def test_float32_is_copied():
    x = weights()
    raw = x.view(np.uint8).reshape(-1).copy()
    ours = ggml.decode(BY_NAME["F32"], raw, x.shape)
    raw[:] = 0
    assert np.array_equal(bits(ours), bits(x))


def test_table_of_types_equals_ggufs():
    sizes = gguf.GGML_QUANT_SIZES
    theirs = {kind.value: (kind.name, *sizes[kind]) for kind in GGMLQuantizationType}
    ours = {kind.id: (kind.name, kind.block, kind.size) for kind in ggml.TYPES.values()}
    for number, row in theirs.items():
        # A newer or older gguf may not know a type; Q8_1 has two sizes in ggml's history.
        if number in ours and row[0] != "Q8_1":
            assert ours[number] == row
    assert len(set(ours) & set(theirs)) >= 30


def test_block_order_by_hand():
    # d = 1, minimum 0: the low nibble of byte j is value j, the high nibble value j + 16.
    raw = np.zeros(20, np.uint8)
    raw[:2] = np.array([1.0], np.float16).view(np.uint8)
    raw[4] = 0xA3
    values = ggml.decode(BY_NAME["Q4_1"], raw, (1, 32))[0]
    assert (values[0], values[16], values.sum()) == (3, 10, 13)
