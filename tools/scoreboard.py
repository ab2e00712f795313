"""Measure the scoreboard: every model with every format, to book/results/scoreboard.json.

    .venv/bin/python tools/scoreboard.py                      # rows that are not there yet
    .venv/bin/python tools/scoreboard.py --fresh --model bpw-small

Rows are written as they are measured, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
from pathlib import Path

import torch

import qlib
from qlib.files.atomic import replacing
from qlib.metrics import Reference
from qlib.scoreboard import Row, measure, protocols

RESULTS = Path(__file__).parents[1] / "book" / "results" / "scoreboard.json"
TOKENS = 12_288

CLIFF = [f"int{bits}-g32-asym" for bits in (8, 6, 5, 4, 3, 2)]
BLOCKS = ["int4-tensor", "int4-row", "int4-g128", "int4-g64", "int4-g32", "int4-g128-asym"]
FLOATS = ["nvfp4", "mxfp4", "nf4", "fp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "fp8_e5m2"]
SEARCH = ["int4-g128-mse", "int4-g32-asym-mse", "int3-g32-asym-mse", "int2-g32-asym-mse"]
SYMMETRIC = ["int8-row", "int8-tensor", "int3-g128", "int3-g32", "int2-g128", "ternary"]
FORMATS = CLIFF + BLOCKS + FLOATS + SEARCH + SYMMETRIC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=["smollm2-135m", "bpw-small"])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    arguments = parser.parse_args()
    for name in arguments.model or ["bpw-small", "smollm2-135m"]:
        run(name, arguments.tokens, arguments.fresh)


def run(name: str, tokens: int, fresh: bool) -> None:
    """Measure one model and write each row as soon as it is known."""
    model, tokenizer = qlib.load(name)
    full, short = protocols(tokenizer, tokens)
    board = read()
    same = board["protocol"].get(name) == str(full)
    done = [row["format"] for row in board["rows"] if row["model"] == name]
    todo = [format for format in FORMATS if fresh or not same or format not in done]
    if not todo:
        return
    references = Reference(model, full), Reference(model, short)
    for format in todo:
        row = measure(name, model, format, references)
        print(f"{name} {format}: {row.bits_per_weight:.3f} bpw, KL {row.kl:.4g}", flush=True)
        write(row, str(full))


def read() -> dict:
    """The board as it is, or an empty one."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"protocol": {}, "rows": []}


def write(row: Row, protocol: str) -> None:
    """Put one row on the board; rows of the same model under another protocol go."""
    board = read()
    stale = board["protocol"].get(row.model) != protocol
    kept = {
        (old["model"], old["format"]): old
        for old in board["rows"]
        if not (stale and old["model"] == row.model)
    }
    kept[row.model, row.format] = dataclasses.asdict(row)
    board = {
        "command": "tools/scoreboard.py",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), torch {torch.__version__.split('+')[0]}, float32",
        "protocol": board["protocol"] | {row.model: protocol},
        "rows": list(kept.values()),
    }
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(board, indent=1) + "\n")


if __name__ == "__main__":
    main()
