"""GPTQ files, which gptqmodel and AutoGPTQ write and transformers and vLLM read.

Of a layer with N outputs, K inputs and groups of g inputs they store, for b = 2, 3, 4 or 8 bits:

qweight  int32 [K b / 32, N]    codes, one little-endian bit stream down each column
qzeros   int32 [K / g, N b / 32]    zero points, one such stream along each row
scales   float16 [K / g, N]
g_idx    int32 [K]    the group of each input: in order, unless "desc_act" says otherwise

value = (code - zero point) * scale. Symmetric layers have zero points too, all 2^(b-1).

The checkpoint_format "gptq" stores zero points minus one, modulo 2^b; "gptq_v2" as they are. Both
are read. Symmetric layers are written as "gptq", which every reader knows, and the others as
"gptq_v2": readers that add the one back to a whole word carry a zero point of 0 into its neighbor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .. import fit, grid
from ..pack import pack, unpack
from ..qtensor import Format, QTensor
from ..reordered import Reordered
from ..scheme import Scheme
from . import hf
from .integers import is_integer, stream, words
from .stored import Settings, Stored

NAME = "gptq"
BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
MAX_GROUP = 1 << 20
# Other values per layer, other orders of the codes, rotated weights: other meanings of a weight.
UNKNOWN = ("dynamic", "is_marlin_format", "rotation", "adapter")


def refusal(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this format and shape cannot be stored as it is, or None."""
    scheme = _scheme(format)
    if scheme is None or scheme.grid.bits not in BITS:
        return "it holds int2, int3, int4 and int8, symmetric or with integer zero points"
    return refused_scale(scheme) or _unpackable(scheme.grid.bits, shape)


def _scheme(format: Format) -> Scheme | None:
    scheme = format.scheme if isinstance(format, Reordered) else format
    return scheme if isinstance(scheme, Scheme) and is_integer(scheme) else None


def refused_scale(scheme: Scheme) -> str | None:
    """Why GPTQ and AWQ files cannot hold the scales, or None."""
    if scheme.scale != torch.float16:
        return "its scales are float16"
    if scheme.block == "tensor":
        return "its scales belong to rows or groups, not to a whole weight"
    return None


def _unpackable(bits: int, shape: tuple[int, ...]) -> str | None:
    for size, what in zip(shape, ("outputs", "inputs")):
        if size * bits % 32:
            need = 32 // math.gcd(32, bits)
            return (
                f"{size} {what} of {bits} bits do not fill int32 words; need a multiple of {need}"
            )
    return None


