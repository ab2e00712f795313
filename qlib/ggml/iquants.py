"""Writers of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S (layouts and readers: `codebooks`).

The signs come off first. Where only 7 of 8 are stored and the minus signs are odd in number, the
weight whose error costs least changes its sign. The magnitudes of a sub-block are then rounded to
points of the codebook under a dozen or more scales, as ggml does it, and the best pair of scale
and points is kept. The scales of a block of 256 are stored in 4 bits, relative to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .block import TYPES, BlockFormat
from .codebooks import (
    CoarseFormat,
    cells,
    read_iq2_s,
    read_iq2_xs,
    read_iq2_xxs,
    read_iq3_s,
    read_iq3_xxs,
)
from .iq4 import error_weights, merged
from .search import TINY, columns, total


@dataclass(frozen=True)
class Search:
    """How the points of a type are searched.

    Args:
        name: the type, whose codebook it is.
        size: weights that share a 4-bit scale.
        top: the highest level, 5 or 15.
        tries, step: the largest magnitude of a sub-block goes to top + step * i, |i| <= tries.
        even: the number of minus signs is even, and 7 of 8 are stored.
        tiny: a sub-block whose magnitudes are all below is taken for zeros.
        whole, always: see `iloops.fit_points`.
        fudge: ggml multiplies d by it; the points are not quite the levels that are searched.
    """

    name: str
    size: int
    top: float
    tries: int
    step: float
    even: bool = True
    tiny: np.float32 = TINY
    whole: bool = False
    always: bool = False
    fudge: float = 1.0

    @property
    def targets(self) -> np.ndarray:
        tries = np.arange(-self.tries, self.tries + 1, dtype=np.float32)
        return np.float32(self.top) + tries * np.float32(self.step)


SMALL = np.float32(1e-8)
IQ2_XXS = Search("IQ2_XXS", 32, 5, 6, 0.1, whole=True, always=True)
IQ2_XS = Search("IQ2_XS", 16, 5, 9, 0.1)
IQ2_S = Search("IQ2_S", 16, 5, 9, 0.1, even=False, tiny=SMALL, fudge=0.9875)
IQ3_XXS = Search("IQ3_XXS", 32, 15, 15, 0.2, tiny=SMALL, fudge=1.0125)
IQ3_S = Search("IQ3_S", 32, 15, 9, 0.2, even=False, tiny=0, whole=True, fudge=1.033)


@dataclass
class Fit:
    """d float32 [blocks, 1], steps uint8 [blocks, s], index and signs [blocks, vectors or 32]."""

    d: np.ndarray
    steps: np.ndarray
    index: np.ndarray
    signs: np.ndarray


def _split_signs(x: np.ndarray, w: np.ndarray, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of `x` and its signs as bytes [blocks, 32]; with `even` one in eight may flip."""
    size, minus = np.abs(x).reshape(-1, 8), (x < 0).reshape(-1, 8)
    if even:
        odd = np.flatnonzero(minus.sum(1) & 1)
        eights = x.reshape(-1, 8)[odd]
        cheapest = (w.reshape(-1, 8)[odd] * eights * eights).argmin(1)
        size[odd, cheapest] *= -1
        minus[odd, cheapest] ^= True
    return size, np.packbits(minus, axis=1, bitorder="little").reshape(-1, 32)


