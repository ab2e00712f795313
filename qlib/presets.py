"""Names as data: every named format is one row here, and every family of names one regex."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit, ggml, grid
from .double import DoubleQuant
from .qtensor import Format, QTensor
from .scheme import Scheme
from .storage import Divisor

ELEMENTS = {
    "fp8_e4m3": grid.E4M3,
    "fp8_e5m2": grid.E5M2,
    "fp6_e2m3": grid.E2M3,
    "fp6_e3m2": grid.E3M2,
    "fp4": grid.E2M1,
    "int8": grid.MXINT8,
}


def mx(element: str, rule: str | None = None) -> Scheme:
    """OCP MX v1.0: 32 elements share one power of two (value = 2^e * element)."""
    return Scheme(ELEMENTS[element], 32, fit.FITS[f"pow2_{rule or 'floor'}"], scale=grid.E8M0)


def nvfp4(rule: str | None = None, reciprocal: str | None = None) -> Scheme:
    """NVFP4: 16 elements share an E4M3 scale; all scales of a tensor share a float32 one."""
    fits = {None: fit.absmax, "mse": fit.mse, "4over6": fit.four_over_six}
    # Scales in units of a power of two keep four significant bits, which that fit counts on.
    outer = fit.pow2_rceil if rule == "4over6" else fit.absmax
    kept = Divisor(torch.float32) if reciprocal else torch.float32
    return Scheme(grid.E2M1, 16, fits[rule], scale=Scheme(grid.E4M3, "tensor", outer, scale=kept))


def _blockwise(points: grid.Grid, size: str | None, double: str | None) -> Scheme:
    """QLoRA (arXiv 2305.14314): one float32 absmax for 64 weights, or that in 8 bits and a bit."""
    scale = DoubleQuant() if double else torch.float32
    return Scheme(points, int(size or 64), fit.absmax, scale=scale)


def fp8(element: str, block: str | None = None) -> Scheme:
    """E4M3 or E5M2 with a float32 scale for a row (the default), the tensor or a group."""
    return Scheme(grid.GRIDS[element], _block(block), fit.absmax, scale=torch.float32)


def _block(name: str | None) -> int | str:
    return int(name[1:]) if (name or "row").startswith("g") else name or "row"


def _mlx(bits: str, size: str | None) -> Scheme:
    levels = grid.GRIDS[f"uint{bits}"]
    return Scheme(levels, int(size or 64), fit.zero_anchored, offset=torch.float16)


MXFP8_E4M3, MXFP8_E5M2 = mx("fp8_e4m3"), mx("fp8_e5m2")
MXFP6_E2M3, MXFP6_E3M2 = mx("fp6_e2m3"), mx("fp6_e3m2")
MXFP4, MXINT8 = mx("fp4"), mx("int8")
NVFP4, NVFP4_RECIPROCAL = nvfp4(), nvfp4(reciprocal="-reciprocal")
NF4 = _blockwise(grid.NF4, None, None)
NF4_DQ = _blockwise(grid.NF4, None, "-dq")
FP4_BNB = _blockwise(grid.BNB_FP4, None, None)
# BitNet b1.58 (arXiv 2402.17764): one absmean scale for a whole matrix, five trits to a byte.
TERNARY = Scheme(grid.TERNARY, "tensor", fit.absmean)


NAMED: dict[str, Format] = {
    "nf4": NF4,
    "nf4-dq": NF4_DQ,
    "fp4_bnb": FP4_BNB,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "nvfp4-reciprocal": NVFP4_RECIPROCAL,
    "mxfp6_e2m3": MXFP6_E2M3,
    "mxfp6_e3m2": MXFP6_E3M2,
    "mxfp8_e4m3": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "mxint8": MXINT8,
    "fp8_e4m3": fp8("e4m3"),
    "fp8_e5m2": fp8("e5m2"),
    "ternary": TERNARY,
}
# The block formats of llama.cpp: q4_0, q4_k, iq4_xs, ... as rows of bytes for a GGUF file.
NAMED |= ggml.FORMATS


def _integer(bits: str, block: str | None, kind: str | None, search: str | None) -> Scheme:
    size = _block(block)
    if kind in ("asym", "offset"):
        levels = grid.GRIDS[f"uint{bits}"]
        stored = levels if kind == "asym" else torch.float16
        return Scheme(levels, size, fit.minmax_mse if search else fit.minmax, offset=stored)
    # Two signed levels, -1 and +1: the mean magnitude is their best scale, not the largest.
    plain = fit.absmean if bits == "1" else fit.absmax
    return Scheme(grid.GRIDS[f"int{bits}"], size, fit.mse if search else plain)


# Every family of names: a pattern, and what makes a format of the pattern's groups.
SIZE = r"(?:-g([1-9]\d*))?"
FAMILIES: dict[str, Callable[..., Scheme]] = {
    r"int([1-8])(?:-(g[1-9]\d*|row|tensor))?(?:-(sym|asym|offset))?(-mse)?": _integer,
    rf"mx({'|'.join(ELEMENTS)})(?:-(floor|ceil|even|rceil|mse))?": mx,
    r"nvfp4(?:-(mse|4over6))?(-reciprocal)?": nvfp4,
    r"fp8_(e4m3|e5m2)(?:-(g[1-9]\d*|row|tensor))?": fp8,
    rf"nf([2-8]){SIZE}(-dq)?": lambda bits, *rest: _blockwise(grid.GRIDS[f"nf{bits}"], *rest),
    rf"fp4_bnb{SIZE}(-dq)?": lambda *rest: _blockwise(grid.BNB_FP4, *rest),
    rf"lloyd([2-8]){SIZE}": lambda bits, size: Scheme(
        grid.GRIDS[f"lloyd{bits}"], int(size or 64), fit.rms
    ),
    r"mlx([234568])(?:-g(32|64|128))?": _mlx,
}
EXAMPLES = ["int8", "int8-tensor", "int6-g64", "int4-row", "int4-g128", "int4-g32-asym"]
EXAMPLES += ["int3-g64-asym-mse", "int2-g32-asym", "int4-g64-offset", "int1-g32"]
EXAMPLES += ["mxfp4-mse", "mxfp8_e4m3-rceil", "nvfp4-4over6", "nvfp4-mse-reciprocal"]
EXAMPLES += ["fp8_e4m3-tensor", "nf3", "nf4-g128-dq", "lloyd4", "lloyd2-g128", "mlx4", "mlx3-g32"]


# What a message says last. A recipe is of a whole model: weights and activations.
WHERE = "qlib.formats() lists the names, qlib.recipes() those for models"


def format(name: str) -> Format:
    """The format called `name`: one of these patterns, or another name in `qlib.formats()`.

    - int{1..8}[-g{n}|-row|-tensor][-{kind}][-mse]: integers. Without a block one scale per row. The
      kind is sym (the default), a float16 scale; asym, also an integer zero point of as many bits
      as the codes; or offset, a float16 scale and a float16 offset: value = code * scale + offset,
      with codes from 0 up.
    - mx{fp8_e4m3|fp8_e5m2|fp6_e2m3|fp6_e3m2|fp4|int8}[-{rule}]: OCP MX; the rule for the exponent
      is floor (the default), ceil, even, rceil or mse.
    - nvfp4[-mse|-4over6][-reciprocal]: NVFP4, and how its block scale is found; reciprocal is
      compressed-tensors' way to store the scale of the tensor.
    - fp8_{e4m3|e5m2}[-g{n}|-row|-tensor]: FP8 with a float32 scale, of a row without a block.
    - nf{2..8}[-g{n}][-dq], fp4_bnb[-g{n}][-dq]: bitsandbytes' tables; blocks of 64 without a size,
      a float32 absmax, with dq in 8 bits (double quantization).
    - lloyd{2..8}[-g{n}]: the best levels for a Gaussian; blocks of 64 without a size, one float16
      root mean square each.
    - mlx{2|3|4|5|6|8}[-g{32|64|128}]: MLX's affine formats, groups of 64 without a size; scale and
      bias are float16 (MLX takes the dtype of the weight).

    -mse is a search for the least squared error. Raises ValueError, with the nearest names, if
    there is no such format.

    >>> format("int4-g128-asym").nbytes((1, 128))      # 64 codes bytes + 2 scale + 1 zero point
    67
    >>> str(format("mxfp4-rceil"))
    'e2m1, block 32, pow2_rceil, scale e8m0'
    """
    if name in NAMED:
        return NAMED[name]
    for pattern, make in FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            return make(*match.groups())
    near = difflib.get_close_matches(name.lower(), formats(), n=3, cutoff=0.3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ValueError(f"unknown format {name!r}: {hint}{WHERE}")


def formats() -> list[str]:
    """Names that `format` knows: all named formats, and examples of each pattern."""
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
        takes = "quantize takes a torch.Tensor (torch.from_numpy), quantize_model a model"
        raise TypeError(f"weight is a {type(weight).__name__}; {takes}")
    chosen = _lookup(format) if isinstance(format, str) else format
    if not hasattr(chosen, "quantize"):
        raise TypeError(f"format is {chosen!r}; give a name such as 'int4-g128', or a Scheme")
    return chosen.quantize(weight, importance)


# `quantize` has an argument called format, after the public name.
_lookup = format
