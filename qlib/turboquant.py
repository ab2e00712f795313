"""TurboQuant: a random rotation, then the best levels for what it yields; one bit of inner product.

Zandieh, Daliri, Hadian and Mirrokni, arXiv 2504.19874. A row is divided by its length and rotated
at random. Whatever the data was, each coordinate now has a known density (`qlib.sphere`), so the
Lloyd-Max levels of that density serve every row without calibration: algorithm 1, of least squared
error. Those levels are means of their cells, which makes decoded vectors too short and inner
products too small, by the factor 1 - distortion: 2 / pi at 1 bit.

Algorithm 2 takes inner products as its aim. It spends one bit less on the levels and keeps of the
residual r its length and the signs of S r, for a Gaussian matrix S: the sketch of QJL (Zandieh,
Daliri and Han, arXiv 2406.03482). The mean over S of sqrt(pi / 2) / d * |r| * S^T sign(S r) is r,
so inner products are unbiased; their variance, about pi / 2 times the distortion of the levels
times |x|^2 |y|^2 / d, is the price: 1.57, 0.57, 0.18 and 0.054 over d for 1 to 4 bits in many
dimensions. (The published 0.047 for 4 bits is what a distortion of 0.0345 gives, rounded to 0.03.)

Stored for each row: "norm", its length; "codes", the levels, packed; and with QJL "residual", the
length of r relative to the norm, and "signs", one bit per coordinate. S multiplies the residual
after the rotation, not before as the paper has it: a rotated Gaussian matrix is one like any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .pack import pack, packed_bytes, unpack
from .qtensor import Format, QTensor
from .scheme import checked
from .sphere import check_rotation, check_width, coordinate_grid, gaussian, matrix_shape, rotate
from .storage import Layout, store


@dataclass(frozen=True)
class TurboQuant(Format):
    """Rows as a length and the rotated direction, each coordinate on the same 2^bits levels.

    Args:
        bits: bits of each coordinate, 1 to 8; with `qjl` one of them is the sketch's.
        qjl: unbiased inner products instead of least squared error.
        rotation: "qr", the paper's uniform rotation; "hadamard", random signs and a Hadamard
            transform: less work, close to what llama.cpp does to its caches (which takes no signs),
            and not covered by the paper's proofs.
        seed: which rotation and which sketch.
        norm: how lengths are stored, torch.float16 or torch.float32.

    Raises ValueError for values outside these.

    >>> q = TurboQuant(3).quantize(torch.ones(10, 128))
    >>> q.nbytes, q.bits_per_weight            # 10 * (48 bytes of codes + one float16)
    (500, 3.125)
    """

    bits: int
    qjl: bool = False
    rotation: str = "qr"
    seed: int = 0
    norm: torch.dtype = torch.float16

    def __post_init__(self):
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ValueError(f"TurboQuant has 1 to 8 bits, got {self.bits!r}")
        if type(self.qjl) is not bool:
            raise ValueError(f"qjl is True or False, got {self.qjl!r}")
        if self.norm not in (torch.float16, torch.float32):
            raise ValueError(f"norms are stored as float16 or float32, got {self.norm!r}")
        check_rotation(self.rotation, self.seed)

    def __str__(self) -> str:
        sketch = " with QJL" if self.qjl else ""
        return f"TurboQuant of {self.bits} bits{sketch}, {self.rotation} rotation {self.seed}"

    def quantize(
        self, weight: Float[Tensor, "*shape"], importance: Tensor | None = None
    ) -> QTensor:
        """Quantize every row, the vectors along the last axis, on its own.

        Args:
            weight: floating point, [tokens, head_dim] for a cache.
            importance: not used: the levels depend on no data.

        Raises ValueError for empty, non-floating or non-finite weights, for rows wider than 8192
        and for lengths that overflow their storage.
        """
        x = checked(weight).reshape(matrix_shape(weight.shape))
        parts = store("norm", _length(x), self.norm)
        # The direction belongs to the length that will be read; a row of zeros has any direction.
        norm = parts["norm"].float()
        rest = rotate(x / norm.masked_fill(norm == 0, 1), self.rotation, self.seed)
        if grid := self._grid(x.shape[1]):
            codes = grid.round_finite(rest)
            parts["codes"] = pack(codes, grid.bits)
            rest = rest - grid.decode(codes)
        if self.qjl:
            parts |= store("residual", _length(rest), self.norm)
            sketch = rest @ gaussian(x.shape[1], self.seed, x.device).T
            parts["signs"] = pack((sketch > 0).to(torch.uint8), 1)
        return QTensor(self, tuple(weight.shape), parts)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "*shape"]:
        """The rows that `parts` mean, float32; with QJL those of unbiased inner products."""
        width, norm = matrix_shape(shape)[1], parts["norm"].float()
        rotated = norm.new_zeros(len(norm), width)
        if grid := self._grid(width):
            rotated = grid.decode(unpack(parts["codes"], grid.bits, width))
        if self.qjl:
            signs = unpack(parts["signs"], 1, width).float() * 2 - 1
            size = parts["residual"].float() * (math.sqrt(math.pi / 2) / width)
            rotated = rotated + signs @ gaussian(width, self.seed, norm.device) * size
        return (rotate(rotated, self.rotation, self.seed, inverse=True) * norm).view(shape)

    def layout(self, shape) -> Layout:
        """dtype and shape of every tensor that rows of `shape` are stored as.

        Raises ValueError for rows that cannot be rotated.
        """
        rows, width = matrix_shape(shape)
        check_width(width, self.rotation)
        parts: Layout = {"norm": (self.norm, (rows, 1))}
        if levels := self.bits - self.qjl:
            parts["codes"] = (torch.uint8, (rows, packed_bytes(width, 2**levels)))
        if self.qjl:
            parts["residual"] = (self.norm, (rows, 1))
            parts["signs"] = (torch.uint8, (rows, packed_bytes(width, 2)))
        return parts

    def _grid(self, width: int) -> Grid | None:
        levels = self.bits - self.qjl
        return coordinate_grid(width, levels) if levels else None


def _length(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)


def format(name: str) -> TurboQuant:
    """The format called turbo{1..8}[-qjl]. Raises ValueError for other names.

    >>> str(format("turbo4-qjl"))
    'TurboQuant of 4 bits with QJL, qr rotation 0'
    """
    match = re.fullmatch(r"turbo([1-8])(-qjl)?", name)
    if not match:
        raise ValueError(f"unknown format {name!r}: TurboQuant is turbo{{1..8}}[-qjl]")
    return TurboQuant(int(match[1]), qjl=match[2] is not None)
