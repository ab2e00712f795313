"""Measure the scoreboard: models x formats x methods, to book/results/.

    .venv/bin/python tools/scoreboard.py              # rows of every board that are not there yet
    .venv/bin/python tools/scoreboard.py --board methods --model bpw-small --fresh

The board "scoreboard" has every format, rounded to nearest; "methods" has a few formats with every
method; "activations" has quantized activations, rotations and caches. Rows are written as they are
measured, so an interrupted run continues where it stopped.
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
from qlib.scoreboard import Entry, Row, calibration, entry_of, measure, protocols

RESULTS = Path(__file__).parents[1] / "book" / "results"
# Twelve thousand tokens a row; less on the boards whose rows cost far more.
TOKENS = {"scoreboard": 12_288, "methods": 6_144, "activations": 4_096}

CLIFF = [f"int{bits}-g32-asym" for bits in (8, 6, 5, 4, 3, 2)]
BLOCKS = ["int4-tensor", "int4-row", "int4-g128", "int4-g64", "int4-g32", "int4-g128-asym"]
FLOATS = ["nvfp4", "mxfp4", "nf4", "fp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "fp8_e5m2"]
SEARCH = ["int4-g128-mse", "int4-g32-asym-mse", "int3-g32-asym-mse", "int2-g32-asym-mse"]
SYMMETRIC = ["int8-row", "int8-tensor", "int3-g128", "int3-g32", "int2-g128", "ternary"]
FORMATS = CLIFF + BLOCKS + FLOATS + SEARCH + SYMMETRIC

METHODS = {
    "rtn": "-asym",
    "gptq": "-asym",
    "gptq-act-order": "-asym",
    "awq": "-asym",
    "awq-clip": "-asym",
    "autoround-light": "-asym",
    # HQQ moves the offset, so it needs one that is stored as a real number.
    "hqq": "-offset",
}
TENSOR = {"activations": "int8-tensor"}
ROTATED = {"rotation": "quarot"}
ACTIVATIONS = [
    Entry("int8-row", **TENSOR),
    Entry("w8a8-static"),
    Entry("int8-row", "smoothquant", **TENSOR),
    Entry("int8-row", "smoothquant-search", **TENSOR),
    Entry("w8a8"),
    Entry("w8a8", "smoothquant"),
    Entry("w8a8", "smoothquant-search"),
    Entry("llm.int8"),
    Entry("w4a4"),
    Entry("w4a4", **ROTATED),
    Entry("w8a8", **ROTATED),
    Entry("fp8"),
    Entry("fp8-static"),
    Entry("w8a8-mxfp8"),
    Entry("w4a8"),
    Entry("w4a4", "gptq", **ROTATED),
    # Weights alone: what rotations do to them.
    Entry("int4-g128"),
    Entry("int4-row"),
    Entry("int4-row", **ROTATED),
    Entry("w4a4", "gptq"),
    Entry("w4a8", "gptq"),
    Entry("w4a4", "gptq", rotation="spinquant"),
    Entry("w4a4", "gptq", **ROTATED, cache="int4-hadamard"),
    Entry("w4a4-mxfp4"),
    Entry("w4a4-nvfp4"),
    Entry("w4a8", "gptq", **ROTATED),
    Entry("w4a4-nvfp4", "gptq", **ROTATED),
    Entry("w4a4-mxfp4", "gptq", **ROTATED),
    Entry("int4-row", "gptq"),
    Entry("int4-row", "gptq", **ROTATED),
]
BOARDS = {
    "scoreboard": [Entry(format) for format in FORMATS],
    "activations": ACTIVATIONS,
    "methods": [
        Entry(f"int{bits}-g{group}{zero}", method)
        for group in (128, 32)
        for method, zero in [*METHODS.items(), ("rtn", "-offset")]
        for bits in (4, 3, 2)
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--board", action="append", choices=BOARDS)
    parser.add_argument("--model", action="append", choices=["smollm2-135m", "bpw-small"])
    parser.add_argument("--method", action="append", help="only rows of this method")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    arguments = parser.parse_args()
    for board in arguments.board or BOARDS:
        for name in arguments.model or ["bpw-small", "smollm2-135m"]:
            run(board, name, arguments.method, arguments.fresh)


def run(board: str, name: str, methods: list[str] | None, fresh: bool) -> None:
    """Measure one model and write each row as soon as it is known."""
    model, tokenizer = qlib.load(name)
    full, short = protocols(tokenizer, TOKENS[board])
    content = read(board)
    same = content["protocol"].get(name) == str(full)
    done = [entry_of(row) for row in content["rows"] if row["model"] == name]
    todo = [entry for entry in BOARDS[board] if fresh or not same or entry not in done]
    todo = [entry for entry in todo if methods is None or entry.method in methods]
    if not todo:
        return
    data = calibration(tokenizer)
    references = Reference(model, full), Reference(model, short)
    for entry in todo:
        row = measure(name, model, entry, references, data)
        bits, seconds = f"{row.bits_per_weight:.3f} bpw", f"{row.seconds:.0f} s"
        print(f"{name} {entry}: {bits}, KL {row.kl:.4g}, {seconds}", flush=True)
        write(board, row, str(full), str(data))


def read(board: str) -> dict:
    """The board as it is, or an empty one."""
    path = RESULTS / f"{board}.json"
    return json.loads(path.read_text()) if path.is_file() else {"protocol": {}, "rows": []}


def write(board: str, row: Row, protocol: str, data: str) -> None:
    """Put one row on the board; rows of the same model under another protocol go."""
    content = read(board)
    stale = content["protocol"].get(row.model) != protocol
    kept = {
        (old["model"], entry_of(old)): old
        for old in content["rows"]
        if not (stale and old["model"] == row.model)
    }
    # The boards of weights alone name no activations, no rotation and no cache.
    found = {key: value for key, value in dataclasses.asdict(row).items() if value != ""}
    kept[row.model, entry_of(found)] = found
    content = {
        "command": "tools/scoreboard.py",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), torch {torch.__version__.split('+')[0]}, float32",
        "protocol": content["protocol"] | {row.model: protocol},
        "calibration": content.get("calibration", {}) | {row.model: data},
        "rows": list(kept.values()),
    }
    with replacing(RESULTS / f"{board}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
