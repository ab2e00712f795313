"""Activations and weights both in microscaling formats: the product of the codes themselves.

`tl.dot_scaled` takes tiles of 4- and 8-bit floats as they are stored, two FP4 codes to a byte along
the inputs, the lower half first, and the bytes of their block scales. Nothing is unpacked where the
GPU has an instruction with block scales. Triton 3.7.1 compiles, for compute capability

    10.0   any two of e2m1, e4m3, e5m2 in blocks of 32, and NVFP4: tcgen05.mma ... block_scale
    12.0   two of 4 bits, two of 8 bits, and NVFP4: mma.sync ... block_scale; it converts 4 bits
           times 8 bits to bfloat16 first
    8.0    on the older GPUs it converts all to bfloat16, which holds each product of code and scale
           exactly, except that a scale of 2^-127 becomes zero; E4M3 needs 8.9

NVFP4's third level, one float32 for the tensor, is the same for all products of a sum, so it
multiplies the sum. `product` serves activations of 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qlib.qtensor import QTensor
from qlib.scheme import Scheme

from .launch import Launch
from .minifloat import FORMATS, kind

# The number of weights that share a scale, for each way that the GPU reads scales.
BLOCKS = {"e8m0": 32, "e4m3": 16, "e4m3 over": 16}


def why_not(x: QTensor, w: QTensor, capability: int) -> str | None:
    """Why `scaled_product` cannot run, or None if it can.

    Args:
        x: activations [rows, in]; w: weight [out, in].
        capability: compute capability times ten, 75 to 120.
    """
    for name, q in (("x", x), ("w", w)):
        if not _is_microscaling(q):
            return f"{name} is not mxfp4, mxfp8 or nvfp4"
    if (_block(x) == 16) != (_block(w) == 16):
        return "only one of x and w is nvfp4"
    if capability < 80:
        return "Triton's product of scaled tiles needs cc 8.0"
    if _block(x) == 16 and capability < 100:
        return "Triton has no product of two nvfp4 tensors before cc 10.0"
    if capability < 89 and "e4m3" in (x.format.grid.name, w.format.grid.name):
        return "Triton has no e4m3 before cc 8.9"
    return None


def _is_microscaling(q: QTensor) -> bool:
    if not isinstance(q.format, Scheme) or q.format.grid.name not in FORMATS:
        return False
    scheme, scale = q.format, kind(q.format.scale)
    if not scheme.is_standard or scheme.offset is not None or scale not in BLOCKS:
        return False
    return scheme.block == BLOCKS[scale] and (scale == "e8m0" or scheme.grid.bits == 4)


def _block(q: QTensor) -> int:
    return q.format.block


def native(x: QTensor, w: QTensor, capability: int) -> bool:
    """Whether Triton finds an instruction with block scales for what `why_not` lets through."""
    same = x.format.grid.bits == w.format.grid.bits
    return 100 <= capability < 120 or (capability >= 120 and same)


def scaled_product(x: QTensor, w: QTensor, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    """`x.dequantize() @ w.dequantize().T`, summed in float32.

    Args:
        x: activations [rows, in]; w: weight [out, in], on the same GPU.
        dtype: of the result.

    Raises ValueError if the inner sizes differ, and for what `why_not` names.
    """
    major, minor = torch.cuda.get_device_capability(x.parts["codes"].device)
    capability = 10 * major + minor
    if reason := why_not(x, w, capability):
        raise ValueError(f"scaled_product: {reason}; dequantize x and take `product`")
    launched, y = launch(x, w, capability, dtype)
    launched.run()
    return y


def launch(
    x: QTensor, w: QTensor, capability: int, dtype: torch.dtype = torch.float32, **tiles: int
) -> tuple[Launch, Tensor]:
    """(how the product runs, the [rows, out] that it will write); `tiles` replaces a choice."""
    (rows, inputs), (outputs, inner) = x.shape, w.shape
    if inputs != inner:
        raise ValueError(f"scaled_product: x has {inputs} inputs, the weight {inner}")
    tiles = _tiles(rows, native(x, w, capability)) | tiles
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    y = torch.empty(rows, outputs, dtype=dtype, device=x.parts["codes"].device)
    grid = (triton.cdiv(outputs, tiles["BLOCK_N"]), triton.cdiv(rows, tiles["BLOCK_M"]))
    args = (_parts(x), _parts(w), y, rows, outputs, inputs)
    stored = {"X": x.format.grid.name, "W": w.format.grid.name, "BLOCK": _block(x)}
    tensor = {"X_SCALE": kind(x.format.scale), "W_SCALE": kind(w.format.scale)}
    return Launch(scaled_kernel, grid, args, stored | tensor | tiles, options), y


def _tiles(rows: int, native: bool) -> dict[str, int]:
    """128 outputs are what the instruction of cc 10.0 takes; converted tiles have to fit into
    registers."""
    most, outputs, warps = (128, 128, 8) if native else (32, 64, 4)
    block = min(most, max(16, triton.next_power_of_2(rows)))
    sides = {"BLOCK_M": block, "BLOCK_N": outputs, "BLOCK_K": 128}
    return sides | {"num_warps": warps, "num_stages": 3}


def _parts(q: QTensor) -> tuple:
    """Stored tensors of `q`, and how many bytes of codes and of scales a row has."""
    nested = "scale.codes" in q.parts
    names = ("codes", "scale.codes", "scale.scale") if nested else ("codes", "scale", "scale")
    parts = [q.parts[name].contiguous() for name in names]
    return (*parts, parts[0].shape[1], parts[1].shape[1])


@triton.jit
def scaled_kernel(
    x, w, y, rows, outputs, inputs,
    X: tl.constexpr, W: tl.constexpr, X_SCALE: tl.constexpr, W_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Outputs stand on the left, the side of which the instructions ask more.
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, inputs, BLOCK_K):
        left, left_scale = _tile(w, n, outputs, k, W, BLOCK, BLOCK_K)
        right, right_scale = _tile(x, m, rows, k, X, BLOCK, BLOCK_K)
        total = tl.dot_scaled(left, left_scale, W, tl.trans(right), right_scale, X, total)
    total = _times(_times(total, w[2], W_SCALE), x[2], X_SCALE)
    at = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    total = total.to(y.dtype.element_ty)
    tl.store(at, total, (m < rows)[None, :] & (n < outputs)[:, None])


@triton.jit
def _tile(parts, n, many, k, NAME: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of codes and of scales of the rows `n` and the inputs k, ..., k + BLOCK_K - 1."""
    PER_BYTE: tl.constexpr = 2 if NAME == "e2m1" else 1
    scale = _bytes(parts[1], n, many, k // BLOCK, parts[4], BLOCK_K // BLOCK)
    if BLOCK == 16:
        scale = scale.to(tl.float8e4nv, bitcast=True)
    return _bytes(parts[0], n, many, k // PER_BYTE, parts[3], BLOCK_K // PER_BYTE), scale


@triton.jit
def _bytes(stored, n, many, first, row_bytes, COUNT: tl.constexpr):
    j = first + tl.arange(0, COUNT)
    inside = (n < many)[:, None] & (j < row_bytes)[None, :]
    return tl.load(stored + n.to(tl.int64)[:, None] * row_bytes + j[None, :], inside, other=0)


@triton.jit
def _times(total, scale, KIND: tl.constexpr):
    """`total` times the float that all block scales of a tensor are in units of, if there is."""
    if KIND == "e4m3":
        total *= tl.load(scale).to(tl.float32)
    elif KIND == "e4m3 over":
        total = tl.div_rn(total, tl.load(scale).to(tl.float32))
    return total
