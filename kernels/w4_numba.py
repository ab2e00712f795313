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

# Up to this many rows of activations, unpacking again for each row costs less than writing the
# weights out once (measured: see `explain` for the rule in words).
GEMV_ROWS = 4
# Weights unpacked at a time: 1 MiB of float32, about one core's second-level cache.
CHUNK_WEIGHTS = 1 << 18

# Sums may be reordered into vector lanes; NaN and infinity keep their meaning.
_compiled = njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True, cache=True)


def matmul(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """`x @ q.dequantize().T` for any integer Scheme of 4 or 8 bits whose blocks fill whole bytes.

    Args:
        x: activations, floating point; the sums are float32.
        q: weight [out, in].
    """
    inputs = x.detach().float()
    run = _by_rows if len(x) <= GEMV_ROWS else _by_chunks
    return run(inputs, *_operands(q)).to(x.dtype)


def _operands(q: QTensor) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """(codes per byte, bytes per block, codes, scale, zero); scale and zero are [out, blocks]."""
    scheme, (out, columns) = q.format, q.shape
    per_byte = 8 // scheme.grid.bits
    scale, zero = scheme.read(q.parts, q.shape)
    low = scheme.grid.min
    zero = torch.full_like(scale, -low) if zero is None else zero - low
    block = scheme.block if type(scheme.block) is int else columns
    tables = (x.expand(out, -1).contiguous().numpy() for x in (scale, zero))
    return per_byte, -(-block // per_byte), q.parts["codes"].contiguous().numpy(), *tables


def _by_rows(x: Tensor, per_byte: int, block_bytes: int, codes, scale, zero) -> Tensor:
    # Codes that share a byte belong to neighboring inputs: deal the inputs out, one plane for each
    # position in the byte, so that the inner loop reads all its operands in order.
    x = torch.nn.functional.pad(x, (0, codes.shape[1] * per_byte - x.shape[1]))
    planes = x.unflatten(1, (-1, per_byte)).transpose(1, 2).contiguous()
    y = torch.empty(len(x), len(codes))
    _gemv(codes, scale, zero, planes.numpy(), block_bytes, y.numpy())
    return y


def _by_chunks(x: Tensor, per_byte: int, block_bytes: int, codes, scale, zero) -> Tensor:
    step = max(16, CHUNK_WEIGHTS // x.shape[1])
    weights = torch.empty(min(step, len(codes)), codes.shape[1] * per_byte)
    y = torch.empty(len(x), len(codes))
    for i in range(0, len(codes), step):
        rows = slice(i, min(i + step, len(codes)))
        chunk = weights[: rows.stop - i]
        _unpack(codes[rows], scale[rows], zero[rows], block_bytes, chunk.numpy())
        y[:, rows] = x @ chunk[:, : x.shape[1]].T
    return y


@_compiled
def _gemv(codes, scale, zero, planes, block_bytes, y):
    """y [rows, out] from codes [out, bytes], scale and zero [out, blocks], planes [rows, per, bytes]."""
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
