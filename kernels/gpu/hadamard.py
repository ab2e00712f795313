"""The fast Walsh-Hadamard transform: x @ H / sqrt(n) in log2(n) rounds of sums and differences.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. That of size 2^k is a Kronecker power of
[[1, 1], [1, -1]], so it acts on one bit of the index after another: in each round the number at
every index whose bit is 0, a, and its partner with the bit 1, b, become a + b and a - b.

In each round the bit is the top one of the index and becomes the lowest, so k rounds also turn the
index once around, back to where it began, and all rounds are the same code. A tile holds several
rows and is loaded transposed, [2^k, ROWS]: the same turn makes it [ROWS, 2^k].

No matrix product is needed, and float32 sums serve every dtype. Threads hold neighbors along the
lower bits, so the top bits lie in the registers of one thread: the kernel does as many rounds as
there are such bits, then the threads exchange what they hold, through shared memory.

Sizes n = m 2^k take a Hadamard matrix of size m besides, such as 12 or 20: `base`. The whole
transform is the Kronecker product of the two; the kernel begins with the base, as a sum over m.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import Launch

# Numbers of one tile, and those that a thread holds of it.
LARGEST, EACH = 32768, 32


def reference(x: Float[Tensor, "*rows n"], base: Tensor | None = None) -> Float[Tensor, "*rows n"]:
    """The same in plain torch, in the dtype of `x`. Arguments as `hadamard`."""
    m, rounds = _sizes(x, base)
    y = x.unflatten(-1, (m, -1))
    if base is not None:
        y = (y.mT @ base.to(x)).mT
    for _ in range(rounds):
        a, b = y.unflatten(-1, (2, -1)).unbind(-2)
        y = torch.stack((a + b, a - b), -1).flatten(-2)
    return y.flatten(-2) / math.sqrt(x.shape[-1])


def hadamard(x: Float[Tensor, "*rows n"], base: Tensor | None = None) -> Float[Tensor, "*rows n"]:
    """x @ (base ⊗ H) / sqrt(n), where H is Sylvester's Hadamard matrix of size n / m.

    Args:
        x: float16, bfloat16 or float32; n is a power of two, or m times one.
        base: Hadamard matrix [m, m] of 1 and -1. Its transpose gives the inverse transform;
            without it, the transform is its own inverse.

    Raises ValueError if n is another number, or too large for one tile.
    """
    launched, y = launch(x, base)
    if x.numel():
        launched.run()
    return y


def launch(x: Tensor, base: Tensor | None = None, **tiles: int) -> tuple[Launch, Tensor]:
    """(how it runs, the output that it will write). `tiles` replaces ROWS, num_warps."""
    m, rounds = _sizes(x, base)
    size = 2**rounds
    # Without a base a program takes a few rows of x; with one, a row of x is m rows of the tile.
    few = max(1, 32 * EACH // size) if base is None else triton.next_power_of_2(m)
    rows = tiles.get("ROWS", few)
    warps = tiles.get("num_warps", max(1, rows * size // (32 * EACH)))
    x = x.contiguous()
    count, y = x.numel() // size, torch.empty_like(x)
    signs = None if base is None else base.to(x.device, torch.float32).contiguous()
    args = (x, x if base is None else signs, y, count, m, 1 / math.sqrt(x.shape[-1]))
    # Bits of the index in the registers of a thread, once its 32 * warps neighbors share the rest.
    held = max(1, (rows * size // (32 * warps)).bit_length() - 1)
    constants = {"ROWS": rows, "ROUNDS": rounds, "HELD": held, "BASE": base is not None}
    grid = (triton.cdiv(count, rows if base is None else m),)
    return Launch(hadamard_kernel, grid, args, constants, {"num_warps": warps}), y


def why_not(n: int, m: int) -> str | None:
    """Why the kernel does not multiply rows of n with a base of size m, or None."""
    size = n // m
    if n == 0 or n % m or size & (size - 1):
        return f"rows of {n} are not {m} times a power of two: need a base"
    if triton.next_power_of_2(m) * size > LARGEST:
        return f"rows of {n} are too long, up to {LARGEST} fit: need blocks"
    return None


def _sizes(x: Tensor, base: Tensor | None) -> tuple[int, int]:
    """(m, k) of n = m 2^k."""
    n, m = x.shape[-1], 1 if base is None else len(base)
    if reason := why_not(n, m):
        raise ValueError(f"hadamard: {reason}")
    return m, (n // m).bit_length() - 1


@triton.jit
def hadamard_kernel(
    x, base, y, rows, m, norm,
    ROWS: tl.constexpr, ROUNDS: tl.constexpr, HELD: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 2**ROUNDS
    i, j = tl.arange(0, ROWS), tl.arange(0, SIZE)
    if BASE:
        first = tl.program_id(0).to(tl.int64) * m
        inside = i < m
        tile = tl.zeros([SIZE, ROWS], tl.float32)
        for a in range(m):
            signs = tl.load(base + a * m + i, inside, other=0.0)
            tile += tl.load(x + (first + a) * SIZE + j).to(tl.float32)[:, None] * signs[None, :]
    else:
        first = tl.program_id(0).to(tl.int64) * ROWS
        inside = first + i < rows
        at = x + (first + i)[None, :] * SIZE + j[:, None]
        tile = tl.load(at, inside[None, :], other=0.0).to(tl.float32)
    tile = tl.reshape(tile, [SIZE * ROWS])
    for done in tl.static_range(0, ROUNDS, HELD):
        tile = _rounds(tile, SIZE * ROWS, min(HELD, ROUNDS - done))
    tile = (tl.reshape(tile, [ROWS, SIZE]) * norm).to(y.dtype.element_ty)
    tl.store(y + (first + i)[:, None] * SIZE + j[None, :], tile, inside[:, None])


@triton.jit
def _rounds(tile, TOTAL: tl.constexpr, BITS: tl.constexpr):
    """Rounds for the top bits of the index, which then become its lowest, in the same order."""
    REST: tl.constexpr = TOTAL // 2**BITS
    for bit in tl.static_range(BITS):
        pairs = tl.reshape(tile, [2**bit, 2, 2 ** (BITS - 1 - bit), REST])
        a, b = tl.split(tl.permute(pairs, [0, 2, 3, 1]))
        pairs = tl.permute(tl.join(a + b, a - b), [0, 3, 1, 2])
        tile = tl.reshape(pairs, [TOTAL])
    return tl.reshape(tl.trans(tl.reshape(tile, [2**BITS, REST])), [TOTAL])
