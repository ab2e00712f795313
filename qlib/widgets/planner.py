"""The memory planner: which model fits on which device, and how fast it can decode there."""

from __future__ import annotations

import traitlets

from ..plan import DEVICES, unique_experts
from ..presets import format as named_format
from ..shapes import GQA, SHAPES, ModelShape
from . import BookWidget

FORMATS = ("int8-g32", "fp8_e4m3", "int6-g64", "int5-g64", "nvfp4", "int4-g32", "int4-g128")
FORMATS += ("int3-g64", "int2-g32", "ternary")
# Bits per weight are counted on a matrix of this shape.
COUNTED = (4096, 4096)
BATCHES = tuple(2**i for i in range(9))


def constants(name: str, shape: ModelShape) -> dict:
    """What the page needs to know of a model: weights by kind and cached values per token."""
    found = shape.matrices.values()
    routed = [m for m in found if m.choices > 1]
    choice = (routed[0].choices, routed[0].active) if routed else (1, 1)
    a = shape.attention
    rope = 0 if isinstance(a, GQA) else a.rope
    return {
        "name": name,
        "parameters": shape.parameters,
        "active": shape.active,
        "hidden": shape.hidden,
        "tables": shape.embedding,
        "head": shape.vocab * shape.hidden,
        "vectors": shape.vectors,
        "dense": sum(m.numel for m in found if m.choices == 1),
        "experts": sum(m.numel for m in routed),
        # Share of the experts that one step reads, for every batch on the slider.
        "share": [unique_experts(*choice, batch) / choice[0] for batch in BATCHES],
        "cached": shape.layers * shape.attention.cached,
        "unshared": shape.layers * a.heads * (2 * a.head_dim + rope),
        "sharing": sharing(shape),
    }


def sharing(shape: ModelShape) -> str:
    """How the attention of a model saves cache, in words."""
    a = shape.attention
    if isinstance(a, GQA):
        return f"GQA, {a.heads} query heads on {a.groups} cached heads"
    return f"MLA, one latent of {a.cache_rank} + {a.rope} values for {a.heads} heads"


def formats() -> list[dict]:
    """Names and counted bits per weight, 16 bits first."""
    weights = COUNTED[0] * COUNTED[1]
    rows = [{"name": "bf16", "bits": 16.0}]
    return rows + [
        {"name": name, "bits": 8 * named_format(name).nbytes(COUNTED) / weights} for name in FORMATS
    ]


class Planner(BookWidget):
    """Choose a model, a format, a context and a batch; read gigabytes and tokens per second."""

    models = traitlets.List().tag(sync=True)
    formats = traitlets.List().tag(sync=True)
    devices = traitlets.List().tag(sync=True)
    model = traitlets.Unicode("Llama-3.1-70B").tag(sync=True)
    format = traitlets.Unicode("int4-g128").tag(sync=True)
    tables = traitlets.Bool(False).tag(sync=True)
    context = traitlets.Int(13).tag(sync=True)
    batch = traitlets.Int(0).tag(sync=True)
    kv_bits = traitlets.Int(16).tag(sync=True)
    unshared = traitlets.Bool(False).tag(sync=True)

    def __init__(self, **state):
        """State that the reader changes; `context` and `batch` are powers of two (13: 8,192)."""
        rows = [constants(name, shape) for name, shape in SHAPES.items()]
        devices = [vars(device) for device in DEVICES]
        super().__init__(models=rows, formats=formats(), devices=devices, **state)
