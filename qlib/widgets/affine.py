"""Drag the range of an affine grid over real weights and see which codes they get."""

from __future__ import annotations

import torch
import traitlets
from jaxtyping import Float
from torch import Tensor

from . import BookWidget

CHOSEN = 8


def chosen(weights: Float[Tensor, " n"]) -> list[int]:
    """Positions of eight weights, evenly spaced in rank from the smallest to the largest."""
    ranks = torch.linspace(0, len(weights) - 1, CHOSEN).round().long()
    return weights.argsort(stable=True)[ranks].tolist()


class Affine(BookWidget):
    """Choose bits and range; read levels, codes of eight weights, clipped share and SNR.

    `limit` bounds the range sliders; a symmetric grid runs from -high to high and ignores `low`.
    """

    weights = traitlets.List().tag(sync=True)
    chosen = traitlets.List().tag(sync=True)
    limit = traitlets.Float(1.0).tag(sync=True)
    bits = traitlets.Int(4).tag(sync=True)
    symmetric = traitlets.Bool(True).tag(sync=True)
    low = traitlets.Float(-1.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)

    @classmethod
    def of(cls, weights: Float[Tensor, " n"], **state) -> Affine:
        """The widget on `weights`, with the range that clips none of them.

        Raises ValueError unless there are at least eight finite weights of both signs.
        """
        w = weights.detach().float().cpu().reshape(-1)
        if len(w) < CHOSEN or not bool(w.isfinite().all()) or w.min() >= 0 or w.max() <= 0:
            raise ValueError(f"need at least {CHOSEN} finite weights of both signs, got {len(w)}")
        largest = w.abs().max().item()
        ends = {"low": w.min().item(), "high": largest, "limit": largest}
        rounded = [float(f"{value:.5g}") for value in w.tolist()]
        return cls(weights=rounded, chosen=chosen(w), **(ends | state))
