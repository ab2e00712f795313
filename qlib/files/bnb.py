"""bitsandbytes, the container of QLoRA (arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

Of a layer it stores, with N outputs, K inputs and blocks of g weights:

4 bits                 weight uint8 [N K / 2, 1], weight.absmax float32 [N K / g],
                       weight.quant_map float32 [16], and the sizes as JSON in a tensor of bytes,
                       weight.quant_state.bitsandbytes__nf4
double quantization    the same, but weight.absmax uint8 [N K / g], with weight.nested_absmax
                       float32 [N K / g / 256] and weight.nested_quant_map float32 [256]
8 bits                 weight int8 [N, K], SCB float32 [N], weight_format, a zero;
                       value = code * SCB / 127

With weights in 8 bits, bitsandbytes always quantizes inputs to int8 for each token, but for the
channels that reach config.json's llm_int8_threshold; where that is 0, there are none.

Of two 4-bit codes the first lies in the high half of the byte. Blocks run over the flattened
weight, so that they are blocks of rows where g divides K.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import fit, grid
from ..activations import Inputs
from ..double import DYNAMIC, DoubleQuant
from ..methods.llm_int8 import LLMInt8
from ..qtensor import Format, QTensor
from ..scheme import Scheme
from .stored import Settings, Stored

NAME = "bitsandbytes"
TABLES = {"nf4": grid.NF4, "fp4": grid.BNB_FP4}
BLOCKS = tuple(2**i for i in range(5, 13))
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
STATE = "weight.quant_state.bitsandbytes__"
# A quant_state has about 200 bytes.
MAX_JSON = 1 << 16
# The constant that bitsandbytes multiplies by, to which 1 / 127 rounds in float32.
STEP = torch.tensor(1 / 127)


def table_of(format: Format) -> str | None:
    """The kind of storage that holds `format`, if one does: a table of four bits, or "int8"."""
    if not isinstance(format, Scheme) or format.offset is not None:
        return None
    if format.grid == grid.int_grid(8) and format.block == "row" and format.scale in FLOATS:
        return "int8"
    if format.block not in BLOCKS or not (format.scale in FLOATS or _is_double(format)):
        return None
    return next((name for name, table in TABLES.items() if format.grid == table), None)


def _is_double(format: Format) -> bool:
    scale = format.scale if isinstance(format, Scheme) else None
    return isinstance(scale, DoubleQuant) and scale.block in BLOCKS


def refusal(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this format and shape cannot be stored as it is, or None."""
    table = table_of(format)
    if table is None:
        return f"it has {', '.join(TABLES)} in blocks of {BLOCKS[0]} to {BLOCKS[-1]}, and int8-row"
    if table != "int8" and shape[1] % format.block:
        return f"its blocks of {format.block} would cross the ends of rows of {shape[1]}"
    return None


def inputs_refusal(inputs: Inputs, weight: Format | None) -> str | None:
    """Why these inputs with a weight of this format cannot be written, or None."""
    if not isinstance(inputs, LLMInt8) or weight is None or table_of(weight) != "int8":
        return "it has LLM.int8(), with int8-row weights"
    return None


