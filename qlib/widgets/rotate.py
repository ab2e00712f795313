"""Rotate an outlier away: one token's channels, a Hadamard transform in stages, and 4 bits."""

from __future__ import annotations

import torch
import traitlets
from jaxtyping import Float
from torch import Tensor

from ..presets import format as named_format
from . import BookWidget

# Channels travel as whole multiples of this; a power of two, so that the page's numbers are
# Python's.
UNIT = 2.0**-10
SIZES = (8, 128)
BITS = range(3, 9)
# Outliers in multiples of an ordinary channel's standard deviation.
SCALES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# The channels of the outliers, as shares of the width.
PLACES = (0.33, 0.69, 0.11, 0.92)
DRAWS = 3
# What a button sets. `basis` is where the outliers stand: on channels, or on rows of the Hadamard
# matrix, so that the rotation makes outliers of what were patterns of signs.
PRESETS = (
    {"label": "one outlier", "basis": "channels", "count": 1, "size": 4},
    {"label": "massive activation", "basis": "channels", "count": 1, "size": 9},
    {"label": "Gaussian", "basis": "channels", "count": 0, "size": 4},
    {"label": "worst case", "basis": "rows", "count": 1, "size": 4},
)


def token(channels: int = 64, seed: int = 16) -> Float[Tensor, " channels"]:
    """A token without outliers: `channels` Gaussian numbers of mean 0 and variance 1.

    Rotating such a token gains or loses a decibel or two by chance, and nothing on average; with
    the default seed it gains nothing.
    """
    x = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    return (x - x.mean()) / x.std(correction=0)


class Rotate(BookWidget):
    """Set an outlier, rotate it in stages, and compare the rounding errors before and after.

    Args:
        channels: [n], the ordinary channels of a token, without outliers; n a power of two from 8
            to 128. Without it, 64 Gaussian channels.

    Raises ValueError for another shape, or for channels that are all zero or not finite.
    """

    channels = traitlets.List().tag(sync=True)
    unit = traitlets.Float(UNIT).tag(sync=True)
    spread = traitlets.Float().tag(sync=True)
    places = traitlets.List().tag(sync=True)
    scales = traitlets.List(list(SCALES)).tag(sync=True)
    grids = traitlets.List().tag(sync=True)
    draws = traitlets.List().tag(sync=True)
    presets = traitlets.List(list(PRESETS)).tag(sync=True)
    basis = traitlets.Unicode("channels").tag(sync=True)
    count = traitlets.Int(1).tag(sync=True)
    size = traitlets.Int(4).tag(sync=True)
    stages = traitlets.Int().tag(sync=True)
    signs = traitlets.Int(0).tag(sync=True)
    bits = traitlets.Int(4).tag(sync=True)

    def __init__(self, channels: Float[Tensor, " n"] | None = None, **state):
        """`size`: index of the outliers' scale; `stages`: done; `signs`: 0, or a draw from 1."""
        x = (token() if channels is None else torch.as_tensor(channels)).detach().float()
        n = len(x) if x.ndim == 1 else 0
        low, high = SIZES
        if n.bit_count() != 1 or not low <= n <= high:
            need = f"a vector of a power of two from {low} to {high} channels"
            raise ValueError(f"the rotation widget needs {need}, got {list(x.shape)}")
        if not x.isfinite().all() or not x.any():
            raise ValueError("the rotation widget needs finite channels that are not all zero")
        whole = torch.round(x / x.square().mean().sqrt() / UNIT).int()
        generator = torch.Generator().manual_seed(1)
        draws = 1 - 2 * torch.randint(2, (DRAWS, n), generator=generator)
        state = {"stages": n.bit_length() - 1} | state
        super().__init__(
            channels=whole.tolist(),
            spread=(whole * UNIT).square().mean().sqrt().item(),
            places=[int(share * n) for share in PLACES],
            grids=[grid(bits) for bits in BITS],
            draws=draws.tolist(),
            **state,
        )


def grid(bits: int) -> dict:
    """The lowest and highest code of a format of integers with one scale per row."""
    levels = named_format(f"int{bits}-row").grid
    return {"bits": bits, "bottom": int(levels.min), "top": int(levels.max)}
