"""MLX, the container of Apple's mlx_lm.

Of a layer it stores, with N outputs, K inputs and groups of g inputs:

affine                 weight uint32 [N, K b / 32], scales and biases float [N, K / g];
                       value = code * scale + bias
mxfp4                  weight uint32 [N, K / 8] of E2M1, scales E8M0 [N, K / 32]
mxfp8                  weight uint32 [N, K / 4] of E4M3, scales E8M0 [N, K / 32]
nvfp4                  weight uint32 [N, K / 8] of E2M1, scales E4M3 [N, K / 16]

Codes are one little-endian bit stream along K, as ours are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import fit, grid
from ..presets import MXFP4, MXFP8_E4M3
from ..qtensor import Format, QTensor
from ..scheme import Scheme
from .stored import Settings, Stored

NAME = "mlx"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = ("F16", "BF16", "F32")
# MLX's linear layers have no scale for the whole tensor.
NVFP4 = Scheme(grid.E2M1, 16, fit.absmax, scale=grid.E4M3)
MODES = {"mxfp4": MXFP4, "mxfp8": MXFP8_E4M3, "nvfp4": NVFP4}


def mode_of(format: Format) -> str | None:
    """The name of the mode that holds `format`, if one does."""
    if not isinstance(format, Scheme):
        return None
    for name, mode in MODES.items():
        if format.offset is None and _key(format) == _key(mode):
            return name
    fits = format.grid.bits in BITS and format.block in GROUPS
    return "affine" if fits and _is_affine(format) else None


def _key(scheme: Scheme) -> tuple[Any, ...]:
    return scheme.grid, scheme.block, scheme.scale


def _is_affine(format: Scheme) -> bool:
    bits = format.grid.bits
    if format.offset is None:
        # Only 16 bits leave room in float32 for a code times a scale.
        return format.grid == grid.int_grid(bits) and format.scale in HALVES
    same = format.offset == format.scale and format.scale in (*HALVES, torch.float32)
    return format.grid == grid.int_grid(bits, signed=False) and same


def refusal(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this format and shape cannot be stored as it is, or None."""
    if mode_of(format) is None:
        if isinstance(format, Scheme) and (format.grid, format.block) == (grid.E2M1, 16):
            return "its nvfp4 has no global scale; quantize by qlib.files.mlx.NVFP4"
        kinds = "integers (scale of 16 bits) or scale and offset of one dtype"
        return f"it has {kinds} in 2, 3, 4, 5, 6, 8 bits by 32, 64, 128; MXFP4, MXFP8, NVFP4"
    if shape[1] % format.block:
        return f"{shape[1]} inputs are no multiple of the group {format.block}"
    return None


def store(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows its name and a dot.

    Symmetric integers are stored with a bias of so many scales as the code of zero says, which is
    exact. Raises ValueError if that overflows.
    """
    scale = q.parts["scale"]
    stored = {"weight": q.parts["codes"].view(torch.uint32), "scales": scale}
    if mode_of(q.format) != "affine":
        return stored
    if q.format.offset is not None:
        return stored | {"biases": q.parts["offset"]}
    bias = scale * q.format.grid.min
    if not bool(bias.isfinite().all()):
        worst, dtype = scale.abs().max().item(), str(scale.dtype).removeprefix("torch.")
        message = f"{-q.format.grid.min:.0f} times a scale of {worst:.3g} overflows {dtype}"
        raise ValueError(f"{q.format} {list(q.shape)}: {message}; store scales as bfloat16")
    return stored | {"biases": bias}


def describe(formats: Mapping[str, Format | None]) -> dict[str, Any]:
    """Entries of config.json: the most frequent format for all, the others by name."""
    entries = {name: format and _entry(format) for name, format in formats.items()}
    counts = Counter(tuple(entry.items()) for entry in entries.values() if entry)
    usual = dict(counts.most_common(1)[0][0]) if counts else {"group_size": 64, "bits": 4}
    others = {name: entry or False for name, entry in entries.items() if entry != usual}
    settings = {**usual, **others}
    return {"quantization": settings, "quantization_config": settings}


def _entry(format: Scheme) -> dict[str, Any]:
    return {"group_size": format.block, "bits": format.grid.bits, "mode": mode_of(format)}


def read(stored: Stored, settings: Settings) -> QTensor | None:
    """The weight of one layer, or None if the file holds it dense."""
    if "scales" not in stored:
        return None
    own = settings.data.get(stored.name, True)
    if own is False:
        raise settings.error(stored.name, "is false, but the layer has scales")
    chosen = settings if own is True else settings.object(stored.name)
    mode = chosen.choice("mode", ("affine", *MODES), "affine")
    return _read_affine(stored, chosen) if mode == "affine" else _read_mode(stored, chosen, mode)


def _read_affine(stored: Stored, settings: Settings) -> QTensor:
    block = settings.choice("group_size", GROUPS, 64)
    bits = settings.choice("bits", BITS, 4)
    codes, shape = _codes(stored, settings, block, bits)
    scale = stored.take("scales", FLOATS, shape)
    offset = stored.take("biases", stored.dtype("scales"), shape)
    levels = grid.int_grid(bits, signed=False)
    format = Scheme(levels, block, fit.zero_anchored, scale.dtype, offset=scale.dtype)
    return QTensor(format, stored.shape, {"codes": codes, "scale": scale, "offset": offset})


def _read_mode(stored: Stored, settings: Settings, mode: str) -> QTensor:
    format = MODES[mode]
    block = settings.choice("group_size", (format.block,), format.block)
    bits = settings.choice("bits", (format.grid.bits,), format.grid.bits)
    codes, shape = _codes(stored, settings, block, bits)
    return QTensor(
        format, stored.shape, {"codes": codes, "scale": stored.take("scales", "U8", shape)}
    )


def _codes(stored: Stored, settings: Settings, block: int, bits: int):
    """Packed codes, and the shape [N, K / g] of scales."""
    out, inner = stored.shape
    if inner % block:
        raise settings.error("group_size", f"is {block}, which does not divide {inner} inputs")
    words = stored.take("weight", "U32", (out, inner * bits // 32))
    return words.contiguous().view(torch.uint8), (out, inner // block)
