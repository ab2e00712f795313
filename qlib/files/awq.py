"""AWQ files in the "gemm" layout of AutoAWQ, which transformers, vLLM and mlx-lm read.

Of a layer with N outputs, K inputs and groups of g inputs they store, always with 4 bits:

qweight  int32 [K, N / 8]    codes
qzeros   int32 [K / g, N / 8]    zero points
scales   float16 [K / g, N]

value = (code - zero point) * scale. A word holds 8 neighboring outputs, in its nibbles from the
lowest up, in the order 0, 2, 4, 6, 1, 3, 5, 7. Symmetric layers are stored with zero points of 8,
and read back without them if all of a layer are 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..pack import pack, unpack
from ..qtensor import Format, QTensor
from ..scheme import Scheme
from . import gptq, hf
from .integers import is_integer, stream, words
from .stored import Settings, Stored

NAME = "awq"
BITS = 4
# Of the 8 outputs of a word, the one that each nibble holds.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# The same settings under the name that AutoAWQ gives them in a file of its own.
OTHER_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
# AutoAWQ says "version", gptqmodel the others.
LAYOUT_NAMES = ("version", "format", "checkpoint_format")


def refusal(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this format and shape cannot be stored as it is, or None."""
    if not isinstance(format, Scheme) or not is_integer(format) or format.grid.bits != BITS:
        return "it holds int4, symmetric or with integer zero points"
    return gptq.refused_scale(format) or _unpackable(shape, gptq.group_of(format, shape[1]))


def _unpackable(shape: tuple[int, ...], group: int) -> str | None:
    if shape[0] % 8:
        return f"{shape[0]} outputs of 4 bits do not fill int32 words; need a multiple of 8"
    if shape[1] % group:
        return f"{shape[1]} inputs are no multiple of the group {group}"
    return None


def store(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows its name and a dot."""
    return {
        "qweight": interleave(unpack(q.parts["codes"], BITS, q.shape[1]).T),
        "qzeros": interleave(gptq.zero_points(q, q.format)),
        "scales": q.parts["scale"].T.contiguous(),
    }


def interleave(codes: Int[Tensor, "rows out"]) -> Int[Tensor, "rows words"]:
    """Codes of 4 bits in words of 8 outputs."""
    return words(pack(codes.unflatten(1, (-1, 8))[:, :, ORDER].flatten(1), BITS))


def deinterleave(packed: Int[Tensor, "rows words"]) -> Int[Tensor, "rows out"]:
    """The codes that `interleave` packed."""
    codes = unpack(stream(packed), BITS, 8 * packed.shape[1])
    return codes.unflatten(1, (-1, 8))[:, :, torch.tensor(ORDER).argsort()].flatten(1)


def describe(formats: Mapping[str, Format | None]) -> dict[str, Any]:
    """Entries of config.json: the one format of all layers, and the layers that stay dense.

    Raises ValueError if layers differ, and if lm_head is quantized.
    """
    if formats.get("lm_head") is not None:
        remedy = "leave it dense, or use container='compressed-tensors'"
        raise ValueError(f"awq cannot quantize lm_head: {remedy}")
    settings = gptq.shared(NAME, {n: _settings(f) for n, f in formats.items() if f is not None})
    dense = [name for name, format in formats.items() if format is None and name != "lm_head"]
    settings["modules_to_not_convert"] = dense or None
    return {"quantization_config": settings}


def _settings(format: Scheme) -> dict[str, Any]:
    return {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": -1 if format.block == "row" else format.block,
        "zero_point": True,
        "version": "gemm",
    }


def read(stored: Stored, settings: Settings) -> QTensor | None:
    """The weight of one layer, or None if the file holds it dense."""
    if "qweight" not in stored:
        return None
    settings.choice(_name(settings, "bits"), (BITS,))
    settings.choice("zero_point", (True,), True)
    for name in LAYOUT_NAMES:
        settings.choice(name, ("gemm", "GEMM"), "gemm")
    name = _name(settings, "group_size")
    (out, inner), block = stored.shape, gptq.block_of(settings, name)
    group = inner if block == "row" else block
    why = _unpackable(stored.shape, group)
    if why is not None:
        raise stored.error("qweight", why)
    packed = stored.take("qweight", "I32", (inner, out // 8))
    zeros = deinterleave(stored.take("qzeros", "I32", (inner // group, out // 8)))
    scale = stored.take("scales", hf.FLOATS[1:], (inner // group, out))
    gptq.take_empty_bias(stored)
    codes = pack(deinterleave(packed).T.contiguous(), BITS)
    return gptq.assemble(stored.shape, block, codes, scale, zeros, BITS, symmetric=True)


def _name(settings: Settings, name: str) -> str:
    other = OTHER_NAMES[name]
    return other if name not in settings.data and other in settings.data else name
