"""Activations times a packed weight, whatever its format: the ladder that all formats share.

1. `reference`: unpack the whole weight to memory, then multiply. Every weight is written and read
   again at full width.
2. `gemv`: each program unpacks tiles of weights in registers and multiplies them by one row of
   activations. Memory sees only packed bytes, but every row of activations reads them all again.
3. `gemm`: an unpacked tile serves many rows of activations, and tensor cores multiply.

A format hands over a `Packed`: its stored tensors, and a device function that decodes a tile.
Programs can share the inputs of one output among them (split-K): each leaves a partial sum in
float32, and torch adds these up, in the same order on every run.

The kernels also run without a GPU: in the interpreter, if TRITON_INTERPRET=1 is set before triton
is imported, and `Launch.compiled` shows what they compile to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from qlib.qtensor import QTensor

from .launch import Launch
from .tuning import check, tiling


@dataclass(frozen=True)
class Packed:
    """A weight as the kernels see it.

    Args:
        shape: [out, in] of the weight.
        parts: what `decode` reads: tensors and sizes.
        decode: a `triton.jit` function (parts, n, outputs, k, OPTIONS, BLOCK_K) that returns the
            weights of the rows `n` and the inputs k, ..., k + BLOCK_K - 1, float32
            [BLOCK_N, BLOCK_K]; `k` is a multiple of BLOCK_K. What lies outside the weight may
            come out as any finite number.
        options: constants of the format, for `decode`.
        step: BLOCK_K divides this power of two.
        order: which column of the weight each stored column is, [in], if they are reordered.
        unroll: UNROLL is no more than this: more would not leave registers enough.
    """

    shape: tuple[int, int]
    parts: tuple
    decode: Any
    options: tuple
    step: int
    order: Tensor | None = None
    unroll: int = 8


def words(codes: UInt8[Tensor, "out bytes"]) -> tuple[Tensor, int, int]:
    """(the same bytes as words, the bits of a word, words in a row): 32 bits, or 8 for odd rows."""
    size = 8 if (codes.shape[1] | codes.storage_offset()) % 4 else 32
    dtype = torch.uint8 if size == 8 else torch.int32
    return codes.contiguous().view(-1).view(dtype), size, codes.shape[1] * 8 // size


def reference(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 1, in plain torch: what the other rungs have to agree with."""
    return x @ q.dequantize().to(x.dtype).T


