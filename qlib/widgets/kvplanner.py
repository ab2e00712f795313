"""The KV planner: how long a context fits on a card, and how fast, in every format of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import traitlets

from ..cache.format import KVFormat
from ..cache.names import kv_format
from ..plan import DEVICES, read_bytes, weights_bytes
from ..presets import format as named_format
from ..shapes import GQA, SHAPES, ModelShape
from . import BookWidget

NAMES = ("f16", "int8", "fp8", "kivi4", "int4", "turbo4", "polar", "turbo3", "kivi2", "turbo2")
WEIGHTS = ("bf16", "fp8_e4m3", "int8-g32", "int4-g32", "int4-g128", "int3-g64", "int2-g32")
# Bits per weight are counted on a matrix of this shape.
COUNTED = (4096, 4096)
BATCHES = tuple(2**i for i in range(9))


def rows(shape: ModelShape) -> tuple[int, int, int]:
    """Width of a cached row, and how many keys and values of that width a token leaves.

    The latent of MLA is one row, which serves as key and value.
    """
    a = shape.attention
    if isinstance(a, GQA):
        return a.head_dim, shape.layers * a.groups, shape.layers * a.groups
    return a.cached, shape.layers, 0


def sharing(shape: ModelShape) -> str:
    """What a layer caches of a token, in words."""
    a = shape.attention
    if isinstance(a, GQA):
        vectors = f"{a.groups} keys and {a.groups} values of {a.head_dim} numbers"
    else:
        vectors = f"one latent of {a.cached} numbers, rounded as a key,"
    return f"{vectors} for {a.heads} query heads"


def constants(name: str, shape: ModelShape) -> dict:
    """What the page needs of a model: cached rows, and bytes of the weights in every format.

    `weights` has a pair for each of WEIGHTS: all bytes, and the bytes that one step reads, for each
    of BATCHES.
    """
    width, keys, values = rows(shape)
    sizes = [
        [weights_bytes(shape, kind), [read_bytes(shape, kind, batch=batch) for batch in BATCHES]]
        for kind in (16, *WEIGHTS[1:])
    ]
    model = {"name": name, "width": width, "keys": width * keys, "values": width * values}
    return model | {"parameters": shape.parameters, "sharing": sharing(shape), "weights": sizes}


def kinds() -> list[dict]:
    """Names and bits per weight of WEIGHTS."""
    bits = [8 * named_format(name).nbytes(COUNTED) / math.prod(COUNTED) for name in WEIGHTS[1:]]
    return [{"name": name, "bits": b} for name, b in zip(WEIGHTS, [16, *bits], strict=True)]


def stored(name: str, widths: Sequence[int]) -> dict:
    """What the page needs of a cache's format: bits of a key and a value, by width of the row, and
    the tokens that stay in full precision. Raises ValueError for unknown names."""
    form: KVFormat = kv_format(name)
    full = 8 * (form.dtype or torch.float32).itemsize
    bits = {str(width): form.bits(width) for width in widths}
    return {"name": name, "full": full, "window": form.window, "sinks": form.sinks, "bits": bits}


class KVPlanner(BookWidget):
    """Choose a model, its weights, a card and a context; compare what every cache format allows.

    Args:
        names: cache formats, as `qlib.cache.kv_format` knows them; the first is the reference.

    Raises ValueError for no name and for unknown ones.
    """

    models = traitlets.List().tag(sync=True)
    kinds = traitlets.List().tag(sync=True)
    devices = traitlets.List().tag(sync=True)
    formats = traitlets.List().tag(sync=True)
    model = traitlets.Unicode("Llama-3.1-8B").tag(sync=True)
    weights = traitlets.Unicode("int4-g128").tag(sync=True)
    device = traitlets.Unicode("RTX 4090").tag(sync=True)
    format = traitlets.Unicode().tag(sync=True)
    context = traitlets.Int(15).tag(sync=True)
    batch = traitlets.Int(0).tag(sync=True)

    def __init__(self, names: Sequence[str] = NAMES, **state):
        """State that the reader changes; `context` and `batch` are powers of two (15: 32,768)."""
        if not names:
            raise ValueError(f"the KV planner needs cache formats, such as {', '.join(NAMES[:3])}")
        models = [constants(name, shape) for name, shape in SHAPES.items()]
        widths = sorted({model["width"] for model in models})
        formats = [stored(name, widths) for name in names]
        state = {"format": "int4" if "int4" in names else names[-1]} | state
        devices = [vars(device) for device in DEVICES]
        data = {"models": models, "kinds": kinds(), "devices": devices, "formats": formats}
        super().__init__(**data, **state)
