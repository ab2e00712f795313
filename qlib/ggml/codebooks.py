"""The I-quants IQ1_* to IQ3_*: runs of 8 or 4 weights are one index into a codebook.

IQ2_XXS  d 8 * (4 indices, u32)                d (s + 1/2) / 4 point sign     s for 32 weights
IQ2_XS   d u16 * 32, scales                    the same                       s for 16
IQ2_S    d indices signs high scales           the same                       s for 16
IQ3_XXS  d indices 8 * u32                     d (s + 1/2) / 2 point sign     s for 32
IQ3_S    d indices high signs scales           d (2 s + 1) point sign         s for 32
IQ1_S    d indices 8 * u16                     d (2 s + 1) (point + shift)    s and shift for 32
IQ1_M    indices high scales, d among them     the same                       s for 16, shift for 8

A block has 256 weights, s has 4 bits (3 in IQ1), and a shift is 1/8 or -1/8. Indices have 8 bits
and `high` the rest of them. Where signs have 7 bits for 8 weights, the number of minus signs is
even: the u32 holds four times 7 signs and s, the u16 an index of 9 bits and 7 signs.

The points themselves are no formula: ggml chose them by their frequency in real models. The
package gguf carries the tables, and they are read from there at first use.
"""

from __future__ import annotations

import functools

import numpy as np

from .block import BlockFormat
from .legacy import half

# How many distances, the smallest first, a point of the codebook may have from a vector of rounded
# levels and still be compared with the weights themselves.
SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}
FOURS = np.array([0, 4], np.uint8)


@functools.cache
def points(name: str) -> np.ndarray:
    """The codebook of a type, float32 [points, 8 or 4], as decoders use it."""
    try:
        from gguf import quants
    except ImportError as error:
        raise ImportError(
            f"the codebook of {name} is a table in the package gguf, which is not installed: "
            "pip install gguf"
        ) from error
    table = getattr(quants, name)
    table.init_grid()
    return table.grid.reshape(table.grid_shape)


@functools.cache
def cells(name: str) -> tuple[np.ndarray, ...]:
    """Which points are near each vector of rounded levels, for the search of a writer.

    A cell is a vector of levels (0, 1, 2 in IQ1 and IQ2, 0 to 7 in IQ3), numbered by its levels as
    digits of 2 or 3 bits, the first lowest.

    Returns:
        index: int16 [cells], the point that has just these levels, or -1.
        bounds: int32 [cells, 2], where in `near` the points of a cell begin and end.
        near: int16, points in up to SHELLS distances from their cell, the nearest first.
        levels: float32 [points, n], the levels as the writers of ggml count them: 1, 3, 5, ...
            in IQ2 and IQ3, -1, 0, 1 in IQ1.
    """
    values = points(name)
    n, digits = values.shape[1], np.unique(values)
    digit = np.searchsorted(digits, values)
    width = 3 if len(digits) > 4 else 2
    place = 1 << width * np.arange(n)
    lattice = np.indices((len(digits),) * n, np.uint8).reshape(n, -1).T
    index, bounds = np.full(1 << width * n, -1, np.int16), np.zeros((1 << width * n, 2), np.int32)
    index[digit @ place] = np.arange(len(digit))
    # |a - b|^2 = |a|^2 - 2 a b + |b|^2, in whole numbers far below 2^24.
    a, b = lattice.astype(np.float32), digit.astype(np.float32)
    distance = np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)
    reach = distance.min(1)
    for _ in range(SHELLS[name] - 1):
        reach = np.where(distance > reach[:, None], distance, np.inf).min(1)
    cell, point = np.nonzero(distance <= reach[:, None])
    order = np.lexsort((point, distance[cell, point], cell))
    ends = np.cumsum(np.bincount(cell, minlength=len(lattice)))
    bounds[lattice @ place] = np.stack((np.roll(ends, 1), ends), axis=1)
    bounds[0, 0] = 0
    levels = b - 1 if name == "IQ1_S" else 2 * b + 1
    return index, bounds, point[order].astype(np.int16), levels


class CoarseFormat(BlockFormat):
    """A type that ggml refuses to write without an importance.

    Where none is given, the sums of the squares of the columns stand in, as in libgguf.
    """

    def _encode(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        if importance is None:
            importance = np.broadcast_to(np.square(x).sum(0, dtype=np.float32), x.shape)
        return super()._encode(x, importance)


def _even_signs() -> np.ndarray:
    """Bytes of 8 signs, by the first 7 of them: the last makes the number of minus signs even."""
    seven = np.arange(128, dtype=np.uint8)
    odd = np.unpackbits(seven[:, None], axis=1).sum(1) & 1
    return (seven | odd << 7).astype(np.uint8)


EVEN = _even_signs()
# The signs of each byte, first bit first: -1 where the bit is set.
SIGNS = np.float32(1) - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1]