def gemv(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """Rung 2: no unpacked weight is ever written; each row of `x` reads all packed bytes.

    Args:
        x: activations on the device of the weight, float16 or bfloat16; the sums are float32.
    """
    return finish(*launch("gemv", x, weight), x.dtype)


def gemm(x: Float[Tensor, "rows in"], weight: Packed) -> Float[Tensor, "rows out"]:
    """Rung 3: a tile of weights is unpacked once for many rows of `x`. Arguments as `gemv`."""
    return finish(*launch("gemm", x, weight), x.dtype)


def finish(launched: Launch, partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Runs a kernel and adds up the partial sums [split, rows, out] that it writes."""
    launched.run()
    return partial[0] if len(partial) == 1 else partial.sum(0).to(dtype)


def launch(rung: str, x: Tensor, weight: Packed, **tiles: int) -> tuple[Launch, Tensor]:
    """(how `rung` runs, the partial sums [split, rows, out] that it will write).

    `tiles` replaces what `tuning` chose. Raises ValueError for tiles that cannot be.
    """
    outputs, inputs = weight.shape
    tiles = tiling(rung, len(x), outputs, inputs, x.device) | tiles
    tiles["BLOCK_K"] = min(tiles.get("BLOCK_K", 0), weight.step)
    if "UNROLL" in tiles:
        tiles["UNROLL"] = min(tiles["UNROLL"], weight.unroll)
    check(rung, tiles, inputs)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    x = _whole_tiles(x if weight.order is None else x[:, weight.order], tiles["BLOCK_K"])
    split = tiles["SPLIT"]
    dtype = x.dtype if split == 1 else torch.float32
    partial = torch.empty(split, len(x), outputs, dtype=dtype, device=x.device)
    programs = triton.cdiv(outputs, tiles["BLOCK_N"]) * triton.cdiv(len(x), tiles.get("BLOCK_M", 1))
    args = (x, weight.parts, partial, len(x), outputs, inputs, x.shape[1])
    constants = {"DECODE": weight.decode, "OPTIONS": weight.options, **tiles}
    kernel = {"gemv": gemv_kernel, "gemm": gemm_kernel}[rung]
    return Launch(kernel, (programs, split), args, constants, options), partial


def _whole_tiles(x: Tensor, size: int) -> Tensor:
    """`x` with zeros up to a multiple of `size`, each row at an address that is one of 16."""
    if x.shape[1] % size:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@triton.jit
def gemv_kernel(
    x, weight, y, rows, outputs, inputs, x_stride,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outputs, BLOCK_N)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = _inputs_of_split(inputs, BLOCK_K, SPLIT)
    # A thread adds up what it decodes, 16 weights to a sum; threads meet once, after the loop.
    total = tl.zeros([BLOCK_N, BLOCK_K // 16], tl.float32)
    for k in tl.range(start, stop, BLOCK_K, loop_unroll_factor=UNROLL):
        values = DECODE(weight, n, outputs, k, OPTIONS, BLOCK_K)
        products = values * _activations(x + m * x_stride + k, BLOCK_K)[None, :]
        total += tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // 16, 16]), axis=2)
    at = y + (tl.program_id(1) * rows + m) * outputs + n
    tl.store(at, tl.sum(total, axis=1).to(y.dtype.element_ty), n < outputs)


@triton.jit
def _activations(first, BLOCK_K: tl.constexpr):
    """BLOCK_K activations, float32, from the address `first` on.

    They are read as words of four: a tensor of fewer words than the program has threads is loaded
    by every thread for itself. One of more elements would take the way through shared memory.
    """
    words = tl.load(first.to(tl.pointer_type(tl.int64)) + tl.arange(0, BLOCK_K // 4))
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    even = tl.interleave(low.to(tl.int16), high.to(tl.int16))
    odd = tl.interleave((low >> 16).to(tl.int16), (high >> 16).to(tl.int16))
    activations = tl.interleave(even, odd).to(first.dtype.element_ty, bitcast=True)
    return activations.to(tl.float32)


@triton.jit
def gemm_kernel(
    x, weight, y, rows, outputs, inputs, x_stride,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped(tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = _inputs_of_split(inputs, BLOCK_K, SPLIT)
    # The side of 64 that tensor cores ask for is the outputs, where the rows are fewer.
    WEIGHTS_LEFT: tl.constexpr = BLOCK_M < 64
    total = tl.zeros([BLOCK_N, BLOCK_M] if WEIGHTS_LEFT else [BLOCK_M, BLOCK_N], tl.float32)
    inside = (m < rows)[:, None]
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    for k in range(start, stop, BLOCK_K):
        values = DECODE(weight, n, outputs, k, OPTIONS, BLOCK_K).to(x.dtype.element_ty)
        activations = tl.load(x_rows + (k + tl.arange(0, BLOCK_K))[None, :], inside, other=0.0)
        if WEIGHTS_LEFT:
            total = tl.dot(values, tl.trans(activations), total, input_precision="ieee")
        else:
            total = tl.dot(activations, tl.trans(values), total, input_precision="ieee")
    total = (tl.trans(total) if WEIGHTS_LEFT else total).to(y.dtype.element_ty)
    at = y + (tl.program_id(1) * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, total, inside & (n < outputs)[None, :])


@triton.jit
def _grouped(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which tile this program computes: GROUP tiles of outputs with all rows come one after the
    other, so that programs that run together read the same weights and rows from the L2 cache."""
    group = tl.program_id(0) // (GROUP * tiles_m)
    inside = tl.program_id(0) % (GROUP * tiles_m)
    width = tl.minimum(tiles_n - group * GROUP, GROUP)
    return inside // width, group * GROUP + inside % width


@triton.jit
def _inputs_of_split(inputs, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """First and last input, exclusive, of this program: whole tiles, shared out evenly."""
    each = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT) * BLOCK_K
    start = tl.program_id(1) * each
    return start, tl.minimum(start + each, inputs)
