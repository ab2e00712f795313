"""Attention to a packed past on a CPU: keys and values are unpacked in registers, never to memory.

One new token reads the whole past once, for all query heads that share a key and value head. Two
products do it, whichever way a past is packed. Each row r below is one row of a QTensor, a token's
vector or a channel of a group of tokens:

- `dot`, rows times a vector: y[h, r] = sum over c of x[h, c] row_r[c];
- `mix`, a sum of rows:       y[h, c] = sum over r of x[h, r] row_r[c].

Scores are the `dot` of queries and keys by token, but the `mix` of keys by channel: there a row has
32 tokens, and the numbers of a query are its coefficients. The output is the `mix` of values by
token and their probabilities.

A block of 32 values is two vectors. Of 4 bits, the low halves of sixteen bytes are the values 0, 2,
4, ..., the high halves 1, 3, 5, ...; the block has only sixteen values, so their table is one
vector, and to unpack is to look up. Four rows are unpacked at once and multiplied by every head's
numbers before the next four. Rows are shared out in pieces, over all heads of all sequences.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numba import types
from torch import Tensor

from qlib.grid import Grid
from qlib.qtensor import Format, QTensor
from qlib.scheme import Scheme

from .scales import check, compiled
from .simd import LANES, floats, half, load, load_bytes, lookup, lookup_two, splat, store, total
from .threads import machine_code, run, words

PAIR = 2 * LANES
# Rows unpacked together, and rows of one piece of work.
FOUR, PIECE = 4, 512
# Where the values of a pair of vectors lie in it: value 1 is the first of the second vector.
ORDER = np.arange(PAIR, dtype=np.uint8).reshape(2, LANES).T.ravel().copy()


def why_not(format: Format, width: int) -> str | None:
    """Why these kernels do not take rows of so many values, or None."""
    return _why_not(format, width) if isinstance(format, Scheme) else f"{format} is not a Scheme"


@lru_cache(maxsize=256)
def _why_not(scheme: Scheme, width: int) -> str | None:
    if scheme.grid.bits != 4 and scheme.grid.name != "uint8":
        return f"the grid {scheme.grid.name} is neither of 4 bits nor uint8"
    if not scheme.is_standard:
        return f"the grid {scheme.grid.name} is learned"
    if scheme.scale is not torch.float16 or scheme.offset is not torch.float16:
        return "scale and offset are not both float16"
    if type(scheme.block) is not int or scheme.block % PAIR or width % scheme.block or not width:
        return f"rows of {width} are not whole blocks of {scheme.block}, a multiple of {PAIR}"
    return None


def dot(
    x: Float[Tensor, "batch heads cols"], q: QTensor, used: int
) -> Float[Tensor, "batch heads used"]:
    """x[b] @ matrix[b].T for the first `used` rows of each matrix.

    Args:
        x: on the CPU, float32.
        q: matrices [batch, any number of rows, cols], contiguous parts of that shape.

    Raises ValueError with the reason of `why_not`, or if an argument is not as said here.
    """
    _check(x, q, used, q.shape[-1])
    if q.format.grid.bits == 4:
        x = x.unflatten(2, (-1, LANES, 2)).transpose(-1, -2).flatten(2)
    y = x.new_empty(*x.shape[:2], used)
    _call(_dot, q, x.contiguous(), used, PIECE, 0, y)
    return y


def mix(
    x: Float[Tensor, "batch heads n"], q: QTensor, used: int, group: int | None = None
) -> Float[Tensor, "batch heads sums"]:
    """x[b] @ matrix[b] for the first `used` rows of each matrix.

    Args:
        x: on the CPU, float32, one number for each row in use.
        q: as for `dot`.
        group: numbers of `x`. Every so many rows have a sum of their own, one behind the other.

    Raises ValueError as `dot` does.
    """
    _check(x, q, used, group or used)
    if group and (group < 0 or used % group):
        raise ValueError(f"attention: {used} rows are not whole groups of {group}")
    y = x.new_empty(*x.shape[:2], -(-used // (group or PIECE)), q.shape[2])
    _call(_mix, q, x, used, group or PIECE, 0 if group else PIECE, y.flatten(2))
    return y.flatten(2) if group else y.sum(2)


def _check(x: Tensor, q: QTensor, used: int, numbers: int) -> None:
    """Raise ValueError unless `x` has `numbers` for each head, and `q` has what it should have."""
    check("attention", q, why_not(q.format, q.shape[-1]))
    if not all(part.is_contiguous() for part in q.parts.values()):
        raise ValueError("attention: parts of q are not contiguous")
    if len(q.shape) != 3 or not 0 <= used <= q.shape[1]:
        raise ValueError(f"attention: {used} rows are in use, q is {list(q.shape)}")
    if x.dtype != torch.float32 or x.ndim != 3 or x.shape[::2] != (q.shape[0], numbers):
        need = f"torch.float32 [{q.shape[0]}, heads, {numbers}]"
        raise ValueError(f"attention: x is {x.dtype} {list(x.shape)}, need {need}")


def _call(function, q: QTensor, x: Tensor, rows: int, piece: int, step: int, y: Tensor) -> None:
    parts, grid = q.parts, q.format.grid
    table = _table(grid) if grid.bits == 4 else None
    scale, offset = (parts[name].view(torch.uint16) for name in ("scale", "offset"))
    arguments = (parts["codes"], scale, offset, table, x.resolve_neg(), rows, piece, step, y)
    work = x.shape[0] * x.shape[1] * rows * q.shape[2]
    run(_code(function, grid.bits), words(*arguments), x.shape[0] * -(-rows // piece), work)


@cache
def _code(function, bits: int) -> int:
    codes, halves = (types.Array(kind, 3, "C") for kind in (types.uint8, types.uint16))
    table = types.float32[::1] if bits == 4 else types.none
    x, y = types.float32[:, :, :], types.float32[:, :, ::1]
    kinds = (codes, halves, halves, table, x, types.int64, types.int64, types.int64, y)
    return machine_code(function, kinds)


@lru_cache(maxsize=64)
def _table(grid: Grid) -> Float[Tensor, " levels"]:
    return torch.nn.functional.pad(grid.points, (0, 16 - len(grid.points)))


@compiled
def _room(n):
    """n float32. A vector that lies across two lines of the cache takes twice as long."""
    room = np.empty(n + LANES, np.float32)
    return room[(-room.ctypes.data // 4) % LANES :][:n]


@compiled
def _wide(bits, numbers):
    """numbers = these float16. Read in one loop, they are converted a vector at a time."""
    bits = bits.reshape(-1)
    for i in range(len(bits)):
        numbers[i] = half(bits[i])


@compiled
def _two(row, i, table, scale, offset):
    """Vectors 2 i and 2 i + 1 of a row of codes, which belong to one block."""
    scale, offset = splat(scale), splat(offset)
    if table is None:
        low, high = load_bytes(row, i * PAIR), load_bytes(row, i * PAIR + LANES)
        return floats(low) * scale + offset, floats(high) * scale + offset
    values, byte = load(table, 0) * scale + offset, load_bytes(row, i * LANES)
    return lookup(values, byte), lookup(values, byte >> 4)


@compiled
def _four(codes, r, last, i, table, scale, offset, at, blocks):
    """`_two` of the rows r, ..., r + 3; the last row instead of any behind it."""
    s = min(r + 1, last - 1), min(r + 2, last - 1), min(r + 3, last - 1)
    b, c, d = at + (s[0] - r) * blocks, at + (s[1] - r) * blocks, at + (s[2] - r) * blocks
    return (
        _two(codes[r], i, table, scale[at], offset[at]),
        _two(codes[s[0]], i, table, scale[b], offset[b]),
        _two(codes[s[1]], i, table, scale[c], offset[c]),
        _two(codes[s[2]], i, table, scale[d], offset[d]),
    )


@compiled
def _dot(codes, scale, offset, table, x, rows, piece, step, y, start, stop):
    (heads, cols), blocks = x.shape[1:], scale.shape[2]
    pieces, pairs = -(-rows // piece), cols // blocks // PAIR
    factors, summands = np.empty(piece * blocks, np.float32), np.empty(piece * blocks, np.float32)
    numbers, sums = _room(heads * cols), _room(heads * FOUR * LANES)
    for number in range(start, stop):
        n, first = number // pieces, number % pieces * piece
        last = min(first + piece, rows)
        _wide(scale[n, first:last], factors)
        _wide(offset[n, first:last], summands)
        for h in range(heads):
            numbers[h * cols : (h + 1) * cols] = x[n, h]
        for r in range(first, last, FOUR):
            sums[:] = 0
            for b in range(blocks):
                at = (r - first) * blocks + b
                for i in range(b * pairs, (b + 1) * pairs):
                    four = _four(codes[n], r, last, i, table, factors, summands, at, blocks)
                    _add_products(four, numbers, i * PAIR, cols, sums, heads)
            for h in range(heads):
                for k in range(min(FOUR, last - r)):
                    y[n, h, r + k] = total(load(sums, (h * FOUR + k) * LANES))


@compiled
def _add_products(four, numbers, i, cols, sums, heads):
    """Products of a pair of vectors of four rows with every head's numbers i, ..., i + 31."""
    for h in range(heads):
        low, high = load(numbers, h * cols + i), load(numbers, h * cols + i + LANES)
        for k in range(FOUR):
            j = (h * FOUR + k) * LANES
            store(sums, j, load(sums, j) + four[k][0] * low + four[k][1] * high)


