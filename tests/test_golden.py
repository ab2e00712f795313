"""Codes, scales and values that other implementations wrote, as small constants.

Sources: torchao 0.18 (`to_mx`, `nvfp4_quantize`), bitsandbytes 0.50.2 (`quantize_4bit`),
microxcaling (`_quantize_mx` with elem_format "int8").
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qlib import fit, grid, presets
from qlib.pack import pack, unpack
from qlib.scheme import Scheme


def floats(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)


# 64 float32: a noisy wave, with one outlier of 3.5 in the second half.
WAVE = floats(
    "55d47f3ebd9ee23ef520213f9933863f34ed9a3f517a6e3f8184363f378b1d3fc5682f3ef255f2be6e8746bf1b8665bf"
    "08fa9bbf443ab1bfca9e85bf6a1521bff467d4beb55675bc2227123f57ce5f3f59f35d3f6d3f823f6bc9943f5a1a573f"
    "7365ae3e6ca2cc3dca9649be7cab4abfc45b97bfc79f91bf24ac8fbf3a2498bfd91058bf94594cbe7558243ecf6ca73e"
    "6f50463f000060407b70863f83c75f3f812a603f93c81b3f53829fbcecc8e6be8c861fbf6e4f7cbf76d3aebf7db5a1bf"
    "a7986bbf331543bfca83f2be7e56293e33cf1d3f3e4c353f8745623fb741983f9bd68c3f48042c3f91dcd83e5b1c5e3e"
    "6bd7afbeba4667bf465f84bf6d788abf"
).view(2, 32)
# The 16 weights around the extreme 4.25 that set the tensor scale of the NVFP4 vector.
PEAK = floats(
    "4016fbbed4e427bf000088c0e080afbfcbb6a0bf595a65bf493b39bfb347dcbeaff3493ef3cb253ff8863b3fd1e2643f"
    "cddc973f681a8b3fa957253f6ab4c53e"
)
# E8M0 bytes of WAVE's two blocks, by element format, in the order of RULES.
RULES = [fit.pow2_floor, fit.pow2_ceil, fit.pow2_even, fit.pow2_rceil]
E8M0_BYTES = {
    "e4m3": ["7778", "7879", "7778", "7778"],
    "e5m2": ["7071", "7172", "7071", "7071"],
    "e2m3": ["7d7e", "7e7f", "7d7e", "7d7e"],
    "e3m2": ["7b7c", "7c7d", "7b7c", "7b7c"],
    "e2m1": ["7d7e", "7e7f", "7d7f", "7d7f"],
}
# FP4 codes of WAVE under each rule, first weight in the low nibble.
FP4_BYTES = [
    "42656645c1edfede8b54655613daeeee9b11733424a8caddbc1a32443412c9cc",
    "21434423a1cbdcbc8a32433401b9cccc8a1062221298a9bbaa0911221201a9aa",
    "42656645c1edfede8b54655613daeeee8a1062221298a9bbaa0911221201a9aa",
    "42656645c1edfede8b54655613daeeee8a1062221298a9bbaa0911221201a9aa",
]
# MXINT8 elements of WAVE in two's complement.
INT8_BYTES = (
    "101c28434d3c2e270be2cec7b2a7bdd8e5ff253837414a361606f3cdb4b7b8b4"
    "e5fa050a1970221c1c13fff2ece0d4d8e3e8f10514171c2623160e07f5e3dfdd"
)


def flipped(x: torch.Tensor) -> torch.Tensor:
    """The same codes with the lowest bit of the third one changed."""
    x = x.clone()
    x.view(-1)[2] ^= 1
    return x


@pytest.mark.parametrize("name", E8M0_BYTES)
@pytest.mark.parametrize("i", range(4), ids=[rule.__name__ for rule in RULES])
def test_mx_scales(name, i):
    q = Scheme(grid.GRIDS[name], 32, RULES[i], scale=grid.E8M0).quantize(WAVE)
    stored = q.parts["scale"].view(-1)
    assert bytes(stored.tolist()).hex() == E8M0_BYTES[name][i]
    assert bytes((stored ^ 1).tolist()).hex() != E8M0_BYTES[name][i]


@pytest.mark.parametrize("i", range(4), ids=[rule.__name__ for rule in RULES])
def test_mxfp4_codes(i):
    q = Scheme(grid.E2M1, 32, RULES[i], scale=grid.E8M0).quantize(WAVE)
    assert bytes(q.parts["codes"].view(-1).tolist()).hex() == FP4_BYTES[i]
    assert bytes(flipped(q.parts["codes"]).view(-1).tolist()).hex() != FP4_BYTES[i]


def test_mxfp4_values():
    first = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.75, 0.5, 0.125, -0.5, -0.75, -1.0, -1.0, -1.5]
    q = presets.quantize(WAVE, "mxfp4")
    assert q.dequantize()[0, :14].tolist() == first
    wrong = dataclasses.replace(q, parts=q.parts | {"codes": flipped(q.parts["codes"])})
    assert wrong.dequantize()[0, :14].tolist() != first


def test_mxint8():
    q = presets.quantize(WAVE, "mxint8")
    assert q.parts["scale"].view(-1).tolist() == [127, 128]
    assert bytes(q.parts["codes"].view(-1).tolist()).hex() == INT8_BYTES
    assert bytes(flipped(q.parts["codes"]).view(-1).tolist()).hex() != INT8_BYTES
    assert q.dequantize()[0, :4].tolist() == [0.25, 0.4375, 0.625, 1.046875]


def test_nvfp4():
    weight = torch.cat([WAVE[0, :16], PEAK]).view(1, 32)
    q = presets.quantize(weight, "nvfp4")
    assert bytes(q.parts["codes"][0].tolist()).hex() == "42656755c2edffdea9cfbc9a21323312"
    assert q.parts["scale.codes"].tolist() == [[0x71, 0x7E]]
    # Divided by 6 and by 448 here, by 2688 there: one rounding more, at most one unit apart.
    one_unit = {"rtol": 2**-23, "atol": 0.0}
    torch.testing.assert_close(q.parts["scale.scale"].view(-1), floats("f43ccf3a"), **one_unit)
    first = [0.2276785671710968, 0.4553571343421936, 0.6830357313156128, 0.9107142686843872]
    close = {"rtol": 2**-22, "atol": 0.0}
    torch.testing.assert_close(q.dequantize()[0, :4], torch.tensor(first), **close)
    wrong = dataclasses.replace(q, parts=q.parts | {"scale.codes": flipped_scale(q)})
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong.dequantize()[0, :4], torch.tensor(first), **close)


def flipped_scale(q) -> torch.Tensor:
    return q.parts["scale.codes"] ^ torch.tensor([[1, 0]], dtype=torch.uint8)


def test_nf4():
    """A ramp in one block of 32; bitsandbytes puts the first weight in the *high* nibble."""
    ramp = (0.21 * (torch.arange(32, dtype=torch.float64) - 13)).float().view(1, 32)
    q = dataclasses.replace(presets.NF4, block=32).quantize(ramp)
    codes = unpack(q.parts["codes"], 4, 32)
    expected = "11122334455667889aabbccddeeeefff"
    assert "".join(f"{code:x}" for code in codes[0].tolist()) == expected
    assert torch.equal(q.parts["scale"].view(-1), floats("85eb7140"))
    values = [-2.631608724594116, -2.631608724594116, -2.631608724594116, -1.9847761392593384]
    assert q.dequantize()[0, :4].tolist() == values
    wrong = dataclasses.replace(q, parts=q.parts | {"codes": pack(flipped(codes), 4)})
    assert wrong.dequantize()[0, :4].tolist() != values