def store(q: QTensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows its name and a dot; inputs have none.

    Raises ValueError for float32 scales of int8 that are no multiple of 1/127 in float32.
    """
    table = table_of(q.format)
    if table == "int8":
        return _store_int8(q)
    scales, nested = _store_scales(q)
    state = {
        "quant_type": table,
        "blocksize": q.format.block,
        # The dtype of the weights that bitsandbytes decodes: in float32 they are ours.
        "dtype": "float32",
        "shape": list(q.shape),
        **nested,
    }
    return {
        "weight": swapped(q.parts["codes"]).view(-1, 1),
        "weight.quant_map": q.format.grid.points.clone(),
        f"{STATE}{table}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        **scales,
    }


def _store_scales(q: QTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the scales, and what the JSON says of them."""
    if not _is_double(q.format):
        return {"weight.absmax": q.parts["scale"].float().view(-1)}, {}
    tensors = {
        "weight.absmax": q.parts["scale.codes"].view(-1),
        "weight.nested_absmax": q.parts["scale.scale"].view(-1),
        "weight.nested_quant_map": DYNAMIC.points.clone(),
    }
    return tensors, {
        "nested_blocksize": q.format.scale.block,
        "nested_dtype": "float32",
        "nested_offset": q.parts["scale.offset"].item(),
    }


def swapped(packed: Tensor) -> Tensor:
    """Bytes with their halves exchanged."""
    return packed >> 4 | packed << 4


def _store_int8(q: QTensor) -> dict[str, Tensor]:
    scale = q.parts["scale"].float()
    near = scale * 127
    # 127 times a float32 is rounded; one of the neighbors may be what the scale was read from.
    for scb in (near, *(near.nextafter(torch.full_like(near, to)) for to in (0.0, math.inf))):
        near = torch.where(scb * STEP == scale, scb, near)
    if not torch.equal(near * STEP, scale):
        message = "a scale in float32 is no SCB / 127; store the scales of int8 as float16"
        raise ValueError(f"{q.format} {list(q.shape)}: {message}")
    return {
        # Offset binary to two's complement.
        "weight": (q.parts["codes"] ^ 128).view(torch.int8),
        "SCB": near.view(-1),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def describe(
    formats: Mapping[str, Format | None], inputs: Mapping[str, Inputs] | None = None
) -> dict[str, Any]:
    """Entries of config.json.

    Raises ValueError if some layers have 4 bits and others 8, or inputs of several kinds.
    """
    tables = {table_of(format): name for name, format in formats.items() if format is not None}
    if "int8" in tables and len(tables) > 1:
        four = next(name for table, name in tables.items() if table != "int8")
        message = f"{four} has 4 bits and {tables['int8']} has 8"
        raise ValueError(f"{NAME} holds layers of one width: {message}; quantize both alike")
    dense = [name for name, format in formats.items() if format is None]
    # A tied head has no layer of its own here, and transformers would take it for a packed one.
    tied = [] if "lm_head" in formats else ["lm_head"]
    settings = {"quant_method": NAME, "llm_int8_skip_modules": [*dense, *tied]}
    if "int8" in tables:
        settings |= {"load_in_8bit": True, "load_in_4bit": False}
        if inputs:
            settings["llm_int8_threshold"] = _common_threshold(formats, inputs)
    else:
        settings |= {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": next(iter(tables), "nf4"),
            "bnb_4bit_use_double_quant": any(map(_is_double, formats.values())),
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }
    return {"quantization_config": settings}


def _common_threshold(formats: Mapping[str, Format | None], inputs: Mapping[str, Inputs]) -> float:
    kinds = {str(inputs.get(n)): n for n, format in formats.items() if format is not None}
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        message = f"{first} has {one}, {second} has {other}"
        raise ValueError(f"{NAME} holds layers of one kind of inputs: {message}")
    threshold = next(iter(inputs.values())).threshold
    return float(threshold) if math.isfinite(threshold) else 0.0


def read_inputs(stored: Stored, settings: Settings) -> Inputs | None:
    """How the layer quantizes its inputs, or None where nothing is said of that."""
    threshold = settings.data.get("llm_int8_threshold")
    if threshold is None or "SCB" not in stored:
        return None
    if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
        raise settings.error("llm_int8_threshold", f"is {threshold!r:.80}; need a number from 0")
    return LLMInt8(float(threshold) or math.inf)


def read(stored: Stored, settings: Settings) -> QTensor | None:
    """The weight of one layer, or None if the file holds it dense."""
    kind = stored.dtype("weight") if "weight" in stored else None
    if "SCB" in stored or kind == "I8":
        settings.choice("load_in_8bit", (True,))
        return _read_int8(stored)
    if "weight.absmax" in stored or kind == "U8":
        settings.choice("load_in_4bit", (True,))
        return _read_four(stored)
    return None


def _read_int8(stored: Stored) -> QTensor:
    codes = stored.take("weight", "I8", stored.shape).view(torch.uint8) ^ 128
    # bitsandbytes rounds code * SCB and then the product with 1 / 127; one scale rounds elsewhere,
    # so that weights may differ by two units in the last place of float32.
    scale = stored.take("SCB", "F32", stored.shape[:1]).view(-1, 1) * STEP
    if "weight_format" in stored and int(stored.take("weight_format", "U8", ())) != 0:
        raise stored.error("weight_format", "is of another order than rows; need 0")
    format = Scheme(grid.int_grid(8), "row", fit.absmax, scale=torch.float32)
    return QTensor(format, stored.shape, {"codes": codes, "scale": scale})


def _read_four(stored: Stored) -> QTensor:
    out, inner = stored.shape
    state, table = _state(stored)
    block = state.choice("blocksize", BLOCKS)
    if inner % block:
        raise state.error("blocksize", f"is {block}, which does not divide {inner} inputs")
    codes = stored.take("weight", "U8", (out * inner // 2, 1)).view(out, inner // 2)
    quant_map = stored.take("weight.quant_map", "F32", (16,))
    if not torch.equal(quant_map, table.points):
        raise stored.error("weight.quant_map", f"is not the table of {table.name}")
    storage, scales = _read_scales(stored, state, (out, inner // block))
    format = Scheme(table, block, fit.absmax, scale=storage)
    return QTensor(format, stored.shape, {"codes": swapped(codes), **scales})


def _read_scales(stored: Stored, state: Settings, shape: tuple[int, int]):
    """How the scales [N, K / g] are stored, and their parts."""
    count = math.prod(shape)
    if "weight.nested_absmax" not in stored:
        return torch.float32, {"scale": stored.take("weight.absmax", "F32", (count,)).view(shape)}
    storage = DoubleQuant(state.choice("nested_blocksize", BLOCKS))
    state.choice("nested_dtype", ("float32",))
    mean = state.data.get("nested_offset")
    if type(mean) is not float or not abs(mean) <= torch.finfo(torch.float32).max:
        raise state.error("nested_offset", f"is {mean!r:.80}; need a finite float32")
    if not torch.equal(stored.take("weight.nested_quant_map", "F32", (256,)), DYNAMIC.points):
        raise stored.error("weight.nested_quant_map", "is not the signed dynamic map")
    scale = stored.take("weight.nested_absmax", "F32", (math.ceil(count / storage.block),))
    return storage, {
        "scale.codes": stored.take("weight.absmax", "U8", (count,)).view(shape),
        "scale.scale": scale.view(1, -1),
        "scale.offset": torch.tensor([mean]),
    }


def _state(stored: Stored) -> tuple[Settings, grid.Grid]:
    """The JSON beside a 4-bit weight, and the table that it names."""
    found = [name for name in TABLES if STATE + name in stored]
    if len(found) != 1:
        need = " or ".join(STATE + name for name in TABLES)
        raise stored.error("weight.quant_state", f"has {len(found)} tensors; need one, {need}")
    part = STATE + found[0]
    size = stored.tensors.shapes[f"{stored.name}.{part}"]
    if len(size) != 1 or not 0 < size[0] <= MAX_JSON:
        raise stored.error(part, f"has shape {list(size)}; need 1 to {MAX_JSON} bytes")
    try:
        data = json.loads(bytes(stored.take(part, "U8", size).tolist()))
    except (ValueError, RecursionError):
        raise stored.error(part, "is not valid JSON") from None
    state = Settings(stored.tensors.folder, f"{stored.name}.{part}", data)
    state.choice("quant_type", found)
    state.choice("dtype", ("float16", "bfloat16", "float32"))
    state.choice("shape", (list(stored.shape),))
    return state, TABLES[found[0]]
