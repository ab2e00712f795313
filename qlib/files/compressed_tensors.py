"""compressed-tensors, the container of vLLM and llm-compressor, which transformers reads too.

Of a layer it stores, with N outputs, K inputs and groups of g inputs:

pack-quantized         weight_packed int32 [N, K b / 32], weight_scale [N, K / g], weight_shape;
                       with zero points also weight_zero_point int32 [N b / 32, K / g]
float-quantized        weight E4M3 [N, K], weight_scale [N, 1] or [1]
int-quantized          weight int8 [N, K], weight_scale [N, K / g], [N, 1] or [1]; integers lie so
                       if inputs are quantized too (`ct_inputs`)
mxfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale E8M0 [N, K / 32]
mxfp6-pack-quantized   weight_packed uint8 [N, 3 K / 4] of E2M3, weight_scale E8M0 [N, K / 32]
mxfp8-quantized        weight E4M3 [N, K], weight_scale E8M0 [N, K / 32]
nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale E4M3 [N, K / 16],
                       weight_global_scale float32 [1], by which is divided

Codes are one little-endian bit stream along K, as ours are; zero points one along N. Integers are
stored as unsigned numbers, q + 2^(b-1).
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import fit, grid
from ..activations import Inputs
from ..pack import pack, unpack
from ..presets import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4_RECIPROCAL
from ..presets import NVFP4 as NVFP4_DIRECT
from ..qtensor import Format, QTensor
from ..scheme import Scheme
from . import ct_inputs
from .ct_inputs import FLOATS
from .integers import is_integer, stream, words
from .stored import Settings, Stored

NAME = "compressed-tensors"
MX = {
    "mxfp4-pack-quantized": MXFP4,
    "mxfp6-pack-quantized": MXFP6_E2M3,
    "mxfp8-quantized": MXFP8_E4M3,
}
NVFP4 = "nvfp4-pack-quantized"
# Whose decoders in compressed-tensors return bfloat16, whatever the rest of the model is.
BFLOAT16 = (NVFP4, *MX)
ASYMMETRIC = (
    "vLLM reads zero points; transformers does (5.23, compressed-tensors 0.20) only with "
    "CompressedTensorsConfig(dequantize=True), and if all layers share one format"
)
# What concerns activations only; weights do not depend on it.
ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point")


def layout_of(format: Format, inputs: Inputs | None = None) -> str | None:
    """The name of the layout that holds `format` with these inputs, if one does."""
    if not isinstance(format, Scheme):
        return None
    for name, scheme in MX.items():
        if (format.grid, format.block, format.scale) == (scheme.grid, 32, grid.E8M0):
            return name
    if (format.grid, format.block, format.scale) == (grid.E2M1, 16, NVFP4_RECIPROCAL.scale):
        return NVFP4
    plain = format.scale in FLOATS.values()
    if plain and format.grid == grid.E4M3 and format.block in ("row", "tensor"):
        return "float-quantized"
    if not plain or not is_integer(format) or format.block == "tensor":
        return None
    return "pack-quantized" if inputs is None else "int-quantized"


def refusal(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this format and shape cannot be stored as it is, or None."""
    layout = layout_of(format)
    if format == NVFP4_DIRECT:
        return "here its global scale divides: quantize to 'nvfp4-reciprocal'"
    if layout is None:
        return "it has layouts for int2 to int8, FP8, MXFP4, MXFP6, MXFP8 and NVFP4 (reciprocal)"
    if type(format.block) is int and shape[1] % format.block:
        return f"{shape[1]} inputs are no multiple of the group {format.block}"
    return None


inputs_refusal = ct_inputs.refusal


