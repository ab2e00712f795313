"""What `bench_gpu` measures, the most important first, and what was aimed at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Outputs x inputs of layers: attention and MLP of 7B and 8B models, then of 70B ones.
SMALL = [(4096, 4096), (14336, 4096), (4096, 14336)]
LARGE = [(8192, 8192), (28672, 8192), (8192, 28672)]
PREFILL = [(4096, 4096), (14336, 4096)]
FIRST, FOUR_BITS = "int4-g128", ("nf4", "mxfp4", "nvfp4", "q4_k")
OTHERS = "int2-g64 int3-g128 int5-g128 int6-g128 int7-g128 int8-g128 int8-row int4-g32-asym"
OTHERS = (*OTHERS.split(), "fp8_e4m3", "mxfp8_e4m3", "q6_k", "ternary")
EIGHT, SCALED = ("int8-row", "fp8_e4m3"), ("mxfp4", "mxfp8_e4m3", "nvfp4")
ENCODED = ("int8-row", "fp8_e4m3", "int4-g128", "mxfp4", "nvfp4")
# Rows, outputs, inputs.
TUNED = [(rows, *shape) for rows in (1, 16, 4096) for shape in LARGE + SMALL]
DRY_TUNED = [(1, 64, 256)]


@dataclass(frozen=True)
class Task:
    """What is measured side by side: contestants for the same shape.

    Args:
        shape: outputs x inputs of a weight, or rows x columns of what has no weight.
        rows: of activations; 0 where there is no weight, and no cuBLAS to compare with.
        entries: (function of `gpu_contestants` or name in `gpu_peers.PEERS`, its arguments).
    """

    title: str
    shape: tuple[int, int]
    rows: int
    entries: tuple[tuple[str, tuple], ...]

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{self.title}, {size}" + (f", M = {self.rows}" if self.rows else "")


PEERS = ("torch tinygemm", "bitsandbytes", "gemlite")
BESIDE = tuple((name, ()) for name in PEERS)


def weights(*names: str) -> tuple[tuple[str, tuple], ...]:
    return tuple(("weight_only", (name,)) for name in names)


def tasks() -> Iterator[Task]:
    """The most important first."""
    for shape in LARGE + SMALL:
        yield Task("decode", shape, 1, (*weights(FIRST, *FOUR_BITS), *BESIDE))
    for shape in LARGE + SMALL:
        yield Task("decode", shape, 16, (*weights(FIRST), *BESIDE))
    eight = tuple(("eight_bits", (name, alone)) for name in EIGHT for alone in (False, True))
    for rows in (4096, 512):
        for shape in PREFILL:
            yield Task("prefill", shape, rows, (*weights(FIRST), *eight, *BESIDE[:1]))
    yield Task("hadamard", (4096, 4096), 0, (("rotation", ()),))
    yield Task("hadamard", (4096, 8192), 0, (("rotation", ()),))
    for shape in LARGE + SMALL:
        yield Task("decode", shape, 4, weights(FIRST))
    for shape in (LARGE[1], SMALL[1]):
        yield Task("decode", shape, 1, weights(*OTHERS))
    microscaled = tuple(("microscaled", (name,)) for name in SCALED)
    yield Task("prefill", PREFILL[0], 4096, (*microscaled, *weights(*FOUR_BITS)))
    yield Task("encode", (4096, 4096), 0, tuple(("quantizer", (name,)) for name in ENCODED))
    yield Task("decode", SMALL[1], 16, weights(*FOUR_BITS, *OTHERS))
    yield Task("prefill", PREFILL[0], 4096, weights(*OTHERS))


def dry_tasks() -> Iterator[Task]:
    """Every kind of entry once; some cannot work on a CPU, and have to be named."""
    some = ("nf4", "nvfp4", "q4_k", "int3-g128", "fp8_e4m3")
    yield Task("decode", (64, 256), 1, (*weights(FIRST, *some, "ternary"), *BESIDE))
    eight = tuple(("eight_bits", (name, alone)) for name in EIGHT for alone in (False, True))
    yield Task("prefill", (64, 256), 17, (*weights(FIRST, "q4_k"), *eight))
    yield Task("prefill", (64, 256), 4, (("microscaled", (SCALED[0],)),))
    yield Task("hadamard", (4, 256), 0, (("rotation", ()),))
    yield Task("encode", (4, 256), 0, tuple(("quantizer", (name,)) for name in ENCODED[-2:]))


@dataclass(frozen=True)
class Target:
    """What the least `key` of the rows with one of `names` should be, of those that `where` takes.

    Args:
        where: key -> the values that it may have.
    """

    title: str
    key: str
    wanted: float
    names: tuple[str, ...]
    where: dict[str, Any]

    def measured(self, rows: list[dict[str, Any]]) -> float | None:
        values = [row[self.key] for row in rows if row["name"] in self.names and self.takes(row)]
        return min(values, default=None)

    def takes(self, row: dict[str, Any]) -> bool:
        return all(row[key] in allowed for key, allowed in self.where.items())


DECODE = {"task": ("decode",), "shape": [list(shape) for shape in LARGE], "rows": (1,)}
LONG = {"task": ("prefill",), "rows": (4096,)}
TARGETS = [
    Target("int4-g128, 1 row, large layers: of copy", "of_copy", 0.85, (FIRST,), DECODE),
    Target("int4-g128, 1 row, large layers: x bf16", "to_bf16", 3.3, (FIRST,), DECODE),
    Target("int4-g128, 16 rows: x bf16", "to_bf16", 3.0, (FIRST,), DECODE | {"rows": (16,)}),
    Target("int4-g128, 4096 rows: x bf16", "to_bf16", 0.8, (FIRST,), LONG),
    Target("w8a8, 4096 rows: x bf16", "to_bf16", 1.5, tuple(f"w8a8 {n}" for n in EIGHT), LONG),
    Target("nf4, mxfp4, nvfp4, q4_k, 1 row: of copy", "of_copy", 0.75, FOUR_BITS, DECODE),
    Target("hadamard: of copy", "of_copy", 0.8, ("hadamard 4096", "hadamard 8192"), {}),
]


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and the least that was measured; geometric means of ratios to peers."""
    found = [
        {"target": target.title, "wanted": target.wanted, "measured": target.measured(rows)}
        for target in TARGETS
    ]
    for peer in ("torch tinygemm int4-g128", "gemlite int4-g128"):
        title = f"int4-g128, 1 row: x {peer}, geometric mean"
        found.append({"target": title, "wanted": 1.0, "measured": mean_ratio(rows, peer)})
    return found


def mean_ratio(rows: list[dict[str, Any]], peer: str) -> float | None:
    """How many times as fast as a peer int4-g128 with one row is, over the shapes of both."""
    decode = [row for row in rows if row["task"] == "decode" and row["rows"] == 1]
    times = {(row["name"], *row["shape"]): row["us"] for row in decode}
    logs = [
        math.log(us / times[(FIRST, *shape)])
        for (name, *shape), us in times.items()
        if name == peer and (FIRST, *shape) in times
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None
