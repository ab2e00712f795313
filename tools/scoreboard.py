"""Measure the scoreboard: models x formats x methods, to book/results/.

    .venv/bin/python tools/scoreboard.py              # rows of every board that are not there yet
    .venv/bin/python tools/scoreboard.py --board methods --model bpw-small --fresh

The board "scoreboard" has every format, rounded to nearest; the board "methods" has a few formats
with every method. Rows are written as they are measured, so an interrupted run continues where it
stopped.
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
from qlib.scoreboard import Row, calibration, measure, protocols

RESULTS = Path(__file__).parents[1] / "book" / "results"
# Twelve thousand tokens a row; the board of methods, whose rows cost far more, has half of it.
TOKENS = {"scoreboard": 12_288, "methods": 6_144}

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
BOARDS = {
    "scoreboard": [(format, "rtn") for format in FORMATS],
    "methods": [
        (f"int{bits}-g{group}{zero}", method)
        for group in (128, 32)
        for method, zero in [*METHODS.items(), ("rtn", "-offset")]
        for bits in (4, 3, 2)
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--board", action="append", choices=BOARDS)
    parser.add_argument("--model", action="append", choices=["smollm2-135m", "bpw-small"])
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    arguments = parser.parse_args()
    for board in arguments.board or BOARDS:
        for name in arguments.model or ["bpw-small", "smollm2-135m"]:
            run(board, name, arguments.method or list(METHODS), arguments.fresh)


def run(board: str, name: str, methods: list[str], fresh: bool) -> None:
    """Measure one model and write each row as soon as it is known."""
    model, tokenizer = qlib.load(name)
    full, short = protocols(tokenizer, TOKENS[board])
    content = read(board)
    same = content["protocol"].get(name) == str(full)
    done = [(row["format"], row["method"]) for row in content["rows"] if row["model"] == name]
    todo = [row for row in BOARDS[board] if fresh or not same or row not in done]
    todo = [(format, method) for format, method in todo if method in methods]
    if not todo:
        return
    data = calibration(tokenizer)
    references = Reference(model, full), Reference(model, short)
    for format, method in todo:
        row = measure(name, model, format, references, method, data)
        bits, seconds = f"{row.bits_per_weight:.3f} bpw", f"{row.seconds:.0f} s"
        print(f"{name} {format} {method}: {bits}, KL {row.kl:.4g}, {seconds}", flush=True)
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
        (old["model"], old["format"], old["method"]): old
        for old in content["rows"]
        if not (stale and old["model"] == row.model)
    }
    kept[row.model, row.format, row.method] = dataclasses.asdict(row)
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