def store(q: QTensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows its name and a dot."""
    weight = _store(q, layout_of(q.format, inputs))
    return weight if inputs is None else weight | ct_inputs.store(inputs)


def _store(q: QTensor, layout: str) -> dict[str, Tensor]:
    parts = q.parts
    if layout == NVFP4:
        return {
            "weight_packed": parts["codes"],
            "weight_scale": parts["scale.codes"].view(torch.float8_e4m3fn),
            "weight_global_scale": parts["scale.scale"].view(1),
        }
    if layout == "float-quantized":
        scale = parts["scale"].view(1) if q.format.block == "tensor" else parts["scale"]
        return {"weight": parts["codes"].view(torch.float8_e4m3fn), "weight_scale": scale}
    if layout == "mxfp8-quantized":
        return {"weight": parts["codes"].view(torch.float8_e4m3fn), "weight_scale": parts["scale"]}
    if layout in MX:
        return {"weight_packed": parts["codes"], "weight_scale": parts["scale"]}
    bits = q.format.grid.bits
    if layout == "int-quantized":
        codes = unpack(parts["codes"], bits, q.shape[1]) - (1 << bits - 1)
        return {"weight": codes.to(torch.int8), "weight_scale": parts["scale"]}
    stored = {
        "weight_packed": words(parts["codes"]),
        "weight_scale": parts["scale"],
        "weight_shape": torch.tensor(q.shape),
    }
    if q.format.offset is not None:
        zeros = unpack(parts["zero_point"], bits, parts["scale"].shape[1])
        stored["weight_zero_point"] = words(pack(zeros.T.contiguous(), bits)).T.contiguous()
    return stored


def describe(
    formats: Mapping[str, Format | None], inputs: Mapping[str, Inputs] | None = None
) -> dict[str, Any]:
    """Entries of config.json: one group of layers for each format of weights and inputs."""
    groups: dict[str, dict[str, Any]] = {}
    for name, format in formats.items():
        if format is not None:
            group = _group(format, (inputs or {}).get(name))
            same = groups.setdefault(f"{format} {group.get('input_activations')}", group)
            same["targets"].append(name)
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    if not all(group["weights"]["symmetric"] for group in groups.values()):
        warnings.warn(ASYMMETRIC, stacklevel=2)
    layouts = {group["format"] for group in groups.values()}
    # A tied head has no layer of its own here, and has one in transformers.
    tied = [] if "lm_head" in formats else ["lm_head"]
    settings = {
        "quant_method": NAME,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        # Without this list transformers takes dense layers for packed ones.
        "ignore": [name for name, format in formats.items() if format is None] + tied,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
    }
    entries: dict[str, Any] = {"quantization_config": settings}
    if any(layout_of(format) in BFLOAT16 for format in formats.values()):
        entries["torch_dtype"] = "bfloat16"
    return entries


def _group(format: Scheme, inputs: Inputs | None) -> dict[str, Any]:
    layout = layout_of(format, inputs)
    strategy = {"row": "channel", "tensor": "tensor"}.get(format.block, "group")
    weights = {
        "num_bits": format.grid.bits,
        "type": "int" if is_integer(format) else "float",
        "symmetric": format.offset is None,
        "strategy": "tensor_group" if layout == NVFP4 else strategy,
        "group_size": format.block if type(format.block) is int else None,
        "dynamic": False,
    }
    if layout in MX:
        weights["scale_dtype"] = "torch.uint8"
    group = {"targets": [], "format": layout, "weights": weights}
    return group if inputs is None else group | {"input_activations": ct_inputs.arguments(inputs)}


def read(stored: Stored, settings: Settings) -> QTensor | None:
    """The weight of one layer, or None if the file holds it dense."""
    if "weight_scale" not in stored:
        return None
    group = _group_of(stored, settings)
    layout = group.choice("format", LAYOUTS, settings.data.get("format"))
    for part in ACTIVATIONS:
        if part in stored:
            stored.take(part, (*FLOATS, "I8"), stored.tensors.shapes[f"{stored.name}.{part}"])
    if layout not in LAYOUTS:
        raise settings.error("format", f"is {layout!r:.40}; need one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](stored, group.object("weights"), layout)


def read_inputs(stored: Stored, settings: Settings) -> Inputs | None:
    """How the layer quantizes its inputs, or None."""
    return ct_inputs.read(stored, _group_of(stored, settings))


def _group_of(stored: Stored, settings: Settings) -> Settings:
    groups = settings.object("config_groups")
    found = [groups.object(name) for name in groups.data]
    for group in found:
        if len(found) == 1 or any(_matches(t, stored.name) for t in group.strings("targets")):
            return group
    raise settings.error("config_groups", f"has no group for the packed layer {stored.name}")


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        # A regular expression from outside can take forever; only its simple form is understood.
        shell = target[3:].replace(r"\.", ".").replace(".*", "*").removesuffix("$")
        return shell.count("*") <= 4 and fnmatch.fnmatchcase(name, shell)
    return target in (name, "Linear")


def _read_integers(stored: Stored, weights: Settings, layout: str) -> QTensor:
    bits = weights.integer("num_bits", 2, 8)
    signed = weights.choice("symmetric", (True, False), True)
    (out, inner), groups = stored.shape, 1
    block = _block(weights, inner)
    groups = 1 if block == "row" else inner // block
    packed = stored.take("weight_packed", "I32", (out, math.ceil(inner * bits / 32)))
    size = stored.take("weight_shape", "I64", (2,))
    if tuple(size.tolist()) != stored.shape:
        raise stored.error("weight_shape", f"is {size.tolist()}; need {list(stored.shape)}")
    scale = stored.take("weight_scale", FLOATS, (out, groups))
    codes = stream(packed, math.ceil(inner * bits / 8))
    parts = {"codes": codes, "scale": scale}
    levels = grid.int_grid(bits, signed)
    if signed:
        return QTensor(Scheme(levels, block, fit.absmax, scale.dtype), stored.shape, parts)
    shape = (math.ceil(out * bits / 32), groups)
    zeros = stream(stored.take("weight_zero_point", "I32", shape).T, math.ceil(out * bits / 8))
    zeros = unpack(zeros, bits, out)
    parts["zero_point"] = pack(zeros.T.contiguous(), bits)
    format = Scheme(levels, block, fit.minmax, scale.dtype, offset=levels)
    return QTensor(format, stored.shape, parts)


def _block(weights: Settings, inner: int) -> int | str:
    strategy = weights.choice("strategy", ("group", "channel"))
    if strategy == "channel":
        return "row"
    block = weights.integer("group_size", 1, inner)
    if inner % block:
        raise weights.error("group_size", f"is {block}, which does not divide {inner} inputs")
    return block


def _read_whole(stored: Stored, weights: Settings, layout: str) -> QTensor:
    """Codes, one to a byte, with a scale for a group or row of the weight, or for all of it."""
    (out, inner), groups = stored.shape, 1
    strategy = weights.choice("strategy", ("channel", "tensor", "group"))
    block = strategy if strategy == "tensor" else _block(weights, inner)
    groups = inner // block if type(block) is int else 1
    codes = stored.take("weight", "I8" if layout == "int-quantized" else "F8_E4M3", stored.shape)
    shape = (1,) if block == "tensor" else (out, groups)
    scale = stored.take("weight_scale", FLOATS, shape).view(-1, groups)
    levels, codes = grid.E4M3, codes.view(torch.uint8)
    if layout == "int-quantized":
        levels = grid.int_grid(weights.integer("num_bits", 2, 8, 8))
        # Two's complement to offset binary.
        codes = codes + (1 << levels.bits - 1)
        if int(codes.max()) >> levels.bits:
            raise stored.error("weight", f"holds more than {levels.bits} bits")
    format = Scheme(levels, block, fit.absmax, scale.dtype)
    parts = {"codes": pack(codes, levels.bits), "scale": scale}
    return QTensor(format, stored.shape, parts)


def _read_mx(stored: Stored, weights: Settings, layout: str) -> QTensor:
    format, (out, inner) = MX[layout], stored.shape
    _whole_blocks(stored, format.block)
    if layout == "mxfp8-quantized":
        codes = stored.take("weight", "F8_E4M3", stored.shape).view(torch.uint8)
    else:
        codes = stored.take("weight_packed", "U8", (out, inner * format.grid.bits // 8))
    scale = stored.take("weight_scale", ("U8", "F8_E8M0"), (out, inner // format.block))
    return QTensor(format, stored.shape, {"codes": codes, "scale": scale.view(torch.uint8)})


def _read_nvfp4(stored: Stored, weights: Settings, layout: str) -> QTensor:
    out, inner = stored.shape
    _whole_blocks(stored, 16)
    scale = stored.take("weight_scale", "F8_E4M3", (out, inner // 16)).view(torch.uint8)
    parts = {
        "codes": stored.take("weight_packed", "U8", (out, inner // 2)),
        "scale.codes": scale.reshape(out, inner // 16),
        "scale.scale": stored.take("weight_global_scale", "F32", (1,)).view(1, 1),
    }
    return QTensor(NVFP4_RECIPROCAL, stored.shape, parts)


def _whole_blocks(stored: Stored, block: int) -> None:
    if stored.shape[1] % block:
        message = f"a weight {list(stored.shape)} has no whole blocks of {block}"
        raise stored.error("weight_scale", message)


LAYOUTS = {
    "pack-quantized": _read_integers,
    "float-quantized": _read_whole,
    "int-quantized": _read_whole,
    **dict.fromkeys(MX, _read_mx),
    NVFP4: _read_nvfp4,
}