def _read(name: str, index: np.ndarray, signs: np.ndarray, scale: np.ndarray, out: np.ndarray):
    """out = scale * point * sign.

    Args:
        index: integers [blocks, vectors].
        signs: uint8 [blocks, 32], a bit for each weight, set for minus.
        scale: float32 [blocks, 8 or 16].
    """
    table = points(name)
    vectors = out.reshape(*index.shape, -1)
    table.take(index.astype(np.intp), axis=0, out=vectors, mode="clip")
    eights = out.reshape(-1, 32, 8)
    eights *= SIGNS[signs]
    parts = out.reshape(*scale.shape, -1)
    parts *= scale[:, :, None]


def _nibbles_in_turn(packed: np.ndarray) -> np.ndarray:
    """uint8 [blocks, n] -> [blocks, 2 n]: the low nibble of each byte, then its high one."""
    return (packed[:, :, None] >> FOURS & 15).reshape(len(packed), -1)


def _signs_and_scale(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [blocks, 8] -> signs uint8 [blocks, 32] and 4-bit scales [blocks, 8]."""
    seven = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return EVEN[seven].reshape(len(words), 32), words >> 28


def _midway(d: np.ndarray, steps: np.ndarray, unit: float) -> np.ndarray:
    return d * (steps.astype(np.float32) + np.float32(0.5)) * np.float32(unit)


def read_iq2_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    pairs = blocks[:, 2:].reshape(-1, 8, 8)
    signs, steps = _signs_and_scale(np.ascontiguousarray(pairs[:, :, 4:]).view("<u4")[:, :, 0])
    index = pairs[:, :, :4].reshape(-1, 32)
    _read("IQ2_XXS", index, signs, _midway(half(blocks, 0), steps, 0.25), out)


def read_iq2_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    words, steps = blocks[:, 2:66].view("<u2"), _nibbles_in_turn(blocks[:, 66:])
    scale = _midway(half(blocks, 0), steps, 0.25)
    _read("IQ2_XS", words & 511, EVEN[words >> 9], scale, out)


def read_iq2_s(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks[:, 66:74, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    index = blocks[:, 2:34] | high.reshape(-1, 32).astype(np.uint16) << 8
    scale = _midway(half(blocks, 0), _nibbles_in_turn(blocks[:, 74:]), 0.25)
    _read("IQ2_S", index, blocks[:, 34:66], scale, out)


def read_iq3_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    signs, steps = _signs_and_scale(np.ascontiguousarray(blocks[:, 66:]).view("<u4"))
    _read("IQ3_XXS", blocks[:, 2:66], signs, _midway(half(blocks, 0), steps, 0.5), out)


def read_iq3_s(blocks: np.ndarray, out: np.ndarray) -> None:
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    index = blocks[:, 2:66] | high.astype(np.uint16) << 8
    steps = _nibbles_in_turn(blocks[:, 106:]).astype(np.float32)
    _read("IQ3_S", index, blocks[:, 74:106], half(blocks, 0) * (2 * steps + 1), out)


def _read_shifted(index: np.ndarray, minus: np.ndarray, scale: np.ndarray, out: np.ndarray):
    """out = scale * (point + shift): one of each for 8 weights, [blocks, 32] all three."""
    vectors = out.reshape(*index.shape, 8)
    points("IQ1_S").take(index.astype(np.intp), axis=0, out=vectors, mode="clip")
    vectors += np.where(minus, np.float32(-0.125), np.float32(0.125))[:, :, None]
    vectors *= scale[:, :, None]


def read_iq1_s(blocks: np.ndarray, out: np.ndarray) -> None:
    words = np.ascontiguousarray(blocks[:, 34:]).view("<u2")
    high = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 32)
    scale = half(blocks, 0) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    minus = (words >> 15).astype(bool)
    pair = (minus.repeat(4, axis=1), scale.repeat(4, axis=1))
    _read_shifted(blocks[:, 2:34] | high << 8, *pair, out)


def read_iq1_m(blocks: np.ndarray, out: np.ndarray) -> None:
    four = _nibbles_in_turn(blocks[:, 32:48])
    words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    # The top nibbles of the four words make up d, the first lowest.
    bits = words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    d = np.bitwise_or.reduce(bits, axis=1, keepdims=True).view("<f2").astype(np.float32)
    steps = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    scale = (d * (2 * steps + 1).astype(np.float32)).repeat(2, axis=1)
    index = blocks[:, :32] | (four & 7).astype(np.uint16) << 8
    _read_shifted(index, (four & 8).astype(bool), scale, out)