def store(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows its name and a dot."""
    scheme, codes, inner = _scheme(q.format), q.parts["codes"], q.shape[1]
    bits = scheme.grid.bits
    g_idx = torch.arange(inner, device=codes.device) // group_of(scheme, inner)
    if isinstance(q.format, Reordered):
        undo = q.parts["order"][0].long().argsort()
        codes, g_idx = pack(unpack(codes, bits, inner)[:, undo], bits), g_idx[undo]
    return {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words(pack(_stored_zeros(q, scheme), bits)),
        "scales": q.parts["scale"].T.contiguous(),
        "g_idx": g_idx.int(),
    }


def _stored_zeros(q: QTensor, scheme: Scheme) -> Int[Tensor, "groups out"]:
    zeros = zero_points(q, scheme)
    return zeros - 1 if scheme.offset is None else zeros


def zero_points(q: QTensor, scheme: Scheme) -> Int[Tensor, "groups out"]:
    """The zero point of every group, also where the format has none."""
    scale, bits = q.parts["scale"], scheme.grid.bits
    if scheme.offset is None:
        return torch.full_like(scale.T, 1 << bits - 1, dtype=torch.uint8)
    return unpack(q.parts["zero_point"], bits, scale.shape[1]).T


def group_of(scheme: Scheme, inner: int) -> int:
    """The inputs that share a scale."""
    return inner if scheme.block == "row" else scheme.block


def describe(formats: Mapping[str, Format | None]) -> dict[str, Any]:
    """Entries of config.json: the one format of all layers.

    Raises ValueError if layers differ, and unless lm_head and nothing else is dense.
    """
    if formats.get("lm_head") is not None:
        remedy = "leave it dense, or use container='compressed-tensors'"
        raise ValueError(f"gptq cannot quantize lm_head: {remedy}")
    dense = [name for name, format in formats.items() if format is None and name != "lm_head"]
    if dense:
        remedy = "container='compressed-tensors' or 'awq'"
        raise ValueError(f"gptq cannot leave {dense[0]} dense: quantize it, or use {remedy}")
    settings = shared(NAME, {n: _settings(f) for n, f in formats.items() if f is not None})
    settings["desc_act"] = any(isinstance(format, Reordered) for format in formats.values())
    return {"quantization_config": settings}


def shared(container: str, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings that every layer has. Raises ValueError, naming two layers that differ."""
    if not settings:
        raise ValueError(f"{container}: no layer is quantized; save a dense model with qlib.save")
    first = next(iter(settings))
    for name, other in settings.items():
        differ = [key for key in other if other[key] != settings[first][key]]
        if differ:
            mine, its = (f"{n} has {differ[0]} {s[differ[0]]}"
                         for n, s in ((first, settings[first]), (name, other)))  # fmt: skip
            remedy = "quantize them alike, or use container='compressed-tensors'"
            raise ValueError(f"{container} has one format for all layers: {mine}, {its}; {remedy}")
    return settings[first]


def _settings(format: Format) -> dict[str, Any]:
    scheme = _scheme(format)
    return {
        "quant_method": NAME,
        "bits": scheme.grid.bits,
        "group_size": -1 if scheme.block == "row" else scheme.block,
        "sym": scheme.offset is None,
        # Readers know the version by one of these names or by the other.
        "checkpoint_format": V1 if scheme.offset is None else V2,
        "format": V1 if scheme.offset is None else V2,
        "desc_act": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "pack_dtype": "int32",
        # transformers would take a packed one for missing.
        "lm_head": False,
    }


def read(stored: Stored, settings: Settings) -> QTensor | None:
    """The weight of one layer, or None if the file holds it dense."""
    if "qweight" not in stored:
        return None
    settings.absent(*UNKNOWN)
    settings.choice("pack_dtype", ("int32",), "int32")
    bits, symmetric = settings.choice("bits", BITS), settings.choice("sym", (True, False), True)
    version = _version(settings)
    (out, inner), block = stored.shape, block_of(settings, "group_size")
    group = inner if block == "row" else block
    groups = math.ceil(inner / group)
    why = _unpackable(bits, stored.shape)
    if why is not None:
        raise stored.error("qweight", why)
    packed = stored.take("qweight", "I32", (inner * bits // 32, out))
    packed_zeros = stored.take("qzeros", "I32", (groups, out * bits // 32))
    zeros = unpack(stream(packed_zeros), bits, out)
    zeros = zeros + (version == V1) & (1 << bits) - 1
    scale = stored.take("scales", hf.FLOATS[1:], (groups, out))
    order = _order(stored, settings, group)
    take_empty_bias(stored)
    codes = stream(packed.T)
    if order is not None:
        codes = pack(unpack(codes, bits, inner)[:, order], bits)
    q = assemble(stored.shape, block, codes, scale, zeros, bits, symmetric)
    return q if order is None else Reordered(q.format).of(q, order)


def _version(settings: Settings) -> str:
    # Two names of the same setting; either may be absent.
    version = settings.choice("checkpoint_format", (V1, V2), None)
    other = settings.choice("format", (V1, V2), None)
    if version and other and version != other:
        raise settings.error("format", f"is {other!r}; need {version!r}")
    return version or other or V1


def block_of(settings: Settings, name: str) -> int | str:
    """The group size called `name`, of which -1 means a whole row."""
    size = settings.integer(name, -1, MAX_GROUP)
    if size == 0:
        raise settings.error(name, "is 0; need a positive integer, or -1 for whole rows")
    return "row" if size == -1 else size


def _order(stored: Stored, settings: Settings, group: int) -> Int[Tensor, " in"] | None:
    """The inputs, group after group, or None if they lie like that already."""
    inner = stored.shape[1]
    plain = torch.arange(inner) // group
    g_idx, last = stored.take("g_idx", "I32", (inner,)).long(), int(plain[-1])
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high > last:
        bad = low if low < 0 else high
        raise stored.error("g_idx", f"holds the group {bad}; need 0 to {last}")
    found, need = (torch.bincount(x, minlength=last + 1) for x in (g_idx, plain))
    if not torch.equal(found, need):
        i = int((found != need).nonzero()[0])
        raise stored.error("g_idx", f"gives group {i} {found[i]} inputs; need {need[i]}")
    in_order = torch.equal(g_idx, plain)
    if not settings.choice("desc_act", (True, False), False) and not in_order:
        raise stored.error("g_idx", "is not in order, as it must be where desc_act is false")
    return None if in_order else g_idx.argsort(stable=True)


def take_empty_bias(stored: Stored) -> None:
    """Accept a bias of zeros: AutoGPTQ gave one to every layer, whether the model has it or not."""
    if "bias" in stored and bool(stored.take("bias", hf.FLOATS, stored.shape[:1]).any()):
        stored.taken.discard(f"{stored.name}.bias")


def assemble(
    shape: tuple[int, ...], block: int | str, codes: Tensor, scale: Tensor, zeros: Tensor,
    bits: int, symmetric: bool,
) -> QTensor:  # fmt: skip
    """The weight of these codes [out, bytes], scales and zero points, [groups, out] each.

    Where `symmetric` is allowed and all zero points are the middle code, the format has none.
    """
    parts = {"codes": codes, "scale": scale.T.contiguous()}
    if symmetric and bool((zeros == 1 << bits - 1).all()):
        format = Scheme(grid.GRIDS[f"int{bits}"], block, fit.absmax, scale.dtype)
        return QTensor(format, shape, parts)
    levels = grid.GRIDS[f"uint{bits}"]
    parts["zero_point"] = pack(zeros.T.contiguous(), bits)
    return QTensor(Scheme(levels, block, fit.minmax, scale.dtype, levels), shape, parts)
