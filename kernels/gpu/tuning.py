"""How large the tiles of a product are: measured for a card where tuned.json has it, else a rule.

Nothing searches when a kernel is first called: `make gpu` measures, and its findings are data.
tuned.json is {card: {product: tiles}}. A card is named as `torch.cuda.get_device_name` names it, a
product by its rung, its rows rounded up as in `rows_class`, and outputs x inputs of the weight:

    {"NVIDIA H100 80GB HBM3": {"gemm 16 x 4096 x 14336": {"BLOCK_M": 16, "BLOCK_N": 64, ...}}}

Tiles are one of `candidates`, with all its names:

- BLOCK_N, BLOCK_K: outputs of a program, and inputs that it decodes at a time;
- SPLIT: how many programs share the inputs of one output;
- num_warps: groups of 32 threads in a program; num_stages: tiles that "gemm" loads ahead;
- for "gemv" UNROLL: tiles whose loads can be under way at once;
- for "gemm" BLOCK_M: rows of activations of a program; GROUP: tiles of outputs that take turns.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
# Triton's own limit for a tensor.
LARGEST = 1 << 20
COMMON = {"BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages"}
NAMES = {"gemv": COMMON | {"UNROLL"}, "gemm": COMMON | {"BLOCK_M", "GROUP"}}


def tiling(rung: str, rows: int, outputs: int, inputs: int, device: torch.device) -> dict[str, int]:
    """The tiles of `rung` for a product on `device`: `NAMES[rung]` with a size each."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return dict(_tiling(rung, rows_class(rows), outputs, inputs, card))


@cache
def _tiling(rung: str, rows: int, outputs: int, inputs: int, card: str) -> dict[str, int]:
    measured = tuned().get(card, {}).get(f"{rung} {rows} x {outputs} x {inputs}")
    return measured or rule(rung, rows, outputs, inputs)


def rule(rung: str, rows: int, outputs: int, inputs: int) -> dict[str, int]:
    """Without measurements: enough programs for a hundred multiprocessors."""
    if rung == "gemv":
        # A thread loads 16 bytes of the 4-bit codes of two rows, which share its activations.
        return _gemv(32, 256, _split(512 * 32 // outputs, inputs, 512))
    if rows <= 64:
        split = _split(256 * 64 // outputs, inputs, 512)
        return _gemm(max(16, rows_class(rows)), 64, 128, split, 4)
    return _gemm(128, 128, 64, 1, 8)


def candidates(rung: str, rows: int, outputs: int, inputs: int) -> list[dict[str, int]]:
    """Tiles worth measuring for a product, the rule's first; each gives the right result."""
    first = rule(rung, rows, outputs, inputs)
    few = sorted({1, first["SPLIT"], _split(2 * first["SPLIT"], inputs, 512)})
    if rung == "gemv":
        shapes = [(16, 256, 4, 2), (32, 256, 4, 1), (32, 256, 4, 2), (64, 256, 8, 1)]
        shapes += [(32, 512, 8, 1)]
        others = [_gemv(n, k, split, *more) for n, k, *more in shapes for split in few]
    elif rows <= 64:
        m = first["BLOCK_M"]
        shapes = [(m, 32, 128, 4, 3), (m, 64, 128, 4, 4), (m, 64, 64, 4, 4), (m, 128, 64, 8, 3)]
        shapes += [(64, 64, 128, 4, 3)]
        others = [_gemm(m, n, k, split, *more) for m, n, k, *more in shapes for split in few]
    else:
        shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4)]
        shapes += [(64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (256, 128, 64, 8, 3)]
        shapes += [(128, 256, 64, 8, 3)]
        others = [_gemm(m, n, k, 1, *more, g) for m, n, k, *more in shapes for g in (4, 8)]
    return [first] + [tiles for tiles in others if tiles != first]


def _gemv(n: int, k: int, split: int, warps: int = 4, unroll: int = 2) -> dict[str, int]:
    tiles = {"BLOCK_N": n, "BLOCK_K": k, "SPLIT": split, "UNROLL": unroll}
    return tiles | {"num_warps": warps, "num_stages": 1}


def _gemm(
    m: int, n: int, k: int, split: int, warps: int, stages: int = 3, group: int = 8
) -> dict[str, int]:
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split, "GROUP": group}
    return tiles | {"num_warps": warps, "num_stages": stages}


def _split(wanted: int, inputs: int, each: int) -> int:
    """Up to 8 programs for the inputs of one output, each with no fewer than `each` of them."""
    return max(1, min(8, wanted, inputs // each))


def check(rung: str, tiles: dict[str, int], inputs: int) -> None:
    """Raise ValueError for tiles that the kernel of `rung` does not have or cannot run with."""
    if tiles.keys() != NAMES[rung]:
        wrong = ", ".join(sorted(tiles.keys() ^ NAMES[rung]))
        raise ValueError(f"{rung}: tiles need {sorted(NAMES[rung])}; missing or unknown: {wrong}")
    for name, size in tiles.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{rung}: {name} is {size!r}, need a positive integer")
        power = name.startswith("BLOCK") or name == "num_warps"
        if power and size & (size - 1):
            raise ValueError(f"{rung}: {name} is {size}, need a power of two")
    blocks = {name: size for name, size in tiles.items() if name.startswith("BLOCK")}
    for name, size in blocks.items():
        if size < 16 and (rung == "gemm" or name == "BLOCK_K"):
            raise ValueError(f"{rung}: {name} is {size}, need at least 16")
    if math.prod(sorted(blocks.values())[-2:]) > LARGEST:
        raise ValueError(f"{rung}: a tile of {blocks} has more than {LARGEST} elements")
    steps = -(-inputs // tiles["BLOCK_K"])
    if tiles["SPLIT"] > steps:
        held = f"{inputs} inputs hold {steps} tiles of {tiles['BLOCK_K']}"
        raise ValueError(f"{rung}: SPLIT is {tiles['SPLIT']}, but {held}")


def rows_class(rows: int) -> int:
    """Rows rounded up to what is tuned: 1, 16, 32, 64, then one class for all more (128)."""
    return next((limit for limit in (1, 16, 32, 64) if rows <= limit), 128)


@cache
def tuned() -> dict[str, dict[str, dict[str, int]]]:
    """What tuned.json holds."""
    return json.loads(TUNED.read_text())
