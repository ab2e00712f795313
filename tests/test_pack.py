"""Packing against numpy's bit streams and a plain loop, and what happens to a flipped bit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.pack import pack, pack_trits, packed_bytes, unpack, unpack_trits

BITS = [1, 2, 3, 4, 5, 6, 7, 8, 16]
SEEDS = st.integers(0, 2**32 - 1)
examples = settings(max_examples=60, deadline=None, derandomize=True)


def random_codes(rows: int, n: int, levels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (rows, n))


def numpy_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition, written bit by bit: bit j of code i is bit i*bits + j of the row."""
    stream = codes[..., None] >> np.arange(bits) & 1
    return np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


def plain_trits(row: list[int]) -> list[int]:
    digits = [row[start : start + 5] for start in range(0, len(row), 5)]
    return [sum(trit * 3**place for place, trit in enumerate(group)) for group in digits]


@examples
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 4), n=st.integers(1, 41), seed=SEEDS)
def test_pack_is_numpy_bit_stream(bits, rows, n, seed):
    codes = random_codes(rows, n, 2**bits, seed)
    expected = numpy_pack(codes, bits)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(unpack(torch.from_numpy(expected), bits, n).numpy(), codes)
    assert packed.shape[1] == packed_bytes(n, 2**bits)


@examples
@given(bits=st.sampled_from(BITS), n=st.integers(1, 41), seed=SEEDS, where=st.floats(0, 0.999))
def test_flipped_bit_changes_exactly_its_own_code(bits, n, seed, where):
    codes = torch.from_numpy(random_codes(2, n, 2**bits, seed))
    packed = pack(codes, bits)
    bit = int(where * n * bits)
    packed[1, bit // 8] ^= 1 << bit % 8
    expected = codes.clone()
    expected[1, bit // bits] ^= 1 << bit % bits
    found = unpack(packed, bits, n)
    assert torch.equal(found.long(), expected)
    assert not torch.equal(found.long(), codes)


@examples
@given(rows=st.integers(1, 3), n=st.integers(1, 41), seed=SEEDS)
def test_trits_are_base_three(rows, n, seed):
    codes = random_codes(rows, n, 3, seed)
    packed = pack_trits(torch.from_numpy(codes))
    assert packed.tolist() == [plain_trits(row.tolist()) for row in codes]
    assert torch.equal(unpack_trits(packed, n), torch.from_numpy(codes).to(torch.uint8))
    assert packed.shape[1] == packed_bytes(n, 3)


def test_wrong_trit_is_noticed():
    codes = torch.tensor([[2, 0, 1, 1, 2, 0, 2]], dtype=torch.uint8)
    packed = pack_trits(codes)
    packed[0, 1] += 1
    assert not torch.equal(unpack_trits(packed, 7), codes)
    assert packed.tolist() != [plain_trits(codes[0].tolist())]


def test_every_byte_unpacks_to_trits():
    """Bytes 243..255 are written by nobody, but a damaged file may hold them."""
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    assert int(unpack_trits(every, 5 * 256).max()) == 2


@pytest.mark.parametrize("bits", BITS)
def test_padding_bits_are_zero(bits):
    packed = pack(torch.full((1, 3), 2**bits - 1), bits)
    assert np.unpackbits(packed.numpy(), bitorder="little").sum() == 3 * bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_any_integer_dtype_and_leading_shape(dtype, bits):
    codes = torch.from_numpy(random_codes(6, 11, 2**bits, 1))
    packed = pack(codes.to(dtype).view(2, 3, 11), bits)
    assert packed.shape[:2] == (2, 3)
    assert torch.equal(packed.flatten(0, 1), pack(codes, bits))
    assert torch.equal(unpack(packed, bits, 11).flatten(0, 1), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("code", [-1, "too large"])
def test_code_that_does_not_fit(bits, code):
    value = 2**bits if code == "too large" else code
    message = f"a code outside 0..{2**bits - 1} does not fit in {bits} bits"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack(torch.tensor([[0, value]]), bits)


@pytest.mark.parametrize("code", [-1, 3])
def test_trit_that_does_not_fit(code):
    with pytest.raises(ValueError, match=r"^a ternary code must be 0, 1 or 2$"):
        pack_trits(torch.tensor([[0, code]]))


@pytest.mark.parametrize("bits", [0, 9, 15, 17])
def test_unknown_widths(bits):
    message = f"^codes have 1 to 8 or 16 bits, got {bits}$"
    with pytest.raises(ValueError, match=message):
        pack(torch.zeros(1, 8, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(1, bits, dtype=torch.uint8), bits, 8)


def test_rows_of_the_wrong_length():
    packed = torch.zeros(2, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^11 codes of 4 bits need 6 bytes a row, got 5$"):
        unpack(packed, 4, 11)
    with pytest.raises(ValueError, match=r"^26 trits need 6 bytes a row, got 5$"):
        unpack_trits(packed, 26)
