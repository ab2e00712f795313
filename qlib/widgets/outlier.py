"""One outlier among real weights: which of its neighbors lose their digits."""

from __future__ import annotations

import torch
import traitlets
from jaxtyping import Float
from torch import Tensor

from ..presets import format as named_format
from . import BookWidget

# Weights travel as whole multiples of this, three digits of a typical weight; it is a power of two,
# so the page's arithmetic starts from the same float32 numbers as Python's.
UNIT = 2.0**-14
MOST = 4096
SHARERS = (("tensor", "tile"), ("row", "row"), ("g16", "16 weights"), ("g8", "8"))


def blocks(shape: tuple[int, int]) -> list[dict]:
    """The choices: format, label, consecutive weights that share a scale, counted bits."""
    rows, columns = shape
    sizes = {"tensor": rows * columns, "row": columns}
    return [
        {
            "format": f"int4-{block}",
            "label": label,
            "size": sizes.get(block) or int(block[1:]),
            "bits": 8 * named_format(f"int4-{block}").nbytes(shape) / (rows * columns),
        }
        for block, label in SHARERS
    ]


class Outlier(BookWidget):
    """Plant an outlier in a tile of weights and see whose error grows, by who shares its scale.

    Args:
        weight: [rows, columns], at most 4,096 weights; columns a multiple of 16.

    Raises ValueError for a tile of another shape.
    """

    tile = traitlets.List().tag(sync=True)
    columns = traitlets.Int().tag(sync=True)
    unit = traitlets.Float(UNIT).tag(sync=True)
    spread = traitlets.Float().tag(sync=True)
    top = traitlets.Int().tag(sync=True)
    bottom = traitlets.Int().tag(sync=True)
    blocks = traitlets.List().tag(sync=True)
    block = traitlets.Unicode("int4-tensor").tag(sync=True)
    size = traitlets.Int(12).tag(sync=True)
    at = traitlets.Int().tag(sync=True)

    def __init__(self, weight: Float[Tensor, "rows columns"], **state):
        """`size`: the outlier in standard deviations of the tile; `at`: its index, row by row."""
        if weight.ndim != 2 or weight.numel() > MOST or weight.shape[1] % 16:
            need = f"[rows, a multiple of 16] with at most {MOST:,} weights"
            raise ValueError(f"a tile is {need}, got {list(weight.shape)}")
        whole = torch.round(weight.detach() / UNIT).int()
        state = {"at": weight.numel() // 2 + weight.shape[1] // 3} | state
        levels = named_format("int4-row").grid
        super().__init__(
            tile=whole.flatten().tolist(),
            columns=weight.shape[1],
            spread=(whole * UNIT).std().item(),
            top=int(levels.max),
            bottom=int(levels.min),
            blocks=blocks(tuple(weight.shape)),
            **state,
        )
