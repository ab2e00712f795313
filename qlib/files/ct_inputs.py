"""The `input_activations` of compressed-tensors: how a layer that vLLM runs quantizes its inputs.

Of the inputs it stores, beside the tensors of the weight:

int8 or E4M3, dynamic     nothing: every call finds one scale for each token
int8 or E4M3, static      input_scale [1]
MXFP4, MXFP8              nothing: every call finds one exponent for 32 channels of a token
NVFP4                     input_global_scale float32 [1], by which is divided: 2688 / amax; the
                          scales of 16 channels are found in every call

What may be joined with which weights is what vLLM has kernels for.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import fit, grid
from ..activations import Dynamic, Inputs, Static
from ..presets import MXFP4, MXFP8_E4M3, NVFP4_RECIPROCAL
from ..presets import format as named_format
from ..qtensor import Format
from ..scheme import Scheme
from .stored import Settings, Stored

INT8, FP8, MX4, MX8, NV4 = "int8", "fp8", "mxfp4", "mxfp8", "nvfp4"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Kind of the inputs, and the strategy: the grid and the block that they have here.
DYNAMIC = {
    (INT8, "token"): named_format("int8-row"),
    (FP8, "token"): named_format("fp8_e4m3"),
    (MX4, "group"): MXFP4,
    (MX8, "group"): MXFP8_E4M3,
}
STATIC = {(INT8, "tensor"): grid.int_grid(8), (FP8, "tensor"): grid.E4M3}
TYPES = {INT8: ("int", 8), FP8: ("float", 8), MX4: ("float", 4), MX8: ("float", 8)}
TYPES[NV4] = ("float", 4)
KNOWN = (
    "vLLM has int8 and fp8_e4m3 inputs with weights of the same kind (for each token, or static "
    "for the tensor), int8 inputs with int4 weights, mxfp4, mxfp8_e4m3, nvfp4-reciprocal-static"
)


def kind_of(inputs: Inputs) -> tuple[str, str] | None:
    """The kind and the strategy of inputs, if compressed-tensors has them."""
    scheme = getattr(inputs, "format", None)
    if not isinstance(scheme, Scheme) or scheme.offset is not None:
        return None
    if type(inputs) is Dynamic:
        same = (key for key, one in DYNAMIC.items() if _alike(one, scheme))
        return next(same, None)
    if (scheme.grid, scheme.block, scheme.scale) == (grid.E2M1, 16, NVFP4_RECIPROCAL.scale):
        return NV4, "tensor_group"
    whole = scheme.block == "tensor" and scheme.scale in FLOATS.values()
    return next((key for key, levels in STATIC.items() if whole and scheme.grid == levels), None)


def _alike(a: Scheme, b: Scheme) -> bool:
    # How a runtime finds and keeps a scale for one call is its own business, unless it is E8M0.
    plain = a.scale in FLOATS.values() and b.scale in FLOATS.values()
    return (a.grid, a.block) == (b.grid, b.block) and (plain or a.scale == b.scale)


def refusal(inputs: Inputs, weight: Format | None) -> str | None:
    """Why these inputs with a weight of this format cannot be written, or None."""
    kind = kind_of(inputs)
    if kind is None or not isinstance(weight, Scheme) or weight.offset is not None:
        return KNOWN
    bits, grid_name = weight.grid.bits, weight.grid.name
    allowed = {
        INT8: grid_name == "int8" and weight.block == "row",
        FP8: grid_name == "e4m3" and weight.block in ("row", "tensor"),
        MX4: _alike(weight, MXFP4),
        MX8: _alike(weight, MXFP8_E4M3) or _alike(weight, MXFP4),
        NV4: _alike(weight, NVFP4_RECIPROCAL),
    }[kind[0]]
    four = kind == (INT8, "token") and grid_name == "int4" and bits == 4
    return None if allowed or four else KNOWN


def arguments(inputs: Inputs) -> dict[str, Any]:
    """The entry `input_activations` of config.json."""
    kind, strategy = kind_of(inputs)
    type_, bits = TYPES[kind]
    entry = {"num_bits": bits, "type": type_, "symmetric": True, "strategy": strategy}
    entry["group_size"] = {MX4: 32, MX8: 32, NV4: 16}.get(kind)
    entry["dynamic"] = "local" if kind == NV4 else type(inputs) is Dynamic
    if kind in (MX4, MX8, NV4):
        entry["scale_dtype"] = "torch.float8_e4m3fn" if kind == NV4 else "torch.uint8"
    return entry


def store(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of static inputs, by what follows the name of the layer and a dot."""
    if type(inputs) is Dynamic:
        return {}
    parts = inputs.quantize(torch.zeros(1, 16)).parts
    if kind_of(inputs)[0] == NV4:
        return {"input_global_scale": parts["scale.scale"].view(1)}
    return {"input_scale": parts["scale"].view(1)}


def read(stored: Stored, group: Settings) -> Inputs | None:
    """How the layer quantizes its inputs, or None.

    Warns, and leaves inputs as they are, where they are quantized in another way.
    """
    if group.data.get("input_activations") is None:
        return None
    entry = group.object("input_activations")
    found = tuple(entry.data.get(name) for name in ("type", "num_bits", "strategy", "dynamic"))
    if entry.data.get("symmetric", True) is True:
        for (kind, strategy), scheme in DYNAMIC.items():
            sized = strategy != "group" or entry.data.get("group_size") == scheme.block
            if found == (*TYPES[kind], strategy, True) and sized:
                return Dynamic(scheme)
        for (kind, strategy), levels in STATIC.items():
            if found == (*TYPES[kind], strategy, False):
                dtype = stored.dtype("input_scale") if "input_scale" in stored else "F32"
                scheme = Scheme(levels, "tensor", fit.absmax, FLOATS.get(dtype, torch.float32))
                return _static(stored, "input_scale", scheme)
        if found == (*TYPES[NV4], "tensor_group", "local") and "input_global_scale" in stored:
            return _static(stored, "input_global_scale", NVFP4_RECIPROCAL)
    known = {name: value for name, value in entry.data.items() if value is not None}
    warnings.warn(f"inputs quantized as {known!r:.200} stay as they are here", stacklevel=5)
    return None


def _static(stored: Stored, part: str, scheme: Scheme) -> Static:
    """Inputs whose stored scale is the tensor called `part`."""
    size = stored.tensors.shapes.get(f"{stored.name}.{part}")
    scale = stored.take(part, FLOATS, () if size == () else (1,)).double().item()
    if not (math.isfinite(scale) and scale > 0):
        raise stored.error(part, f"is {scale}; need a positive number")
    high = 448 * 6 / scale if part == "input_global_scale" else scale * scheme.grid.max
    if high > torch.finfo(torch.float32).max:
        raise stored.error(part, f"is {scale}, the scale of no range")
    # A range that gives exactly this scale need not exist: it is rounded twice on the way.
    return Static(scheme, -high, high, scale)
