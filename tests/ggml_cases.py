"""Weights, importances and the bytes of libgguf (ggml's own C) for the tests of block formats."""

from __future__ import annotations

import libgguf
import numpy as np
import torch

from qlib.ggml import FORMATS

COLUMNS = 512


def weights(rows: int = 4) -> dict[str, np.ndarray]:
    """Tensors [rows, 512] by name: the common, the extreme and the degenerate."""
    rng = np.random.default_rng(0)
    shape = (rows, COLUMNS)
    gauss = rng.standard_normal(shape).astype(np.float32)
    zeros = gauss.copy()
    zeros[0] = 0
    zeros[1, :256] = 0
    zeros[2, 300:310] = -0.0
    # The importance "holes" is zero in the first 40 columns.
    outliers = gauss.copy()
    outliers[:, 7] = 6e4
    exponents = rng.integers(-12, 3, (rows, COLUMNS // 32)).repeat(32, axis=1)
    found = {
        "gauss": gauss,
        "heavy": rng.standard_t(2, shape),
        "constant": np.full(shape, 0.37),
        "minus": np.full(shape, -0.37),
        "zeros": zeros,
        "outliers": outliers,
        "mixed": gauss * 10.0**exponents,
        "ties": rng.integers(-8, 9, shape) / 4,
        "trits": rng.integers(-1, 2, shape),
        "signs": rng.integers(0, 2, shape) * 2 - 1,
        "1e-9": gauss * 1e-9,
        "1e-12": gauss * 1e-12,
        "2e-15": gauss * 2e-15,
        "1e-20": gauss * 1e-20,
        "1e-30": gauss * 1e-30,
        "1e4": gauss * 1e4,
    }
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def importances() -> dict[str, np.ndarray | None]:
    """None, an ordinary importance [512], and one in which whole sub-blocks count for nothing."""
    rng = np.random.default_rng(1)
    usual = np.square(rng.standard_normal(COLUMNS)).astype(np.float32)
    holes = usual.copy()
    holes[:40] = holes[330:370] = 0
    return {"none": None, "usual": usual, "holes": holes}


def oracle(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """libgguf's bytes, uint8 [blocks, size]."""
    kind = FORMATS[name].kind
    raw = np.asarray(libgguf.quantize_rows(x, kind.id, imatrix=importance))
    return raw.view(np.uint8).reshape(-1, kind.size)


def ours(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """This library's bytes, uint8 [blocks, size]."""
    given = None if importance is None else torch.from_numpy(importance)
    q = FORMATS[name].quantize(torch.from_numpy(x), given)
    return q.parts["blocks"].numpy().reshape(-1, FORMATS[name].kind.size)


def differing(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> int:
    """In how many blocks the two differ."""
    unequal = ours(name, x, importance) != oracle(name, x, importance)
    return int(unequal.any(1).sum())


def decoded(name: str, raw: np.ndarray) -> np.ndarray:
    """Our values of blocks uint8 [blocks, size], float32 [blocks, block]."""
    kind = FORMATS[name].kind
    raw = torch.from_numpy(np.ascontiguousarray(raw).reshape(1, -1))
    values = FORMATS[name].decode({"blocks": raw}, (1, raw.numel() // kind.size * kind.block))
    return values.numpy().reshape(-1, kind.block)


def bits(values: np.ndarray) -> np.ndarray:
    """float32 as integers, with every NaN alike."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def refused(name: str, x: np.ndarray) -> str:
    """The message with which `quantize` refuses `x`; empty if it does not."""
    try:
        ours(name, x)
    except ValueError as error:
        return str(error)
    return ""
