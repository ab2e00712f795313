"""Names as data: every named format is one row here, and the grammar of integer names one regex."""

from __future__ import annotations

import difflib
import re

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit, ggml, grid
from .qtensor import Format, QTensor
from .scheme import Scheme

# OCP MX v1.0: 32 elements share one power of two (value = 2^e * element).
MXFP8_E4M3 = Scheme(grid.E4M3, 32, fit.pow2_floor, scale=grid.E8M0)
MXFP8_E5M2 = Scheme(grid.E5M2, 32, fit.pow2_floor, scale=grid.E8M0)
MXFP6_E2M3 = Scheme(grid.E2M3, 32, fit.pow2_floor, scale=grid.E8M0)
MXFP6_E3M2 = Scheme(grid.E3M2, 32, fit.pow2_floor, scale=grid.E8M0)
MXFP4 = Scheme(grid.E2M1, 32, fit.pow2_floor, scale=grid.E8M0)
# NVFP4: 16 elements share an E4M3 scale, and all scales of a tensor one float32:
# the block scales are themselves a tensor quantized to E4M3.
TENSOR_E4M3 = Scheme(grid.E4M3, "tensor", fit.absmax, scale=torch.float32)
NVFP4 = Scheme(grid.E2M1, 16, fit.absmax, scale=TENSOR_E4M3)
# QLoRA (arXiv 2305.14314): quantiles of a Gaussian, one float32 absmax for 64 weights.
NF4 = Scheme(grid.NF4, 64, fit.absmax, scale=torch.float32)
# BitNet b1.58 (arXiv 2402.17764): one absmean scale for a whole matrix, five trits to a byte.
TERNARY = Scheme(grid.TERNARY, "tensor", fit.absmean)
FP8_E4M3 = Scheme(grid.E4M3, "row", fit.absmax, scale=torch.float32)
FP8_E5M2 = Scheme(grid.E5M2, "row", fit.absmax, scale=torch.float32)

NAMED: dict[str, Format] = {
    "nf4": NF4,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "mxfp6_e2m3": MXFP6_E2M3,
    "mxfp6_e3m2": MXFP6_E3M2,
    "mxfp8_e4m3": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
    "ternary": TERNARY,
}
# The block formats of llama.cpp: q4_0, q4_k, iq4_xs, ... as rows of bytes for a GGUF file.
NAMED |= ggml.FORMATS

INTEGER = re.compile(r"int([1-8])(?:-(g[1-9]\d*|row|tensor))?(?:-(sym|asym|offset))?(-mse)?")
EXAMPLES = ["int8", "int8-tensor", "int6-g64", "int4-row", "int4-g128", "int4-g32-asym"]
EXAMPLES += ["int3-g64-asym-mse", "int2-g32-asym", "int4-g64-offset", "int1-g32"]


def format(name: str) -> Format:
    """The format called `name`: int{1..8}[-g{n}|-row|-tensor][-{kind}][-mse], or a named one.

    Without a block an integer name means one scale per row. The kind is sym (the default), a
    float16 scale; asym, also an integer zero point of as many bits as the codes; or offset, a
    float16 scale and a float16 offset: value = code * scale + offset, with codes from 0 up.
    Raises ValueError, with the nearest names, if there is no such format.

    >>> format("int4-g128-asym").nbytes((1, 128))      # 64 codes bytes + 2 scale + 1 zero point
    67
    """
    if name in NAMED:
        return NAMED[name]
    match = INTEGER.fullmatch(name)
    if not match:
        near = difflib.get_close_matches(name, formats(), n=3, cutoff=0.3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown format {name!r}: {hint}qlib.formats() lists the names")
    return _integer(int(match[1]), match[2] or "row", match[3], bool(match[4]))


def _integer(bits: int, block: str, kind: str | None, search: bool) -> Scheme:
    size = int(block[1:]) if block.startswith("g") else block
    if kind in ("asym", "offset"):
        levels = grid.GRIDS[f"uint{bits}"]
        stored = levels if kind == "asym" else torch.float16
        return Scheme(levels, size, fit.minmax_mse if search else fit.minmax, offset=stored)
    # Two signed levels, -1 and +1: the mean magnitude is their best scale, not the largest.
    plain = fit.absmean if bits == 1 else fit.absmax
    return Scheme(grid.GRIDS[f"int{bits}"], size, fit.mse if search else plain)


def formats() -> list[str]:
    """Names that `format` knows: all named formats, and examples of the integer grammar."""
    return [*NAMED, *EXAMPLES]


def quantize(
    weight: Float[Tensor, "*shape"], format: str | Format, importance: Tensor | None = None
) -> QTensor:
    """Quantize one weight by round-to-nearest.

    Args:
        weight: floating point, usually [out, in].
        format: a name (`qlib.formats()`) or any format object.
        importance: weight of each squared error, for formats whose fit searches.

    Raises ValueError for unknown names and for weights that cannot be quantized, TypeError for
    anything that is not a tensor and a format.

    >>> q = quantize(torch.linspace(-1, 1, 64).view(1, 64), "nvfp4")
    >>> q.bits_per_weight, q.dequantize()[0, 0].item()     # 4.5 + one float32 for the tensor
    (5.0, -1.0)
    """
    if not isinstance(weight, Tensor):
        kind = type(weight).__name__
        raise TypeError(f"weight is a {kind}; quantize takes a torch.Tensor (torch.from_numpy)")
    chosen = _lookup(format) if isinstance(format, str) else format
    if not hasattr(chosen, "quantize"):
        raise TypeError(f"format is {chosen!r}; give a name such as 'int4-g128', or a Scheme")
    return chosen.quantize(weight, importance)


# `quantize` has an argument called format, after the public name.
_lookup = format
