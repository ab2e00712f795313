"""Ternary weights -1, 0, 1 with 16-bit activations: five to a byte, in base 3.

Five codes of a byte are no power of two, so a tile has one element for a byte, and an inner loop
takes one trit of every byte at a time. Its activations stand five apart, so they are put in the
order of the trits first, [rows, 5, bytes]; that costs one more pass over the activations.

A byte b < 243 is b / 243 as a fraction of 2**32: a number whose five digits in base 3 are the
trits, the last one leading. It is at least 2/3 if that trit is 2, the weight 1, and less than 1/3
if it is 0, the weight -1. Times 3, the digit leaves the 32 bits at the top and the next one leads:
no division, and one multiplication for each trit.

`gemv` has no multiplication of a weight: an activation is added, subtracted or skipped. On a GPU
that saves nothing: an addition and a multiply-add are the same instruction. What a ternary weight
saves are bytes, at 1.6 bits each. A scale of the tensor or of a row multiplies the sum at the end.
The rungs are those of `product`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qlib.pack import TRITS_PER_BYTE
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .launch import Launch
from .product import finish
from .scales import FLOATS

ONE_243RD = tl.constexpr(-(-(2**32) // 243))
ONE_THIRD, TWO_THIRDS = tl.constexpr(-(-(2**32) // 3)), tl.constexpr(-(-(2**33) // 3))


def why_not(q: QTensor) -> str | None:
    """Why these kernels cannot read `q`, or None if they can."""
    if not isinstance(q.format, Scheme):
        return f"{type(q.format).__name__} is not a Scheme"
    if q.format.grid.name != "ternary" or not q.format.is_standard:
        return f"the grid {q.format.grid.name} is not ternary"
    if q.format.block not in ("row", "tensor"):
        return f"a block of {q.format.block} is neither a row nor the tensor"
    if q.format.scale not in FLOATS:
        return "the scale is not float16, bfloat16 or float32"
    return None if q.format.offset is None else "the weights have an offset"


def gemv(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 2: additions and subtractions; each row of `x` reads all packed bytes.

    Args:
        x: activations on the device of `q`, float16 or bfloat16; the sums are float32.
        q: weight [out, in], if `why_not(q)` is None.
    """
    return finish(*launch("gemv", x, q), x.dtype)


def gemm(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 3: tensor cores multiply by -1, 0 and 1. Arguments as `gemv`."""
    return finish(*launch("gemm", x, q), x.dtype)


def launch(rung: str, x: Tensor, q: QTensor, **tiles: int) -> tuple[Launch, Tensor]:
    """(how `rung` runs, the partial sums [split, rows, out] that it will write).

    `tiles` replaces what `rule` says; BLOCK_J counts bytes, five inputs each.
    """
    (outputs, _), rows = q.shape, len(x)
    codes, scale = q.parts["codes"].contiguous(), q.parts["scale"].contiguous()
    row_bytes = codes.shape[1]
    tiles = rule(rung, rows, outputs, row_bytes) | tiles
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    split = tiles["SPLIT"]
    dtype = x.dtype if split == 1 else torch.float32
    partial = torch.empty(split, rows, outputs, dtype=dtype, device=x.device)
    x = _by_trits(x, triton.cdiv(row_bytes, tiles["BLOCK_J"]) * tiles["BLOCK_J"])
    # A thread loads so many bytes at once: rows begin at multiples of them.
    tiles["UNIT"] = math.gcd(row_bytes, 16)
    sizes = (rows, outputs, row_bytes // tiles["UNIT"], x.shape[2], int(len(scale) > 1))
    args = (x, codes, scale, partial, *sizes)
    blocks_m = triton.cdiv(rows, tiles.get("BLOCK_M", 1))
    grid = (triton.cdiv(outputs, tiles["BLOCK_N"]), blocks_m, split)
    kernel = {"gemv": gemv_kernel, "gemm": gemm_kernel}[rung]
    return Launch(kernel, grid, args, tiles, options), partial


def rule(rung: str, rows: int, outputs: int, row_bytes: int) -> dict[str, int]:
    """Tiles for enough programs, none of them measured."""
    split = max(1, min(8, 512 * 32 // outputs, row_bytes // 256))
    if rung == "gemv":
        tiles = {"BLOCK_N": 32, "BLOCK_J": 64, "SPLIT": split}
        return tiles | {"num_warps": 4, "num_stages": 1}
    few = {"BLOCK_M": max(16, triton.next_power_of_2(rows)), "BLOCK_N": 64, "SPLIT": split}
    many = {"BLOCK_M": 128, "BLOCK_N": 128, "SPLIT": 1}
    tiles = (few if rows <= 64 else many) | {"BLOCK_J": 32}
    return tiles | {"num_warps": 4 if rows <= 64 else 8, "num_stages": 2}


def _by_trits(x: Tensor, width: int) -> Tensor:
    """[rows, in] -> [rows, 5, width], zeros after the end: input 5 j + i is at [i, j]."""
    x = torch.nn.functional.pad(x, (0, TRITS_PER_BYTE * width - x.shape[1]))
    return x.view(len(x), width, TRITS_PER_BYTE).mT.contiguous()


@triton.jit
def gemv_kernel(
    x, codes, scale, y, rows, outputs, units, width, scale_stride,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    for first in range(tl.program_id(2) * BLOCK_J, units * UNIT, SPLIT * BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        fraction = _fraction(codes, n, j, outputs, units * UNIT)
        for i in tl.static_range(5):
            activations = tl.load(x + (5 * m + 4 - i) * width + j).to(tl.float32)[None, :]
            minus = tl.where(fraction < ONE_THIRD, -activations, 0.0)
            total += tl.where(fraction >= TWO_THIRDS, activations, minus)
            fraction *= 3
    s = tl.load(scale + n * scale_stride, n < outputs, other=0.0).to(tl.float32)
    at = y + (tl.program_id(2) * rows + m) * outputs + n
    tl.store(at, (tl.sum(total, axis=1) * s).to(y.dtype.element_ty), n < outputs)


@triton.jit
def gemm_kernel(
    x, codes, scale, y, rows, outputs, units, width, scale_stride, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(tl.program_id(2) * BLOCK_J, units * UNIT, SPLIT * BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        fraction = _fraction(codes, n, j, outputs, units * UNIT)
        # Not unrolled: for cc 10.0 the compiler would keep five sums, more than its memory holds.
        for i in range(5):
            at = x + (5 * m.to(tl.int64) + 4 - i)[None, :] * width + j[:, None]
            activations = tl.load(at, (m < rows)[None, :], other=0.0)
            minus = tl.where(fraction < ONE_THIRD, -1.0, 0.0)
            values = tl.where(fraction >= TWO_THIRDS, 1.0, minus).to(activations.dtype)
            total = tl.dot(values, activations, total, input_precision="ieee")
            fraction *= 3
    s = tl.load(scale + n * scale_stride, n < outputs, other=0.0).to(tl.float32)
    at = y + (tl.program_id(2) * rows + m).to(tl.int64)[None, :] * outputs + n[:, None]
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    tl.store(at, (total * s[:, None]).to(y.dtype.element_ty), inside)


@triton.jit
def _fraction(codes, n, j, outputs, row_bytes):
    """Bytes of the rows `n`, each as b / 243 of 2**32."""
    inside = (n < outputs)[:, None] & (j < row_bytes)[None, :]
    at = codes + n.to(tl.int64)[:, None] * row_bytes + j[None, :]
    return tl.load(at, inside, other=0).to(tl.uint32) * ONE_243RD
