"""MXFP4 and NVFP4 as ggml stores them: E2M1 codes, and one byte for the scale of 32 or 16.

MXFP4  e qs     2^(e - 127) E2M1[q]      32 weights
NVFP4  s qs     E4M3(s) E2M1[q]          64 weights, a byte of s for every 16

Byte j of qs holds the codes of the values j (low nibble) and j + 16, or within the 16 of NVFP4
j and j + 8. Bit 3 of a code is the sign. NVFP4 here has no scale of the whole tensor.

Both round otherwise than the formats "mxfp4" and "nvfp4" of this library, which follow the OCP
and NVIDIA: ggml breaks ties toward zero.
"""

from __future__ import annotations

import numpy as np

from .block import TYPES, BlockFormat
from .legacy import nibbles

# E2M1 doubled, so that all values are whole; scales are halved to make up for it.
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
BOUNDS = (DOUBLED[:7] + DOUBLED[1:8]) / np.float32(2)


def _half_e4m3() -> np.ndarray:
    """Half of what each byte means as E4M3 without a sign; 0x7F, which is NaN, means 0 to ggml."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(byte == 127, 0, value / 2).astype(np.float32)


HALF_E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)
HALF_E4M3 = _half_e4m3()


def _codes(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The code of the value nearest to `x`, of two equally near the one of smaller magnitude.

    Args:
        x: float32 [blocks, n].
        scale: half scales of the blocks, float32 [blocks, 1]; where it is 0 all codes are 0.
    """
    size = np.abs(x)
    codes = np.zeros(x.shape, np.uint8)
    # Few digits of a scale are not 0, so that its products with the bounds are exact.
    for bound in np.where(scale == 0, np.float32(np.inf), scale) * BOUNDS[:, None, None]:
        codes += size > bound
    codes |= ((x < 0) & (codes > 0)).view(np.uint8) << 3
    return codes


def _pack(codes: np.ndarray) -> np.ndarray:
    """Codes [blocks, n] -> uint8 [blocks, n / 2]."""
    n = codes.shape[1] // 2
    return codes[:, :n] | codes[:, n:] << 4


def write_ggml_mxfp4(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """e = floor(log2(max |x|)) - 2, biased by 127. An importance changes nothing.

    As in ggml, e wraps round below 2^-125, and such a block decodes to zeros.
    """
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    # ggml takes the logarithm in float32, where it can round up to the next whole number.
    exponent = np.floor(np.log2(largest, dtype=np.float64).astype(np.float32))
    e = np.where(largest > 0, exponent + 125, 0).astype(np.int32).astype(np.uint8)
    qs = _pack(_codes(blocks, HALF_E8M0[e]))
    return np.concatenate((e, qs), axis=1).reshape(len(x), -1)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The byte of ggml's unsigned E4M3 nearest to `x` >= 0, ties up; from 248 on it is 448.

    E4M3 reaches 448 in steps of 32, but ggml's conversion takes the upper exponent for full.
    """
    bits = x.view(np.uint32)
    normal = (bits + (1 << 19) >> 20).astype(np.int64) - (127 - 7 << 3)
    subnormal = np.minimum(x * np.float32(512) + np.float32(0.5), 7).astype(np.int64)
    exponent = bits >> 23
    byte = np.where(exponent <= 127 - 7, subnormal, np.where(normal >= 15 << 3, 126, normal))
    return byte.astype(np.uint8)


def write_ggml_nvfp4(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """s = max |x| / 6 as E4M3. An importance changes nothing."""
    blocks = x.reshape(-1, 16)
    s = to_e4m3(np.abs(blocks).max(1, keepdims=True) / np.float32(6))
    qs = _pack(_codes(blocks, HALF_E4M3[s]))
    return np.concatenate((s.reshape(-1, 4), qs.reshape(-1, 32)), axis=1).reshape(len(x), -1)


def read_ggml_mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(DOUBLED[nibbles(blocks[:, 1:])], HALF_E8M0[blocks[:, :1]], out=out)


def read_ggml_nvfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    values = DOUBLED[nibbles(blocks[:, 4:].reshape(-1, 8))]
    np.multiply(values, HALF_E4M3[blocks[:, :4].reshape(-1, 1)], out=out.reshape(-1, 16))


FORMATS = {
    "ggml_mxfp4": BlockFormat(TYPES["MXFP4"], write_ggml_mxfp4, read_ggml_mxfp4),
    "ggml_nvfp4": BlockFormat(TYPES["NVFP4"], write_ggml_nvfp4, read_ggml_nvfp4),
}
