"""Both sides in eight bits (W8A8): codes meet codes on the tensor cores, scales come afterwards.

Where every row of the activations and every row of the weight has one scale, the scales leave the
sum: y[m, n] = x.scale[m] * w.scale[n] * sum over k of x.code[m, k] * w.code[n, k]. INT8 codes are
summed in int32, which is exact; E4M3 codes in float32. One multiplication for each output follows.

Stored int8 codes are numbers from 0 to 255 that mean code - 128. Flipping the highest bit turns
one into two's complement, which is what tensor cores take.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qlib import fit
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .. import eight_bits
from .encode import encode
from .launch import Launch

# Up to 64 rows are one tile (BLOCK_M grows with them), a narrow one so that there are many.
FEW = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256, "GROUP": 8, "num_warps": 4, "num_stages": 3}
MANY = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}
# Compute capability times ten with tensor cores for these codes, as far as Triton has them.
NEEDS = {"int8": 80, "e4m3": 89}
# So many products of -128 and -128 are 2^31, one too many for int32.
INT32_INPUTS = 1 << 17


def reference(x: QTensor, w: QTensor, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    """In torch: sums of products of codes in float64, which are exact for both grids."""
    codes = [q.format.grid.decode(q.parts["codes"]).double() for q in (x, w)]
    scales = x.parts["scale"].double() * w.parts["scale"].double().T
    return (codes[0] @ codes[1].T * scales).to(dtype)


def scaled_product(x: QTensor, w: QTensor, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    """`x.dequantize() @ w.dequantize().T` on tensor cores for eight bits, rescaled once.

    Args:
        x: activations [rows, in], int8 or E4M3 codes with one scale for a row (dynamic) or for the
            tensor (static).
        w: weight [out, in] with codes of the same kind.
        dtype: of the result; sums are int32 or float32, scales are multiplied in float32.

    Raises ValueError with the reason of `why_not`.
    """
    if reason := _why_not_anywhere(x, w):
        raise ValueError(f"scaled_product: {reason}")
    launched, y = launch(x, w, dtype)
    launched.run()
    return y


def w8a8(x: Float[Tensor, "rows in"], w: QTensor) -> Float[Tensor, "rows out"]:
    """The product of activations that are quantized on the way, one scale for each row of `x`.

    Two kernels, not one: a code of a row depends on the largest value of the whole row, so a single
    kernel would read its rows to the end before the first product, and once again for every tile
    of outputs. `encode` does that once, and the product then reads half the bytes.

    Args:
        x: activations, float16 or bfloat16, as is the result.
        w: weight [out, in] as for `scaled_product`.
    """
    return scaled_product(encode(x, _per_row(w.format)), w, x.dtype)


@lru_cache(maxsize=256)
def _per_row(format: Scheme) -> Scheme:
    return Scheme(format.grid, "row", fit.absmax, scale=format.scale)


def why_not(x: QTensor, w: QTensor, capability: int) -> str | None:
    """Why `scaled_product` cannot run on a GPU, or None if it can.

    Args:
        capability: its compute capability times ten.
    """
    reason = _why_not_anywhere(x, w)
    if reason or capability >= NEEDS[w.format.grid.name]:
        return reason
    need, have = (f"{cc // 10}.{cc % 10}" for cc in (NEEDS[w.format.grid.name], capability))
    return f"tensor cores for {w.format.grid.name} start at cc {need}, this is {have}"


def _why_not_anywhere(x: QTensor, w: QTensor) -> str | None:
    if reason := eight_bits.why_not(x, w):
        return reason
    long = w.format.grid.name == "int8" and x.shape[1] >= INT32_INPUTS
    return f"sums of {x.shape[1]} products may leave int32" if long else None


def candidates(rows: int) -> list[dict[str, int]]:
    """Tiles worth measuring for a product of so many rows."""
    few = [(16, 32, 256), (16, 64, 256), (16, 64, 512), (32, 64, 256), (64, 64, 128)]
    many = [(64, 128, 128), (128, 128, 128), (128, 256, 128), (256, 128, 128)]
    return [
        dict(zip(MANY, (m, n, k, 8, warps, stages)))
        for m, n, k in (few if rows <= 64 else many)
        for warps in (4, 8)
        for stages in (3, 4)
    ]


def launch(x: QTensor, w: QTensor, dtype: torch.dtype, **tiles: int) -> tuple[Launch, Tensor]:
    """(how the product runs, the output that it fills); `tiles` replaces FEW's or MANY's."""
    (rows, inputs), outputs = x.shape, w.shape[0]
    few = FEW | {"BLOCK_M": max(16, triton.next_power_of_2(rows))}
    tiles = (few if rows <= 64 else MANY) | tiles
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    y = torch.empty(rows, outputs, dtype=dtype, device=w.parts["codes"].device)
    grid = (triton.cdiv(outputs, tiles["BLOCK_N"]), triton.cdiv(rows, tiles["BLOCK_M"]))
    scales = [q.parts["scale"].contiguous() for q in (x, w)]
    strides = [int(q.format.block == "row") for q in (x, w)]
    args = (_codes(x), _codes(w), *scales, y, rows, outputs, inputs, *strides)
    return Launch(product_kernel, grid, args, tiles, options), y


def _codes(q: QTensor) -> Tensor:
    codes = q.parts["codes"].contiguous()
    return codes if q.format.grid.name == "int8" else codes.view(torch.float8_e4m3fn)


@triton.jit
def product_kernel(
    x, w, x_scale, w_scale, y, rows, outputs, inputs, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs that run side by side share what they read: GROUP tiles of outputs, then the next m.
    i, j = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP
    )
    n, m = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.uint8 else tl.float32
    total = tl.zeros([BLOCK_N, BLOCK_M], SUM)
    for k in range(0, inputs, BLOCK_K):
        weights = _tile(w, n, outputs, k, inputs, BLOCK_K)
        activations = tl.trans(_tile(x, m, rows, k, inputs, BLOCK_K))
        # Tensor cores for E4M3 keep about 14 bits of a sum on Hopper: every 128 products it moves
        # to one in float32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
        total = tl.dot(weights, activations, total, max_num_imprecise_acc=128, out_dtype=SUM)
    of_w = tl.load(w_scale + n * w_stride, n < outputs, other=0.0).to(tl.float32)
    of_x = tl.load(x_scale + m * x_stride, m < rows, other=0.0).to(tl.float32)
    values = total.to(tl.float32) * (of_w[:, None] * of_x[None, :])
    at = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(at, values.to(y.dtype.element_ty), (m < rows)[None, :] & (n < outputs)[:, None])


@triton.jit
def _tile(codes, row, rows, k, inputs, BLOCK_K: tl.constexpr):
    """Codes [row, BLOCK_K] from input k on; zeros where the matrix ends."""
    at = k + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (at < inputs)[None, :]
    pointers = codes + row.to(tl.int64)[:, None] * inputs + at[None, :]
    if codes.dtype.element_ty == tl.uint8:
        return (tl.load(pointers, inside, other=128) ^ 128).to(tl.int8, bitcast=True)
    else:
        return tl.load(pointers, inside, other=0.0)
