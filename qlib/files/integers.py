"""Integer codes in words of 32 bits, as GPTQ, AWQ and compressed-tensors store them."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .. import grid
from ..scheme import Scheme


def is_integer(scheme: Scheme) -> bool:
    """Whether its codes are integers, either signed or with an integer zero point."""
    bits = scheme.grid.bits
    if scheme.offset is None:
        return 1 < bits <= 8 and scheme.grid == grid.int_grid(bits)
    return scheme.grid == scheme.offset == grid.int_grid(bits, signed=False)


def words(packed: UInt8[Tensor, "rows bytes"]) -> Int[Tensor, "rows words"]:
    """Rows of bytes as little-endian int32, the last one filled up with zeros."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.reshape(-1).clone().view(torch.int32).view(len(packed), -1)


def stream(
    words: Int[Tensor, "rows words"], size: int | None = None
) -> UInt8[Tensor, "rows bytes"]:
    """The first `size` bytes of each row of `words`, or all of them."""
    return words.reshape(-1).view(torch.uint8).view(len(words), -1)[:, :size].contiguous()
