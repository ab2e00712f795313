"""The widget "one Q4_K block": its script, run by Node, must decode what ggml decodes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import libgguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from node import run

from qlib.ggml import FORMATS
from qlib.qtensor import QTensor
from qlib.widgets import block
from qlib.widgets.block import Block

SCRIPT = Path(block.__file__).with_suffix(".js").read_text(encoding="utf-8")
Q4_K = GGMLQuantizationType.Q4_K


# JSON has no infinity and no NaN: values travel as the bits of a float32.
DECODE = "all => all.map(b => [...new Uint32Array(new Float32Array(decode(b)).buffer)])"


def page(blocks: np.ndarray, script: str = SCRIPT) -> np.ndarray:
    """float32 [blocks, 256], as block.js decodes them."""
    return np.array(run(script, DECODE, blocks.tolist()), np.uint32).view(np.float32)


def oracle(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(libgguf.dequantize_rows(blocks, Q4_K)).reshape(-1, 256)


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bit for bit, with every NaN alike."""
    both = np.isnan(ours) & np.isnan(theirs)
    return bool((both | (ours.view(np.uint32) == theirs.view(np.uint32))).all())


def quantized(count: int = 4) -> np.ndarray:
    x = 0.05 * np.random.default_rng(0).standard_normal((count, 256)).astype(np.float32)
    return np.asarray(libgguf.quantize_rows(x, Q4_K)).view(np.uint8).reshape(count, 144)


def hostile() -> np.ndarray:
    """Blocks of arbitrary bytes, of zeros, of ones, and with every kind of float16 as scales."""
    blocks = np.random.default_rng(1).integers(0, 256, (40, 144), np.uint8)
    blocks[0], blocks[1] = 0, 255
    # Largest, infinity, NaN, smallest, minus zero, largest subnormal.
    halves = np.array([0x7BFF, 0x7C00, 0x7E00, 0x0001, 0x8000, 0x83FF], "<u2")
    pairs = np.stack(np.meshgrid(halves, halves), axis=-1).reshape(-1, 2)
    blocks[4:, :4] = pairs.view(np.uint8)
    return blocks


def flipped(one: np.ndarray, byte: int, bit: int) -> np.ndarray:
    changed = one.copy()
    changed[byte] ^= 1 << bit
    return changed


@pytest.mark.parametrize("blocks", [quantized(), hostile()], ids=["quantized", "hostile"])
def test_the_page_decodes_as_ggml_does(blocks):
    theirs = oracle(blocks)
    assert same(page(blocks), theirs)
    assert not same(page(np.stack([flipped(b, 143, 4) for b in blocks])), theirs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("j >> 1", "j >> 2"),
        ("j % 2 ? 0xf0 : 0x0f", "j % 2 ? 0x0f : 0xf0"),
        ("six(8, 0xf0)", "six(8, 0x0f)"),
        ("[first + j - 4, 0xc0], [8 + j, rest]", "[8 + j, rest], [first + j - 4, 0xc0]"),
        ("mantissa + (exponent && 1024)", "mantissa + 1024"),
        ("Math.fround(d * sc * q - dmin * m)", "d * sc * q - Math.fround(dmin) * (m + 1)"),
    ],
)
def test_a_script_with_one_mistake_is_found(right, wrong):
    assert SCRIPT.count(right) == 1
    blocks = hostile()
    assert not same(page(blocks, SCRIPT.replace(right, wrong)), oracle(blocks))


def test_the_page_decodes_after_every_flip():
    """All 1,152 blocks that differ from a real one in a single bit."""
    one = quantized(1)[0]
    every = np.stack([flipped(one, byte, bit) for byte in range(144) for bit in range(8)])
    assert same(page(every), oracle(every))


def test_the_bits_of_a_weight_are_those_that_move_it():
    """`maskOf` and `reach` against flips in ggml, in a block with no scale, minimum or code 0."""
    one = np.random.default_rng(2).integers(0, 256, 144, np.uint8)
    one[:4] = np.array([0.01, 0.3], "<f2").view(np.uint8)
    one[4:16] |= 0x11
    one[16:] |= 0x11
    every = np.stack([flipped(one, byte, bit) for byte in range(144) for bit in range(8)])
    moved = oracle(every) != oracle(one[None])
    masks = run(SCRIPT, "n => ALL.map(i => Array.from({ length: n }, (_, b) => maskOf(i, b)))", 144)
    bits = np.unpackbits(np.array(masks, np.uint8), axis=1, bitorder="little").astype(bool)
    assert np.array_equal(bits.T, moved)
    assert not np.array_equal(np.roll(bits, 1, axis=1).T, moved)
    counts = "n => Array.from({ length: n }, (_, k) => reach(k >> 3, k & 7))"
    assert run(SCRIPT, counts, 1152) == moved.sum(1).tolist() == [256] * 32 + [32] * 96 + [1] * 1024


def tensor(rows: int = 3, blocks: int = 2) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    return FORMATS["q4_k"].quantize(torch.randn(rows, 256 * blocks, generator=generator))


def test_the_block_of_a_tensor():
    q = tensor()
    shown = Block(q, row=1, index=1, at=7)
    assert (len(shown.stored), shown.bytes, shown.at) == (144, shown.stored, 7)
    ours = page(np.array([shown.stored], np.uint8))[0]
    assert np.array_equal(ours, q.dequantize()[1, 256:].numpy())
    assert not np.array_equal(ours, q.dequantize()[1, :256].numpy())
    assert repr(shown) == "<Block: interactive figure>"


def test_leading_axes_are_rows():
    weight = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    q = FORMATS["q4_k"].quantize(weight)
    ours = page(np.array([Block(q, row=4).stored], np.uint8))[0]
    assert np.array_equal(ours, q.dequantize()[1, 1].numpy())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_bytes_are_shown_as_they_are(kind):
    raw = quantized(1)[0]
    assert Block(kind(raw)).stored == raw.tolist()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.zeros(143, np.uint8), "uint8 [143]"),
        (np.zeros((1, 144), np.uint8), "uint8 [1, 144]"),
        (torch.zeros(144), "float32 [144]"),
    ],
)
def test_other_bytes_are_refused(given, found):
    with pytest.raises(ValueError, match=f"^{re.escape('a block of Q4_K is uint8 [144], got ')}"):
        Block(given)
    with pytest.raises(ValueError, match=re.escape(found) + "$"):
        Block(given)


def test_another_format_is_refused():
    q = FORMATS["q8_0"].quantize(torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"^the block widget shows Q4_K, got Q8_0$"):
        Block(q)


@pytest.mark.parametrize(("row", "index"), [(3, 0), (0, 2), (-1, 0), (0, -1)])
def test_a_block_that_is_not_there(row, index):
    message = f"^no block {index} in row {row}: there are 3 rows of 2 blocks, counted from 0$"
    with pytest.raises(ValueError, match=message):
        Block(tensor(), row, index)


@pytest.mark.parametrize("at", [-1, 256])
def test_a_weight_that_is_not_there(at):
    with pytest.raises(ValueError, match=f"^a block has weights 0 to 255, got {at}$"):
        Block(quantized(1)[0], at=at)


def test_the_script_and_the_data_are_small_and_ask_no_other_host():
    state = Block(quantized(1)[0]).get_state()
    assert len(json.dumps([state["stored"], state["bytes"], state["at"]])) < 50_000
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.|import\s|fetch\(", SCRIPT)
    assert SCRIPT.endswith("export default { render };\n")
