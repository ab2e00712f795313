"""One block of Q4_K, byte by byte: which bytes make a weight, and how far one bit reaches."""

from __future__ import annotations

import numpy as np
import torch
import traitlets

from ..ggml import TYPES
from ..qtensor import QTensor
from . import BookWidget

KIND = TYPES["Q4_K"]


def block_bytes(q: QTensor | torch.Tensor | np.ndarray, row: int, index: int) -> list[int]:
    """The 144 bytes of one block, as integers; the arguments and errors are those of `Block`."""
    if not isinstance(q, QTensor):
        raw = torch.as_tensor(q).detach().cpu()
        if raw.dtype != torch.uint8 or raw.shape != (KIND.size,):
            found = f"{str(raw.dtype).removeprefix('torch.')} {list(raw.shape)}"
            raise ValueError(f"a block of {KIND.name} is uint8 [{KIND.size}], got {found}")
        blocks = raw.view(1, 1, KIND.size)
    elif str(q.format) != KIND.name:
        raise ValueError(f"the block widget shows {KIND.name}, got {q.format}")
    else:
        raw = q.parts["blocks"].cpu()
        blocks = raw.view(len(raw), -1, KIND.size)
    rows, count = blocks.shape[:2]
    if not (0 <= row < rows and 0 <= index < count):
        there = f"there are {rows:,} rows of {count:,} blocks"
        raise ValueError(f"no block {index} in row {row}: {there}, counted from 0")
    return blocks[row, index].tolist()


class Block(BookWidget):
    """Choose a weight and see the bits that it is made of; flip one and see what else it moves.

    Args:
        q: a QTensor of format q4_k, or the bytes of one block, uint8 [144].
        row: row of the tensor, its leading axes flattened.
        index: block of the row: weights 256 * index to 256 * index + 255.
        at: the weight of the block, 0 to 255, that is chosen first.

    Raises ValueError for another format, other bytes, or a block or weight that does not exist.
    """

    stored = traitlets.List().tag(sync=True)
    bytes = traitlets.List().tag(sync=True)
    at = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        q: QTensor | torch.Tensor | np.ndarray,
        row: int = 0,
        index: int = 0,
        at: int = 0,
    ):
        stored = block_bytes(q, row, index)
        if not 0 <= at < KIND.block:
            raise ValueError(f"a block has weights 0 to {KIND.block - 1}, got {at}")
        super().__init__(stored=stored, bytes=list(stored), at=at)
