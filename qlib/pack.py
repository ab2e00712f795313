"""Codes to bytes and back: the only place that knows how codes share a byte.

Rows are packed separately, so that a kernel can start at any row. Within a row the codes form one
little-endian bit stream, lowest bit first: code i occupies bits [i*bits, (i+1)*bits). Padding
occurs only in the last byte of a row, and counts.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256: 1.6 bits per ternary code


def packed_bytes(n: int, codes: int) -> int:
    """Bytes of one packed row of `n` codes from a grid of `codes` values.

    >>> packed_bytes(13, 8), packed_bytes(13, 3)   # 13 three-bit codes; 13 trits
    (5, 3)
    """
    if codes == 3:
        return math.ceil(n / TRITS_PER_BYTE)
    return math.ceil(n * math.ceil(math.log2(codes)) / 8)


def pack(codes: Int[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes of `bits` bits (1..8, or 16) along the last axis.

    Raises ValueError if a code does not fit.

    >>> pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4)   # 0x21, 0x0f
    tensor([[33, 15]], dtype=torch.uint8)
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.max()) >= 2**bits or int(codes.min()) < 0):
        raise ValueError(f"a code outside 0..{2**bits - 1} does not fit in {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], -1).to(torch.uint8).flatten(-2)
    return _pack_words(codes, bits)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """The smallest run of codes that fills whole bytes becomes one word: 2 codes of 4 bits are a
    byte, 8 codes of 3 bits are three."""
    n = codes.shape[-1]
    run = 8 // math.gcd(8, bits)
    word_dtype = torch.uint8 if run * bits == 8 else torch.int64
    runs = _pad(codes, run).to(word_dtype).unflatten(-1, (-1, run))
    word = runs[..., 0].clone()
    for i in range(1, run):
        word |= runs[..., i] << (i * bits)
    if word_dtype == torch.uint8:
        return word
    shifts = 8 * torch.arange(run * bits // 8, device=codes.device)
    stream = (word.unsqueeze(-1) >> shifts & 255).to(torch.uint8).flatten(-2)
    return stream[..., : math.ceil(n * bits / 8)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, n: int) -> Int[Tensor, "*rows n"]:
    """The `n` codes of each packed row: uint8, or int32 for 16 bits.

    Raises ValueError if the rows do not have exactly the bytes that `n` codes need.
    """
    _check_bits(bits)
    if packed.shape[-1] != math.ceil(n * bits / 8):
        need = math.ceil(n * bits / 8)
        found = packed.shape[-1]
        raise ValueError(f"{n} codes of {bits} bits need {need} bytes a row, got {found}")
    if bits == 8:
        return packed
    if bits == 16:
        low, high = packed.unflatten(-1, (-1, 2)).int().unbind(-1)
        return low | high << 8
    return _unpack_words(packed, bits, n)


def _unpack_words(packed: Tensor, bits: int, n: int) -> Tensor:
    run = 8 // math.gcd(8, bits)
    word_bytes = run * bits // 8
    if word_bytes == 1:
        word = packed
    else:
        parts = _pad(packed, word_bytes).long().unflatten(-1, (-1, word_bytes))
        shifts = 8 * torch.arange(word_bytes, device=packed.device)
        word = (parts << shifts).sum(-1)
    codes = torch.stack([(word >> (i * bits)) & (2**bits - 1) for i in range(run)], -1)
    return codes.to(torch.uint8).flatten(-2)[..., :n]


def pack_trits(codes: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """Pack ternary codes 0, 1, 2 in base 3, five to a byte, the first the least significant.

    >>> pack_trits(torch.tensor([[2, 2, 2, 2, 2, 1]], dtype=torch.uint8))
    tensor([[242,   1]], dtype=torch.uint8)
    """
    if codes.numel() and (int(codes.max()) > 2 or int(codes.min()) < 0):
        raise ValueError("a ternary code must be 0, 1 or 2")
    runs = _pad(codes, TRITS_PER_BYTE).unflatten(-1, (-1, TRITS_PER_BYTE))
    powers = 3 ** torch.arange(TRITS_PER_BYTE, device=codes.device)
    return (runs * powers).sum(-1).to(torch.uint8)


def unpack_trits(packed: UInt8[Tensor, "*rows bytes"], n: int) -> UInt8[Tensor, "*rows n"]:
    """The `n` ternary codes of each row that `pack_trits` made."""
    if packed.shape[-1] != packed_bytes(n, 3):
        raise ValueError(f"{n} trits need {packed_bytes(n, 3)} bytes a row, got {packed.shape[-1]}")
    powers = 3 ** torch.arange(TRITS_PER_BYTE, device=packed.device)
    return (packed.unsqueeze(-1) // powers % 3).to(torch.uint8).flatten(-2)[..., :n]


def _pad(x: Tensor, multiple: int) -> Tensor:
    short = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, short)) if short else x


def _check_bits(bits: int) -> None:
    if bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        raise ValueError(f"codes have 1 to 8 or 16 bits, got {bits}")