def _first_guess(search: Search, size: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(peak, scale) of each sub-block: what the trials put at a target, and a scale to begin with.

    The peak of a sub-block that is taken for zeros is 0.
    """
    from . import iloops

    peak = size.max(1)
    peak[peak < search.tiny] = 0
    if search.name != "IQ2_XXS":
        return peak, peak / np.float32(search.top)
    # IQ2_XXS begins with a scale for the levels 0 to 4, and has 3 of it for its peak.
    scale = np.zeros_like(peak)
    iloops.first_scales(np.where(peak[:, None] > 0, size, 0), w, np.float32(4), scale)
    return np.maximum(scale, 0) * np.float32(3), scale


def fit(search: Search, x: np.ndarray, w: np.ndarray) -> Fit:
    """Scales, points and signs of all blocks.

    Args:
        x, w: weights and the weights of their squared errors, float32 [rows, cols].
    """
    from . import iloops

    table = cells(search.name)
    n = table[3].shape[1]
    size, signs = _split_signs(x, w, search.even)
    size, w = size.reshape(-1, search.size), w.reshape(-1, search.size)
    peak, scale = _first_guess(search, size, w)
    index = np.zeros((len(w), search.size // n), np.int16)
    vectors = (array.reshape(*index.shape, n) for array in (size, w, np.sqrt(w)))
    rule = (search.targets, search.whole, search.always)
    iloops.fit_points(*vectors, peak, *rule, table, scale, index)
    scale[peak <= 0] = 0
    signs = signs.reshape(len(scale), -1)
    # A negative scale, which takes a wild importance, is made positive and the signs with it.
    signs[scale < 0] ^= 255
    signs[peak <= 0] = 0
    d, steps = to_steps(np.abs(scale).reshape(-1, 256 // search.size), 15)
    d *= np.float32(search.fudge)
    return Fit(d, steps, index.reshape(len(d), -1).astype(np.uint16), signs.reshape(-1, 32))


def to_steps(scale: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [blocks, s] as d (2 step + 1), steps from 0 to `top`, which the largest scale has.

    Returns d float32 [blocks, 1] and steps uint8 [blocks, s].
    """
    d = scale.max(1, keepdims=True) / np.float32(2 * top + 1)
    steps = np.rint(np.float32(0.5) * (np.float32(1) / d * scale - np.float32(1)))
    return d, np.where(d > 0, np.clip(steps, 0, top), 0).astype(np.uint8)


def joined(rows: int, *parts: np.ndarray) -> np.ndarray:
    """The bytes of `parts`, each [blocks, ...], next to each other in every block."""
    raw = [np.ascontiguousarray(p.reshape(len(parts[0]), -1)).view(np.uint8) for p in parts]
    return np.concatenate(raw, axis=1).reshape(rows, -1)


def _words(found: Fit) -> np.ndarray:
    """Four times 7 signs and a scale: uint32 [blocks, 8]."""
    signs = merged((found.signs & 127).reshape(-1, 8, 4), 7, "<u4")
    return signs | found.steps.astype("<u4") << 28


def _pairs(steps: np.ndarray) -> np.ndarray:
    """Two scales to a byte, the first in the low nibble."""
    return merged(steps.reshape(len(steps), -1, 2), 4, "u1")


def write_iq2_xxs(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    found = fit(IQ2_XXS, x, error_weights(x, importance, 256, 1))
    index = found.index.astype(np.uint8).reshape(-1, 8, 4)
    groups = np.concatenate((index, _words(found)[:, :, None].view(np.uint8)), axis=2)
    return joined(len(x), found.d.astype("<f2"), groups)


def write_iq2_xs(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    found = fit(IQ2_XS, x, error_weights(x, importance, 256, 1))
    words = (found.index | (found.signs & 127).astype(np.uint16) << 9).astype("<u2")
    return joined(len(x), found.d.astype("<f2"), words, _pairs(found.steps))


def write_iq2_s(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    w = error_weights(x, importance, 256)
    if importance is None:
        # Gentler than the squares alone: half their mean is added.
        w = (total(columns(w, 256)) / np.float32(512))[:, None] + w.reshape(-1, 256)
    found = fit(IQ2_S, x, w)
    high = merged((found.index >> 8).reshape(-1, 8, 4), 2, "u1")
    parts = found.index.astype(np.uint8), found.signs, high
    return joined(len(x), found.d.astype("<f2"), *parts, _pairs(found.steps))


def write_iq3_xxs(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    found = fit(IQ3_XXS, x, error_weights(x, importance, 256))
    return joined(len(x), found.d.astype("<f2"), found.index.astype(np.uint8), _words(found))


def write_iq3_s(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The bytes of ggml, except after 32 zeros in a row that share a scale.

    There ggml stores what follows in the place of the zeros, and the rest of the block decodes to
    other weights' values. Here everything is in its place.
    """
    found = fit(IQ3_S, x, error_weights(x, importance, 256))
    high = np.packbits(found.index >> 8, axis=1, bitorder="little")
    parts = found.index.astype(np.uint8), high, found.signs
    return joined(len(x), found.d.astype("<f2"), *parts, _pairs(found.steps))


FORMATS = {
    "iq2_xxs": CoarseFormat(TYPES["IQ2_XXS"], write_iq2_xxs, read_iq2_xxs, True),
    "iq2_xs": CoarseFormat(TYPES["IQ2_XS"], write_iq2_xs, read_iq2_xs, True),
    "iq2_s": BlockFormat(TYPES["IQ2_S"], write_iq2_s, read_iq2_s, True),
    "iq3_xxs": BlockFormat(TYPES["IQ3_XXS"], write_iq3_xxs, read_iq3_xxs, True),
    "iq3_s": BlockFormat(TYPES["IQ3_S"], write_iq3_s, read_iq3_s),
}
