"""CPU kernels, compiled by numba, for integer codes of 4 and 8 bits.

A weight of 4 bits is an eighth of the memory traffic of float32, but only if it is unpacked where
it is used. Two functions do that. `_gemv` multiplies straight from the packed bytes: best for a few
rows of activations. `_unpack` writes a few rows of weights as floats, which the matrix product then
finds in the cache: best for many.

Both see a weight as (code - zero) * scale, where code is the unsigned number in the byte.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from qlib.qtensor import QTensor

# Weights unpacked at a time: 1 MiB of float32, about one core's second-level cache.
CHUNK_WEIGHTS = 1 << 18

# Sums may be reordered into vector lanes; NaN and infinity keep their meaning.
_compiled = njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True, cache=True)


def gemv(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """`x @ q.dequantize().T` straight from the bytes; its time grows with every row.

    Args:
        x: activations on the CPU, floating point; the sums are float32.
        q: weight [out, in] of 4- or 8-bit integer codes whose blocks fill whole bytes.
    """
    per_byte, *operands = _operands(q)
    padding = operands[0].shape[1] * per_byte - x.shape[1]
    inputs = torch.nn.functional.pad(x.detach().float(), (0, padding))
    # Codes that share a byte belong to neighboring inputs: deal the inputs out, one plane for each
    # position in the byte, so that the inner loop reads all its operands in order.
    planes = inputs.unflatten(1, (-1, per_byte)).transpose(1, 2).contiguous()
    y = torch.empty(len(x), q.shape[0])
    _gemv(*operands, planes.numpy(), y.numpy())
    return y.to(x.dtype)


def gemm(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """`x @ q.dequantize().T` by torch from rows of the weight that are unpacked a few at a time.

    Arguments as for `gemv`.
    """
    per_byte, codes, scale, zero, block_bytes = _operands(q)
    inputs = x.detach().float()
    step = max(16, CHUNK_WEIGHTS // x.shape[1])
    weights = torch.empty(min(step, len(codes)), codes.shape[1] * per_byte)
    y = torch.empty(len(x), len(codes))
    for start in range(0, len(codes), step):
        rows = slice(start, min(start + step, len(codes)))
        chunk = weights[: rows.stop - start]
        _unpack(codes[rows], scale[rows], zero[rows], block_bytes, chunk.numpy())
        y[:, rows] = inputs @ chunk[:, : x.shape[1]].T
    return y.to(x.dtype)


def _operands(q: QTensor) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, int]:
    """(codes per byte, codes, scale, zero, bytes per block); scale and zero are [out, blocks]."""
    scheme, (out, columns) = q.format, q.shape
    per_byte = 8 // scheme.grid.bits
    scale, zero = scheme.read(q.parts, q.shape)
    low = scheme.grid.min
    zero = torch.full_like(scale, -low) if zero is None else zero - low
    tables = (table.expand(out, -1).contiguous().numpy() for table in (scale, zero))
    block = scheme.block if type(scheme.block) is int else columns
    return per_byte, q.parts["codes"].contiguous().numpy(), *tables, -(-block // per_byte)


@_compiled
def _gemv(codes, scale, zero, block_bytes, planes, y):
    """y [rows, out] from codes [out, bytes], scale, zero [out, blocks], x [rows, per, bytes]."""
    for o in range(len(codes)):
        for r in range(len(planes)):
            total = np.float32(0)
            for b in range(scale.shape[1]):
                at = slice(b * block_bytes, min((b + 1) * block_bytes, codes.shape[1]))
                if planes.shape[1] == 2:
                    part = _dot4(codes[o, at], planes[r, 0, at], planes[r, 1, at], zero[o, b])
                else:
                    part = _dot8(codes[o, at], planes[r, 0, at], zero[o, b])
                total += part * scale[o, b]
            y[r, o] = total


@_compiled
def _dot4(codes, x_low, x_high, zero):
    low, high = np.float32(0), np.float32(0)
    for i in range(len(codes)):
        # The cast to 32 bits matters: numba's integers are 64 bits wide, and fill half the lanes.
        low += (np.float32(np.int32(codes[i] & 15)) - zero) * x_low[i]
        high += (np.float32(np.int32(codes[i] >> 4)) - zero) * x_high[i]
    return low + high


@_compiled
def _dot8(codes, x, zero):
    total = np.float32(0)
    for i in range(len(codes)):
        total += (np.float32(np.int32(codes[i])) - zero) * x[i]
    return total


@_compiled
def _unpack(codes, scale, zero, block_bytes, weights):
    """weights [out, bytes * per] from codes [out, bytes] and scale, zero [out, blocks]."""
    per = weights.shape[1] // codes.shape[1]
    for o in range(len(codes)):
        for b in range(scale.shape[1]):
            start, stop = b * block_bytes, min((b + 1) * block_bytes, codes.shape[1])
            target = weights[o, start * per : stop * per]
            if per == 2:
                _unpack4(codes[o, start:stop], scale[o, b], zero[o, b], target)
            else:
                _unpack8(codes[o, start:stop], scale[o, b], zero[o, b], target)


@_compiled
def _unpack4(codes, scale, zero, weights):
    for i in range(len(codes)):
        weights[2 * i] = (np.float32(np.int32(codes[i] & 15)) - zero) * scale
        weights[2 * i + 1] = (np.float32(np.int32(codes[i] >> 4)) - zero) * scale


@_compiled
def _unpack8(codes, scale, zero, weights):
    for i in range(len(codes)):
        weights[i] = (np.float32(np.int32(codes[i])) - zero) * scale
