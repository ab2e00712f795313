"""Tile sizes by measurement, for `bench_gpu --tune`: the candidates of `kernels.gpu.tuning`.

They are measured with one format and serve all: tuned.json has one entry for a product. What it has
already for this card is not measured again, so a second run goes on where the first was cut off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_contestants import Setting, copies, weight
from gpu_tasks import FIRST

from qlib.files.atomic import replacing
from qlib.kernels import measure
from qlib.kernels.gpu import integer, product, tuning
from qlib.kernels.gpu.product import Packed

ROUNDS = 5


class Found(NamedTuple):
    """The best tiles of a product, their seconds, and those of the tiles that the rule has."""

    name: str
    tiles: dict[str, int]
    seconds: float
    by_rule: float | None


def tune(
    setting: Setting, timer: Callable, stop: float, products: list[tuple[int, int, int]]
) -> Iterator[Found]:
    """Measure products (rows, outputs, inputs) until the clock shows `stop`."""
    for rows, outputs, inputs in products:
        rung = "gemv" if rows == 1 else "gemm"
        x, kinds = setting.randn(rows, inputs), tuning.candidates(rung, rows, outputs, inputs)
        q = weight(FIRST, outputs, inputs, setting.device)
        operands = [integer.packed(copy) for copy in copies(q, setting)]
        times = []
        for tiles in kinds:
            if time.monotonic() > stop:
                return
            call = measure.in_rotation(partial(with_tiles, rung, x, tiles), operands)
            times.append(_seconds(call, timer, f"{rung} {tiles}"))
        best = min((t, i) for i, t in enumerate(times) if t is not None)[1]
        name = product_name(rows, outputs, inputs)
        yield Found(name, kinds[best], times[best], times[0])


def _seconds(call: Callable[[], object], timer: Callable, what: str) -> float | None:
    try:
        return timer({what: call}, ROUNDS)[what]
    except Exception as error:
        # Some tiles need more registers or shared memory than the card has.
        print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def with_tiles(rung: str, x: torch.Tensor, tiles: dict[str, int], packed: Packed) -> torch.Tensor:
    """The product with these tiles, and all that belongs to it."""
    launched, sums = product.launch(rung, x, packed, **tiles)
    launched.run()
    return sums[0] if len(sums) == 1 else sums.sum(0).to(x.dtype)


def product_name(rows: int, outputs: int, inputs: int) -> str:
    """How tuned.json calls it."""
    rung = "gemv" if rows == 1 else "gemm"
    return f"{rung} {tuning.rows_class(rows)} x {outputs} x {inputs}"


def read(path: Path, card: str) -> dict[str, dict[str, int]]:
    """What the file has for the card."""
    return json.loads(path.read_text()).get(card, {}) if path.exists() else {}


def save(path: Path, card: str, found: Found) -> None:
    """Put the tiles of a product into the file beside what it has, a product to a line."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.setdefault(card, {})[found.name] = found.tiles
    cards = [f" {json.dumps(card)}: {_lines(products)}" for card, products in content.items()]
    with replacing(path) as partial_file:
        partial_file.write_text("{\n" + ",\n".join(cards) + "\n}\n")


def _lines(products: dict[str, dict[str, int]]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(tiles)}" for name, tiles in products.items()]
    return "{\n" + ",\n".join(lines) + "\n }"
