"""The blocks that are a Scheme in other bytes: the same numbers, exchanged without rounding.

A block of Q4_0 is 32 integers with a float16 scale, which is what int4-g32 stores too. Only the
places of the bits differ, so such a weight can leave a GGUF file for another container, or come
back, exactly.
"""

from __future__ import annotations

import numpy as np
import torch

from .. import fit, grid
from ..pack import pack, unpack
from ..qtensor import QTensor
from ..scheme import Scheme
from . import fp4, legacy
from .block import BlockFormat

SCHEMES = {
    "q4_0": Scheme(grid.int_grid(4), 32, fit.absmax_signed),
    "q4_1": Scheme(grid.int_grid(4, signed=False), 32, fit.minmax, offset=torch.float16),
    "q5_0": Scheme(grid.int_grid(5), 32, fit.absmax_signed),
    "q5_1": Scheme(grid.int_grid(5, signed=False), 32, fit.minmax, offset=torch.float16),
    "q8_0": Scheme(grid.int_grid(8), 32, fit.absmax),
    "ggml_mxfp4": Scheme(grid.E2M1, 32, fit.pow2_floor, scale=grid.E8M0),
}
BLOCKS = legacy.FORMATS | fp4.FORMATS


def scheme_of(format: object) -> Scheme | None:
    """The Scheme that a block format is, if it is one."""
    return next((scheme for name, scheme in SCHEMES.items() if BLOCKS[name] == format), None)


def block_of(format: object) -> BlockFormat | None:
    """The block format that a Scheme is, if it is one, for rows of whole blocks."""
    return next((BLOCKS[n] for n, scheme in SCHEMES.items() if _same(scheme, format)), None)


def to_scheme(q: QTensor) -> QTensor | None:
    """The same weight as a QTensor of a Scheme, or None if its blocks are no Scheme.

    Raises ValueError for a block of MXFP4 whose scale, 2^128, only ggml knows.
    """
    scheme = scheme_of(q.format)
    if scheme is None:
        return None
    name = next(name for name in SCHEMES if SCHEMES[name] is scheme)
    raw = q.parts["blocks"].cpu().numpy().reshape(-1, q.format.kind.size)
    heads = {"scale": raw[:, :1] if name == "ggml_mxfp4" else raw[:, :2].view("<f2")}
    if scheme.offset is not None:
        heads["offset"] = raw[:, 2:4].view("<f2")
    if scheme.scale is grid.E8M0 and (raw[:, 0] == 255).any():
        raise ValueError(f"{q.format} {list(q.shape)}: a scale of 2^128 has no E8M0 code")
    rows, groups = q.shape[0], q.shape[1] // 32
    parts = {part: torch.from_numpy(x.reshape(rows, groups).copy()) for part, x in heads.items()}
    codes = torch.from_numpy(_codes(name, raw)).view(rows, -1)
    return QTensor(scheme, q.shape, {"codes": pack(codes, scheme.grid.bits), **parts})


def to_blocks(q: QTensor) -> QTensor | None:
    """The same weight as a QTensor of a block format, or None if no block holds what it stores."""
    name = next((name for name, scheme in SCHEMES.items() if _same(scheme, q.format)), None)
    if name is None or q.shape[-1] % 32 or len(q.shape) != 2:
        return None
    block, scheme = BLOCKS[name], SCHEMES[name]
    codes = unpack(q.parts["codes"].cpu(), scheme.grid.bits, q.shape[1]).view(-1, 32)
    raw = np.empty((len(codes), block.kind.size), np.uint8)
    if name == "q8_0":
        raw[:, 2:] = codes.numpy() ^ 128
    elif name == "ggml_mxfp4":
        raw[:, 1:] = codes[:, :16] | codes[:, 16:] << 4
    else:
        legacy.pack_codes(codes.T.float().numpy(), len(scheme.grid.points) - 1, raw)
    for at, part in enumerate(("scale", "offset")[: 1 + (scheme.offset is not None)]):
        stored = q.parts[part].cpu().contiguous().view(-1, 1).view(torch.uint8).numpy()
        raw[:, 2 * at : 2 * at + stored.shape[1]] = stored
    return QTensor(block, q.shape, {"blocks": torch.from_numpy(raw).view(q.shape[0], -1)})


def _same(one: Scheme, other: object) -> bool:
    """Whether two formats differ at most in how their scales were found."""
    return isinstance(other, Scheme) and all(
        getattr(one, field) == getattr(other, field)
        for field in ("grid", "block", "scale", "offset")
    )


def _codes(name: str, raw: np.ndarray) -> np.ndarray:
    """The codes of blocks [blocks, bytes]: uint8 [blocks, 32]."""
    if name == "q8_0":
        return raw[:, 2:] ^ 128
    codes = legacy.nibbles(raw[:, -16:])
    return codes | legacy.fifth_bits(raw[:, -20:-16]) if name.startswith("q5") else codes
