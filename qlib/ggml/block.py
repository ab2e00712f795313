"""The tensor types of ggml, and BlockFormat: a type whose blocks can be written and read.

A row of a tensor is a run of blocks; a block holds everything that its weights need, scales first
or last as its layout says. The stored bytes are those of llama.cpp, so a QTensor of such a format
can be written to a GGUF file as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..qtensor import QTensor
from ..scheme import check_finite, checked_kind
from .search import finite

# Rows are processed a few at a time, so that what one step writes the next finds in cache.
CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class GgmlType:
    """A tensor type: its name, its id in files, values per block and bytes per block."""

    name: str
    id: int
    block: int
    size: int


_TABLE = """
F32 0 1 4       F16 1 1 2       BF16 30 1 2     F64 28 1 8
I8 24 1 1       I16 25 1 2      I32 26 1 4      I64 27 1 8
Q4_0 2 32 18    Q4_1 3 32 20    Q5_0 6 32 22    Q5_1 7 32 24    Q8_0 8 32 34    Q8_1 9 32 36
Q2_K 10 256 84  Q3_K 11 256 110 Q4_K 12 256 144 Q5_K 13 256 176 Q6_K 14 256 210 Q8_K 15 256 292
IQ2_XXS 16 256 66   IQ2_XS 17 256 74    IQ2_S 22 256 82     IQ3_XXS 18 256 98   IQ3_S 21 256 110
IQ1_S 19 256 50     IQ1_M 29 256 56     IQ4_NL 20 32 18     IQ4_XS 23 256 136
TQ1_0 34 256 54     TQ2_0 35 256 66     MXFP4 39 32 17      NVFP4 40 64 36
Q1_0 41 128 18      Q2_0 42 64 18
"""
_CELLS = iter(_TABLE.split())
TYPES: dict[str, GgmlType] = {
    name: GgmlType(name, int(number), int(block), int(size))
    for name, number, block, size in zip(_CELLS, _CELLS, _CELLS, _CELLS)
}
BY_ID = {kind.id: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class BlockFormat:
    """A format of ggml: blocks along the last axis, each a fixed number of bytes.

    Args:
        kind: the type's name, id and sizes.
        encode: (x, importance) -> bytes. x is float32 [rows, cols] and finite, importance float32
            [rows, cols] or None, the result uint8 [rows, cols / block * size].
        read: (raw, out) -> None. Writes what uint8 [blocks, size] mean to float32 [blocks, block].
        needs_importance: the type is too coarse to be chosen without an importance.

    >>> import qlib
    >>> qlib.format("q8_0").nbytes((1, 64))      # two blocks of a float16 and 32 int8
    68
    """

    kind: GgmlType
    encode: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    read: Callable[[np.ndarray, np.ndarray], None]
    needs_importance: bool = False

    def __str__(self) -> str:
        return self.kind.name

    def quantize(
        self, weight: Float[Tensor, "*shape"], importance: Tensor | None = None
    ) -> QTensor:
        """Choose the bytes that ggml chooses for the same weights.

        Args:
            weight: floating point; its last axis is a multiple of the block.
            importance: weight of each squared error, [in] or like `weight`: an imatrix.

        Raises ValueError for weights that are empty, not finite or too large for the scales, and
        for rows that are no whole number of blocks.
        """
        rows = self._rows(checked_kind(weight))
        if importance is not None:
            if importance.shape[-1:] != weight.shape[-1:]:
                found, need = list(importance.shape), weight.shape[-1]
                raise ValueError(f"importance {found} is for other columns: need [{need}]")
            given = importance.float().expand(weight.shape).reshape(rows.shape)
            importance = given.cpu().numpy()
        x = rows.cpu().contiguous().numpy()
        raw = torch.from_numpy(self._encode(x, importance)).to(weight.device)
        return QTensor(self, tuple(weight.shape), {"blocks": raw})

    def _encode(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        raw = np.empty(self.layout(x.shape)["blocks"][1], np.uint8)
        threads = torch.get_num_threads()
        # Between pieces threads wait for the interpreter, so several of them get larger ones.
        step = max(1, CHUNK_WEIGHTS * (4 if threads > 1 else 1) // x.shape[1])
        overflows = []

        def work(start: int) -> None:
            at = slice(start, start + step)
            # Not all at once before: torch's threads would still be waiting for more to do on the
            # processors that these need.
            if not finite(x[at]):
                check_finite(torch.from_numpy(x))
            # numpy reports a number that became infinite, such as a scale stored as float16.
            with np.errstate(all="ignore", over="call", call=lambda *what: overflows.append(what)):
                raw[at] = self.encode(x[at], None if importance is None else importance[at])

        starts = range(0, len(x), step)
        if len(starts) == 1 or threads == 1:
            list(map(work, starts))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, starts))
        if overflows:
            self._check_scales(x, raw)
        return raw

    def _check_scales(self, x: np.ndarray, raw: np.ndarray) -> None:
        decoded = self.decode({"blocks": torch.from_numpy(raw)}, x.shape)
        if not bool(decoded.isfinite().all()):
            raise ValueError(
                f"{self.kind.name}: weights up to {np.abs(x).max():.3g} need a scale that float16 "
                f"cannot hold; divide the tensor by a constant or leave it unquantized"
            )

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "*shape"]:
        """The weights that the bytes mean, float32, as ggml computes them."""
        blocks = parts["blocks"]
        raw = blocks.cpu().contiguous().numpy().reshape(-1, self.kind.size)
        out = np.empty((len(raw), self.kind.block), np.float32)
        # An infinite scale times a zero code is NaN, as in ggml; it needs no warning.
        with np.errstate(invalid="ignore", over="ignore"):
            self.read(raw, out)
        return torch.from_numpy(out).view(*shape).to(blocks.device)

    def layout(self, shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """One stored tensor, "blocks": uint8 [rows, bytes of a row]."""
        self._check(shape)
        width = shape[-1] // self.kind.block * self.kind.size
        return {"blocks": (torch.uint8, (math.prod(shape[:-1]), width))}

    def nbytes(self, shape) -> int:
        """Bytes that a weight of `shape` will take, known before it is touched."""
        return math.prod(self.layout(shape)["blocks"][1])

    def _rows(self, weight: Tensor) -> Tensor:
        self._check(weight.shape)
        return weight.reshape(-1, weight.shape[-1])

    def _check(self, shape) -> None:
        if not len(shape) or shape[-1] % self.kind.block:
            fits = len(shape) and shape[-1] % 32 == 0
            remedy = "q8_0 and q5_0 have blocks of 32" if fits else "int formats take any row"
            raise ValueError(
                f"{self.kind.name} stores blocks of {self.kind.block}, and rows of shape "
                f"{list(shape)} are no multiple of it; {remedy}"
            )