@compiled
def _mix(codes, scale, offset, table, x, rows, piece, step, y, start, stop):
    heads, blocks, pieces = x.shape[1], scale.shape[2], -(-rows // piece)
    cols = y.shape[2] // pieces
    pairs = cols // blocks // PAIR
    factors, summands = np.empty(piece * blocks, np.float32), np.empty(piece * blocks, np.float32)
    numbers, sums = np.empty((heads, piece + FOUR), np.float32), _room(heads * cols)
    for number in range(start, stop):
        n, part = number // pieces, number % pieces
        first, last = part * piece, min(part * piece + piece, rows)
        _wide(scale[n, first:last], factors)
        _wide(offset[n, first:last], summands)
        sums[:] = 0
        # Rows behind the last count nothing.
        numbers[:, last - first :] = 0
        for h in range(heads):
            numbers[h, : last - first] = x[n, h, part * step : part * step + last - first]
        for r in range(first, last, FOUR):
            for b in range(blocks):
                at = (r - first) * blocks + b
                for i in range(b * pairs, (b + 1) * pairs):
                    four = _four(codes[n], r, last, i, table, factors, summands, at, blocks)
                    _add_rows(four, numbers, r - first, sums, i * PAIR, cols)
        for h in range(heads):
            _write(sums[h * cols : (h + 1) * cols], table, y[n, h], part * cols)


@compiled
def _add_rows(four, numbers, r, sums, i, cols):
    """Add a pair of vectors of four rows, times a head's numbers r, ..., r + 3, for every head."""
    a, b, c, d = four
    for h in range(len(numbers)):
        p, q = splat(numbers[h, r]), splat(numbers[h, r + 1])
        s, t = splat(numbers[h, r + 2]), splat(numbers[h, r + 3])
        low, high = h * cols + i, h * cols + i + LANES
        # A long sum is rounded once for four rows.
        store(sums, low, load(sums, low) + (a[0] * p + b[0] * q + c[0] * s + d[0] * t))
        store(sums, high, load(sums, high) + (a[1] * p + b[1] * q + c[1] * s + d[1] * t))


@compiled
def _write(sums, table, y, at):
    """y[at :] = sums in the order of the columns."""
    for i in range(0, len(sums), PAIR):
        low, high = load(sums, i), load(sums, i + LANES)
        if table is not None:
            left = lookup_two(low, high, load_bytes(ORDER, 0))
            low, high = left, lookup_two(low, high, load_bytes(ORDER, LANES))
        store(y, at + i, low)
        store(y, at + i + LANES, high)
