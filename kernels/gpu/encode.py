"""Quantize and pack: weights or activations in, the stored bytes of a format out.

One program takes whole blocks of one row into registers, fits a scale to each, rounds the scale to
how it is stored, divides by *that*, rounds to codes and packs them: the input is read once, and
nothing but stored bytes is written. Only NVFP4 needs two kernels, since its block scales are in
units of a scale of the whole tensor: `amax_kernel` runs first.

What comes out is, bit for bit, what `qlib.quantize` stores on a CPU; `rounding` says how.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qlib import presets
from qlib.grid import E8M0
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .launch import Launch
from .rounding import ELEMENTS, float_code, integer_code, nested, positive, power_of_two, rint

# Values in one program, unless a single block has more, and values that one thread holds.
TILES = {"TILE": 2048, "EACH": 16}
WIDEST = 32768
INPUTS = (torch.float16, torch.bfloat16, torch.float32)


def candidates() -> list[dict[str, int]]:
    """Tiles worth measuring."""
    return [{"TILE": tile, "EACH": each} for tile in (1024, 2048, 4096) for each in (8, 16, 32)]


def why_not(x: Tensor, format) -> str | None:
    """Why `encode` cannot take these, or None if it can."""
    if x.dtype not in INPUTS:
        return f"x is {_name(x.dtype)}, it takes float16, bfloat16 or float32"
    if x.ndim != 2 or not x.numel():
        return f"x is {list(x.shape)}, it takes rows and columns"
    if not isinstance(format, Scheme):
        return f"{type(format).__name__} is not a Scheme"
    return _why_not_scheme(format, x.shape[1])


@lru_cache(maxsize=256)
def _why_not_scheme(format: Scheme, inputs: int) -> str | None:
    if format.grid.name not in ELEMENTS or not format.is_standard:
        return f"it does not round to the grid {format.grid.name}"
    if _rule(format) is None:
        return f"it does not find the scales of {format}"
    if format.block == "tensor":
        return "all values share one scale"
    size, bits = min(_size(format, inputs), inputs), format.grid.bits
    if size > WIDEST:
        return f"a block of {size} is more than {WIDEST} values"
    if size * bits % 8 and size < inputs:
        return f"blocks of {size} codes of {bits} bits do not end at a byte"
    return None


def encode(x: Float[Tensor, "rows in"], format: Scheme) -> QTensor:
    """`qlib.quantize(x.cpu(), format)` by a GPU, bit for bit, on the device of `x`.

    Args:
        x: float16, bfloat16 or float32, finite: a look at every value would stop the stream of
            kernels. Where NaN or infinity is, or a scale overflows, `quantize` raises; here
            symmetric formats get a scale that is not finite, so the result shows it.
        format: integers or floats of 4 or 8 bits that `why_not` has no objection to.

    Raises ValueError with the reason of `why_not`.
    """
    if reason := why_not(x, format):
        raise ValueError(f"encode: {reason}")
    launched, parts = launches(x, format)
    for launch in launched:
        launch.run()
    return QTensor(format, tuple(x.shape), parts)


def launches(x: Tensor, format: Scheme, **tiles: int) -> tuple[list[Launch], dict[str, Tensor]]:
    """(the kernels to run one after the other, the stored tensors that they fill).

    `tiles` replaces TILE or EACH.
    """
    tiles = TILES | tiles
    x, (rows, inputs) = x.contiguous(), x.shape
    size, layout, rule = _size(format, inputs), format.layout(x.shape), _rule(format)
    parts = {n: torch.empty(s, dtype=d, device=x.device) for n, (d, s) in layout.items()}
    scale = parts["scale.codes" if rule == "nested" else "scale"]
    amax = torch.zeros(1, dtype=torch.int32, device=x.device)
    whole, zero = parts.get("scale.scale", amax), parts.get("zero_point", scale)
    width, blocks = max(2, triton.next_power_of_2(size)), scale.shape[1]
    # Zero points of 4 bits share a byte, so two blocks at least belong to one program.
    count = min(tiles["TILE"] // width, triton.next_power_of_2(blocks))
    count = max(count, 2 if rule == "minmax" else 1)
    row_bytes = (parts["codes"].shape[1], zero.shape[1])
    args = (x, parts["codes"], scale, zero, whole, amax, inputs, blocks, *row_bytes)
    constants = {"GRID": ELEMENTS[format.grid.name], "BITS": format.grid.bits, "RULE": rule}
    constants |= {"SIZE": size, "BLOCKS": count, "WIDTH": width}
    options = {"num_warps": min(32, max(1, count * width // (32 * tiles["EACH"])))}
    grid = (rows, triton.cdiv(blocks, count))
    encoding = Launch(encode_kernel, grid, args, constants, options)
    if rule != "nested":
        return [encoding], parts
    programs = (triton.cdiv(x.numel(), tiles["TILE"]),)
    first = Launch(amax_kernel, programs, (x, amax, x.numel()), {"TILE": tiles["TILE"]})
    return [first, encoding], parts


@triton.jit
def amax_kernel(x, amax, count, TILE: tl.constexpr):
    """The bits of the largest magnitude: as integers they are in the order of the numbers."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = tl.load(x + at, at < count, other=0.0).to(tl.float32)
    tl.atomic_max(amax, tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))


