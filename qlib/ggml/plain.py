"""F32, F16 and BF16: tensor types without blocks."""

from __future__ import annotations

import numpy as np


def read_f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f4")


def read_f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f2")


def read_bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    # A bfloat16 is the upper half of a float32.
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


READERS = {"F32": read_f32, "F16": read_f16, "BF16": read_bf16}
