"""The experts of gpt-oss: MXFP4 weights [experts, out, in] as two tensors of bytes each.

`<name>_blocks` uint8 [E, out, K / 32, 16] holds E2M1 codes, the first of two in the low half of a
byte; `<name>_scales` uint8 [E, out, K / 32] holds exponents plus 127. These are the bytes of our
own MXFP4, so nothing moves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import grid
from ..errors import FormatError
from ..presets import MXFP4
from ..qtensor import QTensor
from ..scheme import Scheme
from .atomic import replacing

BLOCK = MXFP4.block
# The exponent that E8M0 keeps for NaN.
NAN = 255


def read(path: str | os.PathLike, name: str) -> QTensor:
    """One weight of a safetensors file.

    Args:
        path: of the file.
        name: of the weight, such as "model.layers.0.mlp.experts.down_proj".

    Returns a QTensor of shape [E, out, K]; transformers' loader gives its transpose [E, K, out].
    Raises FormatError if a tensor is missing, of another dtype or shape, or holds a NaN scale.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(path, "file", "this file is missing")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(path, "header", str(error)) from error
    with file:
        scales = _take(path, file, f"{name}_scales", None, "[experts, out, in / 32]")
        need = [*scales.shape, BLOCK // 2]
        blocks = _take(path, file, f"{name}_blocks", need, str(need))
    if bool((scales == NAN).any()):
        raise FormatError(path, f"{name}_scales", f"holds a scale {NAN}, which stands for NaN")
    experts, out, groups = scales.shape
    parts = {"codes": blocks.reshape(experts * out, -1), "scale": scales.view(-1, groups)}
    return QTensor(MXFP4, (experts, out, groups * BLOCK), parts)


def _take(path: Path, file, key: str, shape: list[int] | None, need: str) -> torch.Tensor:
    if key not in file.keys():  # noqa: SIM118
        raise FormatError(path, key, "this tensor is missing")
    view = file.get_slice(key)
    found = view.get_shape()
    fits = found == shape if shape else len(found) == 3 and 0 not in found
    if view.get_dtype() != "U8" or not fits:
        raise FormatError(path, key, f"is {view.get_dtype()} {found}; need U8 {need}")
    return file.get_tensor(key)


def write(path: str | os.PathLike, weights: Mapping[str, QTensor]) -> None:
    """Write weights [E, out, K] of MXFP4 to one safetensors file, atomically, by their names.

    Raises ValueError for another format or shape, before anything is written.
    """
    tensors = {}
    for name, q in weights.items():
        _check(name, q)
        experts, out, inner = q.shape
        tensors[f"{name}_blocks"] = q.parts["codes"].view(experts, out, inner // BLOCK, -1)
        tensors[f"{name}_scales"] = q.parts["scale"].view(experts, out, -1)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _check(name: str, q: QTensor) -> None:
    format = q.format
    plain = isinstance(format, Scheme) and format.offset is None
    if not plain or (format.grid, format.block, format.scale) != (grid.E2M1, BLOCK, grid.E8M0):
        raise ValueError(f"{name} {list(q.shape)}: is {format}; gpt-oss stores mxfp4")
    if len(q.shape) != 3 or q.shape[2] % BLOCK:
        message = f"need [experts, out, in] with in a multiple of {BLOCK}"
        raise ValueError(f"{name} {list(q.shape)}: {message}")