@triton.jit
def encode_kernel(
    x, codes, scale, zero, whole, amax, inputs, blocks, codes_bytes, zero_bytes,
    GRID: tl.constexpr, BITS: tl.constexpr, RULE: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS
    block, lane = first + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    column = block[:, None] * SIZE + lane[None, :]
    inside = (lane < SIZE)[None, :] & (column < inputs)
    values = tl.load(x + row * inputs + column, inside, other=0.0).to(tl.float32)
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    z = tl.zeros([BLOCKS], tl.float32)
    if RULE == "pow2_floor":
        stored, s = power_of_two(bits, GRID[2])
    elif RULE == "nested":
        top = tl.load(amax).to(tl.float32, bitcast=True)
        of_tensor = positive(tl.div_rn(tl.div_rn(top, GRID[2]), 448.0), tl.float32)
        tl.store(whole, of_tensor, tl.program_id(0) + tl.program_id(1) == 0)
        stored, s = nested(tl.div_rn(largest, GRID[2]), of_tensor)
    else:
        low = tl.minimum(tl.min(values, axis=1), 0.0)
        span = tl.maximum(tl.max(values, axis=1), 0.0) - low if RULE == "minmax" else largest
        # The lowest value of the grids of minmax is zero.
        stored = positive(tl.div_rn(span, GRID[2]), scale.dtype.element_ty)
        s = stored.to(tl.float32)
    tl.store(scale + row * blocks + block, stored, block < blocks)
    # A block of zeros may have scale 0: any scale codes it exactly.
    s = tl.where(s == 0, 1.0, s)
    if RULE == "minmax":
        z = rint(tl.minimum(tl.div_rn(-low, s), GRID[2]))
        zeros, start = z.to(tl.int32)[None, :], tl.program_id(1) + tl.arange(0, 1)
        _store(zero + row * zero_bytes, zeros, start, zero_bytes, BLOCKS, BITS)
    q = tl.div_rn(values, tl.broadcast_to(s[:, None], values.shape))
    code = float_code(q, GRID, BITS) if GRID[0] else integer_code(q, z[:, None], GRID)
    code = tl.where(inside, code, 0)
    _store(codes + row * codes_bytes, code, block, codes_bytes, SIZE, BITS)


@triton.jit
def _store(row, codes, block, row_bytes, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Packs codes [a, b], the first SIZE of each line, as blocks `block` [a] of `row`."""
    SIZE_BYTES: tl.constexpr = (SIZE * BITS + 7) // 8
    WIDTH: tl.constexpr = codes.shape[1] * BITS // 8
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], WIDTH, 2]))
        codes = low | high << 4
    lane = tl.arange(0, WIDTH)
    at = block[:, None] * SIZE_BYTES + lane[None, :]
    inside = (lane < SIZE_BYTES)[None, :] & (at < row_bytes)
    tl.store(row + at, codes.to(tl.uint8), inside)


def _size(format: Scheme, inputs: int) -> int:
    """Values in a block."""
    return format.block if type(format.block) is int else inputs


@lru_cache(maxsize=256)
def _rule(format: Scheme) -> str | None:
    """How scales are found and stored, where the kernel knows."""
    fit, plain = format.fit.__name__, format.scale in (torch.float16, torch.float32)
    if format.offset is not None:
        same = format.grid.name.startswith("uint") and format.offset == format.grid
        return "minmax" if fit == "minmax" and plain and same else None
    if format.scale == presets.NVFP4.scale and fit == "absmax":
        return "nested"
    if format.scale == E8M0 and fit == "pow2_floor" and not format.grid.name.startswith("int"):
        return "pow2_floor"
    return "absmax" if fit == "absmax" and plain else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
